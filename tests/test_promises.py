"""What `main.py` promises of a run that is disturbed, on one process: the run that was not, bit for
bit.

Several processes are in `test_elastic.py` and `test_watch.py`, random disturbances in
`test_chaos.py`.
"""

from __future__ import annotations

import shutil
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import timm
import torch

import engine
from mixers.registry import METHODS
from run import folder as run_folder
from run import state as run_state
from run.log import RunLog
from tests.image_folders import damage, make_image_folder
from tests.launches import read_status
from tests.runs import (
    Killed,
    Outcome,
    changed,
    digest,
    fingerprint,
    killed_after,
    observing_steps,
    read_log,
    run_small,
)

# Everything that draws or carries state. An epoch has six steps, and checkpoints are at 4, 6, 8 and
# 12.
WORDS = (
    "--aa rand-m9-mstd0.5-inc1 --repeated-aug --drop 0.1 --drop-path 0.2 --batch-size 4 --epochs 2 "
    "--warmup-epochs 1 "
    "--lr 0.1 --sched-on-updates --model-ema-decay 0.9 --save-steps 4 --log-every 1 --auto-resume"
)
Disturbance = Callable[[], AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(
        tmp_path_factory.mktemp("photos"), ("ant", "bee", "cat"), per_class=8, size=(20, 20)
    )


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a run that nobody disturbs comes to."""
    folder = tmp_path_factory.mktemp("whole")
    return run_to_the_end(photos, folder)


@pytest.fixture(scope="module")
def interrupted(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed after step 9, of which 8 were saved. Copy it before
    anything writes there."""
    folder = tmp_path_factory.mktemp("interrupted")
    disturb(photos, folder, [lambda: killed_after(9)])
    return folder


def run(photos: Path, folder: Path, *flags: str) -> Outcome:
    return run_small(WORDS, "--data-path", photos, "--output-dir", folder, *flags)


def run_to_the_end(photos: Path, folder: Path, *flags: str) -> dict[str, str]:
    done = run(photos, folder, *flags)
    assert done.code == 0, done.err
    assert read_status(folder)["state"] == "done"
    return fingerprint(folder)


def disturb(photos: Path, folder: Path, disturbances: list[Disturbance], *flags: str) -> None:
    """The same command once for each; a kill ends it, a polite stop lets it end."""
    for disturbance in disturbances:
        try:
            with disturbance():
                run(photos, folder, *flags)
        except Killed:
            continue
        assert read_status(folder)["state"] == "preempted"


# ------------------------------------------------------------------------- where a run may be ended


@contextmanager
def killed_at(owner: object, name: str, call: int = 0, before: bool = True) -> Iterator[None]:
    """Killed before or after a function's call of this number."""
    real, calls = getattr(owner, name), []

    def die(*args: Any, **more: Any) -> Any:
        calls.append(name)
        if before and len(calls) == call + 1:
            raise Killed
        result = real(*args, **more)
        if len(calls) == call + 1:
            raise Killed
        return result

    with patch.object(owner, name, die):
        yield


@contextmanager
def stopped_in(step: int) -> Iterator[None]:
    """A polite stop in the middle of a step."""

    def ask(training: engine.Training, done: int) -> None:
        if done == step:
            signal.raise_signal(signal.SIGTERM)

    with observing_steps(ask):
        yield


@contextmanager
def stopped_in_evaluation() -> Iterator[None]:
    real = engine.evaluate

    def ask(*args: Any) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        return real(*args)

    with patch.object(engine, "evaluate", ask):
        yield


ENDINGS: dict[str, list[Disturbance]] = {
    "in the middle of an epoch": [lambda: killed_after(9)],
    "before anything is saved": [lambda: killed_after(2)],
    "right after a save": [lambda: killed_at(run_state, "save", 2, before=False)],
    "twice in one epoch": [lambda: killed_after(5), lambda: killed_after(5)],
    "in two epochs": [lambda: killed_after(4), lambda: killed_after(7), lambda: killed_after(10)],
    "in the evaluation": [lambda: killed_at(engine, "evaluate", 1)],
    "with the epoch's line not written": [lambda: killed_at(RunLog, "epoch")],
    "with the epoch's line written and nothing saved": [
        lambda: killed_at(RunLog, "epoch", before=False)
    ],
    "with the epoch saved but not named": [lambda: killed_at(run_folder, "_link_as")],
    "with the epoch saved but not named the best": [lambda: killed_at(run_folder, "_link_as", 1)],
    "with the last epoch saved but not named": [lambda: killed_at(run_folder, "_link_as", 2)],
    "politely": [lambda: stopped_in(2), lambda: stopped_in(4), lambda: stopped_in(9)],
    "politely on the last step of an epoch": [lambda: stopped_in(5)],
    "politely on the last step": [lambda: stopped_in(11)],
    "politely in the evaluation": [stopped_in_evaluation, stopped_in_evaluation],
}


@pytest.mark.parametrize("where", ENDINGS)
def test_p1_p2_p16_wherever_a_run_is_ended_it_goes_on_exactly(
    where: str, photos: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    """Checkpoints, `log.txt` and the scalars of every step."""
    disturb(photos, tmp_path, ENDINGS[where])
    assert changed(whole, run_to_the_end(photos, tmp_path)) == []


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("teacher") / "weights.pth"
    torch.manual_seed(3)
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), path)
    return f"test_resnet={path}"


RECIPES = {
    # what a method draws in an epoch it draws in each
    **{name: f"--mixer {name} --epochs 1" for name in METHODS},
    "no average, other workers": "--no-model-ema",
    "accumulation": "--batch-size 2 --accum-steps 2",
    "fp16": "--amp fp16 --opt momentum --clip-grad 1 --layer-decay 0.5",
    "by epoch, with noise": "--no-sched-on-updates --lr-noise 0.1 0.9",
    "released": "--variant released",
    "batches shared with Mixup": "--mix-protocol split --con-warmup-epochs 2",
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_p1_whatever_the_recipe(recipe: str, photos: Path, teacher: str, tmp_path: Path) -> None:
    flags = [RECIPES[recipe], f"--attentive-teacher {teacher}" if recipe == "attentivemix" else ""]
    wanted = run_to_the_end(photos, tmp_path / "whole", *flags)
    last_step = 4 if "--epochs 1" in flags[0] else 9  # of which 4 and 8 are saved
    disturb(photos, tmp_path / "parts", [lambda: killed_after(last_step)], *flags)
    assert changed(wanted, run_to_the_end(photos, tmp_path / "parts", *flags)) == []


def test_p3_whoever_loads(photos: Path, whole: dict[str, str], tmp_path: Path) -> None:
    for workers, ending in (("2", killed_after(2)), ("3", killed_after(5)), ("0", killed_after(8))):
        disturb(photos, tmp_path, [lambda ending=ending: ending], f"--num-workers {workers}")  # type: ignore[misc]
    assert changed(whole, run_to_the_end(photos, tmp_path, "--num-workers 2")) == []


# ------------------------------------------------------- controls: what is left out must be noticed


def without_state(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer"]["state"] = {}


def put(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: checkpoint.update(values)


def put_weights_into_average(checkpoint: dict[str, Any]) -> None:
    checkpoint["ema"] = checkpoint["model"]


MODEL, LOG = "checkpoint.pth model", "log.txt"
STEPS, EPOCHS = "scalars of steps", "scalars of epochs"  # TensorBoard's
LEFT_OUT: dict[str, tuple[Callable[[dict[str, Any]], None], list[str], list[str]]] = {
    # a piece -> how it is lost, what differs then, and what must not
    "nothing": (put(), [], [MODEL, LOG, STEPS, EPOCHS]),
    "the optimizer": (
        without_state,
        [MODEL, "checkpoint.pth optimizer", LOG],
        ["checkpoint.pth step"],
    ),
    "the average": (
        put_weights_into_average,
        ["checkpoint.pth ema", LOG],
        [MODEL, "checkpoint.pth optimizer"],
    ),
    "the place in the epoch": (put(samples_in_epoch=0), [MODEL, LOG, "checkpoint.pth step"], []),
    "the epoch": (put(epoch=-1), [MODEL, LOG], []),
    "the number of steps": (put(step=0), [MODEL, LOG, STEPS, EPOCHS], []),
    "the sums of the log": (put(meters=[]), [LOG, EPOCHS], [MODEL, "checkpoint.pth ema"]),
    "the first rate": (put(first_rate=None), [LOG], [MODEL, "checkpoint.pth ema"]),
    "the best": (put(best_acc1=101.0), ["checkpoint.pth best_acc1"], [MODEL, LOG]),
    "the count of updates left out": (put(skipped_steps=3.0), [LOG], [MODEL]),
}


@pytest.mark.parametrize("piece", LEFT_OUT)
def test_controls_a_piece_that_is_lost_is_noticed(
    piece: str, photos: Path, whole: dict[str, str], interrupted: Path, tmp_path: Path
) -> None:
    lose, differs, stays = LEFT_OUT[piece]
    folder = Path(shutil.copytree(interrupted, tmp_path / "run"))
    path = run_state.find(str(folder), "", True)[0]
    checkpoint = torch.load(path, weights_only=True)
    assert (checkpoint["step"], checkpoint["epoch"], checkpoint["samples_in_epoch"]) == (8, 0, 8)
    lose(checkpoint)
    torch.save(checkpoint, path)
    found = changed(whole, run_to_the_end(photos, folder))
    assert set(differs) <= set(found)
    assert not set(stays) & set(found)


def test_controls_a_lost_loss_scale_is_noticed(photos: Path, tmp_path: Path) -> None:
    """The first updates of an fp16 run overflow, and the scale falls; one that starts anew
    overflows again."""
    wanted = run_to_the_end(photos, tmp_path / "whole", "--amp fp16")
    assert wanted["checkpoint.pth scaler"] != digest(torch.amp.GradScaler("cpu").state_dict())
    disturb(photos, tmp_path / "parts", [lambda: killed_after(9)], "--amp fp16")
    with patch.object(torch.amp.GradScaler, "load_state_dict", lambda self, state: None):
        found = changed(wanted, run_to_the_end(photos, tmp_path / "parts", "--amp fp16"))
    assert {"checkpoint.pth scaler", MODEL, LOG} <= set(found)


# ------------------------------------------------------------------- what is gone on from, and with


def flip_a_bit(path: Path) -> None:
    """In the middle of the largest tensor; between tensors there is padding, which nobody reads."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    lengths = struct.unpack_from(
        "<HH", content, largest.header_offset + 26
    )  # of the name, and of what follows it
    content[largest.header_offset + 30 + sum(lengths) + largest.file_size // 2] ^= 4
    path.write_bytes(content)


def plant_a_nan(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["ema"]["norm.weight"][0] = float("nan")
    torch.save(checkpoint, path)


@pytest.mark.parametrize(
    ("spoil", "words"), [(flip_a_bit, "corrupt"), (plant_a_nan, "ema.norm.weight is not finite")]
)
def test_p5_p12_a_checkpoint_that_is_spoiled_is_passed_over(
    spoil: Callable[[Path], None],
    words: str,
    photos: Path,
    whole: dict[str, str],
    interrupted: Path,
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(interrupted, tmp_path / "run"))
    newest, before = run_folder.candidates(folder)[:2]
    spoil(newest)
    content = newest.read_bytes()
    said = run(photos, folder).out
    (passed_over,) = (line for line in said.splitlines() if line.startswith("warning: skipped: "))
    assert words in passed_over
    assert str(newest) in passed_over
    assert f"resumed from {before}" in said
    assert changed(whole, fingerprint(folder)) == []
    assert newest.with_name(f"{newest.name}.aside").read_bytes() == content
    for path in run_folder.candidates(folder):
        assert run_state.read(str(path))["step"] == (
            12 if path.name == "checkpoint.pth" else int(path.stem)
        )


def test_p5_nothing_but_damage_is_said_and_left(
    photos: Path, interrupted: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(interrupted, tmp_path / "run"))
    for path in run_folder.candidates(folder):
        flip_a_bit(path)
    content = {path: path.read_bytes() for path in run_folder.candidates(folder)}
    outcome = run(photos, folder)
    assert outcome.code == 2
    assert "the run cannot be resumed from any checkpoint in it" in outcome.err
    assert all(str(path) in outcome.err for path in content)
    assert {path: path.read_bytes() for path in run_folder.candidates(folder)} == content


@pytest.mark.parametrize(
    "schedule",
    [
        "--sched-on-updates",
        "--no-sched-on-updates",
        "--sched tanh --lr-noise 0.1 0.9 --layer-decay 0.5",
    ],
)
def test_p7_the_rate_of_every_update_is_the_same(
    schedule: str, photos: Path, tmp_path: Path
) -> None:
    noted: list[str] = []
    real = engine.update_weights

    def note(training: engine.Training) -> Any:
        noted.append(
            " ".join(float(group["lr"]).hex() for group in training.optimizer.param_groups)
        )
        return real(training)

    flags = f"{schedule} --epochs 3 --aa none --mixer none --no-model-ema --log-every 9"
    with patch.object(engine, "update_weights", note):
        run_to_the_end(photos, tmp_path / "whole", flags)
        expected, noted[:] = list(noted), []
        disturb(
            photos, tmp_path / "parts", [lambda: killed_after(9), lambda: killed_after(17)], flags
        )
        run_to_the_end(photos, tmp_path / "parts", flags)
    assert noted == [*expected[:10], *expected[8:18], *expected[16:]]  # 8 and 16 were saved
    assert len(set(expected)) > 1


CHANGES = {
    "--epochs 3": "epochs",
    "--lr 0.2": "lr",
    "--weight-decay 0.1": "weight-decay",
    "--seed 1": "seed",
    "--reprob 0.1": "reprob",
    "--batch-size 2": "batch-size",
}


@pytest.mark.parametrize("flag", CHANGES)
def test_p7_another_recipe_is_refused_by_name_or_accepted_by_name(
    flag: str, photos: Path, interrupted: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(interrupted, tmp_path / "run"))
    kept = {path: path.read_bytes() for path in run_folder.candidates(folder)}
    refused = run(photos, folder, flag)
    assert refused.code == 2, refused.out
    assert CHANGES[flag] in refused.err
    assert f"--accept-changes {CHANGES[flag]}" in refused.err
    status = read_status(folder)
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert {path: path.read_bytes() for path in run_folder.candidates(folder)} == kept
    if flag in ("--lr 0.2", "--seed 1"):  # the others are alike; epochs are in `test_resume.py`
        run_to_the_end(photos, folder, flag, f"--accept-changes {CHANGES[flag]}")


def test_p7_other_images_are_refused(photos: Path, interrupted: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(interrupted, tmp_path / "run"))
    more = Path(shutil.copytree(photos, tmp_path / "more"))
    shutil.copy(more / "train" / "ant" / "0.jpg", more / "train" / "ant" / "new.jpg")
    refused = run(more, folder, "--accept-changes all")
    assert refused.code == 2
    assert "its data has num_images 24, this run has 25" in refused.err


def test_p7_another_total_batch_begins_at_a_whole_step(
    photos: Path, interrupted: Path, tmp_path: Path
) -> None:
    """Eight images of the epoch are done: no whole number of steps of twelve, which would end in a
    part of one."""
    folder = Path(shutil.copytree(interrupted, tmp_path / "run"))
    refused = run(photos, folder, "--batch-size 12 --accept-changes batch-size")
    assert refused.code == 2, refused.out
    assert (
        "8 images of the current epoch are done, which is no whole number of steps of 12"
        in refused.err
    )
    run_to_the_end(photos, folder, "--batch-size 4 --accum-steps 2 --accept-changes batch-size")


def test_p11_images_that_cannot_be_read_are_counted_once(photos: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(photos, tmp_path / "broken"))
    names = [damage(broken / "train" / "bee" / f"{number}.jpg") for number in (1, 4)]
    flags = "--skip-corrupt --save-steps 1 --no-repeated-aug"
    wanted = run_to_the_end(broken, tmp_path / "whole", flags)
    assert wanted["checkpoint.pth bad_images"] == digest([9, 12])
    disturb(broken, tmp_path / "parts", [lambda: killed_after(3), lambda: killed_after(7)], flags)
    assert changed(wanted, run_to_the_end(broken, tmp_path / "parts", flags)) == []
    said = (tmp_path / "parts" / "train.log").read_text(encoding="utf-8")
    assert [said.count(str(name)) for name in names] == [1, 1]


def test_p12_weights_that_are_not_finite_are_never_written(photos: Path, tmp_path: Path) -> None:
    def spoil(training: engine.Training, step: int) -> None:
        if step == 6:
            training.ema.module.network.norm.weight.data[0] = float("nan")

    with observing_steps(spoil):
        outcome = run(photos, tmp_path)
    assert outcome.code == 3
    assert "ema.norm.weight is not finite" in outcome.err
    assert [int(path.stem) for path in run_folder.candidates(tmp_path)[:-1]] == [6, 4]
    status = read_status(tmp_path)
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    assert "not finite" in status["error"]


def test_p16_each_epoch_has_one_line(photos: Path, tmp_path: Path) -> None:
    for ending in (
        killed_at(RunLog, "epoch", before=False),
        killed_after(6),
        killed_at(RunLog, "epoch", before=False),
    ):
        disturb(photos, tmp_path, [lambda ending=ending: ending])  # type: ignore[misc]
    run_to_the_end(photos, tmp_path)
    assert [line["epoch"] for line in read_log(tmp_path)] == [0, 1]
    with open(tmp_path / "log.txt", encoding="utf-8") as log:
        assert len(log.readlines()) == 2
