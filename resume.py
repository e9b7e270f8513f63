"""What the checkpoint of a run holds, and going on from one.

Plain data only; writing and checked reading are in `checkpoints.py`. Decides nothing about training.
"""

from __future__ import annotations

from collections.abc import Iterator
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


# Evaluation may be asked for elsewhere, on other images or in another precision; the rest makes the model what it is.
FREE_IN_EVALUATION = {
    "eval", "resume", "output_dir", "device", "amp", "seed", "num_workers", "pin_mem", "batch_size",
    "data_set", "data_path", "inat_category", "nb_classes", "eval_crop_ratio",
}  # fmt: skip
OF_ONE_CALL = {"eval", "resume", "output_dir", "device", "amp", "num_workers", "auto_resume", "finetune"}


def is_ours(checkpoint: dict[str, Any]) -> bool:
    """Whether `save` wrote it: then it says itself which model and which input it is for.

    Raises:
        InputError: it did, but in a form of another version, or the file has been altered.
    """
    if not {"format", "model_config", "data", "model", "ema", "args"} <= checkpoint.keys():
        return False
    if checkpoint["format"] != FORMAT:
        raise InputError(f"the checkpoint has format {checkpoint['format']}, this version reads format {FORMAT}")
    parts = [checkpoint["args"], checkpoint["model_config"], checkpoint["data"], checkpoint["model"]]
    if not all(isinstance(part, dict) and part for part in parts):
        raise InputError("the checkpoint's args, model_config, data or model is damaged: use another checkpoint")
    return True


def flags_for_evaluation(saved: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The flags of a run with those of an evaluation's command line over them.

    Raises:
        InputError: one that was given contradicts what the checkpoint is.
    """
    for name, value in given.items():
        if name not in FREE_IN_EVALUATION and not _same(saved.get(name), value):
            raise InputError(
                f"--{name.replace('_', '-')} {value}: --eval takes this from the checkpoint, which has "
                f"{saved.get(name)}; leave the flag out"
            )
    return {**{name: value for name, value in saved.items() if name not in OF_ONE_CALL}, **given}


def find(output_dir: str, given: str, automatic: bool) -> str:
    """The checkpoint to go on from: the one given, else with `automatic` the output folder's, else "".

    Raises:
        InputError: the output folder holds a run that would not be gone on with; none is ever overwritten.
    """
    there = Path(output_dir) / "checkpoint.pth" if output_dir else None
    if there is None or not there.exists():
        return given
    if given and Path(given).resolve().parent == there.resolve().parent:
        return given
    if given or not automatic:
        advice = "" if given else "add --auto-resume to go on with it, or "
        raise InputError(f"--output-dir {output_dir} already holds a run ({there.name}): {advice}choose another folder")
    return str(there)


def check_agreement(found: list[str], output_dir: str) -> None:
    """Refuses that some ranks go on with a run and others begin one. `found` is what `find` gave on each rank.

    Raises:
        InputError: they differ, as on machines that do not share the output folder.
    """
    if len(set(found)) > 1:
        without = [rank for rank, path in enumerate(found) if not path]
        raise InputError(
            f"--output-dir {output_dir}: ranks {without} do not see the checkpoint that others do; "
            "the folder must be on storage that all machines share"
        )


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


def load(path: str, training: Training, identity: Identity) -> tuple[Progress, list[str]]:
    """Puts a run back to where its checkpoint left it.

    State comes from the file, settings from this run: another `--lr` or `--weight-decay` holds from now on.

    Returns:
        How far it has come, and the flags that have changed since, as text.

    Raises:
        InputError: another model, other data, another optimizer, or a part that this run needs is missing; each named.
    """
    checkpoint, source = load_checkpoint(path), f"--resume {path}"
    needed = ["args", "model_config", "data", "model", "optimizer", "scaler", "epoch", "step", "best_acc1"]
    needed += ["ema"] if training.ema is not None else []
    if missing := [name for name in needed if checkpoint.get(name) is None]:
        raise InputError(f"{source}: holds no {', '.join(missing)}; to start a new run from its weights use --finetune")
    if not is_ours(checkpoint):
        raise InputError(f"{source}: was not written by this project's main.py; use --finetune")
    _check_same("model", checkpoint["model_config"], identity.model_config, source)
    _check_same("data", checkpoint["data"], identity.data, source)
    changes = list(_changes(checkpoint["args"], to_plain(identity.args)))
    if (old := checkpoint["args"].get("opt")) != (new := identity.args["opt"]):
        raise InputError(f"{source}: was trained with --opt {old}, whose state --opt {new} cannot go on with")
    load_strictly(training.module, own_keys(checkpoint["model"]), source=source)
    if training.ema is not None:
        load_strictly(training.ema.module, own_keys(checkpoint["ema"]), source=f"{source} (average)")
    own_groups = training.optimizer.state_dict()["param_groups"]
    try:
        training.optimizer.load_state_dict({**checkpoint["optimizer"], "param_groups": own_groups})
        if checkpoint["args"]["amp"] == identity.args["amp"]:  # a scale means something to its own precision only
            training.scaler.load_state_dict(checkpoint["scaler"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{source}: its optimizer state does not fit this run's: {error}") from error
    return Progress(checkpoint["epoch"] + 1, checkpoint["step"], checkpoint["best_acc1"]), changes


def _changes(saved: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    for name, value in wanted.items():
        if name not in OF_ONE_CALL | {"start_epoch", "log_every"} and not _same(saved.get(name), value):
            yield f"--{name.replace('_', '-')} {saved.get(name)} -> {value}"


def _check_same(what: str, saved: dict[str, Any], wanted: dict[str, Any], source: str) -> None:
    """Refuses to go on with another model or other data; regularisation (`drop`, `drop_path`) may change."""
    for name, value in to_plain(wanted).items():
        old = saved.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            _check_same(what, old, value, source)
        elif name not in ("drop", "drop_path") and not _same(old, value):
            raise InputError(f"{source}: its {what} has {name} {_short(old)}, this run has {_short(value)}")


def _same(one: Any, other: Any) -> bool:
    """Equality that takes tuples for lists and one side for a square."""
    as_list = [list(value) if isinstance(value, (list, tuple)) else value for value in (one, other)]
    if all(isinstance(value, list) and len(value) in (1, 2) for value in as_list):
        as_list = [value * 2 if len(value) == 1 else value for value in as_list]
    return bool(as_list[0] == as_list[1])


def _short(value: Any, limit: int = 80) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
