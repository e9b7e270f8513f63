"""The rows of the paper's tables, asked of the scripts that run them (scripts/tables/).

One owner: what a row trains is said in those scripts alone. Here their list is read and taken
apart. It must not know run folders, nor how anything is shown.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.report.records import Row
from utils import InputError

LAUNCH = (
    "NNODES",
    "NODE_RANK",
    "MASTER_",
)  # what several machines of a run are told: a list is of one
FOLDER = Path(__file__).resolve().parent.parent.parent / "scripts" / "tables"


def read_rows(folder: Path = FOLDER) -> list[Row]:
    """Every row for every model, the full ones and those of the rehearsals, table by table in the
    paper's order.

    Raises:
        InputError: there is no bash, a script fails, or its list is not understood.
    """
    scripts = sorted(
        (path for path in folder.glob("table*.sh")), key=lambda path: _order(path.stem)
    )
    if not scripts:
        raise InputError(f"{folder}: the scripts of the paper's tables are not there")
    asked = [
        (path, words) for path in scripts for words in (["--list"], ["--list-tsv", "--nproc", "1"])
    ]
    asked += [(path, ["--small", "--list-tsv"]) for path in scripts]
    with ThreadPoolExecutor() as pool:
        told = dict(
            zip(((path, words[0]) for path, words in asked), pool.map(_ask, asked), strict=True)
        )
    rows = list[Row]()
    for path in scripts:
        title = told[path, "--list"].split("\n")[0].split(": top-1")[0]
        for small in (False, True):
            lines = told[path, "--small" if small else "--list-tsv"].splitlines()
            rows += parse_rows(lines, small, title, path.name)
    return rows


def _order(name: str) -> tuple[bool, int, str]:
    """Table 2 before Table 10, those of the appendix last."""
    number = "".join(character for character in name.split("_")[0] if character.isdigit())
    return name.startswith("tablea"), int(number or 0), name


def _ask(script_and_words: tuple[Path, list[str]]) -> str:
    path, words = script_and_words
    command = ["bash", str(path), *words]
    here = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCH)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", timeout=120, env=here
        )
    except FileNotFoundError as error:
        raise InputError(
            "bash is not there: the paper's rows are listed by the scripts in scripts/tables/"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"scripts/tables/{path.name} {' '.join(words)}: no answer after 120 s"
        ) from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"scripts/tables/{path.name} {' '.join(words)}: {last}")
    return done.stdout


def parse_rows(lines: Iterable[str], small: bool, title: str, script: str) -> list[Row]:
    """Rows from lines of table, row, label, model, figure and arguments, with tabs between them.

    Raises:
        InputError: a line has another form.
    """
    rows = []
    for line in lines:
        fields = line.split("\t")
        try:
            table, name, label, model, figure, words = fields
            paper = float(figure) if figure.strip("- ") else None
        except ValueError as error:
            raise InputError(
                f"scripts/tables/{script}: its list has a line that is not understood: {line}"
            ) from error
        rows.append(
            Row(table, name, label, model, paper, tuple(words.split()), small, title, script)
        )
    return rows
