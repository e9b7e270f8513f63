"""The output folder of a run: one writer, its status, and which checkpoints are kept.

Rank 0 alone holds one. Writing and checking single files is in `storage/checkpoints.py`; what is in
them is `run/state.py`'s.
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

from storage.checkpoints import save_checkpoint
from storage.files import TEMPORARY_SUFFIX, remove_stale, write_json
from utils import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

WAIT_FOR_LOCK = (
    30.0  # seconds: the ranks of a launcher that was killed need a step and a save to leave
)
WAIT_FOR_FAILURE_FILE = 2.0  # seconds
STEPS = "checkpoints"  # the folder of checkpoints by step
FAILURE_FILES = "failed_rank*.json"


def step_file(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates is; names sort like steps."""
    return folder / STEPS / f"{step:010d}.pth"


def candidates(folder: Path) -> list[Path]:
    """The checkpoints that a run may go on from, the newest first; last `checkpoint.pth`, all that
    old runs have."""
    by_step = sorted(
        path for path in (folder / STEPS).glob("*.pth") if re.fullmatch(r"\d{10}\.pth", path.name)
    )
    return [*reversed(by_step), *(path for path in [folder / "checkpoint.pth"] if path.exists())]


def write_failure(folder: Path, rank: int, cause: dict[str, Any]) -> None:
    """A rank without a `RunFolder` says why it ends, for the one that writes `status.json`.

    Raises:
        InputError: it cannot be written.
    """
    write_json(
        folder / FAILURE_FILES.replace("*", str(rank)),
        {**cause, "error": f"rank {rank}: {cause['error']}"},
    )


def _read_json(path: Path) -> dict[str, Any]:
    """An object as it stands in a file; nothing of a file that is missing or damaged."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


class RunFolder:
    """Locked between `open` and `close`.

    Args:
        keep: how many checkpoints by step to keep.
    """

    def __init__(self, path: str | Path, keep: int = 2) -> None:
        self.path, self.keep = Path(path), keep
        self.lock: Any = None

    def open(self) -> None:
        """Makes the folder, locks it, and clears what killed runs left behind.

        Raises:
            InputError: it cannot be written, or another run writes there.
        """
        self._make(self.path / STEPS)
        self.lock = self._lock()
        remove_stale(self.path)
        remove_stale(self.path / STEPS)
        for word in self.path.glob(FAILURE_FILES):
            with suppress(OSError):  # a folder of such a name says nothing
                word.unlink(missing_ok=True)

    def close(self) -> None:
        if self.lock is not None:
            self.lock.close()  # the system takes the lock back, also from a process that was killed

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--output-dir {self.path}: cannot be written: {error.strerror or error}"
            ) from error

    def _lock(self) -> Any:
        if fcntl is None:
            return None
        with _naming(self.path / ".lock") as path:
            lock = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115, held as long as the run
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
                        f"--output-dir {self.path}: {owner} is writing there; stop it, or choose "
                        "another folder"
                    ) from error
                time.sleep(0.2)
            except OSError:  # a file system without locks: one writer cannot be promised there
                return lock
        with suppress(OSError):  # a full disk: the lock holds without a name in it
            lock.truncate(0)
            os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return lock

    def rewind_to(self, path: Path, step: int, names: Sequence[str]) -> list[Path]:
        """Leaves the folder as it was when the checkpoint at `path` was written, after `step`
        updates.

        Later ones are damaged or of a course that is given up: they keep their content under
        another name. And the checkpoint gets its `names` again, because a kill may have come
        before.

        Returns:
            What the later ones are called now.

        Raises:
            InputError: something else is in the way of a name.
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
        """Writes `status.json`: `running`, `done`, `preempted` or `failed`, when, and how far."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        write_json(
            self.path / "status.json", {"state": state, "time": now, "pid": os.getpid(), **more}
        )

    def fail(self, cause: dict[str, Any], has_begun: bool, is_consequence: bool) -> None:
        """Writes that the run failed, and how far it had come.

        Args:
            cause: `exit_code` and `error`.
            has_begun: training has; else a run that was done before stays so.
            is_consequence: of another rank's end, whose word is taken in the place of `cause` if it
                left one.
        """
        before = _read_json(self.path / "status.json")
        if before.get("state") == "done" and not has_begun:
            return
        kept = {name: before[name] for name in ("epoch", "step") if type(before.get(name)) is int}
        self.status(
            "failed", **kept, **((is_consequence and self._failure_of_other_rank()) or cause)
        )

    def _failure_of_other_rank(self) -> dict[str, Any]:
        """What another rank left, see `write_failure`; it may be about to."""
        begun = time.monotonic()
        while (
            not (words := sorted(self.path.glob(FAILURE_FILES)))
            and time.monotonic() - begun < WAIT_FOR_FAILURE_FILE
        ):
            time.sleep(0.1)
        word = _read_json(words[0]) if words else {}
        sound = type(word.get("exit_code")) is int and isinstance(word.get("error"), str)
        return {name: word[name] for name in ("exit_code", "error")} if sound else {}

    def save(self, state: dict[str, Any], step: int, names: tuple[str, ...] = ()) -> None:
        """Writes the checkpoint after `step` updates, lets `names` stand for it too, and forgets
        the oldest ones.

        Raises:
            InputError: the disk is full, or something else is in the way of a name.
        """
        path = step_file(self.path, step)
        save_checkpoint(path, state)
        for name in names:
            _link_as(path, self.path / name)
        files = [file for file in candidates(self.path) if not file.is_dir()]
        for old in files[self.keep :]:
            if old.parent.name == STEPS and old != path:
                with _naming(old):
                    old.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[Path]:
    """Inside, what the system refuses becomes an InputError that names the file at `path`."""
    try:
        yield path
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{path}: {reason}; move away what is there, or choose another --output-dir"
        ) from error


def _move_aside(file: Path) -> Path:
    with _naming(aside := Path(f"{file}.aside")):
        return file.replace(aside)


def _link_as(path: Path, name: Path) -> None:
    """Makes `name` the same file as `path`, at once."""
    temporary = name.with_name(f"{name.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
    try:
        with _naming(name):
            try:
                os.link(path, temporary)
            except OSError:  # a file system without links
                shutil.copyfile(path, temporary)
            os.replace(temporary, name)
    finally:
        with suppress(OSError):
            temporary.unlink(
                missing_ok=True
            )  # where both were the same file already, replacing does nothing
