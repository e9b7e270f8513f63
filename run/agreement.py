"""What the ranks agree on between steps: to stop, to save, that an image was bad. And who asks for
it: signals, clock.

A polite stop is a signal (SIGTERM, SIGINT, SIGUSR1, SIGHUP) to any rank or to the launcher, or a
launcher that is gone: all ranks finish their step, save and leave. Knows no training state.
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

from utils import Processes

SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)
)
LAUNCHER = (
    os.getppid()
)  # asked for early: while the ranks meet in its store, it must still be there
IMPATIENT_AFTER = 3.0  # seconds; a launcher and a batch system may send the same signal twice


class Agreed(NamedTuple):
    """What some rank asked for, the same on all of them."""

    stop: bool = False
    save: bool = False
    bad_images: int = 0  # new ones, of all ranks


class Stopped(Exception):
    """All ranks have agreed to stop."""


class RankAgreement:
    """Used as a context around training. Answers come one call late, so that no rank waits for
    another's message.

    Args:
        save_minutes: rank 0 asks for a save so long after the last one; 0 for never.
    """

    def __init__(self, processes: Processes, save_minutes: float = 0) -> None:
        self.processes, self.save_minutes = processes, save_minutes
        self.asked_at: float | None = None  # for a stop
        self.reason = ""
        self.saved_at = time.monotonic()
        self.launcher = LAUNCHER if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.previous: dict[int, Any] = {}
        self.pending: tuple[torch.Tensor, Any] | None = None
        # Messages of their own group travel beside the gradients, on the host: no device is waited
        # for.
        self.group: Any = None
        if processes.world_size > 1:
            self.group = dist.new_group(backend="gloo", timeout=processes.timeout)

    def __enter__(self) -> RankAgreement:
        for number in SIGNALS:
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
        if self.asked_at is not None and now - self.asked_at > IMPATIENT_AFTER:
            signal.signal(number, self.previous[number])  # asked again: at once
            os.kill(os.getpid(), number)
            return
        if self.asked_at is None:
            self.asked_at, self.reason = now, name

    def stop_is_asked_for(self) -> bool:
        if self.launcher is not None and os.getppid() != self.launcher:
            self.asked_at, self.reason = (
                self.asked_at or time.monotonic(),
                self.reason or "the launcher is gone",
            )
        return self.asked_at is not None

    def saved(self) -> None:
        """Starts the clock of `save_minutes` anew."""
        self.saved_at = time.monotonic()

    def agree(self, bad_images: int = 0) -> Agreed:
        """Tells the others what this rank wants, and returns what all wanted a call ago. All ranks
        call it together."""
        late = (
            self.processes.is_main
            and 0 < self.save_minutes * 60 <= time.monotonic() - self.saved_at
        )
        wanted = torch.tensor([self.stop_is_asked_for(), late, bad_images], dtype=torch.int64)
        if self.group is None:
            return Agreed(bool(wanted[0]), bool(wanted[1]), int(wanted[2]))
        before, self.pending = (
            self.pending,
            (wanted, dist.all_reduce(wanted, group=self.group, async_op=True)),
        )
        if before is None:
            return Agreed()
        before[1].wait()
        stop, save, bad = before[0].tolist()
        return Agreed(stop > 0, save > 0, bad)


class StoppableLoader:
    """A loader whose ranks agree after each batch, `calls` times in all, however many batches this
    rank has.

    Its iteration raises `Stopped` where they agree to stop.
    """

    def __init__(self, watch: RankAgreement, loader: Iterable[Any], calls: int) -> None:
        self.watch, self.loader, self.calls = watch, loader, calls

    def __iter__(self) -> Iterator[Any]:
        left = self.calls
        for batch in self.loader:
            yield batch
            left -= 1
            self._stop_if_agreed(left >= 0)
        for _ in range(left):
            self._stop_if_agreed(True)

    def _stop_if_agreed(self, ask: bool) -> None:
        if ask and self.watch.agree().stop:
            raise Stopped
