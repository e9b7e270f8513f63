"""A short form of `python -m tests.chaos`, which the long one's figures come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import chaos

linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are looked up in /proc")


@linux
@pytest.mark.slow
def test_p1_kills_at_random_change_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    code = chaos.main(["--short", "--runs", "1", "--kills", "2"])
    said = capsys.readouterr().out
    assert code == 0, said
    assert "1 of 1 exact" in said
