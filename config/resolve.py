"""From parsed flags to the frozen record of a run, which its checkpoints keep.

Every default that depends on the machine, the model or another flag is filled in here, once.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from typing import Any

from errors import InputError, as_pair, cores_per_process
from mixers.registry import con_weight_of, options_of
from training.total_batch import fewest_micro_batches, scale_rate


class Flags(argparse.Namespace):
    """The resolved flags of a run. Their values cannot be changed."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        vars(self).update({name: _frozen(value) for name, value in values.items()})

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name}: resolved flags are not changed; see config.resolve.resolve")


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def resolve(
    args: argparse.Namespace,
    world_size: int,
    device_type: str,
    changes: Mapping[str, Any] | None = None,
) -> Flags:
    """The flags of a run, with every default filled in.

    It imports torch, and builds the model without weights, only if `--input-size` is left out.

    Args:
        args: the parsed command line.
        world_size: number of processes.
        device_type: cuda, mps or cpu.
        changes: values that replace those of `args`: `batch_size` and `accum_steps` of a run that
            is resumed with another number of processes.

    Raises:
        InputError: the model is unknown, or cannot be built with these settings; or the processes
            cannot share `--total-batch`.
    """
    flags = {**vars(args), **(changes or {})}
    if args.total_batch is None:
        flags["total_batch"] = flags["batch_size"] * world_size * flags["accum_steps"]
    elif not args.eval:  # an evaluation takes no steps
        flags.update(_share_out(args.total_batch, args.batch_size, world_size))
    flags["data_set"] = args.data_set or ("IMNET" if args.data_path else "DIGITS")
    flags["amp"] = args.amp or ("fp16" if device_type == "cuda" else "none")
    if args.num_workers is None:
        flags["num_workers"] = min(10, cores_per_process())
    flags.update(options_of(vars(args)).filled())
    flags["con_weight"] = con_weight_of(args.mixer, args.con_weight)
    if args.input_size is None:
        from models.build import own_input_size

        flags["input_size"] = own_input_size(args.model, args.patch_size)
    else:
        flags["input_size"] = as_pair(args.input_size)
    return Flags(flags)


def left_out(
    args: argparse.Namespace, names: Collection[str], defaults: argparse.Namespace
) -> dict[str, Any]:
    """The values that the flags `names` have in a run like `args` if its command leaves them out.

    Args:
        defaults: the flags of an empty command line.
    """
    values = {**vars(args), **{name: getattr(defaults, name) for name in names}}
    values.update(options_of(values).filled())
    values["con_weight"] = con_weight_of(values["mixer"], values["con_weight"])
    return {name: values[name] for name in names}


def model_config(flags: argparse.Namespace, num_classes: int) -> dict[str, Any]:
    """The arguments of `models/build.py:build_model`, which checkpoints keep."""
    has_region_head = flags.region_head == "separate" and flags.fine_weight > 0
    return {
        "name": flags.model,
        "num_classes": num_classes,
        "input_size": None if flags.input_size is None else as_pair(flags.input_size),
        "patch_size": flags.patch_size,
        "drop": flags.drop,
        "drop_path": flags.drop_path,
        "separate_region_head": flags.mixer == "smmix" and has_region_head,
    }


def _share_out(total: int, largest: int, world_size: int) -> dict[str, int]:
    """`batch_size` and `accum_steps` for this total batch, with at most `largest` images at once.

    Raises:
        InputError: the processes cannot share the total batch.
    """
    share, rest = divmod(total, world_size)
    if rest:
        near = [n * world_size for n in (share, share + 1) if n > 0]
        raise InputError(
            f"--total-batch {total}: {world_size} processes cannot share it evenly; use "
            f"{' or '.join(map(str, near))}, or a number of processes that divides it"
        )
    accum = fewest_micro_batches(share, largest)
    return {"batch_size": share // accum, "accum_steps": accum}


def peak_rate(flags: Flags) -> float:
    """The largest learning rate of the schedule."""
    return flags.lr if flags.unscale_lr else scale_rate(flags.lr, flags.total_batch)
