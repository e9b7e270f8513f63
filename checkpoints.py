"""Files of plain data and tensors: atomic writing, checked reading, strict loading.

Level 1: imports only `utils` from the project. It may look at key names and shapes, never at what a model does with
them, and it decides nothing about training (when to save, which file to resume). Classes never enter or leave a file:
everything is written as plain data and read with `weights_only=True`.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlparse

import numpy as np
import torch
from torch import Tensor, nn

from utils import InputError

FORMAT = 1  # of our own training checkpoints; raise it when a key changes its meaning
TEMPORARY_SUFFIX = ".unfinished.tmp"

# ---------------------------------------------------------------------------------------------------- writing


def to_plain(value: Any, where: str = "") -> Any:
    """`value` as plain data: dict (str or int keys), list, tuple, str, int, float, bool, None and detached tensors.

    Paths, dtypes and devices become their text, numpy scalars and enum members their value.

    Args:
        where: the name of `value` in messages, such as `config`.

    Raises:
        TypeError: something else was found; the message says where. It is a bug of the caller, not of the user.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        if type(plain := value.detach()) is not Tensor:
            raise TypeError(f"{where or 'value'}: a tensor of class {type(value).__name__} is not plain data")
        return plain
    if isinstance(value, Enum):  # before str and int: StrEnum and IntEnum are both
        return to_plain(value.value, where)
    if isinstance(value, np.generic):  # before float: np.float64 is one, and weights_only refuses it
        return to_plain(value.item(), where)
    if isinstance(value, (Path, torch.dtype, torch.device, str)):
        return str(value)
    if isinstance(value, Mapping):
        return {_plain_key(key, where): to_plain(item, _inside(where, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [to_plain(item, _inside(where, index)) for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise TypeError(f"{where or 'value'}: {type(value).__module__}.{type(value).__qualname__} is not plain data")


def _inside(where: str, key: Any) -> str:
    if not isinstance(key, str):
        return f"{where}[{key!r}]"
    return f"{where}.{key}" if where else key


def _plain_key(key: Any, where: str) -> str | int:
    if type(key) not in (str, int):
        raise TypeError(f"{_inside(where, key)}: a key must be str or int, not {type(key).__name__}")
    return key


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces the file at `path` by what `write` puts into the stream: a reader finds the old or the new file, whole.

    A kill leaves at most a temporary file, see `remove_stale`.

    Raises:
        InputError: the disk is full, or the folder cannot be written; the previous file is still there.
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
        raise InputError(f"cannot write {path}: {reason}; what was there before is unchanged") from error
    with suppress(OSError):  # folders cannot be opened on Windows, nor synced on some network file systems
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _system_reason(error: BaseException | None, path: Path) -> str | None:
    """What the operating system objected to, in words; None if it was something else.

    torch may replace the system's error by its own ("unexpected pos"), so that the chain has to be followed.
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


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Writes `state` to `path`, or leaves what was there. The caller sees to it that only one rank does.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
        TypeError: `state` holds something that is not plain data; nothing was written.
    """
    plain = to_plain(state)
    write_atomically(Path(path), lambda stream: torch.save(plain, stream))


def remove_stale(folder: str | Path) -> list[Path]:
    """Deletes the temporary files that killed runs left in `folder`; returns them. Nobody may be writing there now."""
    stale = sorted(Path(folder).glob(f"*{TEMPORARY_SUFFIX}"))
    for path in stale:
        path.unlink(missing_ok=True)
    return stale


# ---------------------------------------------------------------------------------------------------- reading

# Classes that foreign files contain and that hold only data: official DeiT and SMMix files embed the parsed flags, and
# a best accuracy is often a numpy scalar; numpy 1 wrote these under another module name.
_SCALAR = np.float64(0).__reduce__()[0]
_ALLOWED: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "numpy.dtype": np.dtype,
    "numpy.core.multiarray.scalar": _SCALAR,
    "numpy._core.multiarray.scalar": _SCALAR,
}
_NUMBER_TYPES = sorted({type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}, key=repr)  # rebuilt by numpy.dtype
_HASHED_NAME = re.compile(r"-([0-9a-f]{8,64})(?:\.[a-z]+)+$")


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint, ours or a foreign one, to the CPU without running any code of the file.

    Args:
        path: a local file, or an https URL whose file name carries its hash (`name-0123abcd.pth`), which is downloaded
            once to torch.hub's folder.

    Returns: the dict in the file; embedded argparse Namespaces are dicts, numpy scalars python numbers.

    Raises:
        InputError: no such file, a folder, truncated or corrupt, not a checkpoint, or it needs a pickled class.
    """
    file = _download(str(path)) if "://" in str(path) else Path(path)
    if file.is_dir():
        raise InputError(f"{file} is a folder; name a file inside it, such as {file / 'checkpoint.pth'}")
    if not file.is_file():
        raise InputError(f"there is no file {file}")
    try:
        _check_integrity(file)
        loaded = _read_plain(file)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error
    if not isinstance(loaded, Mapping):
        raise InputError(f"{file} holds a {type(loaded).__name__}, not the dict of a checkpoint")
    return _without_classes(loaded)


def _is_zip(file: Path) -> bool:
    with open(file, "rb") as stream:  # by the first bytes, like torch; zipfile.is_zipfile looks at the last ones
        return stream.read(4) == b"PK\x03\x04"


def _check_integrity(file: Path) -> None:
    """Compares the content of a zip-based torch file with its checksums, as torch itself does not when it loads.

    Files of the older format have none; torch notices at most that they are too short.
    """
    if not _is_zip(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise _corrupt(file, error) from error  # the directory of the archive itself is damaged or missing
    if damaged is not None:
        raise _corrupt(file, damaged)


def _corrupt(file: Path, detail: object) -> InputError:
    reason = (str(detail).splitlines() or [type(detail).__name__])[0]
    return InputError(
        f"{file} is truncated or corrupt, or no checkpoint at all ({reason}); use an earlier one, or copy it again"
    )


def _read_plain(file: Path) -> Any:
    """Unpickles with torch's restricted reader, which knows tensors and plain data, plus the classes of `_ALLOWED`."""
    try:
        if _is_zip(file):  # the older format cannot be listed beforehand: there the reader stops by itself
            found = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            if unknown := sorted(set(found) - _ALLOWED.keys()):
                raise _refusal(file, ", ".join(unknown))
        allowed = [(item, name) for name, item in _ALLOWED.items()]
        with torch.serialization.safe_globals([*allowed, *_NUMBER_TYPES]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if match := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise _refusal(file, match[1].rstrip(".")) from error
        raise _corrupt(file, "not in a format of torch.save") from error
    except (InputError, OSError):
        raise
    except Exception as error:  # whatever a damaged pickle leads the reader into: IndexError, KeyError, TypeError, ...
        raise _corrupt(file, error) from error


def _refusal(file: Path, names: str) -> InputError:
    return InputError(
        f"{file} contains pickled objects ({names}), which could run code; nothing was executed. "
        "If you trust it, load it elsewhere and save only its state dict"
    )


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


def _download(url: str) -> Path:
    """The local copy of the file at `url`, downloaded unless it is there already; its hash is checked either way."""
    name = Path(urlparse(url).path).name
    match = _HASHED_NAME.search(name)
    if not url.startswith("https://") or match is None:
        raise InputError(
            f"{url}: only https URLs of files whose name ends in their hash (name-0123abcd.pth) are loaded, because "
            "anything else cannot be verified; download it yourself and give the local file"
        )
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    try:
        if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest().startswith(match[1]):
            return file
        file.parent.mkdir(parents=True, exist_ok=True)
        progress = os.environ.get("RANK", "0") == "0"
        torch.hub.download_url_to_file(url, str(file), hash_prefix=match[1], progress=progress)
    except (OSError, RuntimeError) as error:  # no network or disk; another hash than the name says
        raise InputError(f"cannot download {url} to {file}: {error}") from error
    return file


# -------------------------------------------------------------------------------------------- weights of a model


def pick_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's state dict in a checkpoint, ours or foreign, without the prefixes of DDP and torch.compile.

    It is under `model`, `state_dict` or `model_state`, or the checkpoint is nothing but named tensors.

    Raises:
        InputError: neither is the case; the message lists the keys that were found.
    """
    for candidate in (*(checkpoint.get(key) for key in ("model", "state_dict", "model_state")), checkpoint):
        if isinstance(candidate, Mapping) and candidate and all(isinstance(w, Tensor) for w in candidate.values()):
            return _strip_prefixes(dict(candidate))
    raise InputError(
        "no weights in this checkpoint: expected named tensors under model, state_dict or model_state, found the keys "
        + _first_of([str(key) for key in checkpoint])
    )


def _strip_prefixes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    prefixes = ("module.", "_orig_mod.")
    while prefix := next((p for p in prefixes if all(name.startswith(p) for name in weights)), None):
        weights = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    return weights


def load_strictly(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    tolerate_missing: Collection[str] = (),
    tolerate_unexpected: Collection[str] = (),
    source: str,
) -> list[str]:
    """Copies `weights` into `module`; everything is checked before anything is copied.

    Args:
        tolerate_missing: names that may keep the module's own value because `weights` lacks them.
        tolerate_unexpected: names in `weights` that may stay unused. A name whose shape differs is both.
        source: what messages call the weights, such as the path of their file.

    Returns: one line per tolerated difference, sorted by name.

    Raises:
        InputError: a name is missing or unexpected, or its shape differs, and that is not tolerated.
    """
    own = module.state_dict()
    refused: list[str] = []
    notes: list[str] = []
    kept: dict[str, Tensor] = {}
    for name in sorted(own.keys() | weights.keys()):
        may_miss, may_drop = name in tolerate_missing, name in tolerate_unexpected
        if name not in weights:
            tolerated, note, result = may_miss, "missing", "keeps the model's own value"
        elif name not in own:
            tolerated, note, result = may_drop, "unknown to the model", "not used"
        elif (here := tuple(own[name].shape)) != (there := tuple(weights[name].shape)):
            note, result = f"shape {there} instead of the model's {here}", "keeps the model's own value"
            tolerated = may_miss and may_drop
        else:
            kept[name] = weights[name]
            continue
        (notes if tolerated else refused).append(f"{name}: {note}" + (f", {result}" if tolerated else ""))
    if refused:
        raise InputError(f"{source} does not fit the model in {len(refused)} names: {_first_of(refused, '; ')}")
    module.load_state_dict(kept, strict=False)
    return notes


def _first_of(texts: list[str], separator: str = ", ", limit: int = 8) -> str:
    rest = len(texts) - limit
    return separator.join(texts[:limit]) + (f"{separator}and {rest} more" if rest > 0 else "")
