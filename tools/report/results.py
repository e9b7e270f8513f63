"""Makes the sections and tables of the report from sorted runs, before HTML or Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from statistics import fmean

from tools.report.page import Cell, Chart, Report, Section, Series, Table
from tools.runs.matching import flags_of
from tools.runs.records import Result, Row, Run, SkippedFolder, SortedRuns, Spread, UnmatchedRun

ACCURACY = (
    "Top-1 accuracy in percent, on the whole validation set, of the model after its last epoch. "
    "EMA is the accuracy of its averaged weights, where a run keeps them. Ours: mean ± standard "
    "deviation over seeds (n − 1)."
)
MATCHING = (
    "A run counts in a row only if every flag of its recipe, the total batch and the data are the "
    "row's; seed, device, loader processes and folders may differ. A run that is not finished "
    "counts in no mean."
)
REHEARSAL = (
    "Not a reproduction. Setting: CIFAR-10 with little data: {setting}, {models}. {why} The "
    "paper's figure is given for reference only: it was measured on another data set, "
    "ImageNet-1k, and with another model."
)
WHY_FEW_IMAGES = (
    "The number of images is small on purpose: in trials of this length, a network this small "
    "gained from mixing only with little data."
)
WHY_APART = (
    "These rehearsals are shorter than their rows require: {cut}. They have their own tables and "
    "count in no other. SMMix starts slower than other mixing and ended higher in long trials "
    "only: a ranking at this length tells nothing about the full length."
)
OURS, EMA = "ours, CIFAR-10", "EMA, CIFAR-10"  # columns of a rehearsal
NUMERIC = ("paper", "ours", "difference", "seeds", "EMA", OURS, EMA)  # columns of numbers
MAX_LINES = 12  # lines of one chart
NOTHING = "–"  # an empty cell


class RunLinks:
    """Numbers the runs, and makes the links to them."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.numbers = {run.name: number for number, run in enumerate(runs, start=1)}

    def cell(self, result: Result) -> Cell:
        """A cell with links to the runs of a row."""
        finished = [(self.numbers[run.name], f"seed {run.args['seed']}") for run in result.finished]
        unfinished = [
            (self.numbers[run.name], f"seed {run.args['seed']}, {progress(run)}")
            for run in result.unfinished
        ]
        return Cell("" if finished or unfinished else NOTHING, (*finished, *unfinished))


def progress(run: Run) -> str:
    """The progress of a run, in a few words."""
    if run.is_finished:
        return "finished"
    if run.is_cut:
        return f"stopped after {run.args['max_steps']} steps by --max-steps"
    if run.done == run.planned and not run.missing:
        return "finished, but its last top-1 is missing"
    return f"unfinished: epoch {run.done} of {run.planned}"


def format_accuracy(value: float) -> str:
    return f"{value:.2f}"


def format_difference(value: float) -> str:
    text = f"{abs(value):.2f}"
    return text if float(text) == 0 else ("+" if value > 0 else "−") + text


def format_spread(spread: Spread | None) -> str:
    if spread is None:
        return NOTHING
    deviation = "" if spread.deviation is None else f" ± {format_accuracy(spread.deviation)}"
    return format_accuracy(spread.mean) + deviation


def format_seeds(spread: Spread | None) -> str:
    return NOTHING if spread is None else str(spread.seeds)


def accuracy_or_reason(result: Result) -> str:
    """The accuracy of a row, or the reason why it has none."""
    if (spread := result.spread()) is not None:
        return format_spread(spread)
    if result.unfinished:
        return "not finished"
    return "not run" if result.row.arguments else "not available yet"


# ------------------------------------------------------------------------------------------- tables


def table_name(table: str) -> str:
    """`table7` -> Table 7, `tablea4` -> Table A4; names of other tables stay as they are."""
    number = table.removeprefix("table")
    return table if number == table else f"Table {number.upper()}"


def by_table(results: Iterable[Result]) -> list[list[Result]]:
    """Results grouped by table, in the order in which the tables first appear."""
    tables = dict[str, list[Result]]()
    for result in results:
        tables.setdefault(result.row.table, []).append(result)
    return list(tables.values())


def recipe_name(row: Row) -> str:
    """The name of a row's recipe, such as `deit_tiny_smmix`."""
    return f"{row.model}_{row.name}"


def how_to_run(results: Sequence[Result], small: bool) -> str:
    flag = " --small" if small else " --row NAME"
    table = results[0].row.table
    return f"To run its rows: python -m tools.tables run {table}{flag} --data-path FOLDER"


def repeated_seeds(results: Iterable[Result]) -> Iterable[str]:
    """A note for each seed of a row that was run more than once."""
    for result in results:
        seeds = sorted(run.args["seed"] for run in result.finished)
        recipe = recipe_name(result.row)
        for seed, same in groupby(seeds):
            if (count := len(list(same))) > 1:
                runs = f"seed {seed} was run {count} times"
                yield f"{recipe}: {runs}; their mean counts as one seed."


def curves(results: Sequence[Result]) -> tuple[Chart, ...]:
    """A chart of top-1 over epochs, with one line for the mean of each row's finished runs."""
    has_models = len({result.row.model for result in results}) > 1
    series = []
    for result in results:
        values = dict[float, list[float]]()
        for run in result.finished:
            for line in run.epochs:
                if line.get("test_acc1") is not None:
                    values.setdefault(line["epoch"] + 1, []).append(line["test_acc1"])
        if values:
            name = f"{result.row.label}, {result.row.model}" if has_models else result.row.label
            series.append(Series(name, [(epoch, fmean(values[epoch])) for epoch in sorted(values)]))
    if not 1 <= len(series) <= MAX_LINES or all(len(one.points) == 1 for one in series):
        return ()
    return (Chart("Top-1 over epochs, mean over seeds", "%", series),)


def full_table(results: Sequence[Result], links: RunLinks) -> Table:
    """One table of the paper: the paper's figures beside ours."""
    header = ["row", "model", "paper", "ours", "difference", "seeds", "EMA", "runs", "recipe"]
    rows = []
    for result in results:
        row, spread = result.row, result.spread()
        paper = NOTHING if row.figure is None else f"{row.figure:.1f}"
        difference = NOTHING
        if spread is not None and row.figure is not None:
            difference = format_difference(spread.mean - row.figure)
        ours, seeds = accuracy_or_reason(result), format_seeds(spread)
        ema = format_spread(result.spread("test_ema_acc1"))
        texts = [row.label, row.model, paper, ours, difference, seeds, ema]
        rows.append([*(Cell(text) for text in texts), links.cell(result), Cell(recipe_name(row))])
    for name in ("EMA", "paper", "difference"):
        header, rows = without_empty(header, rows, name)
    was_run = any(result.finished or result.unfinished for result in results)
    title = results[0].row.title
    title += "" if was_run else f": none of its {len(rows)} rows was run"
    notes = [how_to_run(results, small=False), *repeated_seeds(results)]
    numeric = tuple(index for index, name in enumerate(header) if name in NUMERIC)
    return Table(title, header, rows, notes, numeric, curves(results), folded=not was_run)


def without_empty(
    header: list[str], rows: list[list[Cell]], name: str
) -> tuple[list[str], list[list[Cell]]]:
    """The table without the column of this name, if that column is empty."""
    column = header.index(name)
    if any(row[column].text != NOTHING for row in rows):
        return header, rows
    return header[:column] + header[column + 1 :], [
        row[:column] + row[column + 1 :] for row in rows
    ]


def small_table(results: Sequence[Result], papers: Sequence[Row], links: RunLinks) -> Table:
    """One table of rehearsals, with the paper's figures for reference."""
    header = ["row", OURS, "seeds", EMA, "paper, ImageNet-1k (reference only)", "runs", "recipe"]
    rows = []
    for result in results:
        row = result.row
        found = [
            one
            for one in papers
            if (one.table, one.name) == (row.table, row.name) and one.figure is not None
        ]
        ours, seeds = accuracy_or_reason(result), format_seeds(result.spread())
        ema = format_spread(result.spread("test_ema_acc1"))
        texts = [row.label, ours, seeds, ema, paper_figures(found)]
        rows.append([*(Cell(text) for text in texts), links.cell(result), Cell(recipe_name(row))])
    header, rows = without_empty(header, rows, EMA)
    title = f"{results[0].row.title}: rehearsal on CIFAR-10"
    notes = [how_to_run(results, small=True), *repeated_seeds(results)]
    numeric = tuple(index for index, name in enumerate(header) if name in NUMERIC)
    return Table(title, header, rows, notes, numeric, curves(results))


def paper_figures(rows: Sequence[Row]) -> str:
    """The paper's figures of a row, with their models."""
    figures = [row.figure for row in rows if row.figure is not None]
    if len(figures) <= 2:
        return ", ".join(f"{row.figure:.1f} ({row.model})" for row in rows) or NOTHING
    return f"{min(figures):.1f} to {max(figures):.1f} ({len(figures)} models)"


# ----------------------------------------------------------------------------------------- sections


def full_section(found: SortedRuns, links: RunLinks) -> Section:
    tables = [full_table(results, links) for results in by_table(found.full)]
    lead = ["ImageNet-1k with the paper's recipe, as far as it is known. " + ACCURACY, MATCHING]
    return Section("Tables of the paper", "tables", lead, tables)


def study_section(found: SortedRuns, links: RunLinks) -> Section | None:
    """Our study on CIFAR-10; None if none of its rows was run."""
    if not any(result.finished or result.unfinished for result in found.study):
        return None
    tables = [full_table(results, links) for results in by_table(found.study)]
    lead = ["Our own study on CIFAR-10, not a reproduction. " + ACCURACY, MATCHING]
    return Section("Our study", "study", lead, tables)


def images_and_epochs(rows: Iterable[Row], with_epochs: bool = True) -> str:
    """The number of images of rehearsals, and of epochs if `with_epochs`, as text."""
    settings = []
    for row in rows:
        flags = flags_of(row.arguments, "cpu")
        images = f"{flags['subset']:,} images" if flags["subset"] else "all images"
        settings.append(f"{images}, {flags['epochs']} epochs" if with_epochs else images)
    return " or ".join(dict.fromkeys(settings))


def small_sections(found: SortedRuns, links: RunLinks) -> Iterable[Section]:
    """A section of whole rehearsals, and one for each length of shorter ones."""
    papers = [result.row for result in found.full]
    rows = [result.row for result in found.small if result.row.arguments]
    models = " and ".join(dict.fromkeys(flags_of(row.arguments, "cpu")["model"] for row in rows))
    setting = images_and_epochs(rows)
    lead = [REHEARSAL.format(models=models, setting=setting, why=WHY_FEW_IMAGES)]
    tables, not_run = [], []
    for results in by_table(found.small):
        if any(result.finished or result.unfinished for result in results):
            tables.append(small_table(results, papers, links))
        else:
            not_run.append(table_name(results[0].row.table))
    if not_run:
        lead.append(f"Not run as a rehearsal: {', '.join(not_run)}.")
    if found.small:
        title = "Rehearsals on CIFAR-10, not a reproduction"
        yield Section(title, "rehearsals", lead, tables)
    images = images_and_epochs(rows, with_epochs=False)
    for number, (cut, results) in enumerate(found.cut.items(), start=1):
        why = WHY_APART.format(cut=cut)
        lead = [REHEARSAL.format(models=models, setting=images, why=why)]
        tables = [small_table(one, papers, links) for one in by_table(results)]
        yield Section(f"Rehearsals cut short: {cut}", f"cut-{number}", lead, tables)


def other_section(others: Sequence[UnmatchedRun], links: RunLinks) -> Section | None:
    if not others:
        return None
    header = ["run", "status", "top-1", "EMA", "nearest row", "what differs from it"]
    rows = []
    for run, nearest, texts in others:
        row = NOTHING
        if nearest is not None:
            row = f"{table_name(nearest.table)}, {recipe_name(nearest)}"
            row += " (rehearsal)" if nearest.small else ""
        values = [
            NOTHING if value is None else format_accuracy(value) for value in (run.top1, run.ema)
        ]
        differences = "; ".join(texts) or NOTHING
        cells = [Cell(text) for text in (progress(run), *values, row, differences)]
        rows.append([Cell("", ((links.numbers[run.name], run.name),)), *cells])
    lead = [
        "These runs count in no table: their recipe, data or total batch is that of no row, or "
        "they are the frozen networks of other rows."
    ]
    table = Table("Runs that fit no row", header, rows, [], (2, 3))
    return Section("Other runs", "others", lead, [table])


def skipped_section(skipped: Sequence[SkippedFolder]) -> Section | None:
    if not skipped:
        return None
    rows = [[Cell(name), Cell(reason)] for name, reason in skipped]
    table = Table("Folders that could not be read", ["folder", "reason"], rows, [])
    return Section("Folders that could not be read", "skipped", [], [table])


def build_report(
    root: str, runs: Sequence[Run], skipped: Sequence[SkippedFolder], found: SortedRuns
) -> Report:
    """The report without the pages of the runs, which the command adds."""
    links = RunLinks(runs)
    sections = [full_section(found, links), *small_sections(found, links)]
    optional = (
        study_section(found, links),
        other_section(found.others, links),
        skipped_section(skipped),
    )
    sections += [section for section in optional if section]
    finished = sum(run.is_finished for run in runs)
    available = [result for result in found.full if result.row.arguments]
    with_runs = sum(bool(result.finished) for result in available)
    lead = [
        f"Run folders in {root}: {len(runs)}. Finished: {finished}. Without a row of the paper: "
        f"{len(found.others)}. Folders that could not be read: {len(skipped)}.",
        f"Rows of the paper that can be run here: {len(available)}. With a finished run on "
        f"ImageNet-1k: {with_runs}.",
    ]
    return Report("SMMix: a report of runs", lead, sections, [])
