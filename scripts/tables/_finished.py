"""Compares finished runs with the commands that a table's script would run now.

_finished.sh calls it before the script skips those runs. The `args.json` of each folder is compared
with the arguments of main.py, as the report does. If a recipe differs, it prints a line for each
such run and exits with code 2. It changes nothing.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from errors import InputError, run_command
from tools.report.folders import DamagedError, read_run
from tools.report.matching import differences_from_command


class Finished(NamedTuple):
    """A finished run, and the command that would run it now."""

    what: str  # the table and the row, for messages
    folder: Path
    command: list[str]


def read_words(words: Sequence[str]) -> Iterator[Finished]:
    """Parses the arguments: WHAT FOLDER COUNT and COUNT words of a command, repeated."""
    rest = list(words)
    while rest:
        what, folder, count, *rest = rest
        yield Finished(what, Path(folder), rest[: int(count)])
        rest = rest[int(count) :]


def what_differs(run: Finished) -> str:
    """The differences between a run and its command as text, or why the run cannot be read.

    The text is empty if there are no differences.
    """
    (start,) = [index for index, word in enumerate(run.command) if Path(word).name == "main.py"]
    launch, arguments = " ".join(run.command[:start]), tuple(run.command[start + 1 :])
    counts = re.findall(r"--(?:nnodes|nproc_per_node)=(\d+)", launch)
    processes = math.prod(map(int, counts))
    try:
        recorded = read_run(run.folder, run.folder.name)
        differences = differences_from_command(recorded, arguments, processes)
    except (DamagedError, OSError) as error:
        return f"its recipe cannot be read: {error}"
    return ", ".join(one.text for one in differences)


def main() -> None:
    messages = []
    for run in read_words(sys.argv[1:]):
        if differences := what_differs(run):
            problem = f"{run.folder} holds a finished run with another recipe: {differences}"
            messages.append(f"{run.what}: {problem}; choose another --output")
    if messages:
        raise InputError("\n".join(messages))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
