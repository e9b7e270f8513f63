"""Whole runs of `main.py`: everything that was promised is there, and what must not matter does
not."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.scheduler.scheduler_factory import scheduler_kwargs
from torch import Tensor

import engine
from config.flags import get_args_parser
from tests.image_folders import make_image_folder
from tests.launches import run_ranks, torchrun
from tests.runs import (
    SMALL,
    differences,
    largest_difference,
    observing_steps,
    read_log,
    run_main,
    run_small,
    split,
    state_of,
    tensors_in,
    weights_of,
)
from training import optim

# The flags of a run whose steps draw nothing but the order of the images.
NOT_RANDOM = "--mixer none --drop-path 0 --reprob 0 --opt momentum --lr 1 --epochs 2 --no-model-ema"
SWITCHES = {
    "smmix": "--mixup-switch-prob 1",
    "mixup": "--mixup-switch-prob 0",
    "plain": "--mixup-prob 0",
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 classes x 8 images, to train and to evaluate on: 3 steps of 8."""
    return make_image_folder(
        tmp_path_factory.mktemp("photos"), ("ant", "bee", "cat"), per_class=8, size=(20, 20)
    )


# --------------------------------------------------------------------------------------- end to end


def scalars_of(folder: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    assert events.Tags()["images"] == ["mixing"]
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


@pytest.mark.slow
def test_two_processes_train_resume_and_evaluate(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = split(
        "--data-set DIGITS --model vit_nano_patch4_32 --input-size 16 --batch-size 128 "
        "--no-repeated-aug --aa none "
        "--lr 2e-3 --unscale-lr --warmup-epochs 0 --model-ema-decay 0.5 --num-workers 0 --device "
        "cpu --log-every 2",
        "--output-dir",
        folder,
    )
    code, said = torchrun(tmp_path, *words, "--epochs 1")
    assert code == 0, said
    assert "128 per process x 2 processes x 1 accumulated = 256" in said
    assert said.count("total batch") == 1  # one rank speaks
    more = "--epochs 2 --auto-resume --accept-changes epochs"
    code, said = torchrun(tmp_path, *words, more)
    assert code == 0, said
    assert f"resumed from {folder / 'checkpoints' / '0000000005.pth'}; next is epoch 1" in said

    lines = read_log(folder)
    assert [line["epoch"] for line in lines] == [0, 1]
    needed = {"epoch", "lr", "n_parameters", "train_images_per_second", "peak_memory_mb"}
    needed |= {
        "train_loss",
        "train_loss_cls",
        "train_loss_fine",
        "train_loss_con",
        "train_grad_norm",
    }
    needed |= {f"test_{kind}{name}" for kind in ("", "ema_") for name in ("acc1", "acc5", "loss")}
    for line in lines:
        assert needed <= line.keys()
        assert all(isinstance(line[name], (int, float)) for name in needed), line
        assert 0 <= line["test_acc1"] <= line["test_acc5"] <= 100
        total = line["train_loss_cls"] + line["train_loss_fine"] + line["train_loss_con"]
        assert line["train_loss"] <= total + 1e-6  # steps by Mixup have the first term only
    assert lines[1]["test_loss"] < lines[0]["test_loss"]
    assert lines[0]["lr"] == pytest.approx(2e-3)
    assert lines[0]["n_parameters"] == sum(
        p.numel()
        for p in timm.create_model("vit_nano_patch4_32", num_classes=10, img_size=16).parameters()
    )

    said = (folder / "train.log").read_text(encoding="utf-8")
    assert "total batch" in said
    assert re.search(
        r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d epoch 1 \[1/5\] .*loss ", said, flags=re.MULTILINE
    )
    scalars = scalars_of(folder)
    for name in needed - {"epoch"}:
        assert scalars[name] == pytest.approx(
            {line["epoch"]: line[name] for line in lines}, rel=1e-6
        ), name
    assert len(list((folder / "steps").glob("events*"))) == 2
    with Image.open(folder / "mixing.png") as image:
        assert min(image.size) > 32

    args = json.loads((folder / "args.json").read_text())
    assert (args["data_set"], args["amp"], args["input_size"]) == ("DIGITS", "none", [16, 16])
    assert (args["region_head"], args["consistency"], args["region_size"]) == (
        "shared",
        "probs",
        "floor",
    )
    versions = json.loads((folder / "environment.json").read_text())
    assert (
        versions["torch"] == torch.__version__.split("+")[0]
        or versions["torch"] == torch.__version__
    )
    assert {"python", "torchvision", "timm", "numpy", "pillow", "commit"} <= versions.keys()
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        assert (
            torch.load(folder / name, weights_only=True)["model"].keys()
            == timm.create_model("vit_nano_patch4_32").state_dict().keys()
        )
    assert not list(folder.glob("*.tmp"))

    evaluated = run_main("--eval --resume", folder / "checkpoint.pth")
    assert evaluated.code == 0, evaluated.err
    figures = [float(word) for word in re.findall(r"(?:top-1|top-5|loss) ([\d.]+)", evaluated.out)]
    wanted = [
        lines[1][f"test_{kind}{name}"] for kind in ("", "ema_") for name in ("acc1", "acc5", "loss")
    ]
    assert figures == pytest.approx(wanted, abs=1e-3)
    assert evaluated.out.count("on 360 images") == 2


@pytest.mark.slow
def test_python_and_torchrun_with_one_process_are_the_same(photos: Path, tmp_path: Path) -> None:
    words = split(SMALL, "--data-path", photos, "--output-dir")
    plain = run_main(*words, tmp_path / "python")
    assert plain.code == 0, plain.err
    code, said = torchrun(tmp_path, *words, tmp_path / "torchrun", processes=1)
    assert code == 0, said
    left, right = (
        tensors_in(
            {
                part: torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)[part]
                for part in parts
            }
        )
        for parts in [("model", "ema", "optimizer")]
        for name in ("python", "torchrun")
    )
    assert differences(left, right) == []


# ------------------------------------------------------------------------------- what the head says


def test_the_head_says_what_will_be_done(photos: Path) -> None:
    words = "--batch-size 4 --accum-steps 2 --epochs 1 --lr 0.001"
    run = run_small(words, "--data-path", photos)
    assert run.code == 0, run.err
    rows = dict(re.findall(r"^(\S+(?: \S+)*)  +(.*)$", run.out, flags=re.MULTILINE))
    assert rows["data"] == f"IMNET {photos}"
    assert rows["images"] == "24 to train on, 24 to evaluate on"
    assert rows["classes"] == "3"
    assert rows["input"] == "16 x 16 pixels, 4 x 4 tokens"
    assert rows["mixing"] == "smmix (paper) at 0.5, else Mixup"
    assert rows["total batch"] == "4 per process x 1 processes x 2 accumulated = 8"
    assert rows["steps"] == "3 per epoch, 3 in 1 epochs"
    assert rows["highest rate"] == "1.5625e-05 in this run, --sched cosine"
    assert rows["peak learning rate"] == "1.5625e-05 = 0.001 x 8 / 512"
    assert run.training.optimizer.param_groups[0]["lr"] == pytest.approx(1.5625e-5)
    for version in (
        f"torch {torch.__version__.split('+')[0]}",
        f"timm {timm.__version__}",
        f"numpy {np.__version__}",
    ):
        assert version in rows["versions"]
    assert "commit " in rows["versions"]
    assert "--model-ema-decay 0.99996 averages over 25000 steps, but this run has 3" in run.out
    assert (
        run_small("--unscale-lr --lr 0.25", "--data-path", photos).training.optimizer.param_groups[
            0
        ]["lr"]
        == 0.25
    )


def test_a_handful_of_images_will_do(tmp_path: Path) -> None:
    """Fewer to evaluate on than the picture shows, and a batch of one, which has no partner."""
    few = make_image_folder(tmp_path / "few", ("ant", "bee"), per_class=1, size=(20, 20))
    for batch_size in (1, 2):
        run = run_small(
            f"--batch-size {batch_size} --data-path",
            few,
            "--output-dir",
            tmp_path / str(batch_size),
        )
        assert run.code == 0, run.err
        assert ("so nothing is mixed" in run.out) == (batch_size == 1)
        assert (tmp_path / str(batch_size) / "mixing.png").exists()


def test_without_an_output_folder_nothing_is_written(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_small("--data-path", photos).code == 0
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------ repeatability


def test_seeds_and_workers(photos: Path) -> None:
    """Same seed, same weights, however many processes load; another seed, other weights."""
    words = split(
        "--aa rand-m9-mstd0.5-inc1 --repeated-aug --drop-path 0.2 --lr 0.1 --data-path", photos
    )
    first = state_of(run_small(*words, "--num-workers 0").training)
    assert differences(first, state_of(run_small(*words, "--num-workers 0").training)) == []
    assert differences(first, state_of(run_small(*words, "--num-workers 2").training)) == []
    other = run_small(*words, "--seed 1").training
    assert "/model/network.blocks.0.mlp.fc1.weight" in differences(first, state_of(other))


def test_micro_batches_add_up(photos: Path) -> None:
    """2 x 4 images are 1 x 8, where nothing in the step is random."""
    words = split(NOT_RANDOM, "--data-path", photos)
    joined = run_small(*words, "--batch-size 8").training
    parts = run_small(*words, "--batch-size 4 --accum-steps 2").training
    start = run_small(*words, "--batch-size 8 --lr 1e-30").training
    assert largest_difference(weights_of(joined), weights_of(start)) > 1e-3
    assert largest_difference(weights_of(joined), weights_of(parts)) < 1e-6


def test_a_total_batch_gives_the_same_weights_however_it_is_split(
    photos: Path, tmp_path: Path
) -> None:
    """1 x 8, 2 x 4 and 4 x 2 images of one process, and two processes with 1 x 4 and 2 x 2."""
    words = split(NOT_RANDOM, "--total-batch 8 --data-path", photos, "--output-dir")
    found = {}
    for processes, largest in ((1, 9), (1, 4), (1, 2), (2, 4), (2, 3)):
        folder = tmp_path / f"{processes}_{largest}"
        run_ranks(processes, tmp_path, *words, folder, f"--batch-size {largest}")
        log = (folder / "train.log").read_text(encoding="utf-8")
        factors = re.search(r"(\d+) per process x (\d+) processes x (\d+) accumulated = 8", log)
        assert factors is not None
        assert json.loads((folder / "args.json").read_text())["total_batch"] == 8
        state = torch.load(folder / "checkpoint.pth", weights_only=True)
        assert state["args"]["total_batch"] == 8
        found[tuple(map(int, factors.groups()))] = state["model"]
    assert list(found) == [(8, 1, 1), (4, 1, 2), (2, 1, 4), (4, 2, 1), (2, 2, 2)]
    whole = found.pop((8, 1, 1))
    for weights in found.values():
        torch.testing.assert_close(weights, whole, rtol=1e-5, atol=1e-6)


def test_the_average_is_the_one_by_hand(photos: Path) -> None:
    decay, seen = 0.7, list[dict[str, Tensor]]()
    with observing_steps(lambda training, step: seen.append(weights_of(training))):
        training = run_small(
            f"--model-ema-decay {decay} --lr 0.1 --epochs 2 --data-path", photos
        ).training
    start = weights_of(run_small("--lr 1e-30 --data-path", photos).training)
    assert len(seen) == 6
    average = {name: value.double() for name, value in start.items()}
    for weights in seen:
        average = {
            name: decay * value + (1 - decay) * weights[name].double()
            for name, value in average.items()
        }
    assert largest_difference(average, tensors_in(dict(training.ema.module.state_dict()))) < 1e-6
    assert largest_difference(average, seen[-1]) > 1e-4


# -------------------------------------------------------------------------------- what can be asked


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small convolutional teacher of 3 classes."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.manual_seed(3)
    torch.save({"model": timm.create_model("test_resnet", num_classes=3).state_dict()}, path)
    return path


@pytest.mark.parametrize("distillation", ["none", "soft", "hard"])
@pytest.mark.parametrize("loss", ["", "--bce-loss"])
@pytest.mark.parametrize("mixer", ["smmix", "smmix --variant released", "cutmix", "mixup", "none"])
def test_every_combination_trains(
    photos: Path, teacher: Path, mixer: str, loss: str, distillation: str
) -> None:
    words = split(
        f"--model deit_runs_distilled_patch4_16 --batch-size 12 --mixer {mixer} {loss}",
        "--data-path",
        photos,
    )
    if distillation != "none":
        words += split(
            f"--distillation-type {distillation} --teacher-model test_resnet --teacher-path",
            teacher,
        )
    steps: list[dict[str, Tensor]] = []
    with observing_steps(
        lambda training, step: steps.append(training.nonfinite.records[-1].values)
    ):
        for smoothing in ("0", "0.1") if not loss else ("0",):
            run = run_small(*words, f"--smoothing {smoothing}")
            assert run.code == 0, run.err
    assert len(steps) == (2 if loss else 4)
    assert all(bool(value.isfinite()) for terms in steps for value in terms.values())
    assert all(("distill" in terms) == (distillation != "none") for terms in steps)


@pytest.mark.parametrize("variant", ["paper", "released", "released --no-train-mode"])
@pytest.mark.parametrize("kind", SWITCHES)
def test_every_parameter_learns_on_every_kind_of_step(
    photos: Path, kind: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle: list[str] = []
    real: Callable[[engine.Training], Tensor] = engine.update_weights

    def look(training: engine.Training) -> Tensor:
        named = list(training.module.named_parameters())
        idle.extend(name for name, parameter in named if parameter.grad is None)
        idle.extend(
            name
            for name, parameter in named
            if parameter.grad is not None
            and not parameter.grad.any()
            and (kind == "smmix" or "token_head" not in name)
        )
        return real(training)

    monkeypatch.setattr(engine, "update_weights", look)
    run = run_small(f"--variant {variant} {SWITCHES[kind]} --drop-path 0 --data-path", photos)
    assert run.code == 0, run.err
    assert (run.training.module.token_head is not None) == ("released" in variant)
    assert idle == []


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_lower_precisions_train_on_a_cpu(photos: Path, tmp_path: Path, amp: str) -> None:
    run = run_small(
        f"--amp {amp} --lr 0.01 --epochs 2 --data-path", photos, "--output-dir", tmp_path
    )
    assert all(tensor.isfinite().all() for tensor in weights_of(run.training).values())
    assert all(
        np.isfinite(line["train_loss"]) and np.isfinite(line["test_loss"])
        for line in read_log(tmp_path)
    )
    assert f"{amp} autocast" in run.out
    start = run_small("--lr 1e-30 --data-path", photos).training
    assert largest_difference(weights_of(run.training), weights_of(start)) > 1e-4


def test_images_need_not_be_square(photos: Path, tmp_path: Path) -> None:
    run = run_small("--input-size 16 24 --data-path", photos, "--output-dir", tmp_path)
    assert run.training.module.grid_size == (4, 6)
    assert "16 x 24 pixels, 4 x 6 tokens" in run.out
    evaluated = run_main("--device cpu --eval --resume", tmp_path / "checkpoint.pth")
    assert f"top-1 {read_log(tmp_path)[0]['test_acc1']:.3f} %" in evaluated.out


@pytest.mark.parametrize("mixer", ["smmix --variant released", "cutmix", "mixup", "none"])
def test_evaluation_needs_no_other_flag(photos: Path, tmp_path: Path, mixer: str) -> None:
    """Whatever a run was given is taken from its checkpoint, and none of it is held against the
    command line."""
    assert run_small(f"--mixer {mixer} --data-path", photos, "--output-dir", tmp_path).code == 0
    assert (tmp_path / "mixing.png").exists() == (mixer != "none")
    evaluated = run_main("--eval --resume", tmp_path / "checkpoint.pth")
    assert evaluated.code == 0, evaluated.err
    assert f"top-1 {read_log(tmp_path)[0]['test_acc1']:.3f} %" in evaluated.out


def test_weights_of_another_project_are_evaluated(photos: Path, tmp_path: Path) -> None:
    """DeiT's file, with its flags inside: they describe another run, and the model is the one on
    the command line."""
    torch.manual_seed(4)
    model = timm.create_model("vit_nano_patch4_32", num_classes=3, img_size=16)
    flags = argparse.Namespace(
        model="deit_base_patch16_224", data_path="/far/away", batch_size=3, smoothing=0.1, lr=1
    )
    torch.save({"model": model.state_dict(), "args": flags, "epoch": 299}, tmp_path / "deit.pth")
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    said = []
    for name in ("deit.pth", "timm.pth"):
        words = split(
            "--model vit_nano_patch4_32 --input-size 16 --device cpu --num-workers 0 --data-path",
            photos,
        )
        run = run_main(*words, "--eval --resume", tmp_path / name)
        assert run.code == 0, run.err
        assert "on 24 images" in run.out
        said.append(run.out.split(": ", 1)[1])
    assert said[0] == said[1]


@pytest.mark.parametrize(
    "flag", ["--model vit_mini_patch4_32", "--input-size 24", "--variant released"]
)
def test_evaluation_does_not_ignore_what_is_written(
    photos: Path, tmp_path: Path, flag: str
) -> None:
    """The checkpoint says what the model is; a flag that says otherwise cannot be followed."""
    assert run_small("--data-path", photos, "--output-dir", tmp_path).code == 0
    evaluated = run_main("--device cpu --eval --resume", tmp_path / "checkpoint.pth", flag)
    assert evaluated.code == 2, evaluated.out
    assert flag.split()[0] in evaluated.err


def test_a_student_with_a_teacher_is_evaluated_without_it(
    photos: Path, teacher: Path, tmp_path: Path
) -> None:
    student = split(
        "--model deit_runs_distilled_patch4_16 --distillation-type hard --teacher-model test_resnet"
    )
    own = Path(shutil.copy(teacher, tmp_path / "teacher.pth"))
    run = run_small(
        *student, "--teacher-path", own, "--data-path", photos, "--output-dir", tmp_path / "run"
    )
    assert run.code == 0, run.err
    own.unlink()
    evaluated = run_main("--eval --resume", tmp_path / "run" / "checkpoint.pth")
    assert evaluated.code == 0, evaluated.err
    assert f"top-1 {read_log(tmp_path / 'run')[0]['test_acc1']:.3f} %" in evaluated.out


def test_train_mode_decides_about_drop_path(photos: Path, tmp_path: Path) -> None:
    """A fine-tune drops paths as any training does, unless it is told to train in evaluation mode
    (as DeiT can)."""
    assert run_small("--data-path", photos, "--output-dir", tmp_path).code == 0
    words = split("--lr 0.1 --data-path", photos, "--finetune", tmp_path / "checkpoint.pth")

    def trained(flags: str) -> dict[str, Tensor]:
        return weights_of(run_small(*words, flags).training)

    assert differences(
        trained("--train-mode --drop-path 0"), trained("--train-mode --drop-path 0.9")
    )
    assert not differences(
        trained("--no-train-mode --drop-path 0"), trained("--no-train-mode --drop-path 0.9")
    )


def test_a_compiled_run_trains_alike(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    words = split(
        "--model deit_runs_distilled_patch4_16 --batch-size 12 --drop-path 0 --mixup-switch-prob 1 "
        "--lr 0.01"
    )
    compiled = run_small(*words, "--compile --data-path", photos, "--output-dir", tmp_path).training
    assert (tmp_path / "mixing.png").exists()
    assert len(graphs) == 2  # step and motivating pass, and none for the images of the picture
    plain = run_small(*words, "--data-path", photos).training
    assert hasattr(compiled.model, "_orig_mod")
    assert largest_difference(weights_of(compiled), weights_of(plain)) < 1e-3
    assert compiled.module.state_dict().keys() == plain.module.state_dict().keys()


# ----------------------------------------------------------------------------------------- schedule


def rates(line: str) -> list[float]:
    """The learning rate of each epoch, stepped as `main.py` steps it."""
    args = get_args_parser().parse_args(line.split())
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    schedule = optim.Schedule(optimizer, scheduler_kwargs(args), steps=7)
    seen = []
    for epoch in range(args.epochs):
        seen.append(float(optimizer.param_groups[0]["lr"]))
        schedule.after_update(epoch)  # which a schedule by epoch does not listen to
        schedule.after_epoch(epoch)
    return seen


def test_the_learning_rate_is_deits() -> None:
    """Five epochs up from 1e-6, then a cosine, each epoch at the rate of the one before, as DeiT's
    loop gives it."""
    seen = rates("--lr 1e-3")  # a peak of 1e-3: 5e-4 for a total batch of 1024
    wanted = {0: 1e-6, 1: 1e-6, 2: 2.008e-4, 5: 8.002e-4, 6: 9.993e-4, 150: 5.10e-4, 299: 1.011e-5}
    assert {epoch: seen[epoch] for epoch in wanted} == pytest.approx(wanted, rel=2e-3)
    by_hand = [
        1e-6 + t * (1e-3 - 1e-6) / 5
        if t < 5
        else 1e-5 + 0.99e-3 * (1 + np.cos(np.pi * t / 300)) / 2
        for t in (max(epoch - 1, 0) for epoch in range(300))
    ]
    assert seen == pytest.approx(by_hand, rel=1e-9)


def test_the_run_follows_the_schedule(photos: Path, tmp_path: Path) -> None:
    words = "--epochs 4 --warmup-epochs 2 --lr 1e-3 --unscale-lr"
    assert run_small(words, "--data-path", photos, "--output-dir", tmp_path).code == 0
    assert [line["lr"] for line in read_log(tmp_path)] == pytest.approx(rates(words), rel=1e-9)
