"""A short form of `python -m tests.chaos`: a run that is killed, and one that torchrun itself restarts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests import chaos


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are looked up in /proc")
def test_p1_p9_kills_at_random_change_nothing(tmp_path: Path) -> None:
    disturber = chaos.prepare(chaos.read_args(["--short", "--kills", "1"]), tmp_path)
    killed, wrong = disturber.run(0)
    assert wrong == []
    assert killed.launches > 1
    elastic = replace(disturber, args=chaos.read_args(["--short", "--kills", "1", "--elastic-restarts"]))
    survived, wrong = elastic.run(1)
    assert wrong == []
    assert survived.launches == 1
    assert len(survived.blows) == 1
