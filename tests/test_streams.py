"""What becomes of a command whose stdout or stderr is full, closed or read by nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from errors import InputError, run_command
from mixers.interface import MixedBatch
from run.log import RunLog
from run.pictures import describe_pairs
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


HOSTILE = "a\x1b]0;owned\x07\u202e\udcff"  # a command to the terminal, and no UTF-8
HARMLESS = r"a\x1b]0;owned\x07\u202e\udcff"


def test_names_are_printed_and_logged_with_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        suppress(InputError),
        RunLog(tmp_path, Processes(0, 1, torch.device("cpu")), tensorboard=False) as log,
    ):
        log.say(f"{HOSTILE}\nb")
        log.table([("data", f"{HOSTILE}\nb")])
        raise InputError(HOSTILE)
    lines = [HARMLESS, "b", f"data  {HARMLESS}\\nb"]
    assert capsys.readouterr().out.splitlines() == lines
    kept = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    assert [line[20:] for line in kept] == [*lines, f"error: {HARMLESS}"]

    def command() -> None:
        print("\udcff")
        raise InputError(HOSTILE)

    assert run_command(command) == 2
    assert capsys.readouterr() == ("\\udcff\n", f"error: {HARMLESS}\n")


def test_class_names_are_drawn_with_escapes() -> None:
    batch = MixedBatch(torch.zeros(2, 3, 8, 8), torch.eye(2))
    (pair,) = describe_pairs(batch, torch.tensor([0, 1]), [HOSTILE, "b\nc"], (2, 2))
    assert (pair.source, pair.target) == (r"b\nc", HARMLESS)


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
