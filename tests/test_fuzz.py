"""A few hundred of the cases of `tests/fuzz.py`, some for hypothesis to choose, and faults that it
has to find."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import main
from config.checks import check_args
from config.flags import get_args_parser
from config.parser import Parser
from errors import InputError
from pipeline import images as pipeline_images
from run import log, state
from storage.checkpoints import load_checkpoint
from tests import fuzz, junk

COUNTS = {
    "checkpoint": 25,
    "image": 60,
    "flags": 40,
    "saved flags": 20,
    "run folder": 30,
    "tools": 30,
}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> fuzz.World:
    return fuzz.World(tmp_path_factory.mktemp("world"))


def counterexamples(results: list[fuzz.Result]) -> list[str]:
    steps = [step for one in results for step in one.outcomes]
    return [
        f"{step}: {kind}\n{detail}"
        for step, kind, detail in steps
        if kind not in ("done", "refused")
    ]


@needs_fork
@pytest.mark.parametrize("area", fuzz.SHARES)
def test_cases_end_well_or_with_a_message(area: str, world: fuzz.World) -> None:
    waiting = [(area, number) for number in range(COUNTS[area])]
    results = list(fuzz.run_all(world, 0, waiting))
    assert [(one.area, one.number) for one in results] == waiting
    assert counterexamples(results) == []
    kinds = {step.kind for one in results for step in one.outcomes}
    assert kinds >= {"done", "refused"}  # else the cases are too tame, or too wild


# In each area something of the project that its cases lead to, and a name that a counterexample has
# for it.
PLANTED: dict[str, tuple[Any, str]] = {
    "checkpoint": (state, "keep_total_batch"),
    "image": (pipeline_images, "read_files"),
    "flags": (fuzz, "build_train_transform"),
    "saved flags": (main, "check_args"),
    "run folder": (log, "_epoch_of"),
    "tools": (Parser, "error"),
}


def fail(*args: Any, **keywords: Any) -> None:
    raise KeyError("planted")


def kill(*args: Any, **keywords: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@needs_fork
@pytest.mark.parametrize("area", fuzz.SHARES)
def test_a_fault_planted_in_an_area_is_found(
    area: str, world: fuzz.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How it ends, by an error or by the process's death, `test_a_planted_fault_is_found` tells
    apart."""
    monkeypatch.setattr(*PLANTED[area], fail)
    count = COUNTS[area] if area == "flags" else 12  # one command line of eight is not refused
    texts = counterexamples(list(fuzz.run_all(world, 0, [(area, n) for n in range(count)])))
    assert any("KeyError in " in text.splitlines()[0] for text in texts)


def test_a_case_repeats(world: fuzz.World, tmp_path: Path) -> None:
    for area in fuzz.SHARES:
        (tmp_path / area).mkdir()
        first, second = (fuzz.run_case(world, area, 3, 5, tmp_path / area) for _ in range(2))
        assert [(one.step, one.kind) for one in first] == [(one.step, one.kind) for one in second]


# ------------------------------------------------------------------------------- hypothesis chooses

quick = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(st.binary(max_size=200) | st.binary(max_size=50).map(lambda tail: b"PK\x03\x04" + tail))
def test_bytes_are_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.pth"):
        load_checkpoint(tmp_path / "x.pth")


@quick
@given(st.data())
def test_a_checkpoint_cut_anywhere_is_refused(
    world: fuzz.World, tmp_path: Path, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(world.content) - 1))
    (tmp_path / "x.pth").write_bytes(world.content[:cut])
    with pytest.raises(InputError, match=r"x\.pth is truncated or corrupt"):
        load_checkpoint(tmp_path / "x.pth")


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
nests = st.recursive(
    leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=6
)
parts = st.sampled_from(
    ["model", "ema", "args", "format", "model_config", "data", "optimizer", "meters", "x"]
)


@quick
@given(st.dictionaries(parts, nests))
def test_plain_data_is_read_as_it_was_written_or_refused(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    torch.save(content, tmp_path / "x.pth")
    read: list[Any] = []
    outcome = fuzz.attempt("load", lambda: read.append(load_checkpoint(tmp_path / "x.pth")))
    if "model_config" not in content:  # none of ours: it may hold anything
        assert outcome.kind == "done"
    assert (outcome.kind, read) in [("done", [content]), ("refused", [])]


flags = st.sampled_from(
    [text for action in get_args_parser()._actions for text in action.option_strings]
)
words = (
    st.sampled_from(junk.WORDS)
    | st.floats().map(str)
    | st.integers(-9, 999).map(str)
    | st.text(max_size=5)
)


@settings(max_examples=150)
@given(st.lists(flags | words | st.builds("{}={}".format, flags, words), max_size=8))
def test_command_lines_are_taken_or_refused(line: list[str]) -> None:
    outcome = fuzz.attempt("line", lambda: check_args(get_args_parser().parse_args(line)))
    assert outcome.kind in ("done", "refused"), outcome.detail


# --------------------------------------------------------------------------------- faults are found


class Faulty:
    """A world with one fault; its other cases are fine."""

    def __init__(self, fault: Any) -> None:
        self.fault = fault

    def images(self, rng: Any, folder: Path) -> Iterator[fuzz.Outcome]:
        yield fuzz.attempt("step", self.fault if self.turn(folder) else lambda: None)

    checkpoints = flags = saved_flags = run_folders = tools = images

    def turn(self, folder: Path) -> bool:
        """Whether this is the first case that a child runs."""
        (folder / "case").touch(exist_ok=True)
        count = len(list(folder.iterdir()))
        (folder / f"case{count}").touch()
        return count == 1


def refuse_without_a_word() -> None:
    raise InputError("")


def leave_without_a_word() -> None:
    raise SystemExit(2)


def take_much() -> None:
    torch.zeros(1 << 32).sum()


FAULTS = {
    "ValueError in ": lambda: int("x"),
    "a refusal without a message": refuse_without_a_word,
    "exit code 2": leave_without_a_word,
    "RuntimeError in ": take_much,
    "the process died with code -9": kill,
    "no end after 1 s": lambda: time.sleep(30),
}


@needs_fork
@pytest.mark.parametrize("kind", FAULTS)
def test_a_planted_fault_is_found(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 1.0)
    world: Any = Faulty(FAULTS[kind])
    results = list(fuzz.run_all(world, 0, [("image", 0)]))
    ((_, found, _),) = results[0].outcomes
    assert found.startswith(kind)
    assert fuzz.report(results, seed=7) == 1
    assert "again: python -m tests.fuzz --seed 7 --only 'image:0'" in capsys.readouterr().out


@needs_fork
def test_the_next_case_follows_one_that_died(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 5.0)
    world: Any = Faulty(kill)
    results = list(fuzz.run_all(world, 0, [("image", 0), ("image", 1), ("flags", 0)]))
    assert [one.outcomes[0].kind[:8] for one in results] == [
        "the proc"
    ] * 3  # each is the first of a new child
    fine: Any = Faulty(lambda: None)
    assert [
        one.outcomes[0].kind for one in fuzz.run_all(fine, 0, [("image", 0), ("image", 1)])
    ] == ["done"] * 2
