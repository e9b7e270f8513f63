"""What the checkpoint of a run holds, and going on from one.

Plain data only; writing and checked reading are in `storage/checkpoints.py`. Decides nothing about
training.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine import Training
from models.weights import load_strictly, plain_weights, to_model_keys
from run.folder import RunFolder, candidates
from run.saved_flags import accepts, check_settings, same_value, short
from storage.checkpoints import FORMAT, ReadCheckpoint, load_checkpoint
from storage.files import to_plain
from training.meters import Meters
from training.nonfinite import NonFiniteLoss
from training.optim import load_optimizer
from utils import InputError, Processes, StopRun


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 0  # number of the epoch that comes next, or is under way
    step: int = 0  # number of the next optimizer step
    samples: int = 0  # images of all ranks that are done in this epoch
    best_acc1: float = 0.0  # percent
    first_rate: float | None = None  # learning rate at the beginning of this epoch
    meters: Meters = field(default_factory=Meters)  # of this rank, over this epoch
    bad_images: list[int] = field(default_factory=list)  # those replaced so far, on any rank


@dataclass(frozen=True)
class Identity:
    """What a run is, as opposed to how far it has come.

    Args:
        args: the resolved flags.
        model_config: keywords of `models.build.build_model`.
        data: `class_names` and `image_spec` (see `pipeline.spec.ImageSpec`), all that evaluation
            needs to know, and the training images' number and `pipeline.images.Images.fingerprint`.
        versions: of the libraries, and the commit.
        asked: `batch_size` and `accum_steps` of the command line, from which `args` has what this
            world size makes of them.
    """

    args: dict[str, Any]
    model_config: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str]
    asked: dict[str, int] = field(default_factory=dict)


def is_own_checkpoint(checkpoint: dict[str, Any]) -> bool:
    """Whether `save` wrote it: then it says itself which model and which input it is for.

    Raises:
        InputError: it did, but in a form of another version, or the file has been altered.
    """
    if not {"format", "model_config", "data", "model", "ema", "args"} <= checkpoint.keys():
        return False
    if checkpoint["format"] != FORMAT:
        raise InputError(
            f"the checkpoint has format {checkpoint['format']}, this version reads format {FORMAT}"
        )
    parts = [
        checkpoint["args"],
        checkpoint["model_config"],
        checkpoint["data"],
        checkpoint["model"],
    ]
    if not all(isinstance(part, dict) and part for part in parts):
        raise InputError(
            "the checkpoint's args, model_config, data or model is damaged: use another checkpoint"
        )
    return True


def find(
    output_dir: str, given: str, automatic: bool, read: ReadCheckpoint = load_checkpoint
) -> tuple[str, list[str]]:
    """The checkpoint to go on from: with `automatic` the output folder's newest sound one, else the
    one given, or "".

    Returns:
        Its path, and what is to be said of others: newer ones that are damaged, one that was given.

    Raises:
        InputError: the output folder holds a run that would not be gone on with, or nothing but
            damaged checkpoints; none is ever overwritten.
    """
    there = candidates(Path(output_dir)) if output_dir else []
    is_own = bool(given) and Path(output_dir).resolve() in Path(given).resolve().parents
    if not there or (is_own and not automatic):
        return given, []
    if not automatic:
        advice = "" if given else "add --auto-resume to go on with it, or "
        raise InputError(
            f"--output-dir {output_dir} already holds a run ({there[0]}): {advice}choose another "
            "folder"
        )
    notes: list[str] = []
    for path in there:
        try:
            checkpoint = read(path)
            _check_finite({name: checkpoint.get(name) or {} for name in ("model", "ema")})
            if given and Path(given).resolve() != path.resolve():
                notes.append(
                    f"--auto-resume goes on with {path}; --resume {given} is for an empty "
                    "--output-dir"
                )
            return str(path), notes
        except StopRun as error:
            named = error.text if str(path) in error.text else f"{path}: {error.text}"
            notes.append(f"passed over: {named}")
    raise InputError(
        f"--output-dir {output_dir}: no checkpoint in it can be gone on from\n  "
        + "\n  ".join(notes)
    )


def check_all_see(path: str, processes: Processes) -> None:
    """Refuses that some ranks go on with a run and others cannot see it; all ranks call it.

    Raises:
        InputError: the file is not there for all, as on machines that do not share the output
            folder.
    """
    there = processes.gather(not path or os.path.exists(path))
    without = [rank for rank, seen in enumerate(there) if not seen]
    if without and any(there):  # a name that is wrong for all is refused by who reads it
        raise InputError(
            f"{path}: ranks {without} do not see this checkpoint; it must be on storage that all "
            "machines share"
        )


def save(
    folder: RunFolder | None,
    training: Training,
    progress: Progress,
    identity: Identity,
    names: tuple[str, ...] = (),
) -> None:
    """Writes a checkpoint, and lets `names` stand for it. All ranks call it; the one with a folder
    writes.

    Raises:
        NonFiniteLoss: a weight is not finite; nothing was written.
    """
    weights = {"model": plain_weights(training.module)}
    weights["ema"] = {} if training.ema is None else plain_weights(training.ema.module)
    _check_finite(weights)
    sums = training.processes.gather(progress.meters.state())
    if folder is None:
        return
    state = {
        "format": FORMAT,
        **vars(identity),
        "model": weights["model"],
        "ema": weights["ema"] or None,
        "optimizer": training.optimizer.state_dict(),
        "scaler": training.scaler.state_dict(),
        "epoch": progress.epoch - 1,
        "samples_in_epoch": progress.samples,
        "step": progress.step,
        "best_acc1": progress.best_acc1,
        "first_rate": progress.first_rate,
        "meters": sums,
        "skipped_steps": float(training.nonfinite.skipped),
        "bad_images": progress.bad_images,
        "world_size": training.processes.world_size,
        "names": list(names),
    }
    folder.save(state, progress.step, names)


def _check_finite(weights: Mapping[str, Any]) -> None:
    for part, tensors in weights.items():
        for name, value in tensors.items():
            if (
                isinstance(value, torch.Tensor)
                and value.is_floating_point()
                and not value.isfinite().all()
            ):
                raise NonFiniteLoss(
                    f"{part}.{name} is not finite: such weights are neither written nor gone on "
                    "from"
                )


def read(path: str, read_file: ReadCheckpoint = load_checkpoint) -> dict[str, Any]:
    """A checkpoint that a run can be gone on from.

    Raises:
        InputError: it is not one, or a part is missing.
    """
    checkpoint = read_file(path)
    needed = [
        "args",
        "model_config",
        "data",
        "model",
        "optimizer",
        "scaler",
        "epoch",
        "step",
        "best_acc1",
    ]
    needed += (
        ["ema"] if "ema" not in checkpoint else []
    )  # there, but empty, where a run keeps no average
    if missing := [name for name in needed if checkpoint.get(name) is None]:
        raise InputError(
            f"--resume {path}: holds no {', '.join(missing)}; to start a new run from its weights "
            "use --finetune"
        )
    if not is_own_checkpoint(checkpoint):
        raise InputError(
            f"--resume {path}: was not written by this project's main.py; use --finetune"
        )
    if not {"batch_size", "accum_steps", "amp", "opt"} <= checkpoint["args"].keys():
        raise InputError(
            f"--resume {path}: the checkpoint's args are damaged: use another checkpoint"
        )
    try:
        _check_finite({name: checkpoint[name] or {} for name in ("model", "ema")})
    except NonFiniteLoss as error:
        raise InputError(f"--resume {path}: {error.text}; use another checkpoint") from error
    return checkpoint


def keep_total_batch(
    checkpoint: Mapping[str, Any], flags: dict[str, int], world_size: int, accepted: Collection[str]
) -> dict[str, int]:
    """The `batch_size` and `accum_steps` with which this number of processes takes the same steps
    as the run before.

    Args:
        flags: both, as they are.
        accepted: flags that may differ, or `all`.

    Returns:
        Both, or nothing where the flags do that as they are.

    Raises:
        InputError: the flags ask for another total batch, or the processes cannot share the old
            one, or what is done of the epoch is no whole number of steps of an accepted one.
    """
    saved, old_size = checkpoint["args"], checkpoint.get("world_size", world_size)
    asked = checkpoint.get("asked") or saved
    total, wanted_total = (
        part["batch_size"] * part["accum_steps"] * size
        for part, size in ((saved, old_size), (flags, world_size))
    )
    if wanted_total == total:
        return {}
    if accepts(accepted, "batch_size"):
        if (done := checkpoint.get("samples_in_epoch", 0)) % wanted_total:
            raise InputError(
                f"{done} images of an epoch are done, no whole number of steps of {wanted_total}: "
                "go on with a total "
                f"batch of {total} to the end of the epoch, and change it then"
            )
        return {}
    same = all(value == asked[name] for name, value in flags.items())
    share, rest = divmod(total, world_size)
    if not same or rest:
        wanted = (
            "--batch-size x --accum-steps x processes"
            if not same
            else f"{world_size} processes cannot share it:"
        )
        raise InputError(
            f"the run was begun with a total batch of {total}; {wanted} must give that again "
            "(or add --accept-changes batch-size, at the end of an epoch)"
        )
    accum = next(
        n for n in range(1, share + 1) if share % n == 0 and share // n <= asked["batch_size"]
    )
    return {"batch_size": share // accum, "accum_steps": accum}


def load(
    checkpoint: Mapping[str, Any],
    source: str,
    training: Training,
    identity: Identity,
    accepted: Collection[str] = (),
) -> Progress:
    """Puts a run back to where its checkpoint left it.

    State comes from the file, settings from this run, where they may differ or are accepted as
    different.

    Args:
        checkpoint: what `read` gave.
        source: its path, for messages.
        accepted: names of flags that may differ from those the run was begun with, or `all`.

    Raises:
        InputError: another model, other data, other settings, or a part that this run needs is
            missing; each named.
    """
    if training.ema is not None and checkpoint.get("ema") is None:
        raise InputError(
            f"{source}: holds no ema; to start a new run from its weights use --finetune"
        )
    _check_same("model", checkpoint["model_config"], identity.model_config, source)
    _check_same("data", checkpoint["data"], identity.data, source)
    check_settings(checkpoint["args"], to_plain(identity.args), source, accepted)
    load_optimizer(
        training.optimizer, checkpoint["optimizer"], source
    )  # before the weights: it takes a step
    load_strictly(training.module, to_model_keys(checkpoint["model"]), source=source)
    if training.ema is not None:
        load_strictly(
            training.ema.module, to_model_keys(checkpoint["ema"]), source=f"{source} (average)"
        )
    try:
        if (
            checkpoint["args"]["amp"] == identity.args["amp"]
        ):  # a scale means something to its own precision only
            training.scaler.load_state_dict(checkpoint["scaler"])
        training.nonfinite.skipped += checkpoint.get("skipped_steps", 0.0)
        training.nonfinite.reported = float(training.nonfinite.skipped)
        meters = _own_meters(checkpoint.get("meters", []), training.processes)
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise InputError(f"{source}: its state does not fit this run's: {error}") from error
    return Progress(
        checkpoint["epoch"] + 1,
        checkpoint["step"],
        checkpoint.get("samples_in_epoch", 0),
        checkpoint["best_acc1"],
        checkpoint.get("first_rate"),
        meters,
        list(checkpoint.get("bad_images", [])),
    )


def _own_meters(states: list[dict[str, list[float]]], processes: Processes) -> Meters:
    """This rank's sums; with another number of ranks, rank 0 takes those of all."""
    if len(states) == processes.world_size:
        return Meters.from_state(states[processes.rank])
    total: dict[str, list[float]] = {}
    for state in states if processes.is_main else []:
        for name, sums in state.items():
            total[name] = [
                one + other for one, other in zip(total.get(name, [0.0] * 4), sums, strict=True)
            ]
    return Meters.from_state(total)


def _check_same(what: str, saved: dict[str, Any], wanted: dict[str, Any], source: str) -> None:
    """Refuses to go on with another model or other data; regularisation (`drop`, `drop_path`) may
    change."""
    for name, value in to_plain(wanted).items():
        old = saved.get(name)
        if name not in saved and name in (
            "num_images",
            "fingerprint",
        ):  # checkpoints of older versions have none
            continue
        if isinstance(value, dict) and isinstance(old, dict):
            _check_same(what, old, value, source)
        elif name not in ("drop", "drop_path") and not same_value(old, value):
            raise InputError(
                f"{source}: its {what} has {name} {short(old)}, this run has {short(value)}"
            )
