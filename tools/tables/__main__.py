"""Lists and runs the rows of the paper's tables and of our own studies.

    python -m tools.tables list [TABLE]
    python -m tools.tables run TABLE --data-path /imagenet [--row NAME,NAME] [--model NAME] [...]

`recipes/tables.yaml` has the rows. A run is `output/TABLE/MODEL_ROW`, with `_seedK` added if the
seed is not 0. The same command again skips the finished runs and resumes an interrupted one. All
other flags go to main.py and win over the recipe; flags that the rows set are refused.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from config.parser import Parser, hyphenated
from errors import InputError, run_command, show
from tools.runs.matching import same_recipes
from tools.runs.records import duration
from tools.runs.rows import Table, Tables, read_tables
from tools.tables import finished
from tools.tables.jobs import run_all
from tools.tables.plan import PlannedRun, Planner, shown


def get_args_parser() -> Parser:
    parser = Parser(
        "python -m tools.tables",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|run")
    listing = commands.add_parser("list", help="print the rows and the paper's figures")
    listing.add_argument("table", nargs="?", help="one table; default: all")
    run = commands.add_parser("run", help="train the rows of a table", allow_abbrev=False)
    run.add_argument("table", help="a table, see list")
    run.add_argument(
        "--row",
        type=_split,
        default=[],
        action="extend",
        metavar="NAME,...",
        help="rows, by name or number; default: all that are available",
    )
    run.add_argument(
        "--model",
        type=_split,
        default=[],
        action="extend",
        metavar="NAME,...",
        help="columns; default: all",
    )
    run.add_argument("--seed", type=_seeds, metavar="K,...", help="seeds; default: 0")
    run.add_argument("--data-path", default="", metavar="DIR", help="holds train/ and val/")
    run.add_argument(
        "--output",
        "--output-dir",
        default="",
        metavar="DIR",
        help="folder of all runs; default: output",
    )
    run.add_argument("--nproc", type=int, metavar="N", help="processes; default: one per GPU")
    run.add_argument(
        "--weights",
        default=[],
        action="append",
        metavar="NAME=FILE",
        help="weights of a frozen network that a row names, instead of a download",
    )
    run.add_argument(
        "--small", action="store_true", help="rehearse the rows: a small ViT on a part of CIFAR-10"
    )
    run.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="with --small: end each run after N steps, and evaluate few images",
    )
    run.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at once, each with one thread and at the lowest priority",
    )
    run.add_argument("--dry-run", action="store_true", help="show the commands and end")
    return parser


def _split(text: str) -> list[str]:
    names = [name for name in text.replace(",", " ").split() if name]
    if not names:
        raise argparse.ArgumentTypeError("needs names, with commas between them")
    return names


def _seeds(text: str) -> tuple[int, ...]:
    seeds = _split(text)
    if not all(seed.isascii() and seed.isdigit() for seed in seeds):
        raise argparse.ArgumentTypeError(f"{text}: needs whole numbers, with commas between them")
    return tuple(map(int, seeds))


# -------------------------------------------------------------------------------------------- list


def list_table(tables: Tables, table: Table) -> str:
    """The rows of a table with the paper's figures, and the notes."""
    heads = [tables.labels.get(column, column) for column in table.columns]
    names = table.names()
    width = max(map(len, [*names, "row"]))
    labels = {name: table.find(name, table.columns[0]).label for name in names}
    label_width = max(map(len, labels.values()))
    lines = [f"{table.name}: {table.title}", ""]
    lines.append(
        f" #  {'row':<{width}}  {'label':<{label_width}}  " + "  ".join(f"{h:>6}" for h in heads)
    )
    for number, name in enumerate(names, start=1):
        figures = [table.find(name, column).figure for column in table.columns]
        cells = "  ".join(
            f"{'-' if figure is None else figure:>{max(6, len(head))}}"
            for figure, head in zip(figures, heads, strict=True)
        )
        note = "" if table.is_available(name) else "  not available yet"
        note += "  ours" if name in table.ours else ""
        lines.append(f"{number:2}  {name:<{width}}  {labels[name]:<{label_width}}  {cells}{note}")
    if any(row.figure is not None for row in table.rows):
        lines += ["", "The figures are the paper's top-1 in %. We have run none of these rows."]
    return "\n".join(lines)


def list_notes(tables: Tables, table: Table) -> str:
    """What stands between a run and the figure, and which rows are one recipe."""
    lines = [f"- {note}" for note in table.notes]
    for group in same_recipes(tables.rows()):
        if any(row.table == table.name for row in group):
            rows = ", ".join(f"{row.table} {row.name}" for row in group)
            lines.append(
                f"- One recipe on {group[0].model}: {rows}. One run counts in all of them."
            )
    return "\n".join(lines)


def find_table(tables: Tables, name: str) -> Table:
    if name not in tables.tables:
        known = ", ".join(tables.tables)
        raise InputError(f"{name}: no such table; tables: {known}")
    return tables.tables[name]


# --------------------------------------------------------------------------------------------- run


def run_table(tables: Tables, args: argparse.Namespace, words: Sequence[str]) -> None:
    table = find_table(tables, args.table)
    for name in ("nproc", "steps", "jobs"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name} {value}: must be a whole number above 0")
    runs = Planner(tables, table, args, words).runs()
    done, waiting = finished.split(runs, args.steps)
    for run in done:
        say(f"{run.what}: finished in {run.folder}; skipped")
    for run in waiting:
        if run.left_out:
            say(f"{run.what}: without {shlex.join(run.left_out)}, which it does not use")
    if args.dry_run:
        for run in waiting:
            print(shown(run))
        return
    count = len(done)

    def ended(run: PlannedRun, seconds: float) -> None:
        nonlocal count
        count += 1
        say(f"{run.what}: {result_of(run)} after {duration(seconds)} ({count} of {len(runs)})")

    run_all(waiting, args.jobs, ended)


def result_of(planned: PlannedRun) -> str:
    run = finished.read(planned)
    top1 = None if run is None else run.top1
    return "ended without an accuracy" if top1 is None else f"top-1 {top1:.2f} %"


def say(text: str) -> None:
    show(f"== {text}")


def main(argv: Sequence[str] | None = None) -> None:
    given = [hyphenated(word) for word in (sys.argv[1:] if argv is None else argv)]
    parser = get_args_parser()
    args, words = parser.parse_known_args(given)
    if args.command == "list" and words:
        parser.error(f"unrecognized arguments: {shlex.join(words)}")
    tables = read_tables()
    if args.command == "run":
        run_table(tables, args, words)
        return
    if args.table:
        table = find_table(tables, args.table)
        print(list_table(tables, table), list_notes(tables, table), sep="\n\n")
        return
    print("\n\n".join(list_table(tables, table) for table in tables.tables.values()))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
