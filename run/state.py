"""The content of a run's checkpoint: how it is collected, checked, and loaded to resume the run.

`storage/checkpoints.py` writes and reads the file.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine import Training
from errors import InputError, StopRun
from models.weights import load_strictly, plain_weights, to_model_keys
from run.folder import RunFolder, candidates
from run.saved_flags import accepts, check_settings, same_value, short
from samplers import count_groups
from storage.checkpoints import FORMAT, ReadCheckpoint, load_checkpoint
from storage.plain_data import to_plain
from training.meters import Meters
from training.nonfinite import NonFiniteLoss
from training.optim import load_optimizer
from training.total_batch import fewest_micro_batches
from utils import Processes

# The number of the law by which runs draw, kept in checkpoints; 1 where it is absent. Raise it when
# the same flags give other draws. 2: each view of repeated augmentation in blocks has its own draw,
# and --drop acts in the blocks.
DRAWS = 2

# The parts without which a run cannot be resumed. Besides these it needs `ema`, which may be None.
NEEDED = (
    "args",
    "model_config",
    "data",
    "model",
    "optimizer",
    "scaler",
    "epoch",
    "step",
    "best_acc1",
)


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 0  # number of the current epoch, or of the next one between epochs
    step: int = 0  # number of the next optimizer step
    samples: int = 0  # images of this epoch that all ranks together have used
    best_acc1: float = 0.0  # percent
    first_rate: float | None = None  # learning rate at the beginning of this epoch
    meters: Meters = field(default_factory=Meters)  # means of this rank over this epoch
    bad_images: list[int] = field(default_factory=list)  # unreadable images found on any rank


@dataclass(frozen=True)
class Identity:
    """The settings of a run, which do not change while it trains.

    Args:
        args: the resolved flags.
        model_config: keywords of `models.build.build_model`.
        data: `class_names` and `image_spec` (see `pipeline.spec.ImageSpec`), which evaluation
            needs; `num_images` and `fingerprint` of the training images (see
            `pipeline.images.Images.fingerprint`).
        versions: versions of the libraries and of this code.
        asked: `batch_size` and `accum_steps` of the command line. Those in `args` may differ, if
            the run was resumed with another number of processes.
    """

    args: dict[str, Any]
    model_config: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str]
    asked: dict[str, int] = field(default_factory=dict)


def is_own_checkpoint(checkpoint: dict[str, Any]) -> bool:
    """Whether `save` wrote this checkpoint; such a checkpoint describes its model and input.

    Raises:
        InputError: `save` wrote it, but its format is another one or the file was altered.
    """
    if not {"format", "model_config", "data", "model", "ema", "args"} <= checkpoint.keys():
        return False
    if checkpoint["format"] != FORMAT:
        raise InputError(
            f"the checkpoint has format {checkpoint['format']}, this version reads format {FORMAT}"
        )
    parts = [checkpoint[name] for name in ("args", "model_config", "data", "model")]
    if not all(isinstance(part, dict) and part for part in parts):
        raise InputError(
            "the checkpoint's args, model_config, data or model is damaged: use another checkpoint"
        )
    return True


def find(
    output_dir: str, given: str, automatic: bool, read_file: ReadCheckpoint = load_checkpoint
) -> tuple[str, list[str]]:
    """Chooses the checkpoint from which a run is resumed.

    Args:
        output_dir: `--output-dir`.
        given: `--resume`.
        automatic: `--auto-resume`: choose the newest whole checkpoint in the output folder.

    Returns:
        The path, or "" for a new run, and warnings about checkpoints that are not used: newer ones
        that are damaged or lack a part, and `given`.

    Raises:
        InputError: the output folder holds another run, or only damaged checkpoints. They are
            never overwritten.
    """
    paths = candidates(Path(output_dir)) if output_dir else []
    is_own = bool(given) and Path(output_dir).resolve() in Path(given).resolve().parents
    if not paths or (is_own and not automatic):
        return given, []
    if not automatic:
        advice = "" if given else "add --auto-resume to resume it, or "
        raise InputError(
            f"--output-dir {output_dir} already holds a run ({paths[0]}): {advice}choose another "
            "folder"
        )
    warnings: list[str] = []
    for path in paths:
        try:
            read(str(path), read_file)
            if given and Path(given).resolve() != path.resolve():
                warnings.append(
                    f"--auto-resume resumes from {path}; --resume {given} is used only if "
                    "--output-dir has no checkpoint"
                )
            return str(path), warnings
        except StopRun as error:
            named = error.text if str(path) in error.text else f"{path}: {error.text}"
            warnings.append(f"skipped: {named}")
    raise InputError(
        f"--output-dir {output_dir}: the run cannot be resumed from any checkpoint in it\n  "
        + "\n  ".join(warnings)
    )


def check_visible_to_all(path: str, processes: Processes) -> None:
    """Checks that all ranks can open the checkpoint at `path`. All ranks call it.

    Raises:
        InputError: some ranks have the file and others do not, because their machines do not share
            the output folder.
    """
    exists = processes.gather(not path or os.path.exists(path))
    missing = [rank for rank, has_file in enumerate(exists) if not has_file]
    if missing and any(exists):  # a path that exists nowhere is refused when it is read
        raise InputError(
            f"{path}: ranks {missing} do not see this checkpoint; it must be on storage that all "
            "machines share"
        )


def save(
    folder: RunFolder | None,
    training: Training,
    progress: Progress,
    identity: Identity,
    names: tuple[str, ...] = (),
) -> None:
    """Writes a checkpoint. All ranks call it; the rank with a folder writes.

    Args:
        names: further names of the checkpoint in the folder.

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
        "draws": DRAWS,
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
    """Raises a NonFiniteLoss if any of the weights (part -> name -> tensor) is NaN or inf."""
    for part, tensors in weights.items():
        for name, value in tensors.items():
            is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
            if is_float and not value.isfinite().all():
                raise NonFiniteLoss(
                    f"{part}.{name} is not finite: such weights are not saved, and a run cannot be "
                    "resumed from them"
                )


def read(path: str, read_file: ReadCheckpoint = load_checkpoint) -> dict[str, Any]:
    """Reads a checkpoint from which a run can be resumed.

    Raises:
        InputError: it is not such a checkpoint, or a part is missing.
    """
    checkpoint = read_file(path)
    missing = [name for name in NEEDED if checkpoint.get(name) is None]
    if "ema" not in checkpoint:  # it may be None, if the run keeps no average
        missing.append("ema")
    if missing:
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
    checkpoint: Mapping[str, Any],
    flags: Mapping[str, int],
    world_size: int,
    accepted: Collection[str],
) -> dict[str, int]:
    """The `batch_size` and `accum_steps` that keep the total batch of a resumed run.

    Args:
        checkpoint: the checkpoint that is resumed.
        flags: both values on the command line, and `total_batch` if it is there.
        world_size: the number of processes now.
        accepted: names of flags that may differ, or `all`.

    Returns:
        Both, or an empty dict if the command line is already right.

    Raises:
        InputError: the command line has another total batch, or the processes cannot share the old
            one, or the total batch may change but not within the current epoch.
    """
    saved, old_size = checkpoint["args"], checkpoint.get("world_size", world_size)
    asked = checkpoint.get("asked") or saved
    total = saved["batch_size"] * saved["accum_steps"] * old_size
    given = flags.get("total_batch")
    wanted_total = given or flags["batch_size"] * flags["accum_steps"] * world_size
    if wanted_total != total and _accepts_another_total(accepted):
        if (done := checkpoint.get("samples_in_epoch", 0)) % wanted_total:
            raise InputError(
                f"{done} images of the current epoch are done, which is no whole number of steps "
                f"of {wanted_total}: resume with a total batch of {total}, and change it at the "
                "end of the epoch"
            )
        return {}
    flag = "batch-size" if given is None else "total-batch"
    advice = f"(or add --accept-changes {flag}, at the end of an epoch)"
    if given not in (None, total):
        raise InputError(
            f"--total-batch {given}: the run was started with a total batch of {total}; leave the "
            f"flag as it was {advice}"
        )
    shares = ("batch_size", "accum_steps")
    if wanted_total != total and any(flags[name] != asked[name] for name in shares):
        raise InputError(
            f"the run was started with a total batch of {total}; --batch-size x --accum-steps x "
            f"processes must be equal to it {advice}"
        )
    share, rest = divmod(total, world_size)
    if rest:
        raise InputError(
            f"the run was started with a total batch of {total}, which {world_size} processes "
            f"cannot share; use a number of processes that divides it {advice}"
        )
    if wanted_total == total:
        return {}
    accum = fewest_micro_batches(share, asked["batch_size"])
    return {"batch_size": share // accum, "accum_steps": accum}


def _accepts_another_total(accepted: Collection[str]) -> bool:
    return accepts(accepted, "batch_size") or accepts(accepted, "total_batch")


def load(
    checkpoint: Mapping[str, Any],
    source: str,
    training: Training,
    identity: Identity,
    accepted: Collection[str] = (),
) -> Progress:
    """Loads the state in a checkpoint into a new run.

    Settings that may differ are those of the new run.

    Args:
        checkpoint: the result of `read`.
        source: its path, for messages.
        training: the objects that receive the state.
        identity: the settings of the new run.
        accepted: names of further flags that may differ from those in the checkpoint, or `all`.

    Returns:
        How far the run has come.

    Raises:
        InputError: the checkpoint has another model, other data or other settings, or a part that
            this run needs is missing.
    """
    if training.ema is not None and checkpoint.get("ema") is None:
        raise InputError(
            f"{source}: holds no ema; to start a new run from its weights use --finetune"
        )
    _check_same("model", checkpoint["model_config"], identity.model_config, source)
    _check_same("data", checkpoint["data"], identity.data, source)
    check_settings(checkpoint["args"], to_plain(identity.args), source, accepted)
    _check_draws(checkpoint, identity.args, source)
    # Before the weights are loaded: it takes a step, which changes them.
    load_optimizer(training.optimizer, checkpoint["optimizer"], source)
    load_strictly(training.module, to_model_keys(checkpoint["model"]), source=source)
    if training.ema is not None:
        average = to_model_keys(checkpoint["ema"])
        load_strictly(training.ema.module, average, source=f"{source} (average)")
    try:
        # The scale of another precision is of no use.
        if checkpoint["args"]["amp"] == identity.args["amp"]:
            training.scaler.load_state_dict(checkpoint["scaler"])
        training.nonfinite.skipped += checkpoint.get("skipped_steps", 0.0)
        training.nonfinite.reported = float(training.nonfinite.skipped)
        meters = _own_meters(checkpoint.get("meters", []), training.processes)
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise InputError(f"{source}: its state does not fit this run's: {error}") from error
    # An accuracy on other images is no best one.
    is_comparable = checkpoint["args"].get("val_subset") == identity.args["val_subset"]
    return Progress(
        checkpoint["epoch"] + 1,
        checkpoint["step"],
        checkpoint.get("samples_in_epoch", 0),
        checkpoint["best_acc1"] if is_comparable else 0.0,
        checkpoint.get("first_rate"),
        meters,
        list(checkpoint.get("bad_images", [])),
    )


def _check_draws(checkpoint: Mapping[str, Any], flags: Mapping[str, Any], source: str) -> None:
    """Refuses to continue a run whose draws would follow another law from now on (`DRAWS`)."""
    number = checkpoint.get("draws", 1)
    repeats = flags["repeats"] if flags["repeated_aug"] else 1
    is_same_law = count_groups(repeats, flags["repeat_layout"]) == 1 and not flags["drop"]
    if number == DRAWS or (number < DRAWS and is_same_law):
        return
    commit = checkpoint.get("versions", {}).get("commit", "unknown")
    raise InputError(
        f"{source}: the run draws by law {number} (draws: {number}), this version by law {DRAWS} "
        "(each view of a repeated image has its own mix, and --drop acts in the blocks): finish "
        f"the run with the version that started it (commit {commit}), or start a new run; "
        "--finetune takes its weights"
    )


def _own_meters(states: list[dict[str, list[float]]], processes: Processes) -> Meters:
    """The meters of this rank. If the number of ranks has changed, rank 0 gets all sums."""
    if len(states) == processes.world_size:
        return Meters.from_state(states[processes.rank])
    total: dict[str, list[float]] = {}
    for state in states if processes.is_main else []:
        for name, sums in state.items():
            before = total.get(name, [0.0] * 4)
            total[name] = [one + other for one, other in zip(before, sums, strict=True)]
    return Meters.from_state(total)


def _check_same(what: str, saved: dict[str, Any], wanted: dict[str, Any], source: str) -> None:
    """Refuses another model or other data. Only `drop` and `drop_path` may differ."""
    for name, value in to_plain(wanted).items():
        old = saved.get(name)
        # Checkpoints of older versions lack these two.
        if name not in saved and name in ("num_images", "fingerprint"):
            continue
        if isinstance(value, dict) and isinstance(old, dict):
            _check_same(what, old, value, source)
        elif name not in ("drop", "drop_path") and not same_value(old, value):
            raise InputError(
                f"{source}: its {what} has {name} {short(old)}, this run has {short(value)}"
            )
