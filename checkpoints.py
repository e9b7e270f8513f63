"""Files of plain data and tensors: atomic writing, checked reading, strict loading.

Level 1: imports only level 0 from the project. It may look at key names and shapes, never at what a
model does with them, and it decides nothing about training (when to save, which file to resume). Classes never enter or
leave a file: everything is written as plain data and read with `weights_only=True`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from enum import Enum
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

import downloads
import layout
import safe_load
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
    """Deletes the temporary files that killed runs left in `folder`; returns them. Nobody may be writing there now.

    What cannot be deleted, such as a folder of such a name, does no harm and stays.
    """
    removed = []
    for path in sorted(Path(folder).glob(f"*{TEMPORARY_SUFFIX}")):
        with suppress(OSError):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


# ---------------------------------------------------------------------------------------------------- reading


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint, ours or a foreign one, to the CPU without running any code of the file.

    Args:
        path: a local file, or an https URL whose file name carries its hash (`name-0123abcd.pth`), which is downloaded
            once to torch.hub's folder.

    Returns: the dict in the file; embedded argparse Namespaces are dicts, numpy scalars python numbers.

    Raises:
        InputError: no such file, a folder, truncated or corrupt, not a checkpoint, it needs a pickled class, or it is
            ours but for a part that does not look like it.
    """
    file = Path(path)
    if "://" in str(path):
        try:
            file = downloads.from_url(str(path))
        except (OSError, RuntimeError, ValueError, HTTPException) as error:
            raise InputError(f"cannot download {path}: {error}") from error
    if os.path.isdir(file):  # unlike pathlib's, no error for a name that is too long
        raise InputError(f"{file} is a folder; name a file inside it, such as {file / 'checkpoint.pth'}")
    if not os.path.isfile(file):
        raise InputError(f"there is no file {file}")
    try:
        loaded = safe_load.read(file)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error
    except safe_load.Refused as error:
        raise InputError(str(error)) from error
    if not isinstance(loaded, dict):
        raise InputError(f"{file} holds a {type(loaded).__name__}, not the dict of a checkpoint")
    another_format = type(loaded.get("format")) is int and loaded["format"] != FORMAT
    if "model_config" in loaded and not another_format and (wrong := layout.wrong_parts(loaded)):
        raise InputError(f"{file}: damaged or altered in {', '.join(wrong)}; use another checkpoint")
    return loaded


# -------------------------------------------------------------------------------------------- weights of a model


def pick_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's state dict in a checkpoint, ours or foreign, without the prefixes of DDP and torch.compile.

    It is under `model`, `state_dict` or `model_state`, or the checkpoint is nothing but named tensors.

    Raises:
        InputError: neither is the case, and the message lists the keys that were found; or a tensor is sparse, complex,
            quantized, without content or not finite.
    """
    for candidate in (*(checkpoint.get(key) for key in ("model", "state_dict", "model_state")), checkpoint):
        if isinstance(candidate, Mapping) and candidate and all(map(_is_named_tensor, candidate.items())):
            if odd := [name for name, weight in candidate.items() if not layout.is_ordinary(weight)]:
                raise InputError(f"these weights are no ordinary tensors of numbers: {_first_of(odd)}")
            floats = ((name, weight) for name, weight in candidate.items() if weight.is_floating_point())
            if bad := [name for name, weight in floats if not weight.isfinite().all()]:
                raise InputError(f"these weights are not finite, use another checkpoint: {_first_of(bad)}")
            return _strip_prefixes(dict(candidate))
    raise InputError(
        "no weights in this checkpoint: expected named tensors under model, state_dict or model_state, found the keys "
        + _first_of([str(key) for key in checkpoint])
    )


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


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
    kept, notes = check_fit(module, weights, tolerate_missing, tolerate_unexpected, source)
    module.load_state_dict(kept, strict=False)
    return notes


def check_fit(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    tolerate_missing: Collection[str] = (),
    tolerate_unexpected: Collection[str] = (),
    source: str = "",
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights that `load_strictly` would copy, and its notes, without copying: the module may be on `meta`."""
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
        elif not layout.is_ordinary(weights[name]):
            tolerated, note, result = False, "no ordinary tensor of numbers", ""
        elif (here := tuple(own[name].shape)) != (there := tuple(weights[name].shape)):
            note, result = f"shape {there} instead of the model's {here}", "keeps the model's own value"
            tolerated = may_miss and may_drop
        else:
            kept[name] = weights[name]
            continue
        (notes if tolerated else refused).append(f"{name}: {note}" + (f", {result}" if tolerated else ""))
    if refused:
        raise InputError(f"{source} does not fit the model in {len(refused)} names: {_first_of(refused, '; ')}")
    return kept, notes


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], source: str) -> None:
    """Puts back what an optimizer has gathered; its settings (learning rate, weight decay, ...) stay its own.

    To be called on a new one, before the weights are loaded: it takes a step on gradients of 0, which shows what its
    state looks like. A fused kernel would go by that and read, and write, beyond a smaller tensor.

    Args:
        saved: its `state_dict()`.

    Raises:
        InputError: that is of another optimizer, or of other parameters.
    """
    settings = [{**group} for group in optimizer.state_dict()["param_groups"]]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    own = optimizer.state_dict()
    try:
        odd = [index for index, entries in saved["state"].items() if not _fits(entries, own["state"][index])]
        groups = []
        for before, after, there in zip(settings, own["param_groups"], saved["param_groups"], strict=True):
            counted = {name: there[name] for name in after if name not in before or before[name] != after[name]}
            odd += [name for name, value in counted.items() if not _fits(value, after[name])]
            groups.append({**before, **counted})  # some count their steps there
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{source}: its optimizer state is of another optimizer or another model: {error}") from error
    if odd:
        raise InputError(f"{source}: its optimizer state does not fit in {_first_of([str(name) for name in odd])}")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def _fits(saved: Any, own: Any) -> bool:
    """Whether a piece of an optimizer's state is made like another."""
    if isinstance(own, Tensor):
        alike = layout.is_ordinary(saved) and saved.is_floating_point() == own.is_floating_point()
        return alike and saved.shape == own.shape
    if isinstance(own, dict):
        return (
            isinstance(saved, dict) and saved.keys() == own.keys() and all(_fits(saved[key], own[key]) for key in own)
        )
    if isinstance(own, (list, tuple)):
        return isinstance(saved, type(own)) and len(saved) == len(own) and all(map(_fits, saved, own))
    return type(saved) is type(own) or {type(saved), type(own)} <= {int, float}


def _first_of(texts: list[str], separator: str = ", ", limit: int = 8) -> str:
    rest = len(texts) - limit
    return separator.join(texts[:limit]) + (f"{separator}and {rest} more" if rest > 0 else "")
