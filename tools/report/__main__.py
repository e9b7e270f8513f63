"""Writes report.html and report.md: a report of your runs beside the paper's tables.

    python -m tools.report output
    python -m tools.report output --output somewhere

It reads the run folders at and below the given folder and the rows of recipes/tables.yaml, but no
checkpoint, and changes none of them. The same folders give the same bytes. report.html is one file
with everything in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

from config.parser import Parser
from errors import InputError, run_command
from storage.files import write_atomically
from tools.report.details import run_page
from tools.report.html import write_page
from tools.report.markdown import write_text
from tools.report.results import build_report, progress, recipe_name, table_name
from tools.runs.folders import find_runs
from tools.runs.matching import changed_flags, sort_runs
from tools.runs.records import Result, Row, Run, SortedRuns
from tools.runs.rows import read_tables


def get_args_parser() -> Parser:
    parser = Parser(
        "python -m tools.report", description="Puts your runs beside the paper's tables."
    )
    parser.add_argument(
        "root", metavar="OUTPUT_ROOT", help="folder that holds your runs, at any depth"
    )
    parser.add_argument(
        "--output", default="", help="folder for report.html and report.md; default: OUTPUT_ROOT"
    )
    return parser


def read_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with its defaults filled in."""
    args = get_args_parser().parse_args(argv)
    args.output = args.output or args.root
    return args


def rows_of_run(run: Run, found: SortedRuns) -> str:
    """The rows that a run belongs to, as text."""

    def names(results: Sequence[Result]) -> str:
        rows = [result.row for result in results if run in (*result.finished, *result.unfinished)]
        return ", ".join(f"{table_name(row.table)} {recipe_name(row)}" for row in rows)

    kinds = [("", found.full), ("", found.study), ("as a rehearsal: ", found.small)]
    kinds += [(f"as a rehearsal cut short ({cut}): ", found.cut[cut]) for cut in found.cut]
    parts = [kind + rows for kind, results in kinds if (rows := names(results))]
    if not parts:
        return "no row of the paper"
    counts = run.is_finished or run.is_cut
    return "; ".join(parts) + ("" if counts else "; not yet, because the run is not finished")


def make_report(root: str, rows: Sequence[Row]) -> tuple[str, str]:
    """HTML and Markdown of the runs at and below `root`.

    Args:
        rows: the rows of the paper's tables, see `tools.runs.rows.read_tables`.

    Raises:
        InputError: `root` is not a folder, or it holds no run folder.
    """
    runs, skipped = find_runs(Path(root))
    found = sort_runs(runs, rows)
    pages = [
        run_page(run, number, rows_of_run(run, found), progress(run), changed_flags(run))
        for number, run in enumerate(runs, start=1)
    ]
    report = build_report(root, runs, skipped, found)._replace(runs=pages)
    return write_page(report), write_text(report)


def _write(data: bytes, stream: BinaryIO) -> None:
    stream.write(data)


def main(argv: Sequence[str] | None = None) -> None:
    args = read_args(argv)
    folder = Path(args.output)
    html, markdown = make_report(args.root, read_tables().rows())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder}: cannot be made: {error.strerror or error}") from error
    for path, text in ((folder / "report.html", html), (folder / "report.md", markdown)):
        write_atomically(path, partial(_write, text.encode("utf-8", "backslashreplace")))
        print(f"wrote {path}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
