"""The agreement of all ranks between steps: to stop, to save, and on unreadable images.

A stop is requested by a signal (SIGTERM, SIGINT, SIGUSR1, SIGHUP) to any rank or to the launcher,
or by the end of the launcher. All ranks then finish their step, save a checkpoint and exit.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from errors import heeded_signals
from utils import Processes

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
# The launcher's process id. It is read at import, when the launcher must still be alive: the ranks
# have not met in its store yet.
LAUNCHER = os.getppid()
# A second signal ends the process at once, but not within this many seconds: the launcher and the
# batch system may both send the first one.
IMPATIENT_AFTER = 3.0


class Agreed(NamedTuple):
    """The requests of all ranks together; equal on all ranks."""

    stop: bool = False  # any rank requests it
    save: bool = False
    bad_images: int = 0  # newly found unreadable images, summed over ranks


class Stopped(Exception):
    """All ranks have agreed to stop."""


class RankAgreement:
    """Collects the requests of all ranks after each step. Use it as a context around training.

    With more than one process an answer comes one call late, so that no rank waits for a message.

    Args:
        save_minutes: a checkpoint is requested this long after the last one; 0 for never.
    """

    def __init__(self, processes: Processes, save_minutes: float = 0) -> None:
        self.processes, self.save_minutes = processes, save_minutes
        self.stop_requested_at: float | None = None  # time.monotonic()
        self.reason = ""
        self.saved_at = time.monotonic()
        self.launcher = LAUNCHER if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.previous: dict[int, Any] = {}
        self.pending: tuple[torch.Tensor, Any] | None = None
        # A separate group of processes on the host: its messages wait for no device and do not
        # mix with those of the gradients.
        self.group: Any = None
        if processes.world_size > 1:
            self.group = dist.new_group(backend="gloo", timeout=processes.timeout)

    def __enter__(self) -> RankAgreement:
        for number in heeded_signals(*SIGNALS):
            self.previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.pending is not None and (error is None or isinstance(error, Stopped)):
            self.pending[1].wait()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self.stop_requested_at is None:
            self.stop_requested_at, self.reason = now, name
        elif now - self.stop_requested_at > IMPATIENT_AFTER:
            # The second request: end at once, by the handler from before training.
            signal.signal(number, self.previous[number])
            os.kill(os.getpid(), number)

    def is_stop_requested(self) -> bool:
        """Whether this rank got a signal, or its launcher has ended."""
        if self.launcher is not None and os.getppid() != self.launcher:
            self.stop_requested_at = self.stop_requested_at or time.monotonic()
            self.reason = self.reason or "the launcher is gone"
        return self.stop_requested_at is not None

    def saved(self) -> None:
        """Restarts the clock of `save_minutes`; called after each checkpoint."""
        self.saved_at = time.monotonic()

    def agree(self, bad_images: int = 0) -> Agreed:
        """Sends the requests of this rank. All ranks call it together.

        Args:
            bad_images: number of unreadable images that this rank found since the last call.

        Returns:
            The requests of all ranks: those of the last call, or of this one with one process.
        """
        is_due = 0 < self.save_minutes * 60 <= time.monotonic() - self.saved_at
        save = self.processes.is_main and is_due
        requests = torch.tensor([self.is_stop_requested(), save, bad_images], dtype=torch.int64)
        if self.group is None:
            return Agreed(bool(requests[0]), bool(requests[1]), int(requests[2]))
        last = self.pending
        self.pending = requests, dist.all_reduce(requests, group=self.group, async_op=True)
        if last is None:
            return Agreed()
        sums, work = last
        work.wait()
        stops, saves, bad = sums.tolist()
        return Agreed(stops > 0, saves > 0, bad)


class StoppableLoader:
    """A loader after each of whose batches the ranks may agree to stop.

    Its iteration raises `Stopped` when they agree.

    Args:
        calls: how often to call `agree`, equal on all ranks, also if they have unequal numbers of
            batches.
    """

    def __init__(self, agreement: RankAgreement, loader: Iterable[Any], calls: int) -> None:
        self.agreement, self.loader, self.calls = agreement, loader, calls

    def __iter__(self) -> Iterator[Any]:
        remaining = self.calls
        for batch in self.loader:
            yield batch
            remaining -= 1
            if remaining >= 0:
                self._stop_if_agreed()
        for _ in range(remaining):
            self._stop_if_agreed()

    def _stop_if_agreed(self) -> None:
        if self.agreement.agree().stop:
            raise Stopped
