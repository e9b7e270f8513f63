"""Compares the flags in a checkpoint with those of a command line.

It defines which flags may differ when a run is evaluated or resumed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from errors import InputError

# Evaluation may run on another machine, on other images or in another precision. The other flags
# define the model.
FREE_IN_EVALUATION = {
    "config",
    "eval",
    "resume",
    "output_dir",
    "device",
    "amp",
    "seed",
    "num_workers",
    "pin_mem",
    "batch_size",
    "total_batch",
    "data_set",
    "data_path",
    "inat_category",
    "nb_classes",
    "eval_crop_ratio",
    "val_subset",
}
# Flags that evaluation never takes from the checkpoint.
NOT_FROM_CHECKPOINT = {
    "config",
    "eval",
    "resume",
    "output_dir",
    "device",
    "amp",
    "num_workers",
    "auto_resume",
    "finetune",
    "val_subset",
}
# Flags that may differ when a run is resumed, because they do not change what it learns.
# `run.state.keep_total_batch` checks the total batch.
FREE_ON_RESUME = (NOT_FROM_CHECKPOINT - {"amp"}) | {
    "start_epoch",
    "log_every",
    "pin_mem",
    "save_steps",
    "save_minutes",
    "keep_checkpoints",
    "accept_changes",
    "max_bad_steps",
    "skip_corrupt",
    "data_timeout",
    "decoder",
    "randaugment",
    "data_path",
    "batch_size",
    "accum_steps",
    "total_batch",
    "compile",
    "list_models",
    "attentive_teacher",
    "teacher_path",
    "max_steps",
    "eval_every",
}


def flags_for_evaluation(saved: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The flags of a run, updated with those of the evaluation's command line.

    Args:
        saved: the flags in the checkpoint.
        given: the flags on the command line.

    Raises:
        InputError: a given flag contradicts the checkpoint.
    """
    for name, value in given.items():
        if name not in FREE_IN_EVALUATION and not same_value(saved.get(name), value):
            raise InputError(
                f"--{name.replace('_', '-')} {value}: --eval takes this from the checkpoint, which "
                f"has {saved.get(name)}; leave the flag out"
            )
    kept = {name: value for name, value in saved.items() if name not in NOT_FROM_CHECKPOINT}
    return {**kept, **given}


def accepts(accepted: Collection[str], name: str) -> bool:
    """Whether `--accept-changes` has the flag `name` or `all`. Both spellings of a flag count."""
    return bool({flag.lstrip("-").replace("-", "_") for flag in accepted} & {name, "all"})


def check_settings(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], source: str, accepted: Collection[str]
) -> None:
    """Compares the settings of a resumed run with those in its checkpoint.

    Args:
        saved: the flags in the checkpoint.
        wanted: the flags of this run.
        source: the path of the checkpoint, for messages.
        accepted: names of flags that may differ, or `all`.

    Raises:
        InputError: a setting differs that must not, another optimizer is chosen, or `--layer-decay`
            is switched on or off.
    """
    changed = {
        name: f"--{name.replace('_', '-')} {short(saved[name])} -> {short(value)}"
        for name, value in wanted.items()
        if name in saved and name not in FREE_ON_RESUME and not _is_same(name, saved[name], value)
    }
    if "opt" in changed:
        raise InputError(
            f"{source}: {changed['opt']}: an optimizer cannot use the state of another one"
        )
    before, after = saved.get("layer_decay"), wanted.get("layer_decay")
    if (before is None) != (after is None):
        raise InputError(
            f"{source}: --layer-decay {before} -> {after}: the state of the optimizer is sorted by "
            "layer with this flag only, so it cannot be switched on or off"
        )
    if refused := [name for name in changed if not accepts(accepted, name)]:
        flags = " ".join(name.replace("_", "-") for name in refused)
        raise InputError(
            f"{source}: the run was started with other settings: "
            f"{', '.join(changed[name] for name in refused)}; to resume with the new ones add "
            f"--accept-changes {flags}, or choose another --output-dir"
        )


def _is_same(name: str, saved: Any, wanted: Any) -> bool:
    """Whether two values of a flag mean the same. The file of a motivator may have moved."""
    is_file = name == "motivator" and {saved, wanted}.isdisjoint({"self", "ema"})
    return is_file or same_value(saved, wanted)


def same_value(one: Any, other: Any) -> bool:
    """Equality in which tuples equal lists, and one side equals a square with that side."""
    as_list = [list(value) if isinstance(value, (list, tuple)) else value for value in (one, other)]
    if all(isinstance(value, list) and len(value) in (1, 2) for value in as_list):
        as_list = [value * 2 if len(value) == 1 else value for value in as_list]
    return bool(as_list[0] == as_list[1])


def short(value: Any, limit: int = 80) -> str:
    """`value` as on a command line, cut to `limit` characters."""
    several = isinstance(value, (list, tuple))
    text = " ".join(map(str, value)) if several else str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
