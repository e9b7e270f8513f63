"""A short form of `python -m tests.chaos`: a run of which a rank is killed, and which torchrun
itself restarts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import chaos


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="processes are looked up in /proc"
)
def test_p1_p9_a_kill_at_random_changes_nothing(tmp_path: Path) -> None:
    """The form in which torchrun begins again by itself; kills that end a launch have tests of
    their own."""
    disturber = chaos.prepare(
        chaos.read_args(["--short", "--kills", "1", "--elastic-restarts"]), tmp_path
    )
    survived, wrong = disturber.run(1)  # of the network with batch norm
    assert wrong == []
    assert survived.launches == 1
    assert len(survived.blows) == 1
