"""The time spent waiting for batches: measured, logged, and spoken of where it is long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from run import loop
from run.loop import TimedLoader
from tests.image_folders import make_image_folder
from tests.runs import read_log, run_small, scalars_in, split


class Slow:
    """Three batches; the first is there after 0.1 s, the others after 0.02 s."""

    def __iter__(self) -> Iterator[int]:
        time.sleep(0.08)
        for number in range(3):
            time.sleep(0.02)
            yield number


def test_waiting_is_measured_and_working_is_not() -> None:
    waits = TimedLoader(cast(Any, Slow()))
    assert waits.mean() == waits.recent() == 0
    for number in waits:
        time.sleep(0.05)
        if number == 1:
            assert 0.05 < waits.recent() < 0.09
    assert waits.batches == 3
    assert 0.02 <= waits.recent() < 0.05
    assert 0.14 <= waits.seconds < 0.2
    assert waits.mean() == waits.seconds / 3
    assert 0.1 <= waits.first < 0.15


def test_only_a_large_share_of_a_long_time_is_worth_a_word() -> None:
    waits = TimedLoader()
    waits.first, waits.seconds = 30.0, 36.0
    assert waits.is_long(30 + 59)
    assert not waits.is_long(30 + 61)  # 6 of 61 seconds
    waits.seconds = 34.0
    assert not waits.is_long(36)  # 4 of 6 seconds: short all the same


def test_a_run_logs_its_waits_and_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_image_folder(tmp_path / "images", per_class=16)
    monkeypatch.setattr(loop, "LONG_WAIT_SHARE", 0.0)
    monkeypatch.setattr(loop, "LONG_WAIT_SECONDS", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr("tests.runs.CLOCKS", ())
        words = split(
            "--epochs 2 --log-every 2 --data-path", root, "--output-dir", tmp_path / "run"
        )
        run = run_small(*words)
        steps = scalars_in(tmp_path / "run" / "steps")["data_wait"]
    assert run.code == 0, run.err
    lines = read_log(tmp_path / "run")
    assert len(lines) == 2
    assert all(0 < line["train_data_wait"] < 60 for line in lines)
    assert [step for step, _ in steps] == [1, 3, 5, 7]
    assert all(0 < seconds < 60 for _, seconds in steps)
    assert run.out.count("data_wait ") == 4
    assert run.out.count("waiting for data") == 1
    assert "raise --num-workers" in run.out


def test_checkpoints_keep_no_clock(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "images", per_class=8)
    assert run_small("--data-path", root, "--output-dir", tmp_path / "run").code == 0
    state = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    assert all("data_wait" not in sums for sums in state["meters"])
