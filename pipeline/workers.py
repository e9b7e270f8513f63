"""A loader whose worker processes outlive their trainer's signals, end when it does, and are named
when they fail.

Level 1: imports `utils` only. It must not know images, labels or transforms.

A launcher sends its signal to the whole process group. A worker that died of it would take its
trainer along in the middle of a step, so workers pass signals over until their trainer says that it
is closing, or is gone. Three names of torch's own are used here with a leading underscore
(`_iterator`, `_workers`, `_shutdown_workers`), in `Loader` only.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from itertools import islice
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset

from utils import SampleError

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
GRACE = (
    0.5,
    2.0,
)  # seconds that a worker has for its batch before SIGTERM, and then before SIGKILL
CAUSES = {
    "SIGKILL": "probably the memory ran out: lower --num-workers or --batch-size",
    "SIGBUS": (
        "probably shared memory is full: lower --num-workers, or allow more (docker run --shm-size)"
    ),
}
CRASHED = "it crashed, perhaps at one of these images: --num-workers 0 shows where"


class StuckLoader(SampleError):
    """A worker gives nothing any more: it hangs, or was killed. As of a bad file, only its own rank
    knows of it."""

    exit_code = 4


class Loader(DataLoader[Any]):
    """torch's loader, with `close` and `explain`. May be iterated again after either.

    Args:
        name_of: image number -> its name in messages.
        settings: those of torch's `DataLoader`.
    """

    def __init__(
        self, dataset: Dataset[Any], *, name_of: Callable[[int], str] = str, **settings: Any
    ) -> None:
        self.name_of = name_of
        self.batches: Any = None  # torch's iterator of this epoch
        self.received = 0  # batches of this epoch
        self.waiting = False  # for the next one
        if settings.get("num_workers"):
            self.is_closing = multiprocessing.RawValue("b", 0)  # shared with the workers
            settings["worker_init_fn"] = partial(_stay, self.is_closing)
            # For whoever does not call `close`: python runs this before it ends the processes that
            # are left.
            Finalize(self, setattr, (self.is_closing, "value", 1), exitpriority=100)
        super().__init__(dataset, **settings)

    def __iter__(self) -> Any:
        self.received, self.waiting = 0, True
        with explaining(self):
            with (
                nullcontext() if self._iterator else _held_back()
            ):  # persistent workers have their answer already
                self.batches = super().__iter__()
            for batch in self.batches:
                self.received, self.waiting = self.received + 1, False
                yield batch
                self.waiting = True
        self.waiting = False

    def close(self) -> None:
        """Ends the workers, within three seconds whatever they are doing; the next iteration starts
        new ones."""
        batches, self.batches, self._iterator = self.batches, None, None
        if not getattr(batches, "_workers", None):
            return
        self.is_closing.value = 1
        ended = threading.Event()
        ending = threading.Thread(target=_end, args=(batches, ended))
        ending.start()
        try:
            with suppress(RuntimeError):  # of a worker that was killed: so much is known by now
                batches._shutdown_workers()
        finally:
            ended.set()
            ending.join()
            self.is_closing.value = 0

    def explain(self, error: RuntimeError) -> str | None:
        """What torch's `error` means if it is about a worker of this loader: which one, why, and
        what it owes."""
        workers, text = getattr(self.batches, "_workers", []), str(error)
        if self.waiting and text.startswith("DataLoader timed out"):
            which = self.received % len(workers)
            who = (
                f"loader worker {which} (process {workers[which].pid}) gave no "
                f"batch{self._owed_by(which)}"
            )
            if isinstance(
                self.dataset, IterableDataset
            ):  # whose workers may end early, so that the order is not known
                who = f"no loader worker (of {len(workers)}) gave a batch"
            return (
                f"{who} in {self.timeout:g} seconds. Is a file system slow or gone? Raise "
                "--data-timeout (0 waits for "
                "ever) or lower --num-workers"
            )
        pids = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", text)
        for which, worker in enumerate(workers if pids else []):
            if pids and str(worker.pid) in pids[1].split(", "):
                end = worker.exitcode or 0
                how = (
                    f"was killed by {signal.Signals(-end).name}"
                    if end < 0
                    else f"ended with code {end}"
                )
                why = CAUSES.get(how.split()[-1], CRASHED)
                return (
                    f"loader worker {which} (process {worker.pid}) {how}{self._owed_by(which)}; "
                    f"{why}"
                )
        return None

    def _owed_by(self, worker: int) -> str:
        """The images of the next batch that is due from a worker; batch k of an epoch is worker (k
        mod count)'s."""
        if isinstance(self.dataset, IterableDataset):
            return ""
        number = self.received + (worker - self.received) % self.num_workers
        entries = next(islice(iter(self.batch_sampler or ()), number, None), [])
        indices = [
            entry[1] if isinstance(entry, tuple) else entry for entry in entries
        ]  # of places, or numbers
        return (
            f" (next due: batch {number}, images {indices}, first {self.name_of(indices[0])})"
            if indices
            else ""
        )


@contextmanager
def explaining(*loaders: Loader) -> Iterator[None]:
    """Inside, torch's errors about workers of these loaders become a `StuckLoader`."""
    try:
        yield
    except RuntimeError as error:
        for loader in loaders:
            if (said := loader.explain(error)) is not None:
                raise StuckLoader(said) from error
        raise


def _end(batches: Any, ended: threading.Event) -> None:
    """Signals workers that do not end by themselves, but not while torch's thread may be reading
    from them."""
    if (pinning := getattr(batches, "_pin_memory_thread", None)) is not None:
        pinning.join(timeout=5)
    for seconds, name in zip(GRACE, ("terminate", "kill"), strict=True):
        if ended.wait(seconds):
            return
        for worker in batches._workers:
            getattr(worker, name)()


def _stay(is_closing: Any, worker: int) -> None:
    """In a worker: its answer to signals, first of all to those that were held back while it
    started."""
    parent = multiprocessing.parent_process()
    trainer = parent.pid if parent is not None else os.getppid()

    def answer(number: int, frame: FrameType | None) -> None:
        if is_closing.value or os.getppid() != trainer:
            os._exit(0)  # any other code would be an error to the trainer

    for number in SIGNALS:
        signal.signal(number, answer)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def _held_back() -> Iterator[None]:
    """Signals to processes that are started inside wait until these have an answer to them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
