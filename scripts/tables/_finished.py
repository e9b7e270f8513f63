"""Whether finished runs are those that a table's script would make now: it asks before it skips
them.

Compares each folder's `args.json` with the words of main.py, as the report does. Ends with 2 and a
line for each run whose recipe is another one. Called by _finished.sh; trains nothing, changes
nothing.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tools.report.folders import DamagedError, read_run
from tools.report.matching import differences_now
from utils import InputError, run_command


class Finished(NamedTuple):
    """A finished run, and the command that it would be run with now.

    Args:
        what: the table and the row, for messages.
    """

    what: str
    folder: Path
    command: list[str]


def read_words(words: Sequence[str]) -> Iterator[Finished]:
    """From WHAT FOLDER COUNT and COUNT words of a command, again and again."""
    rest = list(words)
    while rest:
        what, folder, count, *rest = rest
        yield Finished(what, Path(folder), rest[: int(count)])
        rest = rest[int(count) :]


def what_differs(run: Finished) -> str:
    """The flags that the run there was not made with, or why that is not known; empty where it is
    the same."""
    (start,) = [place for place, word in enumerate(run.command) if Path(word).name == "main.py"]
    launch = " ".join(run.command[:start])
    processes = math.prod(
        int(number) for number in re.findall(r"--(?:nnodes|nproc_per_node)=(\d+)", launch)
    )
    try:
        found = differences_now(
            read_run(run.folder, run.folder.name), tuple(run.command[start + 1 :]), processes
        )
    except (DamagedError, OSError) as error:
        return f"its recipe cannot be read: {error}"
    return ", ".join(one.text for one in found)


def main() -> None:
    told = []
    for run in read_words(sys.argv[1:]):
        if differs := what_differs(run):
            told.append(
                f"{run.what}: {run.folder} is finished with another recipe: {differs}; choose "
                "another --output"
            )
    if told:
        raise InputError("\n".join(told))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
