"""Which run belongs to which row of the paper: only one whose whole recipe is the row's, on the
row's data.

Flags are read by the project's own parser and compared one by one. It must not know files, nor how
anything is shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import PurePath
from typing import Any, NamedTuple

import torch

from config.flags import get_args_parser
from config.mixing_flags import METHODS
from config.resolve import model_config, resolve
from models.build import build_on_meta
from run.saved_flags import FREE_ON_RESUME, same_value
from tools.report.records import Other, Result, Row, Run, Sorted
from utils import InputError, Processes

# Free when a run is gone on with, because the run has it behind it or it is a path; still a part of
# what a row is.
OF_A_ROW = {"finetune", "start_epoch", "max_steps", "attentive_teacher", "motivator", "subset"}
# The data are compared by what they are, whatever they are called: see `_compare_data`.
FREE = (FREE_ON_RESUME | {"seed", "data_set", "inat_category", "nb_classes"}) - OF_A_ROW
NETWORKS = {"attentive_teacher", "motivator"}  # NAME, NAME=FILE or a file
THE_ROW, NOW = "the row has", "asked now:"  # how the value that a run's is compared with is called
# the folder of networks that rows of rehearsals look through, see scripts/tables/_small.sh
PRETRAINED = "pretrained"
CUTS = {"epochs", "max_steps"}  # what makes a rehearsal a shorter one
WITH_CUTS = {*CUTS, "warmup_epochs"}  # and what may go with that


class DataSet(NamedTuple):
    """What rows are trained on."""

    name: str
    classes: int
    train: int
    val: int
    flags: tuple[str, ...]  # what --data-set may say


IMAGENET = DataSet("ImageNet-1k", 1000, 1_281_167, 50_000, ("IMNET", "timm/"))
CIFAR10 = DataSet("CIFAR-10", 10, 50_000, 10_000, ("CIFAR10", "IMNET"))
SETTLED = (
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
    """What a run and a row do not share; `name` is a flag's, or a word for something else."""

    name: str
    text: str


class ModelFacts(NamedTuple):
    """What a model is where flags are left out: height and width, and the number of its blocks with
    a score."""

    input_size: tuple[int, int]
    score_blocks: int


def sort_runs(runs: Sequence[Run], rows: Sequence[Row]) -> Sorted:
    """Puts every run under the rows whose recipe it has; a recipe may be that of several rows.

    Raises:
        InputError: a row's arguments are not those of `main.py`.
    """
    there = {row: Result(row) for row in rows}
    cut = dict[str, dict[Row, Result]]()
    others = []
    for run in runs:
        if PRETRAINED in PurePath(run.name).parent.parts:
            others.append(
                Other(
                    run,
                    None,
                    [f"no row: trained for rows to look through, in a folder {PRETRAINED}"],
                )
            )
            continue
        compared = [(differences(run, row), row) for row in rows if row.words]
        fitting = [row for found, row in compared if not found]
        for row in fitting:
            place(there[row], run, run.is_finished)
        shorter = [
            row for found, row in compared if row.small and _is_shorter({one.name for one in found})
        ]
        for row in [] if fitting else shorter:
            results = cut.setdefault(_length(run, row), {})
            place(results.setdefault(row, Result(row)), run, run.is_finished or run.is_cut)
        if not fitting and not shorter:
            found, nearest = min(compared, key=lambda one: len(one[0]), default=([], None))
            others.append(Other(run, nearest, [one.text for one in found]))
    full, small = (
        [result for row, result in there.items() if row.small == kind] for kind in (False, True)
    )
    by_length = sorted(
        cut.items(), key=lambda item: [int(number) for number in re.findall(r"\d+", item[0])]
    )
    return Sorted(
        full, small, {length: _whole_tables(found, rows) for length, found in by_length}, others
    )


def _whole_tables(found: dict[Row, Result], rows: Sequence[Row]) -> list[Result]:
    """The results with the rows without any beside them, of the tables that have one."""
    tables = {row.table for row in found}
    return [found.get(row, Result(row)) for row in rows if row.small and row.table in tables]


def _is_shorter(differ: set[str]) -> bool:
    """Whether a rehearsal that differs from its row in these flags is a shorter one and nothing
    else."""
    return differ <= WITH_CUTS and bool(differ & CUTS)


def _length(run: Run, row: Row) -> str:
    """How much shorter than its row a rehearsal is."""
    wanted = flags_of(row.words, _device_of(run))
    planned, warm_up = wanted["epochs"], run.args.get("warmup_epochs")
    steps = f", at most {run.args['max_steps']} steps" if run.args.get("max_steps") else ""
    length = (
        f"{run.planned} of {planned} epochs{steps}"
        if run.planned != planned or not steps
        else steps[2:]
    )
    return length + (
        "" if warm_up == wanted["warmup_epochs"] else f", {warm_up} of them to warm up"
    )


def place(result: Result, run: Run, is_finished: bool) -> None:
    (result.finished if is_finished else result.unfinished).append(run)


# ---------------------------------------------------------------------------------------- comparing


def differences(run: Run, row: Row) -> list[Difference]:
    """What keeps a run from being one of this row; nothing if it is."""
    wanted = flags_of(row.words, _device_of(run))
    found = compare_flags(run.args, wanted)
    if any(one.name == "score_block" for one in found) and _reads_last(run, wanted):
        found = [one for one in found if one.name != "score_block"]
    found += _compare_data(run, CIFAR10 if row.small else IMAGENET, wanted.get("subset"))
    return [*found, *_compare_total(run, wanted, 1, THE_ROW), *_compare_course(run)]


def differences_now(run: Run, words: tuple[str, ...], processes: int) -> list[Difference]:
    """What a run that came to its end does not share with a command of main.py for the same folder;
    nothing if it is what the command would make. How many steps a run may take makes no difference
    where its epochs ended before.

    Raises:
        InputError: the words are not those of `main.py`.
    """
    wanted = flags_of(words, _device_of(run))
    most, taken = wanted["max_steps"], run.status.get("step")
    is_whole = run.is_finished and isinstance(taken, int) and (most is None or most >= taken)
    found = [
        one
        for one in compare_flags(run.args, wanted, NOW)
        if one.name != "max_steps" or not is_whole
    ]
    for name in sorted(NETWORKS - {one.name for one in found}):
        if _weights(run.args.get(name)) != _weights(wanted[name]):
            found.append(
                Difference(
                    name, f"{written(name, run.args.get(name))} ({NOW} {_shown(wanted[name])})"
                )
            )
    return [*found, *_compare_total(run, wanted, processes, NOW)]


def _compare_total(
    run: Run, wanted: dict[str, Any], processes: int, whose: str
) -> Iterable[Difference]:
    total, own = wanted["batch_size"] * wanted["accum_steps"] * processes, total_batch(run)
    if own != total:
        yield Difference("total batch", f"total batch {own or 'not recorded'} ({whose} {total})")


def _reads_last(run: Run, wanted: dict[str, Any]) -> bool:
    """Whether run and row both read their own score in the last block, where one of them says so
    and one does not."""
    model, patch_size = wanted["model"], wanted["patch_size"]
    if [run.args["model"], run.args.get("patch_size"), run.args.get("motivator")] != [
        model,
        patch_size,
        "self",
    ]:
        return False
    last = _facts_of(model, patch_size).score_blocks
    return (run.args.get("score_block"), wanted["score_block"]) in ((None, last), (last, None))


def compare_flags(
    args: dict[str, Any], wanted: dict[str, Any], whose: str = THE_ROW
) -> list[Difference]:
    """Flags of the recipe whose values differ; one that an older version did not have counts as
    left out."""
    found, defaults = [], _defaults()
    for name in sorted((args.keys() | wanted.keys()) - FREE):
        is_known = name in defaults
        own, other = (
            args.get(name, defaults.get(name)),
            wanted.get(name, "nothing, it is unknown here"),
        )
        if name in NETWORKS:
            own, other = network_of(own), network_of(other)
        if not is_known or not same_value(own, other):
            found.append(Difference(name, f"{written(name, own)} ({whose} {_shown(other)})"))
    return found


def written(name: str, value: Any) -> str:
    """A flag with its value, as it could stand on a command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    text = "none" if value is None or text == "" else text
    return text if len(text) <= 80 else text[:77] + "..."


def network_of(value: Any) -> Any:
    """What tells one network from another, wherever its weights lie: its name without tag, or a
    file and its folder."""
    if not isinstance(value, str) or not value:
        return value
    name, equals, _ = value.partition("=")
    path = PurePath(value)
    if not equals and (len(path.parts) > 1 or path.suffix in (".pth", ".pt", ".safetensors")):
        return "/".join(path.parts[-2:])
    return name.split(".")[0]


def _weights(value: Any) -> str:
    """The name of the file that a network's weights were said to be in, where it is said beside the
    network's name."""
    return PurePath(str(value).partition("=")[2]).name


@cache
def flags_of(words: tuple[str, ...], device: str) -> dict[str, Any]:
    """The flags of a row as a run on such a device would save them.

    Raises:
        InputError: the parser refuses them.
    """
    try:
        args = get_args_parser().parse_args(list(words))
    except SystemExit as error:
        raise InputError(
            f"a row of scripts/tables/ is not for this main.py: {' '.join(words)}"
        ) from error
    return dict(vars(resolve(args, Processes(0, 1, torch.device(device)))))


@cache
def _facts_of(model: str, patch_size: int | None) -> ModelFacts:
    """What flags leave to a model."""
    args = get_args_parser().parse_args(["--model", model])
    args.patch_size = patch_size
    built = build_on_meta(**model_config(args, 10))
    return ModelFacts(built.input_size, built.score_blocks)


@cache
def _defaults() -> dict[str, Any]:
    return vars(get_args_parser().parse_args([]))


def changed_flags(run: Run) -> list[tuple[str, str, str]]:
    """Flags of the recipe that differ from main.py's defaults: name, value, default."""
    mixer, given = run.args["mixer"], run.args.get("input_size")
    words = (
        "--data-set",
        "DIGITS",
        "--mixer",
        mixer if mixer in METHODS else "none",
    )
    defaults = {
        **flags_of(words, _device_of(run)),
        "input_size": given,
        "mixer": _defaults()["mixer"],
    }
    found = [one.name for one in compare_flags(run.args, defaults)]
    return [
        (f"--{name.replace('_', '-')}", _shown(run.args.get(name)), _shown(defaults.get(name)))
        for name in found
    ]


# ---------------------------------------------------------------- what the head of a run says of it


def _numbers(text: str) -> list[int]:
    return [
        int(number.replace(",", "")) for number in re.findall(r"\d[\d,]{0,29}", text)
    ]  # more is no count


def _device_of(run: Run) -> str:
    device = run.start.head.get("device", "cpu").split(",")[0]
    return device if device in ("cuda", "mps") else "cpu"


def total_batch(run: Run) -> int | None:
    """Images per step over all processes; None if the run does not say."""
    numbers = _numbers(run.start.head.get("total batch", ""))
    return numbers[-1] if numbers else None


def _compare_data(run: Run, wanted: DataSet, subset: int | None) -> Iterable[Difference]:
    """Whether a run learned the row's data: by classes and images, and by the kind of data set."""
    head = run.start.head
    found = [_numbers(head.get(name, "")) for name in ("classes", "images")]
    if [len(numbers) for numbers in found] != [1, 2]:
        return [Difference("data", "its data are not recorded in train.log")]
    classes, (train, val) = found[0][0], found[1]
    right = classes == wanted.classes and val == wanted.val and train == (subset or wanted.train)
    if right and str(run.args["data_set"]).startswith(wanted.flags):
        return []
    own = f"{run.args['data_set']}, {classes:,} classes, {train:,} and {val:,} images"
    return [Difference("data", f"data {own} (the row has {wanted.name})")]


def _compare_course(run: Run) -> Iterable[Difference]:
    """What the flags saved last do not say of a run's course."""
    for start in run.course:
        if start.weights and not run.args.get("finetune"):
            yield Difference("finetune", f"begun with weights from {start.weights}")
    for name in SETTLED:
        told = [start.head.get(name, "") for start in run.course]
        values = [_without_place(name, value) for value in told]
        if len(set(values)) > 1:
            yield Difference(
                name, f"changed on the way: {name} {' -> '.join(dict.fromkeys(values))}"
            )
    if run.args.get("accept_changes"):
        flags = (
            " ".join(map(str, run.args["accept_changes"]))
            if isinstance(run.args["accept_changes"], list)
            else "?"
        )
        yield Difference(
            "accept_changes", f"gone on with under changed settings: --accept-changes {flags}"
        )
    if run.missing:
        yield Difference("log", f"log.txt lacks epochs {run.missing[0]} to {run.missing[-1]}")


def _without_place(name: str, value: str) -> str:
    """A row of the head but for what may change: the data's folder, and how a total batch is
    shared."""
    if name == "data":
        return value.split(" ")[0]
    return value.split("= ")[-1] if name == "total batch" else value
