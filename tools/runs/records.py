"""The data types of runs, of the rows of tables, and of their results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

PRETRAINED = "pretrained"  # folder of the frozen networks of rehearsals

# --------------------------------------------------------------------------------------------- runs


@dataclass
class Start:
    """One start of a run, as `train.log` records it.

    Attributes:
        head: the rows of the table that is printed at the start.
        seconds: the time from that table to the last line of this start.
        trained: whether training began.
        resumed: whether it resumed from a checkpoint.
        weights: the file that the weights were read from, with --finetune.
    """

    head: dict[str, str]
    seconds: float = 0.0
    trained: bool = False
    resumed: bool = False
    weights: str = ""


@dataclass(frozen=True)
class Run:
    """The content of one run folder.

    Args:
        name: the path of the folder, relative to the root of the report.
        args: every flag, from `args.json`.
        epochs: the lines of `log.txt`, in order; None replaces a value that is not finite.
        status: the content of `status.json`; empty if the file is missing.
        versions: the content of `environment.json`; empty if the file is missing.
        starts: the starts of the run, from `train.log`.
        warnings: warnings and errors from `train.log`, and problems of the folder itself.
        picture: the path of `mixing.png`, or None.
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
        """The number of epochs that --epochs asks for."""
        return int(self.args["epochs"])

    @property
    def done(self) -> int:
        """The number of epochs up to the last one in the log."""
        return int(self.epochs[-1]["epoch"]) + 1 if self.epochs else 0

    @property
    def missing(self) -> list[int]:
        """Epochs before the last one that the log lacks, counted from 0."""
        logged = {line["epoch"] for line in self.epochs}
        return [epoch for epoch in range(self.done) if epoch not in logged]

    @property
    def is_finished(self) -> bool:
        """Whether the log has every planned epoch, and the top-1 accuracy of the last one."""
        return (
            self.done == self.planned
            and not self.missing
            and self.top1 is not None
            and not self.is_cut
        )

    @property
    def is_cut(self) -> bool:
        """Whether --max-steps ended the run before its last epoch, with an accuracy in the log."""
        is_over = self.status.get("state") == "done" and self.status.get("epoch") != self.planned
        return bool(self.args.get("max_steps")) and is_over and self.top1 is not None

    def last(self, name: str) -> float | None:
        """The value of this name in the last epoch, or None."""
        return self.epochs[-1].get(name) if self.epochs else None

    @property
    def top1(self) -> float | None:
        """Top-1 accuracy of the last epoch, in percent."""
        return self.last("test_acc1")

    @property
    def ema(self) -> float | None:
        """Top-1 accuracy of the averaged weights in the last epoch, or None without an average."""
        return self.last("test_ema_acc1")

    @property
    def counted_starts(self) -> list[Start]:
        """The starts that trained, from the last one that did not resume a checkpoint."""
        trained = [start for start in self.starts if start.trained]
        fresh = [index for index, start in enumerate(trained) if not start.resumed]
        return trained[fresh[-1] :] if fresh else trained

    @property
    def start(self) -> Start:
        """The last start that trained; without one, the last start."""
        return [Start({}), *self.starts, *self.counted_starts][-1]


class SkippedFolder(NamedTuple):
    """A folder that could not be read as a run, and the reason."""

    name: str
    reason: str


# ------------------------------------------------------------------------------- the paper's tables


@dataclass(frozen=True)
class Row:
    """A row of a table for one column, as `recipes/tables.yaml` has it.

    Args:
        table: the short name of the table, such as `table7`.
        name: the name of the row, as --row takes it.
        label: the label of the row, for readers.
        model: the column of the table: the name of a recipe.
        figure: the paper's top-1 accuracy in percent, or None if the paper has none.
        recipes: the files of --config, in their order.
        flags: what table and row add to the recipes, as words of a command line; None if the row is
            not available yet.
        own_flags: the words that the row itself adds, in full runs or in its rehearsal.
        small: whether the row is a rehearsal.
        title: the title of the table.
        is_study: whether it is a row of our own study on CIFAR-10.
    """

    table: str
    name: str
    label: str
    model: str
    figure: float | None
    recipes: tuple[str, ...]
    flags: tuple[str, ...] | None
    own_flags: tuple[str, ...]
    small: bool
    title: str
    is_study: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        """The arguments of main.py without data and output folder; empty if not available.

        A word @NAME stands for the checkpoint of a frozen network of rehearsals.
        """
        if self.flags is None:
            return ()
        return (*(f"--config={file}" for file in self.recipes), *self.flags)

    @property
    def arguments(self) -> tuple[str, ...]:
        """The same with the file of a frozen network, relative to the folder of all rehearsals."""
        return tuple(
            f"{PRETRAINED}/{word[1:]}/checkpoint.pth" if word.startswith("@") else word
            for word in self.words
        )


class Spread(NamedTuple):
    """Mean over seeds, standard deviation (n - 1; None with one seed), and number of seeds."""

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
        """The spread over seeds of this value in the last epoch; None if no run has the value."""
        values = [(run.args["seed"], run.last(name)) for run in self.finished]
        return spread_of([(seed, value) for seed, value in values if value is not None])


def spread_of(values: Sequence[tuple[int, float]]) -> Spread | None:
    """The spread of pairs (seed, value), or None without pairs.

    The values of one seed are averaged first.
    """
    if not values:
        return None
    seeds = sorted({seed for seed, _ in values})
    means = [statistics.fmean(value for s, value in values if s == seed) for seed in seeds]
    deviation = statistics.stdev(means) if len(means) > 1 else None
    return Spread(statistics.fmean(means), deviation, len(means))


class UnmatchedRun(NamedTuple):
    """A run that belongs to no row, the nearest row, and the differences from that row."""

    run: Run
    nearest: Row | None
    differences: list[str]


@dataclass
class SortedRuns:
    """All runs, sorted by the rows that they belong to.

    Attributes:
        full: results of all rows that are neither rehearsals nor of our study.
        study: results of the rows of our study.
        small: results of all rehearsals.
        cut: results of rehearsals with fewer epochs or steps than their row, by length; only tables
            with such a run.
        others: runs that belong to no row.
    """

    full: list[Result]
    study: list[Result]
    small: list[Result]
    cut: dict[str, list[Result]]
    others: list[UnmatchedRun]


def duration(seconds: float) -> str:
    """`1 h 02 min`, `3 min 20 s`, `16 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
