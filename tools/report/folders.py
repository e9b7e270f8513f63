"""Run folders, as `main.py` leaves them, read with suspicion: whatever is in one, the rest of the
report stands.

Reads text and JSON only, no checkpoint. Knows the files of a run folder; it must not know the
paper's tables, nor how anything is shown.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from tools.report.records import Run, Skipped, Start
from utils import InputError

LARGEST = 1 << 28  # bytes of one file of text
# of a run; a larger number is damage, and what is missing before it could not be listed
MOST_EPOCHS = 100_000
LARGEST_VALUE = 1e100  # of a number in log.txt: sums of larger ones are soon infinite
TOLD = 20  # warnings of one run that are shown
NOT_SEARCHED = {"checkpoints", "steps"}  # folders of a run in which no other run is
WHOLE = (
    "epochs",
    "seed",
    "batch_size",
    "accum_steps",
)  # flags without which nothing can be said of a run
WORDS = ("model", "mixer", "data_set")
HEAD = re.compile(
    r"(data|images|classes|model|input|mixing|total batch|steps|peak learning rate|precision|device"
    r"|versions)"
    r" {2,}(\S.*)"
)
LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (.*)")


class DamagedError(Exception):
    """A folder cannot be used; the message says why."""


def find_runs(root: Path) -> tuple[list[Run], list[Skipped]]:
    """Every run folder at and below `root`, and the folders that look like one and cannot be read;
    sorted by name.

    Raises:
        InputError: `root` is no folder, or nothing in it looks like a run.
    """
    if not os.path.isdir(root):  # unlike `Path.is_dir` for every name that there can be
        raise InputError(
            f"{root}: no such folder; give the folder that holds your runs, such as output"
        )
    runs, skipped = list[Run](), list[Skipped]()
    for folder in _folders(root):
        name = folder.relative_to(root).as_posix()
        try:
            if any((folder / file).is_file() for file in ("log.txt", "args.json")):
                runs.append(read_run(folder, name))
        except DamagedError as error:
            skipped.append(Skipped(name, str(error)))
        except OSError as error:
            skipped.append(Skipped(name, f"cannot be read: {error.strerror or error}"))
    if not runs and not skipped:
        raise InputError(
            f"{root}: holds no run; looked there and in all folders below for log.txt and "
            "args.json, which main.py "
            "writes into its --output-dir"
        )
    return runs, skipped


def _folders(root: Path) -> Iterator[Path]:
    """`root` and the folders below it, links too, each once and in the order of names; hidden ones
    are left out."""
    seen = set()
    for path, names, files in os.walk(root, followlinks=True):
        left_out = NOT_SEARCHED if "args.json" in files else set[str]()
        names[:] = sorted(
            name for name in names if not name.startswith(".") and name not in left_out
        )
        real = os.path.realpath(path)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        yield Path(path)


def read_run(folder: Path, name: str) -> Run:
    """What a folder says of its run.

    Raises:
        DamagedError: something that a report needs is missing or makes no sense.
        OSError: a file cannot be read.
    """
    if not (folder / "args.json").is_file():
        raise DamagedError("has log.txt but no args.json: not a run of this project's main.py")
    args = _read_args(folder / "args.json")
    status, versions = (_read_extra(folder / file) for file in ("status.json", "environment.json"))
    starts, warnings = _read_train_log(folder / "train.log")
    if not (folder / "log.txt").is_file():
        where = f"; its status is {status['state']}" if "state" in status else ""
        raise DamagedError(f"has args.json but no log.txt: no epoch is finished{where}")
    epochs, is_torn = _read_log(folder / "log.txt")
    if is_torn:
        warnings.append("the last line of log.txt is cut short and was left out")
    picture = folder / "mixing.png"
    plain = {str(key): str(value) for key, value in versions.items()}
    return Run(
        name, args, epochs, status, plain, starts, warnings, picture if picture.is_file() else None
    )


def _read_text(path: Path) -> str:
    if path.stat().st_size > LARGEST:
        raise DamagedError(
            f"{path.name} has {path.stat().st_size:,} bytes, more than such a file ever has"
        )
    return path.read_text(encoding="utf-8", errors="replace")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_args(path: Path) -> dict[str, Any]:
    args = _parse(_read_text(path))
    if not isinstance(args, dict):
        raise DamagedError("args.json holds no JSON object")
    if missing := [name for name in (*WHOLE, *WORDS) if name not in args]:
        raise DamagedError(
            f"args.json has no {', '.join(missing)}: not a run of this project's main.py"
        )
    wrong = [name for name in WHOLE if not _is_whole(args[name])]
    wrong += [name for name in WHOLE[:1] + WHOLE[2:] if name not in wrong and args[name] <= 0]
    wrong += [name for name in WORDS if not isinstance(args[name], str)]
    if wrong:
        raise DamagedError(
            "args.json: " + ", ".join(f"{name} is {args[name]!r:.40}" for name in wrong)
        )
    return args


def _read_extra(path: Path) -> dict[str, Any]:
    """A JSON object that a run may do without; empty where it is missing or damaged."""
    try:
        found = _parse(_read_text(path)) if path.is_file() else None
    except (OSError, DamagedError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_log(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The lines of `log.txt`, and whether the last one was cut short."""
    lines = [line for line in _read_text(path).split("\n") if line.strip()]
    epochs = list[dict[str, Any]]()
    for number, line in enumerate(lines, start=1):
        stats = _parse(line)
        if (
            not isinstance(stats, dict)
            or not _is_whole(stats.get("epoch"))
            or not 0 <= stats["epoch"] < MOST_EPOCHS
        ):
            if number == len(lines):
                return epochs, True
            raise DamagedError(f"line {number} of log.txt is no JSON object with an epoch")
        if epochs and stats["epoch"] <= epochs[-1]["epoch"]:
            raise DamagedError(
                f"log.txt has epoch {stats['epoch']} behind epoch {epochs[-1]['epoch']}"
            )
        epochs.append(
            {name: value if name == "epoch" else _number(value) for name, value in stats.items()}
        )
    return epochs, False


def _number(value: Any) -> float | None:
    """A number that a run may have written, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) <= LARGEST_VALUE else None  # NaN is not


def _read_train_log(path: Path) -> tuple[list[Start], list[str]]:
    """The starts of a run, and the different warnings and errors it told, with how often."""
    try:
        text = _read_text(path) if path.is_file() else ""
    except (OSError, DamagedError) as error:
        return [], [f"train.log was not read: {error}"]
    starts, told = list[Start](), dict[str, int]()
    began = ""
    for entry in text.splitlines():
        if (match := LINE.match(entry)) is None:
            continue
        time, said = match.groups()
        if row := HEAD.fullmatch(said.rstrip()):
            if row[1] == "data":
                starts.append(Start({}))
                began = time
            if starts:
                starts[-1].head[row[1]] = row[2]
        elif said.startswith(("warning: ", "error: ")):
            line = said.removeprefix("warning: ")
            told[line] = told.get(line, 0) + 1
        if not starts:
            continue
        starts[-1].seconds = max(starts[-1].seconds, _seconds(began, time))
        if said.startswith("weights from "):
            starts[-1].weights = said.removeprefix("weights from ")
        starts[-1].resumed |= said.startswith("resumed from ")
        starts[-1].trained |= re.match(r"epoch \d+(:| \[)", said) is not None
    shown = [line + (f" ({count} times)" if count > 1 else "") for line, count in told.items()]
    if len(shown) > TOLD:
        shown = [*shown[:TOLD], f"and {len(shown) - TOLD} more: see train.log"]
    return starts, shown


def _seconds(began: str, ended: str) -> float:
    try:
        return (datetime.fromisoformat(ended) - datetime.fromisoformat(began)).total_seconds()
    except ValueError:
        return 0.0
