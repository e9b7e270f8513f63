"""Wrong input ends with a message that names it and the fix, exit code 2, no traceback. A failed
loss ends with 3."""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from losses import SMMixLoss
from tests.image_folders import make_image_folder
from tests.launches import torchrun
from tests.runs import (
    Outcome,
    differences,
    observing_steps,
    run_main,
    run_small,
    weights_of,
)

CLASSES = ("ant", "bee", "cat")


class Malicious:
    """Unpickled by anything but a restricted reader, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Everything that is good, and everything that is wrong with it."""
    root = tmp_path_factory.mktemp("files")

    def folder(name: str) -> Path:
        return make_image_folder(root / name, CLASSES, per_class=4, size=(20, 20))

    found = {
        name: folder(name)
        for name in ("photos", "no_val", "no_class", "empty_class", "other_classes")
    }
    shutil.rmtree(found["no_val"] / "val")
    shutil.rmtree(found["no_class"] / "train")
    (found["no_class"] / "train").mkdir()
    for image in (found["empty_class"] / "train" / "bee").iterdir():
        image.unlink()
    (found["other_classes"] / "val" / "cat").rename(found["other_classes"] / "val" / "dog")
    found["flat"] = found["photos"] / "train"
    found["few"] = make_image_folder(root / "few", CLASSES, per_class=1, size=(20, 20))
    for split in ("train", "val"):
        broken = found[f"{split}_corrupt"] = folder(f"{split}_corrupt")
        (broken / split / "bee" / "2.jpg").write_bytes(b"this is no image")
        broken = found[f"{split}_truncated"] = folder(f"{split}_truncated")
        content = (broken / split / "bee" / "2.jpg").read_bytes()
        (broken / split / "bee" / "2.jpg").write_bytes(content[: len(content) // 2])

    run = root / "run"
    made = run_small("--data-path", found["photos"], "--output-dir", run)
    assert made.code == 0, made.err
    checkpoint = found["run"] = run / "checkpoint.pth"
    found["run_folder"], found["text"] = run, root / "notes.pth"
    found["text"].write_text("not a checkpoint")
    content = checkpoint.read_bytes()
    found["truncated"] = root / "truncated.pth"
    found["truncated"].write_bytes(content[: len(content) // 2])
    found["list"], found["no_weights"], found["foreign"] = (
        root / "list.pth",
        root / "epoch.pth",
        root / "foreign.pth",
    )
    torch.save([1, 2], found["list"])
    torch.save({"epoch": 3}, found["no_weights"])
    weights = timm.create_model("vit_nano_patch4_32", num_classes=3, img_size=16).state_dict()
    torch.save(
        {"model": weights, "args": argparse.Namespace(model="other", lr=1.0)}, found["foreign"]
    )
    found["malicious"] = root / "malicious.pth"
    found["marker"] = root / "executed"
    torch.save({"model": Malicious(found["marker"])}, found["malicious"])
    for classes in (3, 4):
        found[f"teacher{classes}"] = root / f"teacher{classes}.pth"
        torch.save(
            timm.create_model("test_resnet", num_classes=classes).state_dict(),
            found[f"teacher{classes}"],
        )
    found["nowhere"] = root / "nowhere"
    return found


def refused(outcome: Outcome, fragments: list[str]) -> None:
    assert outcome.code == 2, outcome.out
    assert "Traceback" not in outcome.out + outcome.err
    for fragment in fragments:
        assert fragment in outcome.err
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("error: ") == 1


def fill(line: str, files: dict[str, Path]) -> list[str | Path]:
    """The words of a line; {name} is one of `files`."""
    return [Path(word.format(**files)) if "{" in word else word for word in line.split()]


# ------------------------------------------------------------------------ data, models, checkpoints

# (flags, fragments of the message); fragments may name `files` too.
WRONG_FILES = {
    "no folder": ("--data-path {nowhere}", ["--data-path {nowhere}", "no such folder"]),
    "no data path": ("--data-set IMNET", ["IMNET", "--data-path"]),
    "a file as folder": ("--data-path {text}", ["--data-path {text}", "train/"]),
    "no val": ("--data-path {no_val}", ["--data-path {no_val}", "val/", "missing"]),
    "classes without split": ("--data-path {flat}", ["{flat}", "train/", "ant", "move them"]),
    "no class folder": ("--data-path {no_class}", ["no_class", "no class folders"]),
    "empty class": ("--data-path {empty_class}", ["empty_class", "bee", "fill or remove"]),
    "other classes": (
        "--data-path {other_classes}",
        ["only in training: cat", "only in validation: dog"],
    ),
    "too few": ("--data-path {few}", ["--batch-size 8", "3 training images", "use at most 3"]),
    "too few for accumulation": (
        "--data-path {photos} --batch-size 4 --accum-steps 4",
        ["--batch-size 4", "12 training images", "4 batches", "use at most 3"],
    ),
    "unknown data set": (
        "--data-set IMAGENET --data-path {photos}",
        ["--data-set IMAGENET", "IMNET", "timm/<name>"],
    ),
    "unknown timm set": (
        "--data-set timm/nope/x --data-path {photos}",
        ["--data-set timm/nope/x", "timm/torch/"],
    ),
    "cifar": (
        "--data-set CIFAR10 --data-path {photos}",
        ["--data-path {photos}", "CIFAR10", "unpack"],
    ),
    "inat": ("--data-set INAT --data-path {photos}", ["train2018.json", "missing"]),
    "near miss": (
        "--model vit_nano_patch4_23",
        ["--model vit_nano_patch4_23", "did you mean", "vit_nano_patch4_32"],
    ),
    "far miss": ("--model qqqqqq", ["--model qqqqqq", "timm.list_models()"]),
    "convolutional": ("--model vgg11", ["--model vgg11", "attention"]),
    "unreadable attention": (
        "--model vit_pwee_patch16_reg1_gap_256 --input-size 32",
        ["--model vit_pwee_patch16_reg1_gap_256", "attention"],
    ),
    "differential attention": (
        "--model vit_dpwee_patch16_reg1_gap_256 --input-size 32",
        ["--model vit_dpwee_patch16_reg1_gap_256", "attention"],
    ),
    "indivisible": ("--input-size 18", ["--input-size 18 18", "patch size 4x4", "16 16"]),
    "indivisible side": ("--input-size 16 22", ["--input-size 16 22", "patch size 4x4", "16 20"]),
    "smaller than a patch": ("--input-size 3", ["--input-size 3", "patch size 4x4"]),
    "no patch": ("--patch-size 0", ["--patch-size 0"]),
    "negative patch": ("--patch-size -4", ["--patch-size -4"]),
    "one token": ("--input-size 4 16", ["--mixer smmix", "1 x 4 tokens", "--input-size"]),
    "resume nothing": ("--resume {nowhere}", ["there is no file {nowhere}"]),
    "resume a folder": ("--resume {run_folder}", ["is a folder", "checkpoint.pth"]),
    "resume truncated": ("--resume {truncated}", ["{truncated}", "truncated or corrupt"]),
    "resume text": ("--resume {text}", ["{text}", "corrupt"]),
    "resume a list": ("--resume {list}", ["{list}", "not the dict of a checkpoint"]),
    "resume foreign": ("--resume {foreign}", ["--resume {foreign}", "holds no", "--finetune"]),
    "resume malicious": ("--resume {malicious}", ["{malicious}", "mkdir", "nothing was executed"]),
    "resume URL": ("--resume http://host/a.pth", ["http://host/a.pth", "https"]),
    "eval nothing": ("--eval --resume {nowhere}", ["there is no file {nowhere}"]),
    "eval a folder": ("--eval --resume {run_folder}", ["is a folder"]),
    "eval truncated": ("--eval --resume {truncated}", ["{truncated}", "truncated or corrupt"]),
    "eval foreign": (
        "--eval --resume {foreign} --model vit_mini_patch4_32 --data-path {photos}",
        ["{foreign}", "does not fit"],
    ),
    "eval foreign classes": (
        "--eval --resume {foreign} --data-set DIGITS",
        ["{foreign}", "head.weight"],
    ),
    "eval without weights": (
        "--eval --resume {no_weights} --data-path {photos}",
        ["no weights", "epoch"],
    ),
    "eval malicious": ("--eval --resume {malicious}", ["{malicious}", "nothing was executed"]),
    "eval other data": ("--eval --resume {run} --data-set DIGITS", ["same classes"]),
    "finetune nothing": ("--finetune {nowhere}", ["there is no file {nowhere}"]),
    "finetune malicious": ("--finetune {malicious}", ["{malicious}", "nothing was executed"]),
    "finetune without weights": ("--finetune {no_weights}", ["no weights", "epoch"]),
    "output is a file": ("--output-dir {text}", ["{text}", "cannot write"]),
    "output in a file": ("--output-dir {text}/run", ["{text}", "cannot write"]),
    "optimizer": ("--opt nope", ["--opt nope"]),
    "betas": ("--opt-betas 2 3", ["--opt-betas", "below 1"]),
    "one beta": ("--opt-betas 0.9", ["--opt"]),
    "schedule": ("--sched nope", ["--sched nope"]),
    "plateau": ("--sched plateau", ["--sched plateau", "cosine"]),
    "aa": ("--aa rnad-m9", ["--aa rnad-m9", "rand-m9-mstd0.5-inc1"]),
    "interpolation": ("--train-interpolation cubic", ["--train-interpolation cubic", "bicubic"]),
    "remode": ("--remode nope", ["--remode nope", "pixel"]),
    "student": (
        "--distillation-type hard --teacher-model test_resnet --teacher-path {teacher3}",
        [
            "--distillation-type",
            "vit_nano_patch4_32",
            "no distillation token",
            "deit_tiny_distilled",
        ],
    ),
}

TEACHER = "--model deit_runs_distilled_patch4_16 --distillation-type soft"
WRONG_TEACHERS = {
    "name": (
        "--teacher-model test_resnt --teacher-path {teacher3}",
        ["--teacher-model test_resnt", "test_resnet"],
    ),
    "no file": (
        "--teacher-model test_resnet --teacher-path {nowhere}",
        ["there is no file {nowhere}"],
    ),
    "classes": (
        "--teacher-model test_resnet --teacher-path {teacher4}",
        ["--teacher-path {teacher4}", "4 classes"],
    ),
    "network": (
        "--teacher-model test_resnet --teacher-path {foreign}",
        ["--teacher-path {foreign}", "does not fit"],
    ),
    "malicious": (
        "--teacher-model test_resnet --teacher-path {malicious}",
        ["{malicious}", "nothing was executed"],
    ),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_files_and_names(case: str, files: dict[str, Path]) -> None:
    line, fragments = WRONG_FILES[case]
    data: list[str | Path] = (
        [] if "--data" in line or "--eval" in line else ["--data-path", files["photos"]]
    )
    outcome = run_small(*data, *fill(line, files))
    refused(outcome, [fragment.format(**files) for fragment in fragments])
    assert not files["marker"].exists()


def test_a_convolutional_network_is_refused_for_its_attention_at_any_size(
    files: dict[str, Path],
) -> None:
    """Without --input-size it is built before it is refused."""
    outcome = run_main(
        "--model test_efficientnet --device cpu --num-workers 0 --data-path", files["photos"]
    )
    refused(
        outcome, ["--model test_efficientnet", "attention", "VisionTransformer", "--list-models"]
    )


@pytest.mark.parametrize("case", WRONG_TEACHERS)
def test_wrong_teachers(case: str, files: dict[str, Path]) -> None:
    line, fragments = WRONG_TEACHERS[case]
    outcome = run_small(TEACHER, "--data-path", files["photos"], *fill(line, files))
    refused(outcome, [fragment.format(**files) for fragment in fragments])
    assert not files["marker"].exists()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["corrupt", "truncated"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_broken_image_is_named(
    split: str, damage: str, workers: int, files: dict[str, Path]
) -> None:
    folder = files[f"{split}_{damage}"]
    words: list[str | Path] = [f"--num-workers {workers}", "--data-path", folder]
    named = [
        str(folder / split / "bee" / "2.jpg"),
        "cannot be read as an image",
        "replace the file or remove it",
    ]
    refused(run_small("--batch-size 12", *words), named)
    if split == "val":
        refused(run_main("--eval --device cpu --resume", files["run"], *words), named)


def test_a_broken_image_ends_a_run_without_harm(files: dict[str, Path], tmp_path: Path) -> None:
    """Met in evaluation, after an epoch's work: no checkpoint of that epoch, and no half a file."""
    folder = tmp_path / "photos"
    shutil.copytree(files["photos"], folder)
    for number in range(4, 40):  # so many that the picture's samples miss it
        shutil.copy(folder / "val" / "cat" / "0.jpg", folder / "val" / "cat" / f"{number}.jpg")
    (folder / "val" / "cat" / "39.jpg").write_bytes(b"this is no image")
    outcome = run_small("--data-path", folder, "--output-dir", tmp_path / "run")
    refused(outcome, [str(folder / "val" / "cat" / "39.jpg")])
    assert not list((tmp_path / "run").rglob("*.pth*"))


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_folder_without_permission(files: dict[str, Path], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    refused(
        run_small("--data-path", files["photos"], "--output-dir", tmp_path / "run"),
        [str(tmp_path / "run")],
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(files: dict[str, Path]) -> None:
    refused(
        run_small("--device cuda --data-path", files["photos"]), ["--device cuda", "--device auto"]
    )


# ------------------------------------------------------------------------------ flags by themselves

WRONG_FLAGS = {
    "--lr -1": ["--lr -1.0", "above 0"],
    "--lr nan": ["--lr nan", "finite"],
    "--lr inf": ["--lr inf"],
    "--weight-decay nan": ["--weight-decay nan"],
    "--warmup-lr inf": ["--warmup-lr inf"],
    "--mixup inf": ["--mixup inf"],
    "--mixer cutmix --mixup 0 --cutmix inf": ["--cutmix inf"],
    "--opt-eps inf": ["--opt-eps inf"],
    "--weight-decay inf": ["--weight-decay inf"],
    "--min-lr -1": ["--min-lr -1.0", "not be negative"],
    "--opt momentum --momentum nan": ["--momentum nan"],
    "--warmup-epochs -1": ["--warmup-epochs -1"],
    "--epochs 0": ["--epochs 0", "above 0"],
    "--batch-size 0": ["--batch-size 0", "above 0"],
    "--batch-size many": ["--batch-size", "many"],
    "--accum-steps 0": ["--accum-steps 0", "above 0"],
    "--num-workers -1": ["--num-workers -1"],
    "--log-every 0": ["--log-every 0", "above 0"],
    "--start-epoch -1": ["--start-epoch -1"],
    "--smoothing 2": ["--smoothing 2.0", "between 0 and 1"],
    "--smoothing nan": ["--smoothing nan"],
    "--drop-path -0.1": ["--drop-path -0.1", "between 0 and 1"],
    "--drop 1.5": ["--drop 1.5", "between 0 and 1"],
    "--reprob 2": ["--reprob 2.0", "between 0 and 1"],
    "--recount 0": ["--recount 0", "above 0"],
    "--color-jitter -1 --aa none": ["--color-jitter -1"],
    "--mixup -1": ["--mixup -1.0", "not be negative"],
    "--mixup nan": ["--mixup nan"],
    "--mixup-prob 2": ["--mixup-prob 2.0", "between 0 and 1"],
    "--model-ema-decay 1.1": ["--model-ema-decay 1.1", "between 0 and 1"],
    "--side-ratio 0.75 0.25": ["--side-ratio", "0.75", "lower first"],
    "--side-ratio 0 2": ["--side-ratio", "lower first"],
    "--side-ratio 0.5": ["--side-ratio", "2 arguments"],
    "--side-ratio nan nan": ["--side-ratio", "nan"],
    "--mixer cutmix --cutmix-minmax 0.8 0.2": ["--cutmix-minmax", "lower first"],
    "--clip-grad 0": ["--clip-grad 0.0", "leave it out"],
    "--clip-grad nan": ["--clip-grad nan"],
    "--eval-crop-ratio 2": ["--eval-crop-ratio 2.0", "between 0 and 1"],
    "--eval-crop-ratio 0": ["--eval-crop-ratio 0.0"],
    "--layer-decay 0": ["--layer-decay 0.0", "above 0"],
    "--layer-decay 1.5": ["--layer-decay 1.5", "between 0 and 1"],
    "--input-size 16 16 16": ["--input-size", "height and width"],
    "--input-size 0": ["--input-size", "pixels"],
    "--input-size -16": ["--input-size", "pixels"],
    "--repeats 0": ["--repeats 0", "above 0"],
    "--opt-eps 0": ["--opt-eps 0.0", "above 0"],
    "--distillation-tau 0": ["--distillation-tau 0.0", "above 0"],
    "--distillation-alpha 2": ["--distillation-alpha 2.0", "between 0 and 1"],
    "--sched step --decay-epochs 0": ["--decay-epochs 0"],
    "--decay-milestones 3 2": ["--decay-milestones 3 2", "ascending"],
    "--decay-milestones 0": ["--decay-milestones 0", "above 0"],
    "--mixer puzzlemix": ["--mixer", "puzzlemix", "smmix"],
    "--variant other": ["--variant", "other", "released"],
    "--amp fp32": ["--amp", "fp32", "bf16"],
    "--nope 1": ["--nope", "(--help lists all flags)"],
    "--warmup_epoch=5": ["--warmup-epoch=5; did you mean --warmup-epochs?"],
    "--no-modelema --batchsize 3": ["did you mean --no-model-ema and --batch-size?"],
    # two flags that contradict each other
    "--mixer mixup --mixup 0": ["--mixup 0", "--mixer none"],
    "--mixer cutmix --cutmix 0": ["--cutmix 0.0", "--mixer cutmix", "--cutmix-minmax"],
    "--cutmix-minmax 0.2 0.8": ["--cutmix-minmax", "(for cutmix or transmix)"],
    "--mixer cutmix --variant released": ["--variant released", "--mixer cutmix", "smmix"],
    "--mixer none --region-head separate": ["--region-head", "--mixer none", "smmix"],
    "--mixer mixup --consistency logits --region-size floor": [
        "--consistency logits (for smmix, or",
        "--region-size floor",
    ],
    "--eval": ["--eval needs --resume"],
    "--resume a --finetune b": ["--resume", "--finetune", "one of them"],
    "--auto-resume": ["--auto-resume needs --output-dir"],
    "--distillation-type hard": ["--distillation-type hard needs --teacher-path"],
    "--teacher-path a": ["--teacher-path would be ignored", "--distillation-type"],
    "--start-epoch 2 --epochs 2": ["--start-epoch 2", "--epochs 2"],
    "--bce-loss": ["--bce-loss", "--smoothing 0.1", "add --smoothing 0"],
    "--nb-classes 5": ["--nb-classes", "timm/<name>"],
    "--data-set CIFAR --nb-classes 5": ["--nb-classes", "timm/<name>"],
}


@pytest.mark.parametrize("line", WRONG_FLAGS)
def test_wrong_flags(line: str, files: dict[str, Path]) -> None:
    refused(run_small("--data-path", files["photos"], line), WRONG_FLAGS[line])


@pytest.mark.parametrize(("rank", "told"), [("0", 1), ("1", 0)])
def test_each_machine_says_what_is_wrong_with_its_command(
    rank: str, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert run_small("--nope").err.count("error: ") == told


def test_values_are_refused_before_any_work(tmp_path: Path) -> None:
    begun = time.perf_counter()
    refused(
        run_small("--output-dir", tmp_path / "run", "--data-path nowhere --smoothing 2"),
        ["--smoothing 2.0"],
    )
    assert time.perf_counter() - begun < 2
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------ several ranks


@pytest.mark.slow
def test_ranks_agree_on_an_error_and_none_waits(files: dict[str, Path], tmp_path: Path) -> None:
    """What all ranks meet is said once; what one rank meets, a broken image, ends them all."""
    words = (
        "--model vit_nano_patch4_32 --input-size 16 --batch-size 2 --no-repeated-aug "
        "--num-workers 0 --device cpu"
    )
    for path, wanted in (
        (files["other_classes"], "only in training: cat"),
        (files["train_corrupt"], "2.jpg: cannot be"),
    ):
        code, said = torchrun(tmp_path, words, "--data-path", path, seconds=60)
        assert code != 0
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, said
        assert wanted in lines[0]
        assert 'main.py", line' not in said  # the launcher's own traceback is the only one


# ------------------------------------------------------------------------ a loss that is not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_failed_loss_stops_before_the_update(
    value: float, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted in the second epoch: exit code 3, the step, its terms and its images; weights and
    files stay."""
    calls, seen, images = [0], list[dict[str, Tensor]](), list[list[int]]()
    real = SMMixLoss.__call__

    def planted(loss: SMMixLoss, output: Any, batch: Any) -> dict[str, Tensor]:
        calls[0] += 1
        terms = real(loss, output, batch)
        if calls[0] == 4:
            terms = {**terms, "cls": terms["cls"] * value, "total": terms["total"] * value}
        return terms

    def see(training: Any, step: int) -> None:
        seen.append(weights_of(training))
        images.append(training.nonfinite.records[-1].indices.tolist())

    monkeypatch.setattr(SMMixLoss, "__call__", planted)
    words: list[str | Path] = [
        "--batch-size 4 --epochs 3 --lr 0.1 --max-bad-steps 1 --log-every 1 --data-path",
        files["photos"],
    ]
    with observing_steps(see):
        outcome = run_small(*words, "--output-dir", tmp_path)
    assert outcome.code == 3
    assert "Traceback" not in outcome.err
    for fragment in (
        "step 3",
        f"cls {value:g}",
        f"total {value:g}",
        f"images {images[3]}",
        "rank 0",
        "--clip-grad 1.0",
    ):
        assert fragment in outcome.err
    assert len(seen) == 4
    assert differences(seen[1], seen[2])
    assert differences(seen[2], seen[3]) == []
    assert all(tensor.isfinite().all() for tensor in seen[3].values())
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert checkpoint["epoch"] == 0
    assert all(
        torch.equal(seen[2][f"/network.{name}"], value)
        for name, value in checkpoint["model"].items()
    )
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 1


def test_a_readable_picture_of_any_kind_is_no_error(tmp_path: Path) -> None:
    """Grey, palette and transparent images among the photos are turned to RGB."""
    folder = make_image_folder(tmp_path, CLASSES, per_class=4, size=(20, 20))
    for number, mode in enumerate(("L", "P", "RGBA")):
        Image.new(mode, (20, 20), 7).save(folder / "train" / "ant" / f"extra{number}.png")
    run = run_small("--batch-size 15 --data-path", folder)
    assert run.code == 0, run.err
