"""How long named stretches of work take that lie after and inside each other: by torch.profiler, or
by marks.

A CUDA device works behind the host, and a backward pass is launched from a thread of autograd's
own, where the profiler knows nothing of the names that are open elsewhere. Marks lie in the stream
itself: what is between two of them took the time between them, whoever launched it.

**The marks of CUDA have not been run on a GPU**; the tests run the same code with marks of another
clock.
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
    """Records while it is open as a context. Stretches end in the reverse order of their
    beginning."""

    @abstractmethod
    def begin(self, name: str) -> None:
        """Work under that name begins."""

    @abstractmethod
    def end(self) -> None:
        """What was begun last ends."""

    @abstractmethod
    def total(self) -> dict[str, float]:
        """After the context: milliseconds by name, with what lies inside, added up."""

    @abstractmethod
    def __enter__(self) -> Recorder: ...

    @abstractmethod
    def __exit__(self, *error: Any) -> None: ...

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """The context's work, under that name."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()


class ByProfiler(Recorder):
    """The host's time under each name, as torch.profiler has it; the names also appear among its
    operations.

    Attributes:
        found: the profile, to be asked for its operations after the context.
    """

    def __init__(self, device: torch.device) -> None:
        on_cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self.found = profile(activities=[ProfilerActivity.CPU, *on_cuda])
        self.open: list[record_function] = []

    def __enter__(self) -> ByProfiler:
        self.found.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.found.__exit__(*error)

    def begin(self, name: str) -> None:
        self.open.append(record_function(name))
        self.open[-1].__enter__()

    def end(self) -> None:
        self.open.pop().__exit__(None, None, None)

    def total(self) -> dict[str, float]:
        return {row.key: row.cpu_time_total / 1000 for row in self.found.key_averages()}


class Mark(Protocol):
    """A moment, as `torch.cuda.Event` has it."""

    def record(self) -> None: ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this mark to that one, once both are reached."""


class ByMarks(Recorder):
    """The time between a mark before and one after.

    Args:
        make_mark: gives a mark that is not recorded yet.
        wait: returns when all marks are reached.
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
        added: defaultdict[str, float] = defaultdict(float)
        for name, begun, ended in self.closed:
            added[name] += begun.elapsed_time(ended)
        return dict(added)

    def _mark(self) -> Mark:
        mark = self.make_mark()
        mark.record()
        return mark


def by_cuda_events(device: torch.device) -> ByMarks:
    """Marks in the current stream of a CUDA device."""
    return ByMarks(
        partial(torch.cuda.Event, enable_timing=True), partial(torch.cuda.synchronize, device)
    )
