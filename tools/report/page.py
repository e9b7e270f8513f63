"""The data types of the report: charts, tables, sections and the page."""

from __future__ import annotations

from typing import NamedTuple


class Series(NamedTuple):
    """A line of a chart: its points (x, y), sorted by x. The line has a gap where y is None."""

    name: str
    points: list[tuple[float, float | None]]


class Chart(NamedTuple):
    """A chart: lines over epochs."""

    title: str
    unit: str
    series: list[Series]


class Cell(NamedTuple):
    """A cell of a table. `runs` are links: the number of a run and the text of its link."""

    text: str
    runs: tuple[tuple[int, str], ...] = ()


class Table(NamedTuple):
    """A table with a title and notes below it.

    Attributes:
        numeric: the indices of the columns that hold numbers.
        folded: whether the page opens the table only on a click.
    """

    title: str
    header: list[str]
    rows: list[list[Cell]]
    notes: list[str]
    numeric: tuple[int, ...] = ()
    charts: tuple[Chart, ...] = ()
    folded: bool = False


class Section(NamedTuple):
    """A section of the page. `lead` holds the paragraphs before its tables."""

    title: str
    anchor: str
    lead: list[str]
    tables: list[Table]


class Picture(NamedTuple):
    """A picture inside the page: its format (`kind`), its bytes, and its size in pixels."""

    kind: str
    data: bytes
    width: int
    height: int


class RunPage(NamedTuple):
    """The part of the page for one run."""

    number: int
    name: str
    state: str
    is_finished: bool
    facts: list[tuple[str, str]]  # results, duration and status
    setting: list[tuple[str, str]]  # data, model, device and versions
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
