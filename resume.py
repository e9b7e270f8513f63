"""What the checkpoint of a run holds, and going on from one.

Plain data only; writing and checked reading are in `checkpoints.py`. Decides nothing about training.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from checkpoints import FORMAT, load_checkpoint, load_optimizer, load_strictly, to_plain
from engine import Training
from health import NonFiniteLoss
from meters import Meters
from models.build import own_keys, plain_weights
from run_folder import RunFolder, candidates
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
        data: `class_names` and `image_spec` (see `transforms.ImageSpec`), all that evaluation needs to know, and the
            number of training images.
        versions: of the libraries, and the commit.
        asked: `batch_size` and `accum_steps` of the command line, from which `args` has what this world size makes of
            them.
    """

    args: dict[str, Any]
    model_config: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str]
    asked: dict[str, int] = field(default_factory=dict)


# Evaluation may be asked for elsewhere, on other images or in another precision; the rest makes the model what it is.
FREE_IN_EVALUATION = {
    "eval", "resume", "output_dir", "device", "amp", "seed", "num_workers", "pin_mem", "batch_size",
    "data_set", "data_path", "inat_category", "nb_classes", "eval_crop_ratio",
}  # fmt: skip
OF_ONE_CALL = {"eval", "resume", "output_dir", "device", "amp", "num_workers", "auto_resume", "finetune"}
# What may differ when a run is gone on with: none of it changes what is learned. The total batch is looked at apart.
FREE_ON_RESUME = (OF_ONE_CALL - {"amp"}) | {
    "start_epoch", "log_every", "pin_mem", "save_steps", "save_minutes", "keep_checkpoints", "accept_changes",
    "max_bad_steps", "skip_corrupt", "data_timeout", "decoder", "randaugment", "data_path", "batch_size", "accum_steps",
    "compile", "list_models", "attentive_teacher", "teacher_path", "max_steps",
}  # fmt: skip


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
        if name not in FREE_IN_EVALUATION and not same_value(saved.get(name), value):
            raise InputError(
                f"--{name.replace('_', '-')} {value}: --eval takes this from the checkpoint, which has "
                f"{saved.get(name)}; leave the flag out"
            )
    return {**{name: value for name, value in saved.items() if name not in OF_ONE_CALL}, **given}


def find(output_dir: str, given: str, automatic: bool) -> tuple[str, list[str]]:
    """The checkpoint to go on from: the one given, else with `automatic` the output folder's newest sound one, else "".

    Returns:
        Its path, and what is to be said of newer ones that are damaged.

    Raises:
        InputError: the output folder holds a run that would not be gone on with, or nothing but damaged checkpoints;
            none is ever overwritten.
    """
    there = candidates(Path(output_dir)) if output_dir else []
    if not there:
        return given, []
    if given and Path(output_dir).resolve() in Path(given).resolve().parents:
        return given, []
    if given or not automatic:
        advice = "" if given else "add --auto-resume to go on with it, or "
        raise InputError(f"--output-dir {output_dir} already holds a run ({there[0]}): {advice}choose another folder")
    notes: list[str] = []
    for path in there:
        try:
            checkpoint = load_checkpoint(path)
            _check_finite({name: checkpoint.get(name) or {} for name in ("model", "ema")})
            return str(path), notes
        except StopRun as error:
            named = error.text if str(path) in error.text else f"{path}: {error.text}"
            notes.append(f"passed over: {named}")
    raise InputError(f"--output-dir {output_dir}: no checkpoint in it can be gone on from\n  " + "\n  ".join(notes))


def check_agreement(path: str, processes: Processes) -> None:
    """Refuses that some ranks go on with a run and others cannot see it; all ranks call it.

    Raises:
        InputError: the file is not there for all, as on machines that do not share the output folder.
    """
    there = processes.gather(not path or Path(path).exists())
    without = [rank for rank, seen in enumerate(there) if not seen]
    if without and any(there):  # a name that is wrong for all is refused by who reads it
        raise InputError(
            f"{path}: ranks {without} do not see this checkpoint; it must be on storage that all machines share"
        )


def save(
    folder: RunFolder | None, training: Training, progress: Progress, identity: Identity, names: tuple[str, ...] = ()
) -> None:
    """Writes a checkpoint, and lets `names` stand for it. All ranks call it; the one with a folder writes.

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
        "skipped_steps": float(training.health.skipped),
        "bad_images": progress.bad_images,
        "world_size": training.processes.world_size,
        "names": list(names),
    }
    folder.save(state, progress.step, names)


def _check_finite(weights: Mapping[str, Any]) -> None:
    for part, tensors in weights.items():
        for name, value in tensors.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all():
                raise NonFiniteLoss(f"{part}.{name} is not finite: such weights are neither written nor gone on from")


def read(path: str) -> dict[str, Any]:
    """A checkpoint that a run can be gone on from.

    Raises:
        InputError: it is not one, or a part is missing.
    """
    checkpoint = load_checkpoint(path)
    needed = ["args", "model_config", "data", "model", "optimizer", "scaler", "epoch", "step", "best_acc1"]
    needed += ["ema"] if "ema" not in checkpoint else []  # there, but empty, where a run keeps no average
    if missing := [name for name in needed if checkpoint.get(name) is None]:
        raise InputError(
            f"--resume {path}: holds no {', '.join(missing)}; to start a new run from its weights use --finetune"
        )
    if not is_ours(checkpoint):
        raise InputError(f"--resume {path}: was not written by this project's main.py; use --finetune")
    if not {"batch_size", "accum_steps", "amp", "opt"} <= checkpoint["args"].keys():
        raise InputError(f"--resume {path}: the checkpoint's args are damaged: use another checkpoint")
    return checkpoint


def keep_total_batch(
    checkpoint: Mapping[str, Any], flags: dict[str, int], world_size: int, accepted: Collection[str]
) -> dict[str, int]:
    """The `batch_size` and `accum_steps` with which this number of processes takes the same steps as the run before.

    Args:
        flags: both, as they are.
        accepted: flags that may differ, or `all`.

    Returns:
        Both, or nothing where the flags do that as they are.

    Raises:
        InputError: the flags ask for another total batch, or the processes cannot share the old one, or what is done of
            the epoch is no whole number of steps of an accepted one.
    """
    saved, old_size = checkpoint["args"], checkpoint.get("world_size", world_size)
    asked = checkpoint.get("asked") or saved
    total, wanted_total = (
        part["batch_size"] * part["accum_steps"] * size for part, size in ((saved, old_size), (flags, world_size))
    )
    if wanted_total == total:
        return {}
    if _accepts(accepted, "batch_size"):
        if (done := checkpoint.get("samples_in_epoch", 0)) % wanted_total:
            raise InputError(
                f"{done} images of an epoch are done, no whole number of steps of {wanted_total}: go on with a total "
                f"batch of {total} to the end of the epoch, and change it then"
            )
        return {}
    same = all(value == asked[name] for name, value in flags.items())
    share, rest = divmod(total, world_size)
    if not same or rest:
        wanted = "--batch-size x --accum-steps x processes" if not same else f"{world_size} processes cannot share it:"
        raise InputError(
            f"the run was begun with a total batch of {total}; {wanted} must give that again "
            "(or add --accept-changes batch-size, at the end of an epoch)"
        )
    accum = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= asked["batch_size"])
    return {"batch_size": share // accum, "accum_steps": accum}


def load(
    checkpoint: Mapping[str, Any], source: str, training: Training, identity: Identity, accepted: Collection[str] = ()
) -> Progress:
    """Puts a run back to where its checkpoint left it.

    State comes from the file, settings from this run, where they may differ or are accepted as different.

    Args:
        checkpoint: what `read` gave.
        source: its path, for messages.
        accepted: names of flags that may differ from those the run was begun with, or `all`.

    Raises:
        InputError: another model, other data, other settings, or a part that this run needs is missing; each named.
    """
    if training.ema is not None and checkpoint.get("ema") is None:
        raise InputError(f"{source}: holds no ema; to start a new run from its weights use --finetune")
    _check_same("model", checkpoint["model_config"], identity.model_config, source)
    _check_same("data", checkpoint["data"], identity.data, source)
    _check_settings(checkpoint["args"], to_plain(identity.args), source, accepted)
    load_optimizer(training.optimizer, checkpoint["optimizer"], source)  # before the weights: it takes a step
    load_strictly(training.module, own_keys(checkpoint["model"]), source=source)
    if training.ema is not None:
        load_strictly(training.ema.module, own_keys(checkpoint["ema"]), source=f"{source} (average)")
    try:
        if checkpoint["args"]["amp"] == identity.args["amp"]:  # a scale means something to its own precision only
            training.scaler.load_state_dict(checkpoint["scaler"])
        training.health.skipped += checkpoint.get("skipped_steps", 0.0)
        training.health.told = float(training.health.skipped)
        meters = _own_meters(checkpoint.get("meters", []), training.processes)
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise InputError(f"{source}: its state does not fit this run's: {error}") from error
    return Progress(
        checkpoint["epoch"] + 1, checkpoint["step"], checkpoint.get("samples_in_epoch", 0), checkpoint["best_acc1"],
        checkpoint.get("first_rate"), meters, list(checkpoint.get("bad_images", [])),
    )  # fmt: skip


def _own_meters(states: list[dict[str, list[float]]], processes: Processes) -> Meters:
    """This rank's sums; with another number of ranks, rank 0 takes those of all."""
    if len(states) == processes.world_size:
        return Meters.from_state(states[processes.rank])
    total: dict[str, list[float]] = {}
    for state in states if processes.is_main else []:
        for name, sums in state.items():
            total[name] = [one + other for one, other in zip(total.get(name, [0.0] * 4), sums, strict=True)]
    return Meters.from_state(total)


def _accepts(accepted: Collection[str], name: str) -> bool:
    return bool({word.lstrip("-").replace("-", "_") for word in accepted} & {name, "all"})


def _check_settings(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], source: str, accepted: Collection[str]
) -> None:
    """Refuses settings that differ from those a run was begun with, unless they are accepted by name."""
    changed = {
        name: f"--{name.replace('_', '-')} {_short(saved[name])} -> {_short(value)}"
        for name, value in wanted.items()
        if name in saved
        and name not in FREE_ON_RESUME
        and not same_value(saved[name], value)
        and not (name == "motivator" and {saved[name], value}.isdisjoint({"self", "ema"}))  # a network may move
    }
    if "opt" in changed:
        raise InputError(f"{source}: {changed['opt']}: one optimizer cannot go on with another's state")
    if refused := [name for name in changed if not _accepts(accepted, name)]:
        flags = " ".join(name.replace("_", "-") for name in refused)
        raise InputError(
            f"{source}: the run was begun with other settings: {', '.join(changed[name] for name in refused)}; "
            f"to go on with the new ones add --accept-changes {flags}, or choose another --output-dir"
        )


def _check_same(what: str, saved: dict[str, Any], wanted: dict[str, Any], source: str) -> None:
    """Refuses to go on with another model or other data; regularisation (`drop`, `drop_path`) may change."""
    for name, value in to_plain(wanted).items():
        old = saved.get(name)
        if name not in saved and name == "num_images":  # checkpoints of older versions do not have it
            continue
        if isinstance(value, dict) and isinstance(old, dict):
            _check_same(what, old, value, source)
        elif name not in ("drop", "drop_path") and not same_value(old, value):
            raise InputError(f"{source}: its {what} has {name} {_short(old)}, this run has {_short(value)}")


def same_value(one: Any, other: Any) -> bool:
    """Equality that takes tuples for lists and one side for a square."""
    as_list = [list(value) if isinstance(value, (list, tuple)) else value for value in (one, other)]
    if all(isinstance(value, list) and len(value) in (1, 2) for value in as_list):
        as_list = [value * 2 if len(value) == 1 else value for value in as_list]
    return bool(as_list[0] == as_list[1])


def _short(value: Any, limit: int = 80) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
