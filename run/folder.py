"""The output folder of a run: its lock, `status.json`, and which checkpoints are kept.

Only rank 0 has a `RunFolder`. `storage/checkpoints.py` writes and reads the single checkpoint, and
`run/state.py` defines its content.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from errors import InputError
from storage.checkpoints import save_checkpoint
from storage.files import TEMPORARY_SUFFIX, refused, remove_stale
from storage.plain_data import write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Seconds. If a launcher was killed, its ranks finish a step and save before they exit.
WAIT_FOR_LOCK = 30.0
WAIT_FOR_FAILURE_FILE = 2.0  # seconds
STEPS = "checkpoints"  # the folder with the checkpoints named by step
FAILURE_FILES = "failed_rank*.json"


def step_file(folder: Path, step: int) -> Path:
    """The path of the checkpoint after `step` updates. Names sort like steps."""
    return folder / STEPS / f"{step:010d}.pth"


def candidates(folder: Path) -> list[Path]:
    """The checkpoints that a run may be resumed from, the newest first.

    The last one is `checkpoint.pth`: runs of older versions have no other.
    """
    by_step = sorted(
        path for path in (folder / STEPS).glob("*.pth") if re.fullmatch(r"\d{10}\.pth", path.name)
    )
    latest = folder / "checkpoint.pth"
    return [*reversed(by_step), *([latest] if latest.exists() else [])]


def write_failure(folder: Path, rank: int, cause: dict[str, Any]) -> None:
    """Writes why this rank ends, for rank 0, which writes `status.json`.

    Args:
        cause: `exit_code` and `error`.

    Raises:
        InputError: the file cannot be written.
    """
    write_json(
        folder / FAILURE_FILES.replace("*", str(rank)),
        {**cause, "error": f"rank {rank}: {cause['error']}"},
    )


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty dict if the file is missing or damaged."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


class RunFolder:
    """The output folder of one run, which is locked from `open` to `close`.

    Args:
        keep: number of checkpoints named by step to keep.
    """

    def __init__(self, path: str | Path, keep: int = 2) -> None:
        self.path, self.keep = Path(path), keep
        self.lock: Any = None

    def open(self) -> None:
        """Makes the folder, locks it, and deletes the temporary files of killed runs.

        Raises:
            InputError: the folder cannot be written, or another run is writing to it.
        """
        self._make(self.path / STEPS)
        self.lock = self._lock()
        remove_stale(self.path)
        remove_stale(self.path / STEPS)
        for file in self.path.glob(FAILURE_FILES):
            with suppress(OSError):  # a folder with such a name does no harm
                file.unlink(missing_ok=True)

    def close(self) -> None:
        if self.lock is not None:
            self.lock.close()  # releases the lock; the system does so too if the process is killed

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--output-dir {self.path}: cannot be written: {error.strerror or error}"
            ) from error

    def _lock(self) -> Any:
        """The open and locked file `.lock`; it stays open until the run ends."""
        if fcntl is None:
            return None
        with _as_input_error(self.path / ".lock") as path:
            lock = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115
        begun = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() - begun > WAIT_FOR_LOCK:
                    lock.seek(0)
                    owner = lock.read().strip() or "another process"
                    lock.close()
                    raise InputError(
                        f"--output-dir {self.path}: {owner} is writing to it; stop it, or choose "
                        "another folder"
                    ) from error
                time.sleep(0.2)
            except OSError:  # a file system without locks, where a second run is not detected
                return lock
        with suppress(OSError):  # a full disk: the lock works without its owner's name
            lock.truncate(0)
            os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return lock

    def rewind_to(self, path: Path, step: int, names: Sequence[str]) -> list[Path]:
        """Restores the folder to its state just after the checkpoint at `path` was written.

        Later checkpoints are damaged or will be made again, so they are renamed. The checkpoint
        gets its `names` again, because the run may have been killed before it got them.

        Args:
            path: the checkpoint from which the run is resumed.
            step: number of updates before this checkpoint.
            names: the checkpoint's other names in the folder, such as `best_checkpoint.pth`.

        Returns:
            The new paths of the later checkpoints.

        Raises:
            InputError: a name cannot be given, for example because a folder has it.
        """
        later = [
            file
            for file in candidates(self.path)
            if file.parent.name == STEPS and int(file.stem) > step
        ]
        if path.resolve().parent == (self.path / STEPS).resolve():
            for name in names:
                _link_as(path, self.path / name)
        return [_move_aside(file) for file in later]

    def status(self, state: str, **more: Any) -> None:
        """Writes `status.json`.

        Args:
            state: `running`, `done`, `preempted` or `failed`.
            more: further entries, such as `epoch` and `step`.
        """
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        status = {"state": state, "time": now, "pid": os.getpid(), **more}
        write_json(self.path / "status.json", status)

    def fail(self, cause: dict[str, Any], has_begun: bool, is_consequence: bool) -> None:
        """Writes to `status.json` that the run failed, and its last epoch and step.

        Args:
            cause: `exit_code` and `error`.
            has_begun: whether training has begun. If not, the status `done` of an earlier run is
                not overwritten.
            is_consequence: whether this rank failed because another one ended. Then the cause that
                the other rank has written is preferred, if it has written one.
        """
        if self.lock is not None and not self.path.exists():  # renamed: Linux knows the new name
            with suppress(OSError):
                self.path = Path(os.readlink(f"/proc/self/fd/{self.lock.fileno()}")).parent
        before = _read_json(self.path / "status.json")
        if before.get("state") == "done" and not has_begun:
            return
        kept = {name: before[name] for name in ("epoch", "step") if type(before.get(name)) is int}
        if is_consequence:
            cause = self._failure_of_other_rank() or cause
        self.status("failed", **kept, **cause)

    def _failure_of_other_rank(self) -> dict[str, Any]:
        """The cause that another rank wrote by `write_failure`; empty if there is none.

        Waits for the file, because the other rank may still be about to write it.
        """
        begun = time.monotonic()
        while not (files := sorted(self.path.glob(FAILURE_FILES))):
            if time.monotonic() - begun >= WAIT_FOR_FAILURE_FILE:
                return {}
            time.sleep(0.1)
        cause = _read_json(files[0])
        is_valid = type(cause.get("exit_code")) is int and isinstance(cause.get("error"), str)
        return {name: cause[name] for name in ("exit_code", "error")} if is_valid else {}

    def save(self, state: dict[str, Any], step: int, names: tuple[str, ...] = ()) -> None:
        """Writes the checkpoint after `step` updates, and deletes all but the newest `keep`.

        Args:
            state: the content of the checkpoint.
            names: further names of the same checkpoint in the folder.

        Raises:
            InputError: the disk is full, or a name cannot be given (see `rewind_to`).
        """
        path = step_file(self.path, step)
        save_checkpoint(path, state)
        for name in names:
            _link_as(path, self.path / name)
        files = [file for file in candidates(self.path) if not file.is_dir()]
        for old in files[self.keep :]:
            if old.parent.name == STEPS and old != path:
                with _as_input_error(old):
                    old.unlink(missing_ok=True)


@contextmanager
def _as_input_error(path: Path) -> Iterator[Path]:
    """A context that turns an OSError into an InputError with the name of the file at `path`."""
    try:
        yield path
    except OSError as error:
        raise refused("write", path, error) from error


def _move_aside(file: Path) -> Path:
    with _as_input_error(aside := Path(f"{file}.aside")):
        return file.replace(aside)


def _link_as(path: Path, name: Path) -> None:
    """Atomically makes `name` a hard link to `path`, or a copy of it."""
    temporary = name.with_name(f"{name.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
    try:
        with _as_input_error(name):
            try:
                os.link(path, temporary)
            except OSError:  # a file system without links
                shutil.copyfile(path, temporary)
            os.replace(temporary, name)
    finally:
        # os.replace does nothing if both names were links to the same file already.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
