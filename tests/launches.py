"""Processes of `main.py` that tests watch and disturb: under torchrun, or as ranks without a
launcher.

A fresh python needs seconds to import torch and timm. Processes here are forked from a server that
has done so once; torchrun is torch's own, and forks its ranks too. `Launch(forked=False)` starts
everything anew, as a user does.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

import main
from errors import run_command
from run import agreement
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


# ------------------------------------------------------------------------------------------ forking

Command = Callable[[list[str]], None]  # a function of a module that takes words

MARK = "LAUNCH_MARK"
os.environ.setdefault(MARK, "-" * 36)  # room for a launch's mark, where /proc shows it

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.launches"])  # so that a process starts in no time


class Forked:
    """A forked process, with what launchers and tests ask of a `subprocess.Popen`."""

    def __init__(self, process: BaseProcess) -> None:
        self.process = process
        process.start()
        assert process.pid is not None
        self.pid = process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        ended = wait_until(
            lambda: self.process.exitcode is not None, 3600 if timeout is None else timeout
        )
        if not ended or self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout or 0)
        return self.process.exitcode


def start(function: Callable[..., object], *args: Any) -> Forked:
    """A function of a module, in a process of its own."""
    return Forked(_forks.Process(target=function, args=args))


def say_into(path: Path) -> None:
    """From now on this process writes its output there, behind what is there, at once."""
    stream = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(stream, number)
    for text in (sys.stdout, sys.stderr):
        text.reconfigure(write_through=True)  # type: ignore[union-attr]


# ----------------------------------------------------------------------------------- under torchrun


class Launch:
    """`main.py` under torchrun in the background, with a mark by which all of its processes are
    found in /proc.

    Args:
        words: the flags of `main.py`.
        log: receives what is printed, after what is there.
        restarts: torchrun's `--max-restarts`.
        options: more of torchrun's own.
        forked: see above; else started anew.
    """

    def __init__(
        self,
        words: list[str],
        processes: int,
        log: Path,
        restarts: int = 0,
        options: str = "--standalone",
        forked: bool = True,
    ) -> None:
        self.restarts = restarts
        mark = str(uuid.uuid4())
        self.mark = f"{MARK}={mark}"
        launcher = split(f"{options} --nproc_per_node={processes} --max-restarts={restarts}")
        self.process: Forked | subprocess.Popen[bytes]
        if forked:
            self.process = start(_be_launcher, mark, [*launcher, "main.py", *words], log)
            return
        with open(log, "ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *launcher, "main.py", *words],
                cwd=ROOT,
                stdout=stream,
                stderr=stream,
                env={**os.environ, "OMP_NUM_THREADS": "1", MARK: mark},
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


def _be_launcher(mark: str, argv: list[str], log: Path) -> None:
    _show_mark(mark)
    os.setsid()
    os.chdir(ROOT)
    say_into(log)
    os.environ["OMP_NUM_THREADS"] = "1"
    with patch.object(
        SubprocessHandler, "_popen", lambda handler, args, env: _fork_rank(args, env)
    ):
        torch.distributed.run.main(argv)


def _show_mark(mark: str) -> None:
    """Writes over the text that /proc shows as this process's environment, and its children's."""
    library = ctypes.CDLL(None)
    library.getenv.restype = ctypes.c_void_p
    place = library.getenv(MARK.encode())
    assert len(mark) == len(ctypes.string_at(place))
    ctypes.memmove(place, mark.encode(), len(mark))


def _fork_rank(args: tuple[str, ...], env: dict[str, str]) -> Forked:
    words = args[args.index("main.py") + 1 :]
    with warnings.catch_warnings():  # the launcher's threads hold no lock that the rank takes
        warnings.simplefilter("ignore", DeprecationWarning)
        forked = Forked(
            multiprocessing.get_context("fork").Process(
                target=_be_rank_of_torchrun, args=(list(words), env, os.getpid())
            )
        )
    with suppress(OSError):  # the first of the two to do it
        os.setpgid(forked.pid, forked.pid)
    return forked


def _be_rank_of_torchrun(words: list[str], env: dict[str, str], launcher: int) -> None:
    """As `main.py` begins in a python of its own."""
    os.setpgid(0, 0)
    gc.freeze()  # what is the launcher's is not for this process to close
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for file in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(file).st_mode):  # of the launcher's store
                os.close(file)
    os.environ.clear()
    os.environ.update(env)
    agreement.LAUNCHER = launcher
    _run(main.main, words)


def _run(command: Command, words: list[str]) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # loader workers, as where no test is
    sys.exit(run_command(lambda: command(words)))


def torchrun(
    folder: Path, *words: str | Path, processes: int = 2, seconds: float = 120
) -> tuple[int, str]:
    """A launch to its end, which leaves no process. Returns its exit code and what it said."""
    log = folder / f"said_{uuid.uuid4()}.log"
    with Launch(split(*words), processes, log) as launch:
        code = launch.wait(seconds)
        assert launch.wait_until_gone(5), launch.left()
    return code, log.read_text(encoding="utf-8")


# --------------------------------------------------------------------------------- without torchrun

Meddle = Callable[
    [int], AbstractContextManager[Any]
]  # rank -> what goes wrong there; a function of a module


class Ranks:
    """The ranks of one `main.py`, each a process.

    Args:
        folder: receives what each rank prints.
        meddle: rank -> context that its run is put into. It must be picklable: a function of a
            module, or a partial.
        command: what takes the words.
    """

    def __init__(
        self,
        world_size: int,
        folder: Path,
        *words: str | Path,
        meddle: Meddle | None = None,
        command: Command = main.main,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.said_in = [folder / f"rank{rank}_{port}.log" for rank in range(world_size)]
        self.processes = [
            _forks.Process(
                target=_be_rank, args=(rank, world_size, port, split(*words), said, meddle, command)
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
    rank: int,
    world_size: int,
    port: int,
    words: list[str],
    said: Path,
    meddle: Meddle | None,
    command: Command,
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    say_into(said)
    with meddle(rank) if meddle is not None else nullcontext():
        _run(command, words)


def run_ranks(
    world_size: int,
    folder: Path,
    *words: str | Path,
    meddle: Meddle | None = None,
    command: Command = main.main,
) -> None:
    """A small run on so many ranks, to its end; all must succeed."""
    ranks = Ranks(world_size, folder, SMALL, *words, meddle=meddle, command=command)
    codes = ranks.wait()
    assert codes == [0] * world_size, [ranks.said(rank)[-2000:] for rank in range(world_size)]
