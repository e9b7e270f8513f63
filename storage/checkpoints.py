"""Atomic writing and checked reading of checkpoints.

A file never holds classes: everything is written as plain data and read with `weights_only=True`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch

from errors import InputError
from storage import checkpoint_schema, downloads, safe_load
from storage.files import write_atomically
from storage.plain_data import to_plain

FORMAT = 1  # version of this project's checkpoints; raise it when a key changes its meaning

ReadCheckpoint = Callable[[str | Path], dict[str, Any]]

# ------------------------------------------------------------------------------------------ writing


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Writes `state` to `path`. If that fails, the previous file is unchanged.

    Only one process may write to a path at a time.

    Raises:
        InputError: the disk is full, or the folder is not writable.
        TypeError: `state` holds something that is not plain data; nothing was written.
    """
    plain = to_plain(state)
    write_atomically(Path(path), lambda stream: torch.save(plain, stream))


# ------------------------------------------------------------------------------------------ reading


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint to the CPU without running any code in the file.

    The checkpoint may come from this project or from another one.

    Args:
        path: a local file, or an https URL whose file name ends in its hash (`name-0123abcd.pth`).
            The file of a URL is downloaded once to torch.hub's folder.

    Returns:
        The dict in the file. argparse Namespaces are turned into dicts, and numpy scalars into
        Python numbers.

    Raises:
        InputError: the file does not exist, is a folder, is damaged, is not a checkpoint, needs a
            pickled class, or is a checkpoint of this project with a part that was altered.
    """
    file = Path(path)
    if "://" in str(path):
        try:
            file = downloads.from_url(str(path))
        except (OSError, RuntimeError, ValueError, HTTPException) as error:
            raise InputError(f"cannot download {path}: {error}") from error
    if os.path.isdir(file):  # pathlib's method raises an error for a name that is too long
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
    has_other_format = type(loaded.get("format")) is int and loaded["format"] != FORMAT
    is_checked = "model_config" in loaded and not has_other_format
    if is_checked and (wrong := checkpoint_schema.wrong_parts(loaded)):
        raise InputError(
            f"{file}: damaged or altered in {', '.join(wrong)}; use another checkpoint"
        )
    return loaded


class CheckpointReader:
    """`load_checkpoint` with a cache, so that one command reads each file once."""

    def __init__(self) -> None:
        self.read: dict[str, dict[str, Any]] = {}

    def __call__(self, path: str | Path) -> dict[str, Any]:
        key = os.path.realpath(path)
        if key not in self.read:
            self.read[key] = load_checkpoint(path)
        return self.read[key]

    def forget(self) -> None:
        """Empties the cache to free its memory."""
        self.read.clear()
