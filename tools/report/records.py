"""What the parts of the report hand to each other: a run, a row of the paper, where a run belongs,
and the page.

Level 0: imports nothing from the project, computes nothing but means.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# ------------------------------------------------------------------------------------- what was run


@dataclass
class Start:
    """One start of a run, as `train.log` has it.

    Attributes:
        head: the rows of the table at its beginning.
        seconds: from that table to the last line.
        trained: whether anything was trained after it.
        resumed: whether it went on from a checkpoint.
        weights: the file that the weights came from, with --finetune.
    """

    head: dict[str, str]
    seconds: float = 0.0
    trained: bool = False
    resumed: bool = False
    weights: str = ""


@dataclass(frozen=True)
class Run:
    """What a run folder says.

    Args:
        name: the folder, below the root of the report.
        args: every flag, from `args.json`.
        epochs: the lines of `log.txt`, in their order; a value that was not finite is None.
        status: `status.json`, empty where it is missing.
        versions: `environment.json`, likewise.
        starts: from `train.log`.
        warnings: what the run said of itself, and what is odd about the folder.
        picture: `mixing.png` or None.
    """

    name: str
    args: dict[str, Any]
    epochs: list[dict[str, Any]]
    status: dict[str, Any]
    versions: dict[str, str]
    starts: list[Start]
    warnings: list[str]
    picture: Path | None

    @property
    def planned(self) -> int:
        return int(self.args["epochs"])

    @property
    def done(self) -> int:
        """Epochs up to the last one in the log."""
        return int(self.epochs[-1]["epoch"]) + 1 if self.epochs else 0

    @property
    def missing(self) -> list[int]:
        """Epochs before the last one that the log does not have."""
        there = {line["epoch"] for line in self.epochs}
        return [epoch for epoch in range(self.done) if epoch not in there]

    @property
    def is_finished(self) -> bool:
        """Whether the log has every epoch that was asked for, and a top-1 accuracy of the last
        one."""
        return (
            self.done == self.planned
            and not self.missing
            and self.top1 is not None
            and not self.is_cut
        )

    @property
    def is_cut(self) -> bool:
        """Whether it ended as --max-steps says, before its last epoch was over, with something
        measured."""
        is_over = self.status.get("state") == "done" and self.status.get("epoch") != self.planned
        return bool(self.args.get("max_steps")) and is_over and self.top1 is not None

    def last(self, name: str) -> float | None:
        """A value of the last epoch."""
        return self.epochs[-1].get(name) if self.epochs else None

    @property
    def top1(self) -> float | None:
        """Percent, of the last epoch."""
        return self.last("test_acc1")

    @property
    def ema(self) -> float | None:
        """The same of the averaged weights, where there are any."""
        return self.last("test_ema_acc1")

    @property
    def course(self) -> list[Start]:
        """The starts that this run is made of: from the last one that began anew, those that
        trained."""
        trained = [start for start in self.starts if start.trained]
        anew = [place for place, start in enumerate(trained) if not start.resumed]
        return trained[anew[-1] :] if anew else trained

    @property
    def start(self) -> Start:
        """The last start that trained, else the last one."""
        return [Start({}), *self.starts, *self.course][-1]


class Skipped(NamedTuple):
    """A folder that is no run that could be read, and why."""

    name: str
    reason: str


# ------------------------------------------------------------------------------- the paper's tables


@dataclass(frozen=True)
class Row:
    """A row of one of the paper's tables for one model, as scripts/tables/ has it.

    Args:
        table: `table7`.
        name: of the row, as --row takes it.
        label: of the row, to be read.
        model: of scripts/, the column.
        figure: the paper's top-1 in percent; None where it has none.
        words: the arguments of main.py without data and output; empty where the row is not
            available yet.
        small: whether it is a rehearsal.
        title: of the table.
        script: its name in scripts/tables/.
    """

    table: str
    name: str
    label: str
    model: str
    figure: float | None
    words: tuple[str, ...]
    small: bool
    title: str
    script: str


class Spread(NamedTuple):
    """The mean over seeds, the standard deviation (n - 1; None with one seed), and their number."""

    mean: float
    deviation: float | None
    seeds: int


@dataclass
class Result:
    """A row and the runs that belong to it."""

    row: Row
    finished: list[Run] = field(default_factory=list)
    unfinished: list[Run] = field(default_factory=list)

    def spread(self, name: str = "test_acc1") -> Spread | None:
        """Of a value of the last epoch, over seeds: runs of one seed are averaged first. None
        without such values."""
        values = [(run.args["seed"], run.last(name)) for run in self.finished]
        return spread_of([(seed, value) for seed, value in values if value is not None])


def spread_of(values: Sequence[tuple[int, float]]) -> Spread | None:
    """From pairs of seed and value; None without any."""
    if not values:
        return None
    seeds = sorted({seed for seed, _ in values})
    means = [statistics.fmean(value for own, value in values if own == seed) for seed in seeds]
    deviation = statistics.stdev(means) if len(means) > 1 else None
    return Spread(statistics.fmean(means), deviation, len(means))


class Other(NamedTuple):
    """A run that fits no row, the nearest one, and what differs."""

    run: Run
    nearest: Row | None
    differences: list[str]


@dataclass
class Sorted:
    """Where every run belongs; each list of results has all rows of its kind, or for `cut` those of
    tables with a run.

    Attributes:
        cut: rehearsals with fewer epochs or steps than their row, by what was cut.
    """

    full: list[Result]
    small: list[Result]
    cut: dict[str, list[Result]]
    others: list[Other]


# ----------------------------------------------------------------------------------------- the page


class Series(NamedTuple):
    """A line of a chart: its points (x, y) in the order of x; where y is None the line is
    broken."""

    name: str
    points: list[tuple[float, float | None]]


class Chart(NamedTuple):
    """Lines over one axis of epochs."""

    title: str
    unit: str
    series: list[Series]


class Cell(NamedTuple):
    """A cell of a table; `runs` are numbers of runs to link to, each with the words for it."""

    text: str
    runs: tuple[tuple[int, str], ...] = ()


class Table(NamedTuple):
    """A table with a title, and what is to be said below it; `numeric` are the columns of
    numbers."""

    title: str
    header: list[str]
    rows: list[list[Cell]]
    notes: list[str]
    numeric: tuple[int, ...] = ()
    charts: tuple[Chart, ...] = ()
    folded: bool = False


class Section(NamedTuple):
    """A part of the page; `lead` are its first paragraphs."""

    title: str
    anchor: str
    lead: list[str]
    tables: list[Table]


class Picture(NamedTuple):
    """A picture inside the page: its bytes as `kind` says, and its size in pixels."""

    kind: str
    data: bytes
    width: int
    height: int


class RunPage(NamedTuple):
    """What the page says of one run."""

    number: int
    name: str
    state: str
    is_finished: bool
    facts: list[tuple[str, str]]  # how it went
    setting: list[tuple[str, str]]  # what it was
    warnings: list[str]
    flags: list[tuple[str, str, str]]  # name, value, default
    charts: list[Chart]
    picture: Picture | None


class Report(NamedTuple):
    """The whole page."""

    title: str
    lead: list[str]
    sections: list[Section]
    runs: list[RunPage]
