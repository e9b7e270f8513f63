"""Runs commands, one after the other or several side by side."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from errors import StopRun, heeded_signals, show
from tools.runs.folders import read_extra
from tools.tables.plan import PlannedRun

LAST_LINES = 20  # of the output of a failed job


class Failed(StopRun):
    """A run failed or was stopped; ends the command with the exit code of the run."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Job:
    """A run that was started.

    Args:
        quiet: keep its output for the case that it fails; it has one thread and the lowest priority
            then.
    """

    def __init__(self, run: PlannedRun, quiet: bool) -> None:
        self.run, self.began = run, time.monotonic()
        self.output: IO[bytes] | None = tempfile.TemporaryFile() if quiet else None  # noqa: SIM115
        options: dict[str, Any] = {}
        if quiet:
            threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            options = {
                "stdout": self.output,
                "stderr": subprocess.STDOUT,
                "stdin": subprocess.DEVNULL,
                "env": {**os.environ, **threads},
                "start_new_session": True,  # Ctrl-C reaches this command only, which passes it on
                "preexec_fn": _lowest_priority if os.name == "posix" else None,
            }
        self.process = subprocess.Popen(run.command, **options)

    def check(self) -> bool:
        """Whether the run has ended well.

        Raises:
            Failed: the run failed, or it was stopped before its end.
        """
        code = self.process.poll()
        if code is None:
            return False
        what = self.run.what
        if code:
            code = 128 - code if code < 0 else code
            self._show_last_lines()
            raise Failed(
                f"{what}: stopped with exit code {code}, see above; the same "
                "command resumes from here",
                code,
            )
        if state_of(self.run.folder) == "preempted":
            raise Failed(
                f"{what}: stopped by a signal before its end; the same command resumes from here", 1
            )
        return True

    def _show_last_lines(self) -> None:
        if self.output is not None:
            self.output.seek(0)
            lines = self.output.read().decode(errors="replace").splitlines()
            show("\n".join(lines[-LAST_LINES:]), "stderr")


def run_all(
    runs: Sequence[PlannedRun], jobs: int | None, ended: Callable[[PlannedRun, float], None]
) -> None:
    """Runs everything. After a failure the runs under way are stopped; they save first.

    Args:
        jobs: how many at once, each with one thread and at the lowest priority; None: one after the
            other, with their output on the screen.
        ended: called with each finished run and its seconds.

    Raises:
        Failed: a run failed or was stopped.
    """
    waiting, active = list(runs), list[Job]()
    with _stopping(active):
        while waiting or active:
            while waiting and len(active) < (jobs or 1):
                active.append(Job(waiting.pop(0), quiet=jobs is not None))
            for job in list(active):
                if job.check():
                    active.remove(job)
                    ended(job.run, time.monotonic() - job.began)
            time.sleep(0.1)


@contextmanager
def _stopping(active: list[Job]) -> Any:
    """A context that passes SIGTERM, SIGHUP, SIGINT on to the active jobs; errors stop them too."""

    def stop(number: int, frame: Any) -> None:
        raise Failed(f"stopped by {signal.Signals(number).name}", 128 + number)

    heeded = heeded_signals("SIGTERM", "SIGINT", "SIGHUP")
    old = {number: signal.signal(number, stop) for number in heeded}
    try:
        yield
    finally:
        for number in old:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C does not cut the saving short
        for job in active:
            if job.process.poll() is None:
                job.process.terminate()
        for job in active:
            job.process.wait()
        for number, handler in old.items():
            signal.signal(number, handler)


def _lowest_priority() -> None:
    os.nice(19)
    # Linux shares the cores among sessions first. Without this, the priority would count only
    # inside the job's own session.
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text("19")


def state_of(folder: Path) -> str:
    """The state of a run by its `status.json`, or ""."""
    return str(read_extra(folder / "status.json").get("state", ""))
