"""What the report says, before it has a form: the tables of results, and a page for each run.

Level 2: from sorted runs to text and numbers. It must not know HTML or Markdown, nor where anything
lies on the disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from statistics import fmean

from tools.report.records import (
    Cell,
    Chart,
    Other,
    Report,
    Result,
    Row,
    Run,
    Section,
    Series,
    Skipped,
    Sorted,
    Spread,
    Table,
)

MEANING = (
    "Top-1 accuracy in percent, on the whole validation set, of the model as it is after its last "
    "epoch. EMA is the "
    "same of its averaged weights, where a run keeps them. Ours: mean ± standard deviation over "
    "seeds (n − 1)."
)
BELONGING = (
    "A run counts in a row only if every flag of its recipe, the total batch and the data are the "
    "row's; seed, device, "
    "loader processes and folders are free. A run that is not finished counts nowhere."
)
REHEARSAL = (
    "Not a reproduction. Setting: CIFAR-10, short of data: {setting}, {models}. {why} The paper's "
    "figure stands beside "
    "as a reference only: it is of another data set, ImageNet-1k, and of another model."
)
WHOLE = (
    "It is short of data on purpose: in trials of this length a network this small gained from "
    "mixing only there."
)
CUT = (
    "These rehearsals are shorter than their rows ask: {cut}. They stand apart and count in no "
    "other table. SMMix "
    "starts slower than other mixing and ended higher in long trials only: a ranking at this "
    "length tells nothing "
    "about the full length."
)
OURS, EMA = "ours, CIFAR-10", "EMA, CIFAR-10"  # of a rehearsal
FIGURES = ("paper", "ours", "difference", "seeds", "EMA", OURS, EMA)  # columns of numbers
MOST_LINES = 12  # of one chart


class Words:
    """Numbers of runs, and how they are spoken of."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.numbers = {run.name: number for number, run in enumerate(runs, start=1)}

    def links(self, result: Result) -> Cell:
        finished = [(self.numbers[run.name], f"seed {run.args['seed']}") for run in result.finished]
        others = [
            (self.numbers[run.name], f"seed {run.args['seed']}, {progress(run)}")
            for run in result.unfinished
        ]
        return Cell("" if finished or others else "–", (*finished, *others))


def progress(run: Run) -> str:
    """How far a run has come, in a few words."""
    if run.is_finished:
        return "finished"
    if run.is_cut:
        return f"stopped after {run.args['max_steps']} steps, as asked"
    if run.done == run.planned and not run.missing:
        return "finished, but its last top-1 is missing"
    return f"unfinished: epoch {run.done} of {run.planned}"


def number(value: float) -> str:
    return f"{value:.2f}"


def signed(value: float) -> str:
    text = f"{abs(value):.2f}"
    return text if float(text) == 0 else ("+" if value > 0 else "−") + text


def described(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    return number(spread.mean) + (
        "" if spread.deviation is None else f" ± {number(spread.deviation)}"
    )


def seeds(spread: Spread | None) -> str:
    return "–" if spread is None else str(spread.seeds)


def ours(result: Result) -> str:
    """The figure of a row, or why there is none."""
    if (spread := result.spread()) is not None:
        return described(spread)
    if result.unfinished:
        return "not finished"
    return "not run" if result.row.words else "not available yet"


# ------------------------------------------------------------------------------------------- tables


def table_name(table: str) -> str:
    """`table7` -> Table 7, `tablea4` -> Table A4."""
    return f"Table {table.removeprefix('table').upper()}"


def by_table(results: Iterable[Result]) -> list[list[Result]]:
    """Results of one table together, tables in the order they come first."""
    tables = dict[str, list[Result]]()
    for result in results:
        tables.setdefault(result.row.table, []).append(result)
    return list(tables.values())


def recipe(row: Row) -> str:
    return f"{row.model}_{row.name}"


def how_to_run(results: Sequence[Result], small: bool) -> str:
    scripts = list(dict.fromkeys(result.row.script for result in results))
    flag = " --small" if small else " --row NAME"
    lines = " or ".join(
        f"bash scripts/tables/{script}{flag} --data-path FOLDER" for script in scripts
    )
    return f"To run rows of it: {lines}"


def repeated_seeds(results: Iterable[Result]) -> Iterable[str]:
    for result in results:
        seeds = sorted(run.args["seed"] for run in result.finished)
        for seed, same in groupby(seeds):
            if (count := len(list(same))) > 1:
                yield (
                    f"{recipe(result.row)}: seed {seed} was run {count} times; their mean counts "
                    "as one seed."
                )


def curves(results: Sequence[Result]) -> tuple[Chart, ...]:
    """Top-1 over epochs, a line for each row with finished runs: their mean."""
    many = len({result.row.model for result in results}) > 1
    series = []
    for result in results:
        values = dict[float, list[float]]()
        for run in result.finished:
            for line in run.epochs:
                if line.get("test_acc1") is not None:
                    values.setdefault(line["epoch"] + 1, []).append(line["test_acc1"])
        if values:
            name = f"{result.row.label}, {result.row.model}" if many else result.row.label
            series.append(Series(name, [(epoch, fmean(values[epoch])) for epoch in sorted(values)]))
    if not 1 <= len(series) <= MOST_LINES or all(len(one.points) == 1 for one in series):
        return ()
    return (Chart("Top-1 over epochs, mean over seeds", "%", series),)


def full_table(results: Sequence[Result], words: Words) -> Table:
    """Rows beside the paper's figures."""
    header = ["row", "model", "paper", "ours", "difference", "seeds", "EMA", "runs", "recipe"]
    rows = []
    for result in results:
        row, spread = result.row, result.spread()
        paper = "–" if row.figure is None else f"{row.figure:.1f}"
        gap = "–" if spread is None or row.figure is None else signed(spread.mean - row.figure)
        ema = described(result.spread("test_ema_acc1"))
        texts = [row.label, row.model, paper, ours(result), gap, seeds(spread), ema]
        rows.append([*(Cell(text) for text in texts), words.links(result), Cell(recipe(row))])
    header, rows = without_empty(header, rows, "EMA")
    was_run = any(result.finished or result.unfinished for result in results)
    title = results[0].row.title.replace(" of the paper", "")
    title = title if title.startswith("Table") else table_name(results[0].row.table)
    title += "" if was_run else f": none of its {len(rows)} rows was run"
    notes = [how_to_run(results, small=False), *repeated_seeds(results)]
    numeric = tuple(place for place, name in enumerate(header) if name in FIGURES)
    return Table(title, header, rows, notes, numeric, curves(results), folded=not was_run)


def without_empty(
    header: list[str], rows: list[list[Cell]], name: str
) -> tuple[list[str], list[list[Cell]]]:
    """A table without the column of this name, if nothing is in it."""
    place = header.index(name)
    if any(row[place].text != "–" for row in rows):
        return header, rows
    return header[:place] + header[place + 1 :], [row[:place] + row[place + 1 :] for row in rows]


def small_table(results: Sequence[Result], papers: Sequence[Row], words: Words) -> Table:
    """Rehearsals; the paper's figures only as what they are."""
    header = ["row", OURS, "seeds", EMA, "paper, ImageNet-1k (reference only)", "runs", "recipe"]
    rows = []
    for result in results:
        row = result.row
        found = [
            one
            for one in papers
            if (one.table, one.name) == (row.table, row.name) and one.figure is not None
        ]
        ema = described(result.spread("test_ema_acc1"))
        texts = [row.label, ours(result), seeds(result.spread()), ema, reference(found)]
        rows.append([*(Cell(text) for text in texts), words.links(result), Cell(recipe(row))])
    header, rows = without_empty(header, rows, EMA)
    title = f"{results[0].row.title.replace(' of the paper', '')}: rehearsal on CIFAR-10"
    notes = [how_to_run(results, small=True), *repeated_seeds(results)]
    numeric = tuple(place for place, name in enumerate(header) if name in FIGURES)
    return Table(title, header, rows, notes, numeric, curves(results))


def reference(rows: Sequence[Row]) -> str:
    """The paper's figures of a row, with their models."""
    figures = [row.figure for row in rows if row.figure is not None]
    if len(figures) <= 2:
        return ", ".join(f"{row.figure:.1f} ({row.model})" for row in rows) or "–"
    return f"{min(figures):.1f} to {max(figures):.1f} ({len(figures)} models)"


# ----------------------------------------------------------------------------------------- sections


def full_section(found: Sorted, words: Words) -> Section:
    tables = [full_table(results, words) for results in by_table(found.full)]
    lead = ["ImageNet-1k with the paper's recipe, as far as it is known. " + MEANING, BELONGING]
    return Section("Tables of the paper", "tables", lead, tables)


def setting_of(rows: Iterable[Row], with_epochs: bool = True) -> str:
    """What the rehearsals' commands have in common, in words: images and epochs, or images
    alone."""
    settings = []
    for row in rows:
        given = dict(re.findall(r"--(subset|epochs) (\d+)", " ".join(row.words)))
        images = f"{int(given['subset']):,} images" if "subset" in given else "all images"
        settings.append(f"{images}, {given.get('epochs', '?')} epochs" if with_epochs else images)
    return " or ".join(dict.fromkeys(settings))


def small_sections(found: Sorted, words: Words) -> Iterable[Section]:
    """Whole rehearsals, and those that were cut short, one section for each length."""
    papers = [result.row for result in found.full]
    rows = [result.row for result in found.small if result.row.words]
    models = " and ".join(dict.fromkeys(row.model for row in rows))
    lead = REHEARSAL.format(models=models, setting=setting_of(rows), why=WHOLE)
    tables, none = [], []
    for results in by_table(found.small):
        if any(result.finished or result.unfinished for result in results):
            tables.append(small_table(results, papers, words))
        else:
            none.append(table_name(results[0].row.table))
    if found.small:
        without = [f"Not run as a rehearsal: {', '.join(none)}."] if none else []
        yield Section(
            "Rehearsals on CIFAR-10, not a reproduction", "rehearsals", [lead, *without], tables
        )
    for place, (cut, results) in enumerate(found.cut.items(), start=1):
        images = setting_of(rows, with_epochs=False)
        told = REHEARSAL.format(models=models, setting=images, why=CUT.format(cut=cut))
        tables = [small_table(one, papers, words) for one in by_table(results)]
        yield Section(f"Rehearsals cut short: {cut}", f"cut-{place}", [told], tables)


def other_section(others: Sequence[Other], words: Words) -> Section | None:
    if not others:
        return None
    header = ["run", "status", "top-1", "EMA", "nearest row", "what differs from it"]
    rows = []
    for run, nearest, texts in others:
        row = "–" if nearest is None else f"{table_name(nearest.table)}, {recipe(nearest)}"
        row += " (rehearsal)" if nearest is not None and nearest.small else ""
        values = ["–" if value is None else number(value) for value in (run.top1, run.ema)]
        cells = [Cell(text) for text in (progress(run), *values, row, "; ".join(texts) or "–")]
        rows.append([Cell("", ((words.numbers[run.name], run.name),)), *cells])
    lead = [
        "Their recipe, data or total batch is no row's, or rows look through them. They count in "
        "no table."
    ]
    return Section(
        "Other runs", "others", lead, [Table("Runs that fit no row", header, rows, [], (2, 3))]
    )


def skipped_section(skipped: Sequence[Skipped]) -> Section | None:
    if not skipped:
        return None
    rows = [[Cell(name), Cell(reason)] for name, reason in skipped]
    return Section(
        "Folders left out", "skipped", [], [Table("Folders left out", ["folder", "why"], rows, [])]
    )


def build(root: str, runs: Sequence[Run], skipped: Sequence[Skipped], found: Sorted) -> Report:
    """Everything but the pages of the runs, which the command adds."""
    words = Words(runs)
    sections = [full_section(found, words), *small_sections(found, words)]
    sections += [
        section
        for section in (other_section(found.others, words), skipped_section(skipped))
        if section
    ]
    finished = sum(run.is_finished for run in runs)
    there = [result for result in found.full if result.row.words]
    lead = [
        f"Run folders in {root}: {len(runs)}, of them finished: {finished}, of no row of the "
        "paper: "
        f"{len(found.others)}. Folders left out: {len(skipped)}.",
        f"Rows of the paper that can be run here: {len(there)}, of them with a finished run on "
        "ImageNet-1k: "
        f"{sum(bool(result.finished) for result in there)}.",
    ]
    return Report("SMMix: a report of runs", lead, sections, [])
