"""Writing files: whole or not at all, and of plain data only (no classes)."""

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

from utils import InputError

TEMPORARY_SUFFIX = ".unfinished.tmp"


def to_plain(value: Any, where: str = "") -> Any:
    """`value` as plain data: dict (str or int keys), list, tuple, str, int, float, bool, None and
    detached tensors.

    Paths, dtypes and devices become their text, numpy scalars and enum members their value.

    Args:
        where: the name of `value` in messages, such as `config`.

    Raises:
        TypeError: something else was found; the message says where. It is a bug of the caller, not
            of the user.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        if type(plain := value.detach()) is not Tensor:
            raise TypeError(
                f"{where or 'value'}: a tensor of class {type(value).__name__} is not plain data"
            )
        return plain
    if isinstance(value, Enum):  # before str and int: StrEnum and IntEnum are both
        return to_plain(value.value, where)
    if isinstance(
        value, np.generic
    ):  # before float: np.float64 is one, and weights_only refuses it
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
    """Replaces the file at `path` by what `write` puts into the stream: a reader finds the old or
    the new file, whole.

    A kill leaves at most a temporary file, see `remove_stale`.

    Raises:
        InputError: the disk is full, or the folder cannot be written; the previous file is still
            there.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())  # else a power cut may leave the new name with no content
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if (reason := _system_reason(error, path)) is None:
            raise
        raise InputError(
            f"cannot write {path}: {reason}; what was there before is unchanged"
        ) from error
    with suppress(
        OSError
    ):  # folders cannot be opened on Windows, nor synced on some network file systems
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _system_reason(error: BaseException | None, path: Path) -> str | None:
    """What the operating system objected to, in words; None if it was something else.

    torch may replace the system's error by its own ("unexpected pos"), so that the chain has to be
    followed.
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
    """Deletes the temporary files that killed runs left in `folder`; returns them. Nobody may be
    writing there now.

    What cannot be deleted, such as a folder of such a name, does no harm and stays.
    """
    removed = []
    for path in sorted(Path(folder).glob(f"*{TEMPORARY_SUFFIX}")):
        with suppress(OSError):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def to_json(data: Any, indent: int | None = None) -> str:
    """`data` as valid JSON: NaN and infinities, which JSON lacks, become null; paths and numpy
    scalars become plain."""
    return json.dumps(_finite(to_plain(data)), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, data: Any) -> None:
    """Replaces the file at `path` by `data` as JSON, atomically. Raises InputError like
    `write_atomically`."""
    text = to_json(data, indent=2) + "\n"
    write_atomically(Path(path), lambda stream: stream.write(text.encode()))
