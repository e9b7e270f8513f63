"""The type and the range of every part of this project's checkpoints, to refuse altered files.

`run/state.py` describes what the parts are for and which of them must be present. Parts that are
not listed here are not checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from utils import is_ordinary

Check = Callable[[Any], bool]

MOST_IMAGES_PER_STEP = 10_000_000
# The sizes by which the members of a family differ. Besides these and the keywords that main.py
# writes, `model_config` may hold nothing: other keywords of timm's could name a file to load.
SIZES = ("patch_size", "embed_dim", "depth", "num_heads")
LARGEST_SIZE = 4096


def wrong_parts(checkpoint: Mapping[str, Any]) -> list[str]:
    """The names of the parts that `run.state.save` cannot have written.

    A part may be missing or None, except that those of `NEVER_NONE` may not be None.
    """
    present = {
        name: value for name, value in checkpoint.items() if value is not None or name in NEVER_NONE
    }
    return [name for name, check in PARTS.items() if name in present and not check(present[name])]


def _one_of(*kinds: type) -> Check:
    # Not isinstance: a bool is an int in Python.
    return lambda value: type(value) in kinds


def _whole(low: int, high: int = 2**53) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _factor(value: Any) -> bool:
    """A loss scale or a factor of it, within the range of float32, in which torch keeps it."""
    return _finite(value) and 0 < value < 2.0**127


def _list(check: Check, *lengths: int) -> Check:
    def holds(value: Any) -> bool:
        return (
            type(value) in (list, tuple)
            and (not lengths or len(value) in lengths)
            and all(map(check, value))
        )

    return holds


def _dict(check: Check, key: type = str) -> Check:
    def holds(value: Any) -> bool:
        return (
            type(value) is dict
            and all(type(name) is key for name in value)
            and all(map(check, value.values()))
        )

    return holds


def _either(*checks: Check) -> Check:
    return lambda value: any(check(value) for check in checks)


def _parts(*needed: str, **checks: Check) -> Check:
    """A dict whose keys are all in `checks`. If it is not empty, it has every key of `needed`."""

    def holds(value: Any) -> bool:
        if type(value) is not dict or (value and not set(needed) <= value.keys()):
            return False
        return all(name in checks and checks[name](item) for name, item in value.items())

    return holds


def _is_state(value: Any) -> bool:
    """The optimizer's state of one parameter: numbers, tensors, and lists or dicts of them."""
    if isinstance(value, dict):
        has_plain_keys = all(type(name) in (int, str) for name in value)
        return has_plain_keys and all(map(_is_state, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_state, value))
    return is_ordinary(value) or type(value) in (type(None), bool, int, float, str)


def _are_flags(value: Any) -> bool:
    single = _one_of(type(None), bool, int, float, str)
    if not _dict(_either(single, _list(single)))(value):
        return False
    shares = [value.get(name, 1) for name in ("batch_size", "accum_steps")]
    return all(map(_whole(1), shares)) and math.prod(shares) <= MOST_IMAGES_PER_STEP


_NOTHING = _one_of(type(None))
_SIDES = _list(_whole(1, LARGEST_SIZE), 2)
_WEIGHTS = _dict(is_ordinary)
_SHARE = _either(_NOTHING, lambda value: _finite(value) and 0 <= value <= 1)

# The names that the checkpoint may have in its folder.
NAMES = ("checkpoint.pth", "best_checkpoint.pth")
NEVER_NONE = (
    "draws",
    "samples_in_epoch",
    "meters",
    "skipped_steps",
    "bad_images",
    "world_size",
    "asked",
    "names",
)
PARTS: dict[str, Check] = {
    "format": _whole(0),
    "draws": _whole(1),
    "args": _are_flags,
    "model_config": _parts(
        name=_one_of(str),
        num_classes=_whole(1),
        input_size=_either(_NOTHING, _SIDES),
        drop=_SHARE,
        drop_path=_SHARE,
        separate_region_head=_one_of(bool),
        **dict.fromkeys(SIZES, _either(_NOTHING, _whole(1, LARGEST_SIZE))),
    ),
    "data": _parts(
        "class_names",
        "image_spec",
        class_names=_list(_one_of(str)),
        num_images=_whole(0),
        fingerprint=_one_of(str),
        image_spec=_parts(
            "input_size",
            input_size=_SIDES,
            mean=_list(_finite, 3),
            std=_list(_finite, 3),
            interpolation=_one_of(str),
            crop_ratio=_finite,
        ),
    ),
    "versions": _dict(_one_of(str)),
    "model": _WEIGHTS,
    "ema": _WEIGHTS,
    "optimizer": _parts(
        "state",
        "param_groups",
        state=_dict(_is_state, int),
        param_groups=_list(_one_of(dict)),
    ),
    "scaler": _parts(
        scale=_factor,
        growth_factor=_factor,
        backoff_factor=_factor,
        growth_interval=_whole(1, 2**31 - 1),
        _growth_tracker=_whole(0, 2**31 - 1),
    ),
    "epoch": _whole(-1),
    "samples_in_epoch": _whole(0),
    "step": _whole(0),
    "best_acc1": _finite,
    "first_rate": _finite,
    "meters": _list(_dict(_list(_one_of(int, float), 4))),
    "skipped_steps": _finite,
    "bad_images": _list(_whole(0)),
    "world_size": _whole(1, 1_000_000),
    "asked": _parts("batch_size", "accum_steps", batch_size=_whole(1), accum_steps=_whole(1)),
    "names": _list(lambda value: value in NAMES),
}
