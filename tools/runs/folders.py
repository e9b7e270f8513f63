"""Finds and reads the run folders that `main.py` writes.

Damage in one folder never stops the report: the folder is listed with the reason. Only text and
JSON are read, no checkpoint.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from errors import InputError
from tools.runs.records import Run, SkippedFolder, Start

MAX_FILE_BYTES = 1 << 28  # larger text files are not read
# A larger epoch number is damage: the list of missing epochs before it would be endless.
MAX_EPOCHS = 100_000
MAX_VALUE = 1e100  # largest number taken from log.txt: sums of larger ones soon become infinite
MAX_WARNINGS = 20  # warnings that the report lists for one run
NOT_SEARCHED = {"checkpoints", "steps"}  # folders inside a run folder that hold no other run
# Flags that a run must have to be in the report.
INTEGER_FLAGS = ("epochs", "seed", "batch_size", "accum_steps")
POSITIVE_FLAGS = ("epochs", "batch_size", "accum_steps")
TEXT_FLAGS = ("model", "mixer", "data_set")
HEAD_ROW = re.compile(
    r"(data|images|classes|model|input|mixing|total batch|steps|peak learning rate|precision|device"
    r"|versions)"
    r" {2,}(\S.*)"
)
LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (.*)")


class DamagedError(Exception):
    """A run folder cannot be read; the message gives the reason."""


def find_runs(root: Path) -> tuple[list[Run], list[SkippedFolder]]:
    """Reads every run folder at and below `root`, in the order of their names.

    Returns:
        The runs, and the run folders that cannot be read.

    Raises:
        InputError: `root` is not a folder, or it holds no run folder.
    """
    if not os.path.isdir(root):  # `Path.is_dir` raises for some names
        raise InputError(
            f"{root}: no such folder; give the folder that holds your runs, such as output"
        )
    runs, skipped = list[Run](), list[SkippedFolder]()
    for folder in _folders(root):
        name = folder.relative_to(root).as_posix()
        try:
            if any((folder / file).is_file() for file in ("log.txt", "args.json")):
                runs.append(read_run(folder, name))
        except DamagedError as error:
            skipped.append(SkippedFolder(name, str(error)))
        except OSError as error:
            reason = f"cannot be read: {error.strerror or error}"
            skipped.append(SkippedFolder(name, reason))
    if not runs and not skipped:
        raise InputError(
            f"{root}: no run found in it or in the folders below; a run folder is the --output-dir "
            "of main.py and holds log.txt and args.json"
        )
    return runs, skipped


def _folders(root: Path) -> Iterator[Path]:
    """`root` and all folders below it, sorted by name, without hidden ones.

    Links are followed; each folder is visited once.
    """
    visited = set()
    for path, names, files in os.walk(root, followlinks=True):
        skipped = NOT_SEARCHED if "args.json" in files else set[str]()
        names[:] = sorted(name for name in names if name[0] != "." and name not in skipped)
        real = os.path.realpath(path)
        if real in visited:
            names.clear()
            continue
        visited.add(real)
        yield Path(path)


def read_run(folder: Path, name: str) -> Run:
    """The run that a folder holds.

    Raises:
        DamagedError: something that the report needs is missing or invalid.
        OSError: a file cannot be read.
    """
    if not (folder / "args.json").is_file():
        raise DamagedError("has log.txt but no args.json: not a run of this project's main.py")
    args = _read_args(folder / "args.json")
    status, versions = (read_extra(folder / file) for file in ("status.json", "environment.json"))
    starts, warnings = _read_train_log(folder / "train.log")
    if not (folder / "log.txt").is_file():
        state = f"; its status is {status['state']}" if "state" in status else ""
        raise DamagedError(f"has args.json but no log.txt: no epoch is finished{state}")
    epochs, is_torn = _read_log(folder / "log.txt")
    if is_torn:
        warnings.append("the last line of log.txt is incomplete and was ignored")
    path = folder / "mixing.png"
    picture = path if path.is_file() else None
    plain = {str(key): str(value) for key, value in versions.items()}
    return Run(name, args, epochs, status, plain, starts, warnings, picture)


def _read_text(path: Path) -> str:
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise DamagedError(
            f"{path.name} is too large: {size:,} bytes, the limit is {MAX_FILE_BYTES:,}"
        )
    return path.read_text(encoding="utf-8", errors="replace")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_args(path: Path) -> dict[str, Any]:
    args = _parse(_read_text(path))
    if not isinstance(args, dict):
        raise DamagedError("args.json holds no JSON object")
    if missing := [name for name in (*INTEGER_FLAGS, *TEXT_FLAGS) if name not in args]:
        raise DamagedError(
            f"args.json has no {', '.join(missing)}: not a run of this project's main.py"
        )
    wrong = [name for name in INTEGER_FLAGS if not _is_integer(args[name])]
    wrong += [name for name in POSITIVE_FLAGS if name not in wrong and args[name] <= 0]
    wrong += [name for name in TEXT_FLAGS if not isinstance(args[name], str)]
    if wrong:
        values = ", ".join(f"{name} is {args[name]!r:.40}" for name in wrong)
        raise DamagedError(f"args.json: {values}")
    return args


def read_extra(path: Path) -> dict[str, Any]:
    """An optional JSON object; empty if the file is missing or damaged."""
    try:
        content = _parse(_read_text(path)) if path.is_file() else None
    except (OSError, DamagedError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_log(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The lines of `log.txt`, and whether the last line is incomplete."""
    lines = [line for line in _read_text(path).split("\n") if line.strip()]
    epochs = list[dict[str, Any]]()
    for number, line in enumerate(lines, start=1):
        stats = _parse(line)
        epoch: Any = stats.get("epoch") if isinstance(stats, dict) else None
        if not _is_integer(epoch) or not 0 <= epoch < MAX_EPOCHS:
            if number == len(lines):
                return epochs, True
            raise DamagedError(f"line {number} of log.txt is no JSON object with an epoch")
        if epochs and epoch <= epochs[-1]["epoch"]:
            raise DamagedError(f"log.txt has epoch {epoch} after epoch {epochs[-1]['epoch']}")
        epochs.append(
            {name: value if name == "epoch" else _number(value) for name, value in stats.items()}
        )
    return epochs, False


def _number(value: Any) -> float | None:
    """The value as a float; None if it is not a number, not finite or too large."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) <= MAX_VALUE else None  # the comparison is false for NaN


def _read_train_log(path: Path) -> tuple[list[Start], list[str]]:
    """The starts of a run, and its warnings and errors, each text once with its count."""
    try:
        text = _read_text(path) if path.is_file() else ""
    except (OSError, DamagedError) as error:
        return [], [f"train.log was not read: {error}"]
    starts, counts = list[Start](), dict[str, int]()
    began = ""
    for line in text.splitlines():
        if (match := LOG_LINE.match(line)) is None:
            continue
        time, message = match.groups()
        if row := HEAD_ROW.fullmatch(message.rstrip()):
            if row[1] == "data":
                starts.append(Start({}))
                began = time
            if starts:
                starts[-1].head[row[1]] = row[2]
        elif message.startswith(("warning: ", "error: ")):
            warning = message.removeprefix("warning: ")
            counts[warning] = counts.get(warning, 0) + 1
        if not starts:
            continue
        starts[-1].seconds = max(starts[-1].seconds, _seconds(began, time))
        if message.startswith("weights from "):
            starts[-1].weights = message.removeprefix("weights from ")
        starts[-1].resumed |= message.startswith("resumed from ")
        starts[-1].trained |= re.match(r"epoch \d+(:| \[)", message) is not None
    return starts, _list_warnings(counts)


def _list_warnings(counts: dict[str, int]) -> list[str]:
    """At most `MAX_WARNINGS` warnings, each with its count, and a line for the rest."""
    warnings = [text + (f" ({count} times)" if count > 1 else "") for text, count in counts.items()]
    if len(warnings) <= MAX_WARNINGS:
        return warnings
    more = len(warnings) - MAX_WARNINGS
    return [*warnings[:MAX_WARNINGS], f"and {more} more: see train.log"]


def _seconds(began: str, ended: str) -> float:
    try:
        return (datetime.fromisoformat(ended) - datetime.fromisoformat(began)).total_seconds()
    except ValueError:
        return 0.0
