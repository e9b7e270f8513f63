"""Loader workers: signals pass them by, they end with their trainer, and the one that hangs or dies
is named."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from errors import run_command
from pipeline.loaders import closing
from pipeline.workers import SIGNALS, Loader, StuckLoader, _block_signals
from tests import loader_process
from tests.image_folders import message_of
from tests.launches import Forked, say_into, start, wait_until
from tests.loader_process import NAMES
from tests.runs import ROOT

linux = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc"
)


class Numbers(Dataset[int]):
    """0 to 11; something happens in the worker at number 7, which is the second worker's second
    batch's."""

    def __init__(self, at_seven: Callable[[], object] = int) -> None:
        self.at_seven = at_seven

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        if index == 7:
            self.at_seven()
        return index


class Heavy(Dataset[bytes]):
    """So much per sample that the pipe of a worker is full of it, and the worker waits to be read
    from."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> bytes:
        return bytes(2**23)


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield 0
        hang()


def hang() -> None:
    time.sleep(100)


def hang_for_good() -> None:
    """As in a library that never comes back to python: no signal is answered."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    time.sleep(100)


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    os._exit(5)


def make_loader(dataset: Dataset[Any], **more) -> Loader:
    settings = {"batch_size": 2, "num_workers": 2, "timeout": 1, "persistent_workers": True, **more}
    return Loader(dataset, name_of="picture {}".format, **settings)


def take_all(loader: Loader, after_first: Callable[[], object] = int) -> None:
    with closing(loader):
        batches = iter(loader)
        next(batches)
        after_first()
        list(batches)


def failure(loader: Loader, after_first: Callable[[], object] = int) -> tuple[str, float]:
    """What a loader's failure says, and the seconds it took until its workers were gone."""
    begun = time.monotonic()
    said = message_of(StuckLoader, take_all, loader, after_first)
    return said, time.monotonic() - begun


# ---------------------------------------------------------------------------------- in this process


@pytest.mark.parametrize("how", [hang, hang_for_good])
@pytest.mark.parametrize("persistent", [True, False])
def test_p13_a_worker_that_hangs_is_named_with_the_images_it_owes(
    how: Callable[[], None], persistent: bool
) -> None:
    said, seconds = failure(make_loader(Numbers(how), persistent_workers=persistent))
    assert said.startswith("loader worker 1 (process ")
    assert "batch 3, images [6, 7], first picture 6)" in said
    assert "in 1 seconds" in said
    assert "--data-timeout" in said
    assert "--num-workers" in said
    assert seconds < 1 + 5


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (be_killed, ["was killed by SIGKILL", "memory", "--batch-size"]),
        (leave, ["ended with code 5", "crashed"]),
    ],
)
def test_a_worker_that_is_killed_is_named_with_the_images_it_owes(
    how: Callable[[], None], words: list[str]
) -> None:
    said, seconds = failure(make_loader(Numbers(how), timeout=0))
    assert said.startswith("loader worker 1 (process ")
    assert "[6, 7]" in said or "[2, 3]" in said  # those it had handed over may not have arrived
    assert all(word in said for word in [*words, "--num-workers"])
    assert seconds < 5


def test_a_worker_that_dies_in_the_middle_of_a_step_is_named_too() -> None:
    loader = make_loader(Numbers(), batch_size=1)

    def step() -> None:
        os.kill(loader.batches._workers[0].pid, signal.SIGKILL)
        time.sleep(20)

    said, seconds = failure(loader, step)
    assert "worker 0 " in said
    assert "was killed by SIGKILL (next due: batch 2, images [2], first picture 2)" in said
    assert seconds < 5


def test_a_stream_that_hangs_is_told_without_numbers() -> None:
    said, seconds = failure(make_loader(Endless(), batch_size=1))
    assert said.startswith("no loader worker (of 2) gave a batch in 1 seconds")
    assert seconds < 1 + 5


def test_a_failure_leaves_with_a_code_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        loader = make_loader(Numbers(hang))
        with closing(loader):
            list(loader)

    assert run_command(command) == StuckLoader.exit_code == 4
    assert capsys.readouterr().err.startswith("error: loader worker 1")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_rank_that_met_it_says_so(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise StuckLoader("worker 3")

    monkeypatch.setenv("RANK", rank)
    assert run_command(command) == 4
    assert capsys.readouterr().err == "error: worker 3\n"


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^a bug$"), closing(make_loader(Numbers())) as _:
        raise RuntimeError("a bug")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_may_be_closed_at_any_time_and_used_again(workers: int) -> None:
    settings = (
        {"num_workers": workers, "timeout": 60} if workers else {"num_workers": 0, "timeout": 0}
    )
    loader = make_loader(
        Numbers(), **settings, **({} if workers else {"persistent_workers": False})
    )
    loader.close()
    first = iter(loader)
    assert next(first).tolist() == [0, 1]
    loader.close()
    loader.close()
    for _ in range(2):
        assert torch.cat(list(loader)).tolist() == list(range(12))
    assert len(loader) == 6
    loader.close()


@linux
@pytest.mark.parametrize("persistent", [True, False])
def test_p13_a_full_queue_ends_with_its_loader(persistent: bool) -> None:
    loader = make_loader(Heavy(), timeout=60, persistent_workers=persistent)
    batches = iter(loader)
    assert len(next(batches)) == 2
    time.sleep(0.5)  # nobody reads, and each worker has batches more to give than its pipe holds
    workers = [worker.pid for worker in loader.batches._workers]
    begun = time.monotonic()
    loader.close()
    assert time.monotonic() - begun < 3 + 2  # stated, and a slow machine
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_signals_wait_in_processes_that_start() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    show = "import signal; print(len(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    with _block_signals():
        shown = subprocess.run(
            [sys.executable, "-c", show], capture_output=True, text=True, check=True
        )
    assert int(shown.stdout) >= len(SIGNALS) == len(NAMES)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


# ----------------------------------------------------------------------------- a process of its own


@contextmanager
def started(folder: Path, how: str) -> Iterator[Forked | subprocess.Popen[bytes]]:
    """`loader_process` in a process group of its own, in its second epoch. Where it is `failing` it
    has an interpreter of its own, whose end ends the workers."""
    said = folder / "said.log"
    process: Forked | subprocess.Popen[bytes]
    if how == "failing":
        with open(said, "wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.loader_process", str(folder), how],
                cwd=ROOT,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=stream,
                stderr=stream,
            )
    else:
        process = start(be_loader_process, folder, how)
    try:
        assert wait_until(
            lambda: process.poll() is not None or (said.exists() and said.read_text() != ""), 60
        )
        assert said.read_text() == "epoch 0\n"
        yield process
    finally:
        if left(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def be_loader_process(folder: Path, how: str) -> None:
    os.setsid()
    say_into(folder / "said.log")
    multiprocessing.set_start_method("fork", force=True)
    loader_process.main(str(folder), how)


def left(group: int) -> list[int]:
    """Processes of a group that are running."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has ended meanwhile
            continue
        if int(of) == group and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def wait_until_gone(group: int, seconds: float) -> float:
    begun = time.monotonic()
    while left(group):
        assert time.monotonic() - begun < seconds, f"{left(group)} still there"
        time.sleep(0.05)
    return time.monotonic() - begun


@linux
@pytest.mark.slow
def test_signals_to_the_group_pass_workers_by_and_they_end_when_told(tmp_path: Path) -> None:
    """A storm, so that some meet workers that are just starting: the stream's are new in each
    epoch."""
    with started(tmp_path, "closing") as process:
        assert len(left(process.pid)) >= 5
        until = time.monotonic() + 4
        while time.monotonic() < until:
            for name in NAMES:
                if name != "SIGUSR2":
                    os.killpg(process.pid, getattr(signal, name))
            time.sleep(0.005)
        time.sleep(1)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGUSR2)
        assert wait_until_gone(process.pid, 10) < 5
        said = (tmp_path / "said.log").read_text()
        assert process.wait(10) == 0, said
        assert "leaving after" in said
        assert all(name in said for name in NAMES)


@linux
@pytest.mark.slow
def test_a_process_that_fails_is_gone_soon_with_its_workers(tmp_path: Path) -> None:
    """Where nobody says that the loaders close."""
    with started(tmp_path, "failing") as process:
        os.killpg(process.pid, signal.SIGUSR2)
        wait_until_gone(process.pid, 10)
        assert process.wait(10) == 1
        assert "ArithmeticError: a bug" in (tmp_path / "said.log").read_text()


@linux
@pytest.mark.slow
def test_workers_end_when_their_trainer_is_killed(tmp_path: Path) -> None:
    with started(tmp_path, "closing") as process:
        os.kill(process.pid, signal.SIGKILL)
        wait_until_gone(process.pid, 10)
