"""Running `main.py` from tests: in this process where one is enough, under torchrun where several
are the point."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from timm.models import register_model
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor

import engine
import main
from errors import run_command

ROOT = Path(__file__).resolve().parent.parent

# A second's work with a small image folder. Later flags win, so that a test can override any of
# these.
SMALL = (
    "--model vit_nano_patch4_32 --input-size 16 --batch-size 8 --no-repeated-aug --aa none "
    "--epochs 1 "
    "--warmup-epochs 0 --num-workers 0 --device cpu"
)


@register_model
def deit_runs_distilled_patch4_16(
    pretrained: bool = False, **kwargs: Any
) -> VisionTransformerDistilled:
    """The smallest student with a distillation token."""
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(name, None)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return VisionTransformerDistilled(**{**settings, **kwargs})


class Outcome(NamedTuple):
    """What a command line came to. `trainings` are the objects behind it, to look at what was
    trained."""

    code: int
    out: str
    err: str
    trainings: list[engine.Training]

    @property
    def training(self) -> engine.Training:
        assert self.code == 0, self.err
        (only,) = self.trainings
        return only


def split(*words: str | Path) -> list[str]:
    """Texts are split at white space, paths are kept whole."""
    return [
        part for word in words for part in ([str(word)] if isinstance(word, Path) else word.split())
    ]


def run_main(*words: str | Path) -> Outcome:
    """`main.py` with `words` in this process, as its last two lines run it."""
    trainings: list[engine.Training] = []
    begin = engine.Training.__post_init__

    def remember(training: engine.Training) -> None:
        begin(training)
        trainings.append(training)

    argv, out, err = split(*words), io.StringIO(), io.StringIO()
    keep = patch.object(engine.Training, "__post_init__", remember)
    with keep, redirect_stdout(out), redirect_stderr(err):
        try:
            code = run_command(lambda: main.main(argv))
        except SystemExit as leaving:  # the parser's way out
            code = int(leaving.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue(), trainings)


def run_small(*words: str | Path) -> Outcome:
    return run_main(SMALL, *words)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of `log.txt`."""
    return [
        json.loads(line) for line in (folder / "log.txt").read_text(encoding="utf-8").splitlines()
    ]


# ---------------------------------------------------------------------------------------- comparing


def tensors_in(value: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor and number in a nest of dicts and lists, by its path."""
    if isinstance(value, Tensor):
        return {name: value.detach().clone()}
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {
            key: leaf
            for at, item in items
            for key, leaf in tensors_in(item, f"{name}/{at}").items()
        }
    return {name: torch.tensor(float(value))} if isinstance(value, (int, float)) else {}


CLOCKS = ("train_images_per_second", "train_data_wait", "data_wait", "peak_memory_mb")


def without_clocks(folder: Path) -> list[dict[str, Any]]:
    """The lines of `log.txt` but for what depends on the machine."""
    return [
        {name: value for name, value in line.items() if name not in CLOCKS}
        for line in read_log(folder)
    ]


def scalars_in(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's scalars of one of its runs, but for clocks, as it would show them.

    A file hides what those before it have from its step on. Read by hand, because TensorBoard
    orders the files of one second by name.
    """
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    files = [list(LegacyEventFileLoader(str(path)).Load()) for path in folder.glob("events*")]
    shown: dict[str, list[tuple[int, float]]] = {}
    for event in (
        event for file in sorted(files, key=lambda file: file[0].wall_time) for event in file
    ):
        if event.HasField("session_log"):
            shown = {
                tag: [one for one in values if one[0] < event.step] for tag, values in shown.items()
            }
        for value in (
            value
            for value in event.summary.value
            if value.HasField("simple_value") and value.tag not in CLOCKS
        ):
            shown.setdefault(value.tag, []).append((event.step, value.simple_value))
    return shown


PARTS = (
    "model",
    "ema",
    "optimizer",
    "scaler",
    "epoch",
    "step",
    "samples_in_epoch",
    "best_acc1",
    "first_rate",
    "meters",
    "skipped_steps",
    "bad_images",
)


def digest(value: Any) -> str:
    """SHA-256 of a nest of dicts, lists, tensors and numbers, every bit of it."""
    summed = hashlib.sha256()
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        summed.update(
            f"{plain.dtype} {tuple(plain.shape)}".encode()
            + plain.reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    elif isinstance(value, dict):
        summed.update(
            repr(sorted((repr(key), digest(item)) for key, item in value.items())).encode()
        )
    elif isinstance(value, (list, tuple)):
        summed.update(repr([digest(item) for item in value]).encode())
    else:
        summed.update(repr(value).encode())
    return summed.hexdigest()


def fingerprint(folder: Path, scalars: bool = True) -> dict[str, str]:
    """The SHA-256 of everything that a finished run leaves: its checkpoints by parts, its log, its
    scalars."""
    found = {}
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        state = torch.load(folder / name, weights_only=True)
        found.update({f"{name} {part}": digest(state[part]) for part in PARTS})
    found["log.txt"] = digest(without_clocks(folder))
    for name, place in {"steps": folder / "steps", "epochs": folder}.items() if scalars else ():
        found[f"scalars of {name}"] = digest(scalars_in(place))
    return found


def changed(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names of the parts in which two fingerprints differ."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def state_of(training: engine.Training) -> dict[str, Tensor]:
    """All that a run carries from step to step: weights, average, optimizer, loss scale."""
    parts = {
        "model": training.module.state_dict(),
        "ema": {} if training.ema is None else training.ema.module.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "scaler": training.scaler.state_dict(),
    }
    return tensors_in(parts)


def weights_of(training: engine.Training) -> dict[str, Tensor]:
    return tensors_in(dict(training.module.state_dict()))


def differences(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """Names whose values are not equal bit for bit."""
    names = left.keys() | right.keys()
    return sorted(
        n for n in names if n not in left or n not in right or not torch.equal(left[n], right[n])
    )


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


# ----------------------------------------------------------------------------------------- meddling


class Killed(BaseException):
    """Stands for the end of a process in the middle of a step."""


@contextmanager
def observing_steps(see: Callable[[engine.Training, int], None]) -> Iterator[None]:
    """Calls `see` with the training and the step's number after each optimizer step."""
    real = engine.train_step

    def step_and_see(training: engine.Training, micro_batches: Any, step: int, meters: Any) -> None:
        real(training, micro_batches, step, meters)
        see(training, step)

    with patch.object(engine, "train_step", step_and_see):
        yield


@contextmanager
def killed_after(last_step: int) -> Iterator[None]:
    """The run inside is killed when it has done step `last_step`."""

    def kill(training: engine.Training, step: int) -> None:
        if step == last_step:
            raise Killed

    with observing_steps(kill):
        yield


def spoil_loss(training: engine.Training) -> None:
    """From now on its loss is not a number."""
    good = training.criterion

    def spoiled(output: Any, batch: Any) -> Any:
        terms = good(output, batch)
        return {**terms, "total": terms["total"] * float("nan")}

    training.criterion = spoiled
