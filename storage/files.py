"""Atomic writing of files, and the conversion of values to plain data (no classes) and JSON."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from errors import InputError

TEMPORARY_SUFFIX = ".unfinished.tmp"


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


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces the file at `path` by what `write` writes into a stream.

    A reader gets either the complete old file or the complete new one. If the process is killed, a
    temporary file may remain, see `remove_stale`.

    Raises:
        InputError: the disk is full, or the folder is not writable; the previous file is unchanged.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())  # else the file may be empty after a power cut
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if (reason := _system_reason(error, path)) is None:
            raise
        raise InputError(
            f"cannot write {path}: {reason}; the previous file is unchanged"
        ) from error
    # Windows cannot open folders, and some network file systems cannot sync them.
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _system_reason(error: BaseException | None, path: Path) -> str | None:
    """The operating system's reason for an error as text; None for an error of another kind.

    torch may raise its own error ("unexpected pos") while it handles the system's, so the chain of
    causes is searched.
    """
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    if error is None:
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk full (or over quota); free some space"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"the folder {path.parent} is not writable"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"there is no folder {path.parent}"
    return error.strerror or str(error)


def remove_stale(folder: str | Path) -> list[Path]:
    """Deletes the temporary files of killed runs in `folder`, and returns their paths.

    No process may be writing to the folder. What cannot be deleted, such as a folder with such a
    name, does no harm and stays.
    """
    removed = []
    for path in sorted(Path(folder).glob(f"*{TEMPORARY_SUFFIX}")):
        with suppress(OSError):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


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
