"""What the checkpoint of a run holds, and going on from one.

Plain data only; writing and checked reading are in `checkpoints.py`. Decides nothing about training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import FORMAT, load_checkpoint, load_strictly, save_checkpoint, to_plain
from engine import Training
from models.build import own_keys, plain_weights
from utils import InputError


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 0  # number of the next epoch
    step: int = 0  # number of the next optimizer step
    best_acc1: float = 0.0  # percent


@dataclass(frozen=True)
class Identity:
    """What a run is, as opposed to how far it has come.

    Args:
        args: the resolved flags.
        model_config: keywords of `models.build.build_model`.
        data: `class_names` and `image_spec` (see `transforms.ImageSpec`): all that evaluation needs to know.
        versions: of the libraries, and the commit.
    """

    args: dict[str, Any]
    model_config: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str]


def is_ours(checkpoint: dict[str, Any]) -> bool:
    """Whether `save` wrote it: then it says itself which model and which input it is for."""
    return {"format", "model_config", "data", "model", "ema"} <= checkpoint.keys()


def find(output_dir: str, given: str, automatic: bool) -> str:
    """The checkpoint to go on from: the one given, else with `automatic` the output folder's, else "".

    Raises:
        InputError: the output folder holds a run that would not be gone on with; none is ever overwritten.
    """
    there = Path(output_dir) / "checkpoint.pth" if output_dir else None
    if given or there is None or not there.exists():
        return given
    if not automatic:
        raise InputError(
            f"--output-dir {output_dir} already holds a run ({there.name}): add --auto-resume to go on with it, "
            "or choose another folder"
        )
    return str(there)


def save(folder: Path, training: Training, progress: Progress, identity: Identity, is_best: bool) -> None:
    """Writes `checkpoint.pth`, and `best_checkpoint.pth` if the last epoch was the best so far. For rank 0 alone."""
    state = {
        "format": FORMAT,
        **vars(identity),
        "model": plain_weights(training.module),
        "ema": None if training.ema is None else plain_weights(training.ema.module),
        "optimizer": training.optimizer.state_dict(),
        "scaler": training.scaler.state_dict(),
        "epoch": progress.epoch - 1,
        "step": progress.step,
        "best_acc1": progress.best_acc1,
    }
    save_checkpoint(folder / "checkpoint.pth", state)
    if is_best:
        save_checkpoint(folder / "best_checkpoint.pth", state)


def load(path: str, training: Training, identity: Identity) -> Progress:
    """Puts a run back to where its checkpoint left it.

    Raises:
        InputError: another model, other data, or a part that this run needs is missing; each named.
    """
    checkpoint, source = load_checkpoint(path), f"--resume {path}"
    needed = ["model_config", "data", "model", "optimizer", "scaler", "epoch", "step", "best_acc1"]
    needed += ["ema"] if training.ema is not None else []
    if missing := [name for name in needed if checkpoint.get(name) is None]:
        raise InputError(f"{source}: holds no {', '.join(missing)}; to start a new run from its weights use --finetune")
    _check_same("model", checkpoint["model_config"], identity.model_config, source)
    _check_same("data", checkpoint["data"], identity.data, source)
    load_strictly(training.module, own_keys(checkpoint["model"]), source=source)
    if training.ema is not None:
        load_strictly(training.ema.module, own_keys(checkpoint["ema"]), source=f"{source} (average)")
    try:
        training.optimizer.load_state_dict(checkpoint["optimizer"])
        training.scaler.load_state_dict(checkpoint["scaler"])
    except (ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{source}: its optimizer state does not fit this run's --opt or --amp: {error}") from error
    return Progress(checkpoint["epoch"] + 1, checkpoint["step"], checkpoint["best_acc1"])


def _check_same(what: str, saved: dict[str, Any], wanted: dict[str, Any], source: str) -> None:
    """Refuses to go on with another model or other data; regularisation (`drop`, `drop_path`) may change."""
    for name, value in to_plain(wanted).items():
        old = saved.get(name)
        if name not in ("drop", "drop_path") and _listed(old) != _listed(value):
            raise InputError(f"{source}: its {what} has {name} {_short(old)}, this run has {_short(value)}")


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _short(value: Any, limit: int = 80) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
