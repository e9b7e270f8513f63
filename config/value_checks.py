"""Checks the value of a single flag: ranges of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from errors import InputError, as_written


def check_values(
    values: Mapping[str, Any],
    positive: Sequence[str] = (),
    not_negative: Sequence[str] = (),
    shares: Sequence[str] = (),
    ranges: Sequence[str] = (),
) -> None:
    """Refuses numbers that are out of range; flags that are absent or None pass.

    Args:
        values: name of each flag -> its value. No value may be inf or NaN.
        positive, not_negative: names of flags with these limits.
        shares: names of flags between 0 and 1.
        ranges: names of flags with two shares, the lower one first.

    Raises:
        InputError: names the flag and the rule.
    """
    for name, value in values.items():
        for number in value if isinstance(value, (list, tuple)) else [value]:
            is_finite = not isinstance(number, float) or math.isfinite(number)
            require(is_finite, name, value, "must be a finite number")
    for names, holds, rule in (
        (positive, lambda value: value > 0, "must be above 0"),
        (not_negative, lambda value: value >= 0, "must not be negative"),
        (shares, lambda value: 0 <= value <= 1, "must lie between 0 and 1"),
        (ranges, _is_range, "must be two shares, the lower first"),
    ):
        for name in names:
            if (value := values.get(name)) is not None:
                require(holds(value), name, value, rule)


def _is_range(value: Sequence[float]) -> bool:
    return 0 <= value[0] <= value[1] <= 1


def require(holds: bool, name: str, value: Any, rule: str) -> None:
    """Refuses the value of a flag unless it `holds` the rule.

    Raises:
        InputError: names the flag, the value and the rule.
    """
    if not holds:
        raise InputError(f"{as_written(name, value)}: {rule}")
