"""Processes of `main.py` that tests watch and disturb: under torchrun, or forked as ranks without a
launcher."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import main
import utils
from tests.runs import ROOT, SMALL, split


def read_status(folder: Path) -> dict[str, Any]:
    """`status.json`, or nothing where there is none yet."""
    path = folder / "status.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def wait_until(holds: Callable[[], bool], seconds: float, pause: float = 0.02) -> bool:
    """Whether this came to hold within so many seconds."""
    until = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < until:
        time.sleep(pause)
    return held


# ----------------------------------------------------------------------------------- under torchrun


class Launch:
    """`main.py` under torchrun in the background, with a mark by which all of its processes are
    found in /proc.

    Args:
        words: the flags of `main.py`.
        log: receives what is printed, after what is there.
        restarts: torchrun's `--max-restarts`.
        options: more of torchrun's own.
    """

    def __init__(
        self,
        words: list[str],
        processes: int,
        log: Path,
        restarts: int = 0,
        options: str = "--standalone",
    ) -> None:
        self.restarts = restarts
        self.mark = f"LAUNCH_MARK={uuid.uuid4()}"
        name, _, value = self.mark.partition("=")
        launcher = split(
            f"-m torch.distributed.run {options} --nproc_per_node={processes} "
            f"--max-restarts={restarts}"
        )
        with open(log, "ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, "main.py", *words],
                cwd=ROOT,
                stdout=stream,
                stderr=stream,
                env={**os.environ, "OMP_NUM_THREADS": "1", name: value},
                start_new_session=True,
            )

    def is_running(self, pid: int) -> bool:
        """Whether this is a process of this launch, and no zombie, which has no environment any
        more."""
        try:
            return self.mark.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile, or is another user's
            return False

    def left(self) -> list[int]:
        """All processes of this launch that are running: launcher, ranks, loader workers."""
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        return [pid for pid in pids if self.is_running(pid)]

    def ranks(self) -> list[int]:
        """The processes that the launcher started; none once it is gone."""
        try:
            text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        except OSError:
            return []
        return [int(word) for word in text.split() if self.is_running(int(word))]

    def wait_until(self, holds: Callable[[], bool], seconds: float, pause: float = 0.02) -> bool:
        """Whether this came to hold before the launcher ended, and within so many seconds."""
        found = False

        def held_or_ended() -> bool:
            nonlocal found
            found = holds()
            return found or self.process.poll() is not None

        wait_until(held_or_ended, seconds, pause)
        return found

    def wait_until_replaced(self, seconds: float) -> bool:
        """Whether none of the ranks that are there now was left after at most so many seconds."""
        before = set(self.ranks())
        return self.wait_until(lambda: not before & set(self.ranks()), seconds)

    def wait(self, seconds: float) -> int:
        """The launcher's exit code.

        Raises:
            subprocess.TimeoutExpired: it is still running; so are its ranks.
        """
        return self.process.wait(seconds)

    def wait_until_gone(self, seconds: float) -> bool:
        """Whether no process is left after at most so many seconds."""
        return wait_until(lambda: not self.left(), seconds)

    def kill(self) -> None:
        """Ends whatever is left of it, at once."""
        while left := self.left():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        self.process.wait()

    def __enter__(self) -> Launch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()


# --------------------------------------------------------------------------------- without torchrun

Meddle = Callable[
    [int], AbstractContextManager[Any]
]  # rank -> what goes wrong there; a function of a module

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.launches"])  # so that a rank starts in no time


class Ranks:
    """The ranks of one `main.py`, each a process.

    Args:
        folder: receives what each rank prints.
        meddle: rank -> context that its run is put into. It must be picklable: a function of a
            module, or a partial.
    """

    def __init__(
        self, world_size: int, folder: Path, *words: str | Path, meddle: Meddle | None = None
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.said_in = [folder / f"rank{rank}_{port}.log" for rank in range(world_size)]
        self.processes = [
            _forks.Process(
                target=_be_rank, args=(rank, world_size, port, split(*words), said, meddle)
            )
            for rank, said in enumerate(self.said_in)
        ]
        for process in self.processes:
            process.start()

    def said(self, rank: int) -> str:
        return self.said_in[rank].read_text(encoding="utf-8")

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait(self, seconds: float = 120) -> list[int | None]:
        """The exit codes; what is still running after so many seconds is killed, and is None."""
        until = time.monotonic() + seconds
        codes = []
        for process in self.processes:
            process.join(max(0, until - time.monotonic()))
            codes.append(process.exitcode)
        for process in self.processes:
            process.kill()
        return codes


def _be_rank(
    rank: int, world_size: int, port: int, words: list[str], said: Path, meddle: Meddle | None
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(stream, number)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # loader workers, as where no test is
    with meddle(rank) if meddle is not None else nullcontext():
        sys.exit(utils.run_command(lambda: main.main(words)))


def run_ranks(
    world_size: int, folder: Path, *words: str | Path, meddle: Meddle | None = None
) -> None:
    """A small run on so many ranks, to its end; all must succeed."""
    ranks = Ranks(world_size, folder, SMALL, *words, meddle=meddle)
    codes = ranks.wait()
    assert codes == [0] * world_size, [ranks.said(rank)[-2000:] for rank in range(world_size)]
