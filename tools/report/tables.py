"""Reads the rows of the paper's tables from the lists that scripts/tables/*.sh print.

Those scripts alone define what a row trains.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from errors import InputError
from tools.report.records import Row

# Variables for runs on several machines; the list of rows is for one machine.
LAUNCH_VARIABLES = ("NNODES", "NODE_RANK", "MASTER_")
FOLDER = Path(__file__).resolve().parent.parent.parent / "scripts" / "tables"


def read_rows(folder: Path = FOLDER) -> list[Row]:
    """All rows for all models, full ones and rehearsals, in the paper's order of tables.

    Raises:
        InputError: bash is missing, a script fails, or its list cannot be parsed.
    """
    scripts = sorted(folder.glob("table*.sh"), key=lambda path: _paper_order(path.stem))
    if not scripts:
        raise InputError(f"{folder}: holds no scripts of the paper's tables (table*.sh)")
    with ThreadPoolExecutor() as pool:
        titles = pool.map(lambda path: _run_script(path, "--list"), scripts)
        full = pool.map(lambda path: _run_script(path, "--list-tsv", "--nproc", "1"), scripts)
        small = pool.map(lambda path: _run_script(path, "--small", "--list-tsv"), scripts)
        outputs = list(zip(scripts, titles, full, small, strict=True))
    rows = list[Row]()
    for path, listing, full_lines, small_lines in outputs:
        title = listing.split("\n")[0].split(": top-1")[0]
        rows += parse_rows(full_lines.splitlines(), False, title, path.name)
        rows += parse_rows(small_lines.splitlines(), True, title, path.name)
    return rows


def _paper_order(name: str) -> tuple[bool, int, str]:
    """Sorts Table 2 before Table 10, and the appendix last."""
    number = "".join(character for character in name.split("_")[0] if character.isdigit())
    return name.startswith("tablea"), int(number or 0), name


def _run_script(path: Path, *arguments: str) -> str:
    """The standard output of a table's script."""
    command = ["bash", str(path), *arguments]
    script = f"scripts/tables/{path.name} {' '.join(arguments)}"
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(LAUNCH_VARIABLES)
    }
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", timeout=120, env=environment
        )
    except FileNotFoundError as error:
        raise InputError(
            "bash is not installed: the scripts in scripts/tables/ list the paper's rows"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{script}: no answer after 120 s") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"{script}: {last}")
    return done.stdout


def parse_rows(lines: Iterable[str], small: bool, title: str, script: str) -> list[Row]:
    """Rows from tab-separated lines: table, row, label, model, figure, arguments.

    Raises:
        InputError: a line cannot be parsed.
    """
    rows = []
    for line in lines:
        fields = line.split("\t")
        try:
            table, name, label, model, figure, arguments = fields
            paper = float(figure) if figure.strip("- ") else None
        except ValueError as error:
            raise InputError(
                f"scripts/tables/{script}: its list has a line that cannot be parsed: {line}"
            ) from error
        words = tuple(arguments.split())
        rows.append(Row(table, name, label, model, paper, words, small, title, script))
    return rows
