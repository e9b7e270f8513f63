"""Matches runs to rows of the paper's tables.

A run belongs to a row only if its whole recipe, its total batch and its data are the row's. Flags
are read by the parser of `main.py` and compared one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import PurePath
from typing import Any, NamedTuple

from config.config_file import read_file
from config.flags import get_args_parser
from config.parser import Parser
from config.resolve import resolve
from errors import InputError
from mixers.registry import METHODS
from run.saved_flags import FREE_ON_RESUME, same_value
from tools.runs.records import PRETRAINED, Result, Row, Run, SortedRuns, UnmatchedRun

# These flags may change when a run is resumed, because they act only at its start or are paths.
# They are still a part of the row's recipe.
ROW_FLAGS = {
    "finetune",
    "start_epoch",
    "max_steps",
    "val_subset",
    "attentive_teacher",
    "motivator",
    "subset",
}
# The data are compared by their content and not by their name: see `_compare_data`.
DATA_FLAGS = {"data_set", "inat_category", "nb_classes"}
IGNORED_FLAGS = (FREE_ON_RESUME | {"seed"} | DATA_FLAGS) - ROW_FLAGS
NETWORK_FLAGS = {"attentive_teacher", "motivator"}  # their values are NAME, NAME=FILE or a file
# How a difference introduces the expected value.
IN_ROW, IN_COMMAND = "the row has", "this command has"
LENGTH_FLAGS = {"epochs", "max_steps"}  # a rehearsal that differs in these is a shorter one
SHORTER_FLAGS = {
    *LENGTH_FLAGS,
    "warmup_epochs",
    "val_subset",
}  # a shorter rehearsal may differ in all of these


class DataSet(NamedTuple):
    """The data set that rows are trained on."""

    name: str
    classes: int
    train: int
    val: int
    flags: tuple[str, ...]  # the possible beginnings of --data-set


IMAGENET = DataSet("ImageNet-1k", 1000, 1_281_167, 50_000, ("IMNET", "timm/"))
CIFAR10 = DataSet("CIFAR-10", 10, 50_000, 10_000, ("CIFAR10", "IMNET"))
# Rows of a run's head that must be the same in all its starts.
FIXED_HEAD_ROWS = (
    "data",
    "images",
    "classes",
    "model",
    "input",
    "mixing",
    "total batch",
    "steps",
    "peak learning rate",
)


class Difference(NamedTuple):
    """One difference between a run and a row. `name` is a flag, or the name of something else."""

    name: str
    text: str


def sort_runs(runs: Sequence[Run], rows: Sequence[Row]) -> SortedRuns:
    """Assigns every run to the rows whose recipe it has. Several rows may have the same recipe.

    Raises:
        InputError: `main.py` does not accept the arguments of a row.
    """
    results = {row: Result(row) for row in rows}
    cut = dict[str, dict[Row, Result]]()
    others = []
    for run in runs:
        if PRETRAINED in PurePath(run.name).parent.parts:
            reason = f"no row: a frozen network of other rows, in a folder named {PRETRAINED}"
            others.append(UnmatchedRun(run, None, [reason]))
            continue
        compared = [(differences(run, row), row) for row in rows if row.arguments]
        matching = [row for found, row in compared if not found]
        shorter = [
            row for found, row in compared if row.small and _is_shorter({one.name for one in found})
        ]
        if matching:
            for row in matching:
                _add_run(results[row], run, run.is_finished)
        elif shorter:
            for row in shorter:
                same_length = cut.setdefault(_length(run, row), {})
                result = same_length.setdefault(row, Result(row))
                _add_run(result, run, run.is_finished or run.is_cut)
        else:
            found, nearest = min(compared, key=lambda one: len(one[0]), default=([], None))
            others.append(UnmatchedRun(run, nearest, [one.text for one in found]))
    full = [result for row, result in results.items() if not (row.small or row.is_study)]
    study = [result for row, result in results.items() if row.is_study]
    small = [result for row, result in results.items() if row.small]
    lengths = sorted(cut, key=lambda length: [int(digits) for digits in re.findall(r"\d+", length)])
    whole = {length: _whole_tables(cut[length], rows) for length in lengths}
    return SortedRuns(full, study, small, whole, others)


def _whole_tables(found: dict[Row, Result], rows: Sequence[Row]) -> list[Result]:
    """The results, with an empty result for every other row of the same tables."""
    tables = {row.table for row in found}
    return [found.get(row, Result(row)) for row in rows if row.small and row.table in tables]


def _is_shorter(differing: set[str]) -> bool:
    """Whether a rehearsal with these differing flags is a shorter one of the same recipe."""
    return differing <= SHORTER_FLAGS and bool(differing & LENGTH_FLAGS)


def _length(run: Run, row: Row) -> str:
    """The length of a shorter rehearsal, beside that of its row."""
    wanted = flags_of(row.arguments, _device_of(run))
    epochs, max_steps = wanted["epochs"], run.args.get("max_steps")
    warm_up = run.args.get("warmup_epochs")
    parts = []
    if run.planned != epochs or not max_steps:
        parts.append(f"{run.planned} of {epochs} epochs")
    if max_steps:
        parts.append(f"at most {max_steps} steps")
    if few := run.args.get("val_subset"):
        parts.append(f"evaluated on {few} images")
    if warm_up != wanted["warmup_epochs"]:
        parts.append(f"{warm_up} of them to warm up")
    return ", ".join(parts)


def _add_run(result: Result, run: Run, is_finished: bool) -> None:
    (result.finished if is_finished else result.unfinished).append(run)


# ---------------------------------------------------------------------------------------- comparing


def differences(run: Run, row: Row) -> list[Difference]:
    """The differences between a run and a row; empty if the run belongs to the row."""
    wanted = flags_of(row.arguments, _device_of(run))
    found = compare_flags(run.args, wanted)
    is_cifar = row.small or row.is_study
    found += _compare_data(run, CIFAR10 if is_cifar else IMAGENET, wanted.get("subset"))
    return [*found, *_compare_total(run, wanted, IN_ROW), *_compare_starts(run)]


def differences_from_command(
    run: Run, arguments: tuple[str, ...], processes: int
) -> list[Difference]:
    """The differences between a finished run and a command of main.py for the same folder.

    Empty if the command would make the same run. `max_steps` is ignored if the run finished its
    epochs within that number of steps.

    Args:
        arguments: the arguments of main.py.
        processes: the number of processes of the command.

    Raises:
        InputError: `main.py` does not accept the arguments.
    """
    wanted = flags_of(arguments, _device_of(run), processes)
    max_steps, steps = wanted["max_steps"], run.status.get("step")
    is_within = isinstance(steps, int) and (max_steps is None or max_steps >= steps)
    found = compare_flags(run.args, wanted, IN_COMMAND)
    if run.is_finished and is_within:
        found = [one for one in found if one.name != "max_steps"]
    for name in sorted(NETWORK_FLAGS - {one.name for one in found}):
        value, expected = run.args.get(name), wanted[name]
        if _weights_file(value) != _weights_file(expected):
            text = f"{written_flag(name, value)} ({IN_COMMAND} {_text_of(expected)})"
            found.append(Difference(name, text))
    return [*found, *_compare_total(run, wanted, IN_COMMAND)]


def _compare_total(run: Run, wanted: dict[str, Any], whose: str) -> Iterable[Difference]:
    expected, total = wanted["total_batch"], total_batch(run)
    if total != expected:
        text = f"total batch {total or 'not recorded'} ({whose} {expected})"
        yield Difference("total batch", text)


def compare_flags(
    args: dict[str, Any], wanted: dict[str, Any], whose: str = IN_ROW
) -> list[Difference]:
    """Flags of the recipe whose values differ.

    A flag that an older version did not have counts as its default.
    """
    found, defaults = [], _defaults()
    for name in sorted((args.keys() | wanted.keys()) - IGNORED_FLAGS):
        value = args.get(name, defaults.get(name))
        expected = wanted.get(name, "no such flag")
        if name in NETWORK_FLAGS:
            value, expected = network_of(value), network_of(expected)
        if name not in defaults or not same_value(value, expected):
            text = f"{written_flag(name, value)} ({whose} {_text_of(expected)})"
            found.append(Difference(name, text))
    return found


def written_flag(name: str, value: Any) -> str:
    """A flag with its value, as on a command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {_text_of(value)}"


def _text_of(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    text = "none" if value is None or text == "" else text
    return text if len(text) <= 80 else text[:77] + "..."


def network_of(value: Any) -> Any:
    """The identity of a network, without the place of its weights.

    Returns:
        Its name without tag, or the last folder and the file name of a path.
    """
    if not isinstance(value, str) or not value:
        return value
    name, equals, _ = value.partition("=")
    path = PurePath(value)
    if not equals and (len(path.parts) > 1 or path.suffix in (".pth", ".pt", ".safetensors")):
        return "/".join(path.parts[-2:])
    return name.split(".")[0]


def _weights_file(value: Any) -> str:
    """The file name in NAME=FILE, else an empty text."""
    return PurePath(str(value).partition("=")[2]).name


@cache
def flags_of(arguments: tuple[str, ...], device: str, processes: int = 1) -> dict[str, Any]:
    """The flags that a run with these arguments saves, on so many processes of this device.

    Raises:
        InputError: the parser refuses the arguments, or a file of --config is wrong.
    """
    words = list[str]()
    for word in arguments:
        flag, _, file = word.partition("=")
        words += _words_of_recipe(file) if flag == "--config" else [word]
    try:
        args = _parser().parse_args(words)
    except SystemExit as error:
        raise InputError(f"main.py does not accept {' '.join(arguments)}") from error
    return dict(vars(resolve(args, processes, device)))


@cache
def _parser() -> Parser:
    return get_args_parser()


@cache
def _words_of_recipe(file: str) -> list[str]:
    """The flags of a recipe as words of a command line. Each file is read once."""
    return [word for setting in read_file(_parser(), file).values() for word in setting.words]


def same_recipes(rows: Iterable[Row]) -> list[list[Row]]:
    """Groups of rows that are one recipe, so that one run counts in all of them."""
    groups = dict[tuple[Any, ...], list[Row]]()
    for row in rows:
        if row.arguments and not row.small:
            flags = flags_of(row.arguments, "cpu")
            recipe = (repr(flags[name]) for name in sorted(flags.keys() - IGNORED_FLAGS))
            groups.setdefault((row.model, *recipe), []).append(row)
    return [group for group in groups.values() if len(group) > 1]


@cache
def _defaults() -> dict[str, Any]:
    return vars(_parser().parse_args([]))


def changed_flags(run: Run) -> list[tuple[str, str, str]]:
    """Flags of the recipe that differ from main.py's defaults: name, value, default."""
    mixer = run.args["mixer"] if run.args["mixer"] in METHODS else "none"
    # A size spares building the model, whose own size is not compared here.
    arguments = ("--data-set", "DIGITS", "--input-size", "1", "--mixer", mixer)
    defaults = {
        **flags_of(arguments, _device_of(run)),
        "input_size": run.args.get("input_size"),
        "mixer": _defaults()["mixer"],
    }
    names = [one.name for one in compare_flags(run.args, defaults)]
    return [
        (f"--{name.replace('_', '-')}", _text_of(run.args.get(name)), _text_of(defaults.get(name)))
        for name in names
    ]


# ------------------------------------------------------------------------------ the head of a run


def _numbers(text: str) -> list[int]:
    # At most 30 digits: a longer number is no count.
    return [int(digits.replace(",", "")) for digits in re.findall(r"\d[\d,]{0,29}", text)]


def _device_of(run: Run) -> str:
    device = run.start.head.get("device", "cpu").split(",")[0]
    return device if device in ("cuda", "mps") else "cpu"


def total_batch(run: Run) -> int | None:
    """The total batch of a run, or None if it is not recorded."""
    numbers = _numbers(run.start.head.get("total batch", ""))
    return numbers[-1] if numbers else None


def _compare_data(run: Run, wanted: DataSet, subset: int | None) -> Iterable[Difference]:
    """Compares the data by kind of data set, number of classes and numbers of images."""
    head = run.start.head
    found = [_numbers(head.get(name, "")) for name in ("classes", "images")]
    if [len(numbers) for numbers in found] != [1, 2]:
        return [Difference("data", "its data are not recorded in train.log")]
    classes, (train, val) = found[0][0], found[1]
    right = classes == wanted.classes and val == wanted.val and train == (subset or wanted.train)
    if right and str(run.args["data_set"]).startswith(wanted.flags):
        return []
    data = f"{run.args['data_set']}, {classes:,} classes, {train:,} and {val:,} images"
    return [Difference("data", f"data {data} (the row has {wanted.name})")]


def _compare_starts(run: Run) -> Iterable[Difference]:
    """Changes between the starts of a run, which its saved flags do not record."""
    for start in run.counted_starts:
        if start.weights and not run.args.get("finetune"):
            yield Difference("finetune", f"started with weights from {start.weights}")
    for name in FIXED_HEAD_ROWS:
        values = [_comparable(name, start.head.get(name, "")) for start in run.counted_starts]
        if len(set(values)) > 1:
            changes = " -> ".join(dict.fromkeys(values))
            yield Difference(name, f"changed when the run was resumed: {name} {changes}")
    if changed := run.args.get("accept_changes"):
        flags = " ".join(map(str, changed)) if isinstance(changed, list) else "?"
        text = f"resumed with changed settings: --accept-changes {flags}"
        yield Difference("accept_changes", text)
    if run.missing:
        yield Difference("log", f"log.txt lacks epochs {run.missing[0]} to {run.missing[-1]}")


def _comparable(name: str, value: str) -> str:
    """A row of the head without the data's folder and without the factors of the total batch."""
    if name == "data":
        return value.split(" ")[0]
    return value.split("= ")[-1] if name == "total batch" else value
