"""Polite stops: whoever is asked, all ranks finish their step, save and leave, and the run goes on
exactly."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import engine
import utils
from errors import StopRun
from run import agreement
from run.agreement import Agreed, RankAgreement, StoppableLoader, Stopped
from run.state import candidates
from tests.image_folders import make_image_folder
from tests.launches import Launch, Ranks, read_status, run_ranks, wait_until
from tests.runs import SMALL, changed, fingerprint, observing_steps, split
from utils import Processes

ALONE = Processes(0, 1, torch.device("cpu"))
GONE_WITHIN = 10.0  # seconds from a signal until no process is left, as promised

# -------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("name", agreement.SIGNALS)
def test_a_signal_asks_for_a_stop_and_its_handler_goes_with_the_watch(name: str) -> None:
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with RankAgreement(ALONE) as watching:
        assert watching.agree() == Agreed()
        signal.raise_signal(number)
        assert watching.agree() == Agreed(stop=True)
        assert watching.reason == number.name
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("name", agreement.SIGNALS)
def test_a_signal_that_nohup_or_a_shell_made_us_ignore_stays_ignored(name: str) -> None:
    number = signal.Signals[name]
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with RankAgreement(ALONE) as watching:
            signal.raise_signal(number)
            assert watching.agree() == Agreed()
            others = [other for other in agreement.SIGNALS if other != name]
            signal.raise_signal(signal.Signals[others[0]])
            assert watching.agree() == Agreed(stop=True)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_p8_a_second_signal_later_acts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    try:
        with RankAgreement(ALONE) as watching:
            for _ in range(3):  # a launcher and a batch system may each send it
                signal.raise_signal(signal.SIGTERM)
            assert ended == []
            monkeypatch.setattr(agreement, "IMPATIENT_AFTER", -1.0)
            signal.raise_signal(signal.SIGTERM)
            assert ended == [signal.SIGTERM]
            assert watching.is_stop_requested()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_launcher_that_is_gone_asks_for_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not RankAgreement(ALONE).is_stop_requested()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(agreement, "LAUNCHER", os.getppid())
    assert not RankAgreement(ALONE).is_stop_requested()
    monkeypatch.setattr(agreement, "LAUNCHER", os.getppid() + 1)
    watching = RankAgreement(ALONE)
    assert watching.agree() == Agreed(stop=True)
    assert watching.reason == "the launcher is gone"


def test_ranks_whose_launcher_was_killed_before_they_met_leave_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torch would ask its store again and again, for ten minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torchruns = {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in {**address, **ranks, **torchruns}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StopRun, match="the launcher is gone: its store"):
        utils.init_processes("cpu")


def test_the_clock_asks_for_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watching = RankAgreement(ALONE, save_minutes=2)
    answers = []
    for now[0] in (100, 219, 220, 221):
        answers.append(watching.agree().save)
    watching.saved()
    for now[0] in (222, 340, 341):
        answers.append(watching.agree().save)
    assert answers == [False, False, True, True, False, False, True]
    assert not RankAgreement(Processes(1, 1, torch.device("cpu")), 1e-9).agree().save, (
        "rank 0 has the clock"
    )


@pytest.mark.parametrize(("batches", "calls"), [(3, 3), (2, 3), (0, 2), (2, 0)])
def test_ranks_with_unequal_shares_ask_equally_often(batches: int, calls: int) -> None:
    watching = RankAgreement(ALONE)
    with patch.object(RankAgreement, "agree", return_value=Agreed()) as agree:
        assert list(StoppableLoader(watching, range(batches), calls)) == list(range(batches))
    assert agree.call_count == calls
    watching.stop_requested_at = 1.0
    if calls:
        with pytest.raises(Stopped):
            list(StoppableLoader(watching, range(batches), calls))


# -------------------------------------------------------------------------------- several processes

# 24 steps of two ranks, with workers; each is saved.
WORDS = (
    "--aa rand-m9-mstd0.5-inc1 --drop 0.1 --batch-size 1 --epochs 2 --lr 0.1 --num-workers 1 "
    "--save-steps 1 "
    "--log-every 1 --auto-resume"
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(
        tmp_path_factory.mktemp("photos"), ("ant", "bee", "cat"), per_class=8, size=(20, 20)
    )


@pytest.fixture(scope="module")
def words(photos: Path) -> list[str]:
    return split(WORDS, "--data-path", photos, "--output-dir")


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(2, folder, *words, folder / "run")
    return fingerprint(folder / "run")


@contextmanager
def signal_at(where: str, number: signal.Signals, rank: int) -> Iterator[None]:
    """Rank 1 alone gets it: in its step 4, or as it begins to evaluate."""
    if rank == 0:
        yield
        return
    real = engine.evaluate

    def evaluate(*args: Any) -> Any:
        os.kill(os.getpid(), number)
        return real(*args)

    def see(training: engine.Training, step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), number)

    with (
        patch.object(engine, "evaluate", evaluate)
        if where == "the evaluation"
        else observing_steps(see)
    ):
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "number", "epoch", "step", "samples"),
    [("a step", signal.SIGUSR1, 0, 6, 12), ("the evaluation", signal.SIGINT, 0, 12, 24)],
)
def test_p8_a_signal_to_one_rank_stops_all(
    where: str,
    number: signal.Signals,
    epoch: int,
    step: int,
    samples: int,
    words: list[str],
    whole: dict[str, str],
    tmp_path: Path,
) -> None:
    """Within one further step; also while they evaluate, of which nothing is kept."""
    run_ranks(2, tmp_path, *words, tmp_path / "run", meddle=partial(signal_at, where, number))
    status = read_status(tmp_path / "run")
    assert (status["state"], status["epoch"], status["step"]) == ("preempted", epoch, step)
    newest = torch.load(candidates(tmp_path / "run")[0], weights_only=True)
    assert (newest["step"], newest["samples_in_epoch"]) == (step, samples)
    assert not (tmp_path / "run" / "log.txt").exists()
    run_ranks(2, tmp_path, *words, tmp_path / "run")
    assert changed(whole, fingerprint(tmp_path / "run")) == []


@contextmanager
def stuck_after(step: int, rank: int) -> Iterator[None]:
    def see(training: engine.Training, done: int) -> None:
        if done == step:
            time.sleep(60)

    with observing_steps(see):
        yield


@pytest.mark.slow
def test_p8_asked_twice_a_stuck_run_ends_at_once(words: list[str], tmp_path: Path) -> None:
    ranks = Ranks(2, tmp_path, SMALL, *words, tmp_path / "run", meddle=partial(stuck_after, 3))
    assert wait_until(lambda: read_status(tmp_path / "run").get("step") == 3, 60)
    for pause in (agreement.IMPATIENT_AFTER + 0.5, 0):
        for rank in range(2):
            ranks.kill(rank, signal.SIGTERM)
        time.sleep(pause)
    assert ranks.wait(GONE_WITHIN) == [-signal.SIGTERM] * 2


def begin(words: list[str], folder: Path, forked: bool = True) -> Launch:
    handled = "--standalone --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    flags = [*split(SMALL), *words, str(folder / "run")]
    return Launch(flags, 2, folder / "said.log", options=handled, forked=forked)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="processes are looked up in /proc"
)
def test_p8_signals_to_the_launcher(photos: Path, tmp_path: Path) -> None:
    """Each ends the run politely and leaves no process behind, SIGKILL too; the same command goes
    on to the end. The first launch is one as a user's."""
    more = split(f"{WORDS} --epochs 3", "--data-path", photos, "--output-dir")
    run_ranks(2, tmp_path, *more, tmp_path / "whole")
    step = 0

    def has_gone_on() -> bool:
        return read_status(tmp_path / "run").get("step", 0) > step + 1

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL):  # SIGINT to ranks: above
        with begin(more, tmp_path, number != signal.SIGTERM) as launch:
            assert launch.wait_until(has_gone_on, 60)
            os.kill(launch.process.pid, number)
            assert launch.wait_until_gone(GONE_WITHIN), f"{number.name}: {launch.left()}"
            assert launch.wait(1) != 0
        status = read_status(tmp_path / "run")
        assert status["state"] == "preempted", number.name
        assert status["step"] > step
        step = status["step"]
    said = (tmp_path / "said.log").read_text()
    assert [
        said.count(f"({reason});") for reason in ("SIGTERM", "SIGUSR1", "the launcher is gone")
    ] == [1] * 3
    with begin(more, tmp_path) as launch:
        assert launch.wait(60) == 0
        assert launch.wait_until_gone(1)
    assert read_status(tmp_path / "run")["state"] == "done"
    assert changed(fingerprint(tmp_path / "whole"), fingerprint(tmp_path / "run")) == []
