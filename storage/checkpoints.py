"""Files of plain data and tensors: atomic writing, checked reading, strict loading.

Level 1: imports only level 0 from the project. It may look at key names and shapes, never at what a
model does with them, and it decides nothing about training (when to save, which file to resume).
Classes never enter or
leave a file: everything is written as plain data and read with `weights_only=True`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch

from storage import checkpoint_schema, downloads, safe_load
from storage.files import to_plain, write_atomically
from utils import InputError

FORMAT = 1  # of our own training checkpoints; raise it when a key changes its meaning

# ------------------------------------------------------------------------------------------ writing


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Writes `state` to `path`, or leaves what was there. The caller sees to it that only one rank
    does.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
        TypeError: `state` holds something that is not plain data; nothing was written.
    """
    plain = to_plain(state)
    write_atomically(Path(path), lambda stream: torch.save(plain, stream))


# ------------------------------------------------------------------------------------------ reading


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint, ours or a foreign one, to the CPU without running any code of the file.

    Args:
        path: a local file, or an https URL whose file name carries its hash (`name-0123abcd.pth`),
            which is downloaded once to torch.hub's folder.

    Returns: the dict in the file; embedded argparse Namespaces are dicts, numpy scalars python
    numbers.

    Raises:
        InputError: no such file, a folder, truncated or corrupt, not a checkpoint, it needs a
            pickled class, or it is ours but for a part that does not look like it.
    """
    file = Path(path)
    if "://" in str(path):
        try:
            file = downloads.from_url(str(path))
        except (OSError, RuntimeError, ValueError, HTTPException) as error:
            raise InputError(f"cannot download {path}: {error}") from error
    if os.path.isdir(file):  # unlike pathlib's, no error for a name that is too long
        raise InputError(
            f"{file} is a folder; name a file inside it, such as {file / 'checkpoint.pth'}"
        )
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
    if (
        "model_config" in loaded
        and not another_format
        and (wrong := checkpoint_schema.wrong_parts(loaded))
    ):
        raise InputError(
            f"{file}: damaged or altered in {', '.join(wrong)}; use another checkpoint"
        )
    return loaded


# ------------------------------------------------------------------------------- weights of a model


ReadCheckpoint = Callable[[str | Path], dict[str, Any]]


class CheckpointReader:
    """`load_checkpoint` for one command: each file is read once, whoever asks for it."""

    def __init__(self) -> None:
        self.read: dict[str, dict[str, Any]] = {}

    def __call__(self, path: str | Path) -> dict[str, Any]:
        key = os.path.realpath(path)
        if key not in self.read:
            self.read[key] = load_checkpoint(path)
        return self.read[key]

    def forget(self) -> None:
        """Frees the memory of what was read."""
        self.read.clear()
