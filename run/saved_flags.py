"""Saved flags of a run beside those of a command line: which may differ, and what is said where
they may not.

Level 1: imports `utils` only. It must not know what a flag does, nor what else a checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from utils import InputError

# Evaluation may be asked for elsewhere, on other images or in another precision; the rest makes the
# model what it is.
FREE_IN_EVALUATION = {
    "eval",
    "resume",
    "output_dir",
    "device",
    "amp",
    "seed",
    "num_workers",
    "pin_mem",
    "batch_size",
    "data_set",
    "data_path",
    "inat_category",
    "nb_classes",
    "eval_crop_ratio",
}
OF_ONE_CALL = {
    "eval",
    "resume",
    "output_dir",
    "device",
    "amp",
    "num_workers",
    "auto_resume",
    "finetune",
}
# What may differ when a run is gone on with: none of it changes what is learned. The total batch is
# looked at apart.
FREE_ON_RESUME = (OF_ONE_CALL - {"amp"}) | {
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
    "compile",
    "list_models",
    "attentive_teacher",
    "teacher_path",
    "max_steps",
    "eval_every",
}


def flags_for_evaluation(saved: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The flags of a run with those of an evaluation's command line over them.

    Raises:
        InputError: one that was given contradicts what the checkpoint is.
    """
    for name, value in given.items():
        if name not in FREE_IN_EVALUATION and not same_value(saved.get(name), value):
            raise InputError(
                f"--{name.replace('_', '-')} {value}: --eval takes this from the checkpoint, which "
                "has "
                f"{saved.get(name)}; leave the flag out"
            )
    return {**{name: value for name, value in saved.items() if name not in OF_ONE_CALL}, **given}


def accepts(accepted: Collection[str], name: str) -> bool:
    return bool({word.lstrip("-").replace("-", "_") for word in accepted} & {name, "all"})


def check_settings(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], source: str, accepted: Collection[str]
) -> None:
    """Refuses settings that differ from those a run was begun with, unless they are accepted by
    name."""
    changed = {
        name: f"--{name.replace('_', '-')} {short(saved[name])} -> {short(value)}"
        for name, value in wanted.items()
        if name in saved
        and name not in FREE_ON_RESUME
        and not same_value(saved[name], value)
        and not (
            name == "motivator" and {saved[name], value}.isdisjoint({"self", "ema"})
        )  # a network may move
    }
    if "opt" in changed:
        raise InputError(
            f"{source}: {changed['opt']}: one optimizer cannot go on with another's state"
        )
    if refused := [name for name in changed if not accepts(accepted, name)]:
        flags = " ".join(name.replace("_", "-") for name in refused)
        raise InputError(
            f"{source}: the run was begun with other settings: "
            f"{', '.join(changed[name] for name in refused)}; "
            f"to go on with the new ones add --accept-changes {flags}, or choose another "
            "--output-dir"
        )


def same_value(one: Any, other: Any) -> bool:
    """Equality that takes tuples for lists and one side for a square."""
    as_list = [list(value) if isinstance(value, (list, tuple)) else value for value in (one, other)]
    if all(isinstance(value, list) and len(value) in (1, 2) for value in as_list):
        as_list = [value * 2 if len(value) == 1 else value for value in as_list]
    return bool(as_list[0] == as_list[1])


def short(value: Any, limit: int = 80) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
