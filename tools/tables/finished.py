"""Which runs are finished, and whether their recipe is that of the command."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from errors import InputError
from tools.runs.folders import DamagedError, read_run
from tools.runs.matching import differences_from_command
from tools.runs.records import Run
from tools.tables.plan import PlannedRun


def is_finished(planned: PlannedRun, steps: int | None) -> bool:
    """Whether the folder holds the last epoch, or a rehearsal of at least `steps` steps.

    Raises:
        InputError: the folder has a log but its run cannot be read, or the finished run has another
            recipe than the command.
    """
    run = read(planned)
    if run is None or not (run.is_finished or _has_steps(run, steps)):
        return False
    found = differences_from_command(run, planned.arguments, 1)
    if found:
        texts = ", ".join(one.text for one in found)
        raise InputError(
            f"{planned.what}: {planned.folder} holds a finished run with another recipe: {texts}; "
            "choose another --output"
        )
    return True


def read(planned: PlannedRun) -> Run | None:
    """The run in the folder, or None if it has no epoch yet.

    Raises:
        InputError: it cannot be read.
    """
    folder: Path = planned.folder
    if not (folder / "log.txt").is_file():
        return None
    try:
        return read_run(folder, folder.name)
    except (DamagedError, OSError) as error:
        raise InputError(
            f"{planned.what}: {folder} cannot be read: {error}; choose another --output"
        ) from error


def _has_steps(run: Run, steps: int | None) -> bool:
    done = run.status.get("step")
    return steps is not None and run.is_cut and isinstance(done, int) and done >= steps


def split(
    runs: Iterable[PlannedRun], steps: int | None
) -> tuple[list[PlannedRun], list[PlannedRun]]:
    """The finished runs and the others.

    Raises:
        InputError: one line for each run that has the error of `is_finished`.
    """
    finished, others, problems = list[PlannedRun](), list[PlannedRun](), list[str]()
    for run in runs:
        try:
            (finished if is_finished(run, steps) else others).append(run)
        except InputError as error:
            problems.append(error.text)
    if problems:
        raise InputError("\n".join(problems))
    return finished, others
