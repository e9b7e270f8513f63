"""The conversion of values to plain data (no classes) and to JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storage.files import write_atomically


def to_plain(value: Any, where: str = "") -> Any:
    """`value` as plain data.

    Plain data are dicts with str or int keys, lists, tuples, str, int, float, bool, None and
    detached tensors. Paths, dtypes and devices become their text, numpy scalars and enum members
    their value.

    Args:
        where: the name of `value` in messages, such as `config`.

    Raises:
        TypeError: `value` holds something else; the message names its place. This is a bug of the
            caller, not a mistake of the user.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        if type(plain := value.detach()) is not Tensor:
            raise TypeError(
                f"{where or 'value'}: a tensor of class {type(value).__name__} is not plain data"
            )
        return plain
    # Before str and int: members of StrEnum and IntEnum are instances of these.
    if isinstance(value, Enum):
        return to_plain(value.value, where)
    # Before float: an np.float64 is a float, and torch's `weights_only` refuses it.
    if isinstance(value, np.generic):
        return to_plain(value.item(), where)
    if isinstance(value, (Path, torch.dtype, torch.device, str)):
        return str(value)
    if isinstance(value, Mapping):
        return {
            _plain_key(key, where): to_plain(item, _inside(where, key))
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        items = [to_plain(item, _inside(where, index)) for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise TypeError(
        f"{where or 'value'}: {type(value).__module__}.{type(value).__qualname__} is not plain data"
    )


def _inside(where: str, key: Any) -> str:
    if not isinstance(key, str):
        return f"{where}[{key!r}]"
    return f"{where}.{key}" if where else key


def _plain_key(key: Any, where: str) -> str | int:
    if type(key) not in (str, int):
        raise TypeError(
            f"{_inside(where, key)}: a key must be str or int, not {type(key).__name__}"
        )
    return key


def to_json(data: Any, indent: int | None = None) -> str:
    """`data` as JSON. It is made plain first; NaN and inf, which JSON lacks, become null."""
    return json.dumps(_finite(to_plain(data)), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, data: Any) -> None:
    """Replaces the file at `path` by `data` as JSON; raises InputError like `write_atomically`."""
    text = to_json(data, indent=2) + "\n"
    write_atomically(Path(path), lambda stream: stream.write(text.encode()))
