"""Times named, possibly nested parts of a program, with torch.profiler or with CUDA events.

A CUDA device works later than the host, and autograd launches the backward pass from another
thread, where the profiler does not know the names. Events are recorded in the stream itself, so the
time between two of them is the time of the work between them, whichever thread launched it.

**The CUDA events have not been run on a GPU**; the tests run the same code with another clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile, record_function


class Recorder(ABC):
    """A context that records named parts. Parts end in the reverse order of their beginning."""

    @abstractmethod
    def begin(self, name: str) -> None:
        """Begins the part with this name."""

    @abstractmethod
    def end(self) -> None:
        """Ends the part that was begun last."""

    @abstractmethod
    def total(self) -> dict[str, float]:
        """Milliseconds by name, summed, nested parts included; call it after the context."""

    @abstractmethod
    def __enter__(self) -> Recorder: ...

    @abstractmethod
    def __exit__(self, *error: Any) -> None: ...

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """A context whose work is the part with this name."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()


class ByProfiler(Recorder):
    """Times the host with torch.profiler; the names also appear among its operations.

    Attributes:
        profile: the profile, which gives its operations after the context.
    """

    def __init__(self, device: torch.device) -> None:
        on_cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self.profile = profile(activities=[ProfilerActivity.CPU, *on_cuda])
        self.open: list[record_function] = []

    def __enter__(self) -> ByProfiler:
        self.profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)

    def begin(self, name: str) -> None:
        self.open.append(record_function(name))
        self.open[-1].__enter__()

    def end(self) -> None:
        self.open.pop().__exit__(None, None, None)

    def total(self) -> dict[str, float]:
        return {row.key: row.cpu_time_total / 1000 for row in self.profile.key_averages()}


class Mark(Protocol):
    """A point in time, such as `torch.cuda.Event`."""

    def record(self) -> None: ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this mark to `end_event`, after both are reached."""


class ByMarks(Recorder):
    """Times each part by a mark before it and a mark after it.

    Args:
        make_mark: returns a mark that is not recorded yet.
        wait: waits until all marks are reached.
    """

    def __init__(self, make_mark: Callable[[], Mark], wait: Callable[[], Any]) -> None:
        self.make_mark, self.wait = make_mark, wait
        self.open: list[tuple[str, Mark]] = []
        self.closed: list[tuple[str, Mark, Mark]] = []

    def __enter__(self) -> ByMarks:
        return self

    def __exit__(self, *error: Any) -> None:
        self.wait()

    def begin(self, name: str) -> None:
        self.open.append((name, self._mark()))

    def end(self) -> None:
        self.closed.append((*self.open.pop(), self._mark()))

    def total(self) -> dict[str, float]:
        sums: defaultdict[str, float] = defaultdict(float)
        for name, begun, ended in self.closed:
            sums[name] += begun.elapsed_time(ended)
        return dict(sums)

    def _mark(self) -> Mark:
        mark = self.make_mark()
        mark.record()
        return mark


def by_cuda_events(device: torch.device) -> ByMarks:
    """A recorder with events in the current stream of a CUDA device."""
    return ByMarks(
        partial(torch.cuda.Event, enable_timing=True), partial(torch.cuda.synchronize, device)
    )
