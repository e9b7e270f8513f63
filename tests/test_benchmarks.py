"""The benchmarks run, compare what they say they compare, and write what they measured. No figure
is looked at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from errors import run_command
from mixers.interface import Regions
from smmix import paste_regions
from tools.bench import profile_step, run, steps
from tools.bench.recorders import ByMarks
from tools.bench.timing import Case, Timing, measure, to_markdown

CPU = torch.device("cpu")
TINY = ["--model", "vit_nano_patch4_32", "--batch-size", "4", "--device", "cpu"]


def test_every_case_is_timed_in_every_round_beside_its_reference() -> None:
    calls: list[str] = []
    cases = [Case("one", lambda: calls.append("one")), Case("two", lambda: calls.append("two"), 3)]
    timings = measure(cases, CPU, rounds=4, warm_up=1)
    assert (calls.count("one"), calls.count("two")) == (1 + 4, 1 + 4 * 3)
    assert [timing.name for timing in timings] == ["one", "two"]
    assert timings[0].ratio == (1.0, 1.0, 1.0)
    assert measure(cases, CPU, rounds=2, reference="two")[1].ratio == (1.0, 1.0, 1.0)


def test_medians_and_quartiles_are_shown() -> None:
    table = to_markdown(
        [Timing("a", (0.5, 0.4, 0.6), (1.25, 1.0, 1.5)), Timing("b", (2.0, 2.0, 2.0), (4, 4, 4))]
    )
    assert "| a | 500 | 1.25 [1.00..1.50] |" in table
    assert "peak" not in table
    more = to_markdown([Timing("a", (0.5, 0.4, 0.6), (1.25, 1.0, 1.5), 12.0, 64.0)])
    assert "| case | ms | ratio | images/s | peak MiB |" in more
    assert "| a | 500 | 1.25 [1.00..1.50] | 64 | 12 |" in more


def test_memory_is_the_most_that_one_call_holds_at_once() -> None:
    held = torch.zeros(2**20)

    def run() -> None:
        for _ in range(3):  # two of 4 MiB at a time
            (held + 1).add_(held * 2)

    (timing,) = measure([Case("twice", run, images=5)], CPU, rounds=3, with_memory=True)
    assert timing.peak_mib == pytest.approx(8, abs=0.1)
    assert timing.images_per_second == pytest.approx(5 / timing.seconds[0])


def test_half_of_the_steps_by_mixup() -> None:
    seconds = {"cutmix": 1.0, "mixup": 1.0, "smmix": 1.4, "none": 0.9, steps.SPLIT: 1.1}
    timings = [
        Timing(f"step with {name}", (value, value, value), (1, 1, 1))
        for name, value in seconds.items()
    ]
    assert steps.switched(timings) == pytest.approx({"cutmix": 1.0, "smmix": 1.2, steps.SPLIT: 1.1})


def test_the_textbook_way_pastes_the_same() -> None:
    images = torch.rand(4, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    regions = Regions(
        torch.tensor([[0, 1], [2, 2], [1, 0], [0, 0]]),
        torch.tensor([[1, 1], [0, 0], [2, 3], [0, 2]]),
        torch.tensor([[2, 3]] * 4),
    )
    ours = paste_regions(images, regions, (8, 8))
    assert torch.equal(steps.paste_by_unfolding((2, 3), images, regions, (8, 8)), ours)


def test_a_quick_run_writes_all_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        *TINY,
        "--quick",
        "--parts",
        "step",
        "guide",
        "update",
        "paste",
        "--output",
        str(tmp_path),
    ]
    assert run_command(lambda: run.main(flags)) == 0
    told, written = capsys.readouterr().out, json.loads((tmp_path / "bench.json").read_text())
    assert (tmp_path / "bench.md").read_text().strip() == told.strip()
    assert {"device", "threads", "torch", "commit"} <= written["machine"].keys()
    assert list(written["results"]) == ["step", "guide", "update", "paste"]
    names = [timing["name"] for timing in written["results"]["step"]]
    assert names[0] == "step with cutmix"
    cheaper = [
        "--guide-amp bf16",
        "--guide-size 16 16",
        "--con-weight 0",
        "--con-weight 0 --score-block 2",
    ]
    more = ["--mix-protocol split", *cheaper]
    assert set(names) == {
        f"step with {name}" for name in [*steps.METHODS, *(f"smmix {flags}" for flags in more)]
    }
    half = written["half_mixup"]
    assert half == steps.switched([Timing(**timing) for timing in written["results"]["step"]])
    shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in half.items())
    assert f"Half of the steps by Mixup, over CutMix with Mixup: {shown}\n" in told
    assert "stages" not in written


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_in_a_later_part_loses_nothing(
    error: type[BaseException],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(run.pipeline, "cases", fail)
    with pytest.raises(error):
        run.main([*TINY, "--quick", "--parts", "pipeline", "paste", "--output", str(tmp_path)])
    written, table = (
        json.loads((tmp_path / "bench.json").read_text()),
        (tmp_path / "bench.md").read_text(),
    )
    assert list(written["results"]) == ["paste"]
    assert len(written["results"]["paste"]) == 5
    assert "| paste_regions | " in table
    assert capsys.readouterr().out == table


def test_places_are_checked_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: object) -> None:
        raise AssertionError("too early")

    monkeypatch.setattr(run.steps, "Bench", build)
    nothing, file, before = tmp_path / "nothing", tmp_path / "file", tmp_path / "bench.json"
    file.touch()
    before.write_text("of an earlier run")
    assert run_command(lambda: run.main([*TINY, "--data-path", str(nothing)])) == 2
    assert f"--data-path {nothing}: holds no image" in capsys.readouterr().err
    for folder in (file, file / "inside"):
        assert run_command(lambda folder=folder: run.main([*TINY, "--output", str(folder)])) == 2  # type: ignore[misc]
        assert f"--output {folder}: cannot be written" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="too early"):
        run.main([*TINY, "--output", str(tmp_path)])
    assert before.read_text() == "of an earlier run"


def test_a_profile_names_the_parts_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: profile_step.main([*TINY, "--steps", "1", "--rows", "3"])) == 0
    told = capsys.readouterr().out
    rows = dict(
        line.strip("| ").split(" | ")[:2] for line in told.splitlines() if line.startswith("| ")
    )
    assert set(profile_step.PARTS) <= rows.keys()
    assert all(float(rows[part]) >= 0 for part in profile_step.PARTS)


class Clock:
    """Marks whose time is how many were recorded before; like those of a device, they are read
    after waiting only."""

    def __init__(self) -> None:
        self.ticks, self.waited = 0, -1

    def wait(self) -> None:
        self.waited = self.ticks


class Tick:
    def __init__(self, clock: Clock) -> None:
        self.clock, self.time = clock, -1

    def record(self) -> None:
        assert self.time == -1, "recorded twice"
        self.time = self.clock.ticks
        self.clock.ticks += 1

    def elapsed_time(self, end_event: Tick) -> float:
        assert self.clock.waited > end_event.time > self.time >= 0
        return float(end_event.time - self.time)


def test_marks_time_what_lies_between_them() -> None:
    clock = Clock()
    recorder = ByMarks(lambda: Tick(clock), clock.wait)
    with recorder, recorder.during("all"):
        for _ in range(3):
            with recorder.during("outer"), recorder.during("inner"):
                pass
        with pytest.raises(ZeroDivisionError), recorder.during("failed"):
            raise ZeroDivisionError
    assert recorder.total() == {"inner": 3, "outer": 9, "failed": 1, "all": 15}


def test_parts_of_a_step_are_timed_by_marks() -> None:
    clock, backward = Clock(), torch.Tensor.backward
    bench = steps.Bench("vit_nano_patch4_32", CPU, 4, "none")
    forward, guide = bench.model.forward, bench.guide
    times = profile_step.time_parts(bench, 2, ByMarks(lambda: Tick(clock), clock.wait))
    assert list(times) == [*profile_step.PARTS, "step"]
    # what holds no other part is one tick; the update is two calls; mixing has a tick before the
    # pass and one after it
    assert times == {
        "motivating pass": 1,
        "mixing without the pass": 2,
        "forward": 1,
        "losses": 1,
        "backward": 1,
        "update": 2,
        "step": 2 * 7 + 1,
    }
    assert (torch.Tensor.backward, bench.guide) == (backward, guide)
    assert (bench.model.forward, "forward" in vars(bench.model)) == (forward, False)


@pytest.mark.parametrize("flag", ["--batch-size", "--rounds", "--threads"])
def test_numbers_that_make_no_sense_are_refused(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(lambda: run.main([flag, "0"])) == 2
    assert f"{flag} 0: must be above 0" in capsys.readouterr().err
