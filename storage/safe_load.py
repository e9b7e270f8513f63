"""Reads a file of torch.save without running any code in it.

A file that needs code, is damaged or is made to exhaust memory raises `Refused`.
"""

from __future__ import annotations

import argparse
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Classes in files of other projects that hold only data. The official files of DeiT and SMMix hold
# the parsed flags, and the best accuracy is often a numpy scalar. numpy 1 wrote these scalars with
# another module name.
_SCALAR = np.float64(0).__reduce__()[0]
_ALLOWED: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "numpy.dtype": np.dtype,
    "numpy.core.multiarray.scalar": _SCALAR,
    "numpy._core.multiarray.scalar": _SCALAR,
}
# numpy.dtype returns instances of these classes when it is unpickled.
_NUMBER_TYPES = sorted({type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}, key=repr)
# Limits for the content of a file. This project's have a depth of 6 and a few thousand parts.
_DEEPEST, _MOST_PARTS = 50, 1_000_000


class Refused(ValueError):
    """A file was not read. The message names the file and the reason."""


def read(file: Path) -> Any:
    """The content of `file`, with its tensors on the CPU.

    argparse Namespaces are turned into dicts, and numpy scalars into Python numbers.

    Raises:
        Refused: the file is damaged, was not written by torch.save, or needs a pickled class.
        OSError: the file cannot be opened.
    """
    _check_integrity(file)
    loaded = _unpickle(file)
    _check_extent(loaded, file)
    return _without_classes(loaded)


def _is_zip(file: Path) -> bool:
    # By the first bytes, like torch. zipfile.is_zipfile reads the last ones.
    with open(file, "rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _check_integrity(file: Path) -> None:
    """Compares the content of a zip-based torch file with its checksums, which torch does not do.

    Files of torch's older format have no checksums; torch notices only that they are too short.
    """
    if not _is_zip(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > file.stat().st_size:
                raise _corrupt(
                    file,
                    "it is packed, as torch never does, and would unpack to more than its size",
                )
            damaged = archive.testzip()
    except Refused:
        raise
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        # The archive's own list of files is damaged or missing.
        raise _corrupt(file, error) from error
    if damaged is not None:
        raise _corrupt(file, damaged)


def _corrupt(file: Path, detail: object) -> Refused:
    reason = (str(detail).splitlines() or [type(detail).__name__])[0]
    return Refused(
        f"{file} is truncated or corrupt, or no checkpoint at all ({reason}); use an earlier one, "
        "or copy it again"
    )


def _unpickle(file: Path) -> Any:
    """Reads with torch's restricted reader: tensors, plain data and the classes of `_ALLOWED`."""
    try:
        # Classes in a file of the older format cannot be listed first. There torch's reader raises
        # an error at the first one.
        if _is_zip(file):
            found = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            if unknown := sorted(set(found) - _ALLOWED.keys()):
                raise _unsafe(file, ", ".join(unknown))
        allowed = [(item, name) for name, item in _ALLOWED.items()]
        with torch.serialization.safe_globals([*allowed, *_NUMBER_TYPES]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        if names := [match[1].rstrip(".")] if match else _imports_of(file):
            raise _unsafe(file, ", ".join(names)) from error
        raise _corrupt(file, "not in a format of torch.save") from error
    except (Refused, OSError):
        raise
    # A damaged pickle may raise any error: IndexError, KeyError, TypeError, ...
    except Exception as error:
        raise _corrupt(file, error) from error


def _imports_of(file: Path) -> list[str]:
    """The names that a pickle would import. The pickle is disassembled and not executed.

    This also works for protocols that torch's reader does not support.
    """
    found: set[str] = set()
    texts: list[str] = []
    with suppress(Exception):  # the file may not be a pickle
        for code, argument, _ in pickletools.genops(_pickle_in(file)):
            if code.name == "GLOBAL":
                found.add(str(argument).replace(" ", "."))
            elif code.name == "STACK_GLOBAL" and len(texts) > 1:
                found.add(".".join(texts[-2:]))
            elif isinstance(argument, str):
                texts.append(argument)
    plain = re.compile(r"collections\.OrderedDict|torch\._utils\.\w+|torch\.\w+Storage")
    return sorted(name for name in found - _ALLOWED.keys() if not plain.fullmatch(name))


def _pickle_in(file: Path) -> bytes:
    if not _is_zip(file):
        return file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def _unsafe(file: Path, names: str) -> Refused:
    return Refused(
        f"{file} contains pickled objects ({names}), which could run code; nothing was executed. "
        "If you trust it, load it elsewhere and save only its state dict"
    )


def _check_extent(loaded: Any, file: Path) -> None:
    """Refuses content made to exhaust time or memory.

    Examples are a list that contains itself, parts that are repeated many times, and tensors that
    are larger than their file.
    """
    size = file.stat().st_size
    waiting, parts = [(loaded, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        parts += 1
        if depth > _DEEPEST or parts > _MOST_PARTS:
            raise _corrupt(
                file, f"nested more than {_DEEPEST} deep, or more than {_MOST_PARTS:,} parts"
            )
        if isinstance(value, Tensor) and value.numel() * value.element_size() > size:
            raise _corrupt(file, f"a tensor of shape {tuple(value.shape)} is larger than its file")
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if isinstance(value, Mapping):
            waiting += [(item, depth + 1) for pair in value.items() for item in pair]
        elif isinstance(value, (list, tuple, set)):
            waiting += [(item, depth + 1) for item in value]


def _without_classes(value: Any) -> Any:
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _without_classes(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_without_classes(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value
