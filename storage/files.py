"""Atomic writing of files."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from errors import InputError

TEMPORARY_SUFFIX = ".unfinished.tmp"
FIXES = {
    errno.EISDIR: "move it away, or ",
    errno.EEXIST: "move it away, or ",
    errno.ENOENT: "move it back if it was renamed during the run, or ",
}


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


def refused(what: str, path: Path, error: OSError) -> InputError:
    """The InputError for an operation `what` (`read`, `write`) of a run that the system refused.

    The message says the cause and what to do.
    """
    is_read = what == "read"
    reason = (error.strerror or str(error)) if is_read else _system_reason(error, path)
    fix = FIXES.get(error.errno or 0, "")
    return InputError(f"cannot {what} {path}: {reason}; {fix}choose another output folder")


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
