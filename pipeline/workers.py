"""torch's loader with workers that ignore signals and end with the trainer, and with clear errors.

A launcher sends its signal to the whole process group. A worker that died from it would end the
trainer in the middle of a step. Workers therefore ignore signals until the trainer closes its
loader or has ended. The trainer is the process that uses the loader.

Private names of torch are used here: `_iterator`, `_workers`, `_shutdown_workers`,
`_pin_memory_thread`.
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

from errors import SampleError

SIGNAL_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
SIGNALS = tuple(getattr(signal, name) for name in SIGNAL_NAMES if hasattr(signal, name))
GRACE = (0.5, 2.0)  # seconds for a worker to end by itself before SIGTERM, then before SIGKILL
CAUSES = {
    "SIGKILL": "probably out of memory: lower --num-workers or --batch-size",
    "SIGBUS": (
        "probably shared memory is full: lower --num-workers, or allow more (docker run --shm-size)"
    ),
}
CRASHED = "it crashed, perhaps at one of these images: run with --num-workers 0 to find it"


class StuckLoader(SampleError):
    """A loader worker hangs or was killed; only its rank knows, as with an unreadable file."""

    exit_code = 4


class Loader(DataLoader[Any]):
    """torch's loader with `close` and `explain`. It can be iterated again after either.

    Args:
        name_of: image number -> its name in messages.
        settings: those of torch's `DataLoader`.
    """

    def __init__(
        self, dataset: Dataset[Any], *, name_of: Callable[[int], str] = str, **settings: Any
    ) -> None:
        self.name_of = name_of
        self.batches: Any = None  # torch's iterator of this epoch
        self.received = 0  # number of batches of this epoch so far
        self.waiting = False  # whether the trainer waits for the next batch
        if settings.get("num_workers"):
            self.is_closing = multiprocessing.RawValue("b", 0)  # shared with the workers
            settings["worker_init_fn"] = partial(_handle_signals, self.is_closing)
            # If nobody calls `close`: Python runs this before it ends its remaining processes.
            Finalize(self, setattr, (self.is_closing, "value", 1), exitpriority=100)
        super().__init__(dataset, **settings)

    def __iter__(self) -> Any:
        self.received, self.waiting = 0, True
        with explain_errors(self):
            # Persistent workers of an earlier epoch have their signal handlers already.
            with nullcontext() if self._iterator else _block_signals():
                self.batches = super().__iter__()
            for batch in self.batches:
                self.received, self.waiting = self.received + 1, False
                yield batch
                self.waiting = True
        self.waiting = False

    def close(self) -> None:
        """Ends all workers within three seconds; the next iteration starts new ones."""
        batches, self.batches, self._iterator = self.batches, None, None
        if not getattr(batches, "_workers", None):
            return
        self.is_closing.value = 1
        ended = threading.Event()
        killer = threading.Thread(target=_kill_late_workers, args=(batches, ended))
        killer.start()
        try:
            with suppress(RuntimeError):  # about a killed worker, which was reported before
                batches._shutdown_workers()
        finally:
            ended.set()
            killer.join()
            self.is_closing.value = 0

    def explain(self, error: RuntimeError) -> str | None:
        """The message for torch's `error`, or None if it is not about a worker of this loader.

        The message names the worker, the cause and the images of the worker's next batch.
        """
        text = str(error)
        if self.waiting and text.startswith("DataLoader timed out"):
            return self._explain_timeout()
        pids = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", text)
        if pids is None:
            return None
        for number, worker in enumerate(getattr(self.batches, "_workers", [])):
            if str(worker.pid) in pids[1].split(", "):
                return self._explain_exit(number, worker)
        return None

    def _explain_timeout(self) -> str:
        workers = getattr(self.batches, "_workers", [])
        if isinstance(self.dataset, IterableDataset):
            # Workers of a stream may end early, so it is not known whose batch is next.
            who = f"no loader worker (of {len(workers)}) gave a batch"
        else:
            number = self.received % len(workers)
            process = workers[number].pid
            who = f"loader worker {number} (process {process}) gave no batch{self._next_of(number)}"
        return (
            f"{who} in {self.timeout:g} seconds. Is a file system slow or gone? "
            "Raise --data-timeout (0 waits without limit) or lower --num-workers"
        )

    def _explain_exit(self, number: int, worker: Any) -> str:
        code = worker.exitcode or 0
        name = signal.Signals(-code).name if code < 0 else ""
        how = f"was killed by {name}" if name else f"ended with code {code}"
        who = f"loader worker {number} (process {worker.pid})"
        return f"{who} {how}{self._next_of(number)}; {CAUSES.get(name, CRASHED)}"

    def _next_of(self, worker: int) -> str:
        """The next batch of a worker, as part of a message; "" if it is not known.

        Worker w of W loads the batches w, w + W, w + 2 W, ... of an epoch.
        """
        if isinstance(self.dataset, IterableDataset):
            return ""
        number = self.received + (worker - self.received) % self.num_workers
        entries = next(islice(iter(self.batch_sampler or ()), number, None), [])
        # Training samplers give places (epoch, index, position), others give indices.
        indices = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
        if not indices:
            return ""
        return f" (next due: batch {number}, images {indices}, first {self.name_of(indices[0])})"


@contextmanager
def explain_errors(*loaders: Loader) -> Iterator[None]:
    """Turns torch's errors about workers of these loaders into `StuckLoader`."""
    try:
        yield
    except RuntimeError as error:
        for loader in loaders:
            if (message := loader.explain(error)) is not None:
                raise StuckLoader(message) from error
        raise


def _kill_late_workers(batches: Any, ended: threading.Event) -> None:
    """Sends signals to workers that do not end by themselves, until `ended` is set."""
    # torch's pinning thread may still read from the workers; it must end first.
    if (pinning := getattr(batches, "_pin_memory_thread", None)) is not None:
        pinning.join(timeout=5)
    for seconds, name in zip(GRACE, ("terminate", "kill"), strict=True):
        if ended.wait(seconds):
            return
        for worker in batches._workers:
            getattr(worker, name)()


def _handle_signals(is_closing: Any, worker: int) -> None:
    """In a worker: ignores signals, but ends at a signal if the trainer is closing or has ended.

    Signals that were blocked while the worker started are handled here.
    """
    parent = multiprocessing.parent_process()
    trainer = parent.pid if parent is not None else os.getppid()

    def handle(number: int, frame: FrameType | None) -> None:
        if is_closing.value or os.getppid() != trainer:
            os._exit(0)  # any other code would be an error for the trainer

    for number in SIGNALS:
        signal.signal(number, handle)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def _block_signals() -> Iterator[None]:
    """Blocks signals in processes started inside, until `_handle_signals` unblocks them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
