"""What becomes of a command whose stdout or stderr is full, closed or read by nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from run.log import RunLog
from tests.runs import ROOT
from utils import Processes

linux = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")

# A tool prints its results, and a run shows how far it is.
BODIES = {
    "tool": "print('x', flush=True); print('y')",
    "quiet tool": "print('x')",
    "run": "show('x'); show('y'); show('z', 'stderr')",
    "refused": "raise InputError('wrong')",
    "other pipe": "os.write(pipe, b'x')",
}
BEGIN = (
    "import os, sys\n"
    "from errors import InputError, run_command, show\n"
    "reader, pipe = os.pipe(); os.close(reader)\n"
)


def end_of(body: str, redirections: str = "", stdout: int | None = None) -> tuple[int, str]:
    """Exit code and stderr of a command whose output goes there."""
    program = f"{BEGIN}def command():\n    {BODIES[body]}\nsys.exit(run_command(command))"
    done = subprocess.run(
        ["bash", "-c", f'exec "$0" -c "$1" {redirections}', sys.executable, program],
        cwd=ROOT,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    return done.returncode, done.stderr


SPACE = "error: cannot print: No space left on device\n"


@linux
@pytest.mark.parametrize(
    ("body", "redirections", "end"),
    [
        ("tool", "> /dev/full", (1, SPACE)),
        ("quiet tool", "> /dev/full", (1, SPACE)),
        ("run", "> /dev/full", (0, "z\n")),
        ("run", "> /dev/full 2>&1", (0, "")),
        ("run", ">&- 2>&-", (0, "")),
        ("tool", ">&- 2>&-", (0, "")),
        ("refused", "> /dev/full 2>&1", (2, "")),
        ("refused", "2>&-", (2, "")),
    ],
)
def test_a_full_or_closed_stream(body: str, redirections: str, end: tuple[int, str]) -> None:
    assert end_of(body, redirections) == end


@pytest.mark.parametrize(("body", "code"), [("tool", 141), ("quiet tool", 141), ("run", 0)])
def test_output_that_nobody_reads_ends_a_tool_quietly_and_no_run(body: str, code: int) -> None:
    reader, pipe = os.pipe()
    os.close(reader)
    try:
        assert end_of(body, stdout=pipe) == (code, "z\n" if body == "run" else "")
    finally:
        os.close(pipe)


def test_another_broken_pipe_is_still_an_error() -> None:
    code, said = end_of("other pipe", "> /dev/null")
    assert code == 1
    assert "BrokenPipeError" in said


@linux
@pytest.mark.parametrize("has_bar", [False, True])
def test_the_log_of_a_run_goes_on_without_a_terminal(
    has_bar: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: has_bar, raising=False)
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with RunLog(tmp_path, Processes(0, 1, torch.device("cpu")), tensorboard=False) as log:
            for _ in log.progress(range(2), 2, "loop"):
                log.say("a line")
        monkeypatch.undo()
    kept = (tmp_path / "train.log").read_text().splitlines()
    assert [line[20:] for line in kept] == ["a line"] * 2
