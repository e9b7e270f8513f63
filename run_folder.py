"""The output folder of a run: one writer, its status, and which checkpoints are kept.

Rank 0 alone holds one. Writing and checking single files is in `checkpoints.py`; what is in them is `resume.py`'s.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from checkpoints import TEMPORARY_SUFFIX, remove_stale, save_checkpoint
from logs import write_json
from utils import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

WAIT_FOR_LOCK = 30.0  # seconds: the ranks of a launcher that was killed need a step and a save to leave
STEPS = "checkpoints"  # the folder of checkpoints by step


def step_file(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates is; names sort like steps."""
    return folder / STEPS / f"{step:010d}.pth"


def candidates(folder: Path) -> list[Path]:
    """The checkpoints that a run may go on from, the newest first; last `checkpoint.pth`, all that old runs have."""
    by_step = sorted(path for path in (folder / STEPS).glob("*.pth") if re.fullmatch(r"\d{10}\.pth", path.name))
    return [*reversed(by_step), *(path for path in [folder / "checkpoint.pth"] if path.exists())]


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

    def close(self) -> None:
        if self.lock is not None:
            self.lock.close()  # the system takes the lock back, also from a process that was killed

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output-dir {self.path}: cannot be written: {error.strerror or error}") from error

    def _lock(self) -> Any:
        if fcntl is None:
            return None
        lock = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115, held as long as the run
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
                        f"--output-dir {self.path}: {owner} is writing there; stop it, or choose another folder"
                    ) from error
                time.sleep(0.2)
            except OSError:  # a file system without locks: one writer cannot be promised there
                return lock
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        return lock

    def go_on_from(self, path: Path, step: int, names: Sequence[str]) -> list[Path]:
        """Leaves the folder as it was when the checkpoint at `path` was written, after `step` updates.

        Later ones are damaged or of a course that is given up: they keep their content under another name. And the
        checkpoint gets its `names` again, because a kill may have come before.

        Returns:
            What the later ones are called now.
        """
        later = [file for file in candidates(self.path) if file.parent.name == STEPS and int(file.stem) > step]
        if path.resolve().parent == (self.path / STEPS).resolve():
            for name in names:
                _stand_for(path, self.path / name)
        return [file.replace(f"{file}.aside") for file in later]

    def status(self, state: str, **more: Any) -> None:
        """Writes `status.json`: `running`, `done`, `preempted` or `failed`, when, and how far."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        write_json(self.path / "status.json", {"state": state, "time": now, "pid": os.getpid(), **more})

    def save(self, state: dict[str, Any], step: int, names: tuple[str, ...] = ()) -> None:
        """Writes the checkpoint after `step` updates, lets `names` stand for it too, and forgets the oldest ones."""
        path = step_file(self.path, step)
        save_checkpoint(path, state)
        for name in names:
            _stand_for(path, self.path / name)
        for old in candidates(self.path)[self.keep :]:
            if old.parent.name == STEPS and old != path:
                old.unlink(missing_ok=True)


def _stand_for(path: Path, name: Path) -> None:
    """Makes `name` the same file as `path`, at once."""
    temporary = name.with_name(f"{name.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without links
        shutil.copyfile(path, temporary)
    os.replace(temporary, name)
    temporary.unlink(missing_ok=True)  # where both were the same file already, replacing does nothing
