"""A report of your runs beside the paper's tables: report.html, one file with everything in it, and
report.md.

    python -m tools.report output
    python -m tools.report output --output somewhere

Reads every run folder at and below the one that is given, and the rows of scripts/tables/. Changes
nothing in them. The same folders give the same bytes. Trains nothing, reads no checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

from config.parser import Parser
from storage.files import write_atomically
from tools.report import details, folders, matching, tables
from tools.report import html as report_html
from tools.report import markdown as tools_report_markdown
from tools.report import results as tools_report_results
from tools.report.records import Result, Row, Run, Sorted
from utils import InputError, run_command


def get_args_parser() -> Parser:
    parser = Parser(
        "python -m tools.report", description="Puts your runs beside the paper's tables."
    )
    parser.add_argument(
        "root", metavar="OUTPUT_ROOT", help="the folder with your runs in it, at any depth"
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


def where_it_counts(run: Run, found: Sorted) -> str:
    """The rows that a run belongs to, in words."""

    def names(results: Sequence[Result]) -> str:
        there = [result.row for result in results if run in (*result.finished, *result.unfinished)]
        return ", ".join(
            f"{tools_report_results.table_name(row.table)} {tools_report_results.recipe(row)}"
            for row in there
        )

    kinds = [("", found.full), ("as a rehearsal: ", found.small)]
    kinds += [
        (f"as a rehearsal cut short ({cut}): ", results) for cut, results in found.cut.items()
    ]
    parts = [how + there for how, results in kinds if (there := names(results))]
    counts = run.is_finished or run.is_cut
    return "; ".join(parts or ["no row of the paper"]) + (
        "; not yet, since it is not finished" if parts and not counts else ""
    )


def make_report(root: str, rows: Sequence[Row]) -> tuple[str, str]:
    """HTML and Markdown of the runs at and below `root`.

    Args:
        rows: of the paper's tables, see `tools.report.tables.read_rows`.

    Raises:
        InputError: there is no such folder, or nothing in it looks like a run.
    """
    runs, skipped = folders.find_runs(Path(root))
    found = matching.sort_runs(runs, rows)
    pages = []
    for number, run in enumerate(runs, start=1):
        flags = matching.changed_flags(run)
        pages.append(
            details.run_page(
                run, number, where_it_counts(run, found), tools_report_results.progress(run), flags
            )
        )
    report = tools_report_results.build(root, runs, skipped, found)._replace(runs=pages)
    return report_html.write_page(report), tools_report_markdown.write_text(report)


def _write(data: bytes, stream: BinaryIO) -> None:
    stream.write(data)


def main(argv: Sequence[str] | None = None) -> None:
    args = read_args(argv)
    folder = Path(args.output)
    html, markdown = make_report(args.root, tables.read_rows())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder}: cannot be made: {error.strerror or error}") from error
    for name, written in (("report.html", html), ("report.md", markdown)):
        write_atomically(
            folder / name, partial(_write, written.encode("utf-8", "backslashreplace"))
        )
        print(f"wrote {folder / name}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
