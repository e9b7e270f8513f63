"""Which runs a command line asks for: the folder and the command of each."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from config.flags import get_args_parser as get_main_parser
from config.mixing_checks import mixing_conflicts
from config.parser import explicit_flags
from errors import InputError
from mixers.registry import METHODS, all_flags, users
from tools.runs.records import PRETRAINED, Row
from tools.runs.rows import Planned, Table, Tables

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCH = ROOT / "scripts" / "launch.py"
FEW_IMAGES = 100  # --steps evaluates that many


@dataclass(frozen=True)
class PlannedRun:
    """One run.

    Args:
        what: the table, the row and the like, for messages.
        folder: its output folder.
        arguments: those of main.py.
        launch: those of scripts/launch.py.
        left_out: the user's flags that this row does not use.
    """

    what: str
    folder: Path
    arguments: tuple[str, ...]
    launch: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(LAUNCH), *self.launch, *self.arguments]


class Planner:
    """Makes the runs of one table.

    Args:
        tables: all tables.
        table: the table to run.
        args: the command line of `tools.tables run`.
        words: the user's flags for main.py.

    Raises:
        InputError: the command line does not fit the table.
    """

    def __init__(
        self, tables: Tables, table: Table, args: argparse.Namespace, words: Sequence[str]
    ) -> None:
        self.tables, self.table, self.args, self.words = tables, table, args, tuple(words)
        self.output = Path(args.output or ROOT / "output")
        self.weights = dict(_weights(one) for one in args.weights)
        self._check()

    def _check(self) -> None:
        args, table = self.args, self.table
        if not args.data_path:
            raise InputError("--data-path DIR is missing: the folder that holds train/ and val/")
        if args.small and table.is_study:
            raise InputError(f"--small: {table.name} is small already; leave it out")
        if args.small and args.model:
            raise InputError("--model: all rehearsals have one model; leave it out")
        if args.steps is not None and not (args.small or table.is_study):
            raise InputError(f"--steps {args.steps}: only a rehearsal is cut short; add --small")
        self.parser = get_main_parser()
        given = explicit_flags(self.parser, self.words)
        for name in sorted(given.keys() & self._flags_of_rows()):
            flag = "--" + name.replace("_", "-")
            if flag not in table.open_flags:
                raise InputError(
                    f"{flag}: the rows of {table.name} set it; choose rows with --row, see "
                    "python -m tools.tables list"
                )
            if not args.output:
                raise InputError(
                    f"{flag}: the rows of {table.name} set it; for another value give another "
                    "--output too"
                )

    def _flags_of_rows(self) -> set[str]:
        """The flags that rows of this table set, in full runs or in rehearsals."""
        return {
            name for row in self.table.rows for name in explicit_flags(self.parser, row.own_flags)
        }

    # ------------------------------------------------------------------------------ what is chosen

    def runs(self) -> list[PlannedRun]:
        """The runs in their order; frozen networks that rows need come first."""
        chosen = [
            (row, seed)
            for planned in self._queue()
            for seed in planned.seeds
            for name in planned.rows
            for row in self._rows(name)
        ]
        needed = dict.fromkeys(name for row, _ in chosen for name in _networks_of(row))
        frozen = {_plain_name(value) for row, _ in chosen for value in _frozen(row)}
        if unknown := sorted(self.weights.keys() - frozen):
            raise InputError(
                f"--weights {unknown[0]}=...: the chosen rows name no such network; theirs: "
                f"{', '.join(sorted(frozen)) or 'none'}"
            )
        return [*map(self._pretraining, needed), *(self._run(*one) for one in chosen)]

    def _queue(self) -> Iterable[Planned]:
        """Rows and seeds: those of the command line, or the queue of the table."""
        table, names = self.table, self._chosen_names()
        if not self.args.row and self.args.seed is None and table.queue:
            return table.queue
        return [Planned(tuple(names), self.args.seed or (0,))]

    def _chosen_names(self) -> list[str]:
        table, known = self.table, self.table.names()
        if not self.args.row:
            return [name for name in known if table.is_available(name)]
        chosen = list[str]()
        for word in self.args.row:
            name = known[int(word) - 1] if word.isdigit() and 0 < int(word) <= len(known) else word
            if name not in known:
                rows = ", ".join(f"{i} {name}" for i, name in enumerate(known, start=1))
                raise InputError(f"--row {word}: {table.name} has no such row; its rows: {rows}")
            if not table.is_available(name):
                raise InputError(f"--row {word}: {name} of {table.name} is not available yet")
            chosen.append(name)
        return list(dict.fromkeys(chosen))

    def _rows(self, name: str) -> Iterator[Row]:
        if self.args.small:
            yield self.table.find(name, "", small=True)
            return
        for column in self.args.model:
            if column not in self.table.columns:
                columns = ", ".join(self.table.columns)
                raise InputError(
                    f"--model {column}: {self.table.name} has no such column; its columns: "
                    f"{columns}"
                )
        for column in self.args.model or self.table.columns:
            yield self.table.find(name, column)

    # ------------------------------------------------------------------------------------- one run

    def _run(self, row: Row, seed: int) -> PlannedRun:
        table, suffix = self.table, f"_seed{seed}" if seed else ""
        what = f"{table.name}, row {table.names().index(row.name) + 1}, {row.name}"
        folder = self.output / table.name / f"{row.model}_{row.name}{suffix}"
        if row.small:
            what, folder = (
                f"small, {what}",
                self.output / "small" / table.name / (row.name + suffix),
            )
        elif table.is_study:
            folder = folder.with_name(row.name + suffix)
        elif len(table.columns) > 1:
            what += f" on {row.model}"
        what += f", seed {seed}" if seed else ""
        own = tuple(self._network(word) for word in row.words)
        words, left_out = self._used(own)
        return self._planned(what, folder, own, ("--seed", str(seed)), words, left_out)

    def _pretraining(self, name: str) -> PlannedRun:
        """A frozen network of rehearsals: seed 0, and no flag that only methods use."""
        recipe = next(row for row in self.table.rows if row.small).recipes
        own = (*(f"--config={file}" for file in recipe), *self.tables.pretrained[name])
        of_some = {flag for flag in all_flags() if len(users(flag)) < len(METHODS)}
        others = (chunk for flag, chunk in self._chunks() if flag not in of_some)
        words = tuple(word for chunk in others for word in chunk)
        folder = self.output / "small" / PRETRAINED / name
        return self._planned(f"small, frozen network {name}", folder, own, (), words, ())

    def _planned(
        self,
        what: str,
        folder: Path,
        own: tuple[str, ...],
        seed: tuple[str, ...],
        words: tuple[str, ...],
        left_out: tuple[str, ...],
    ) -> PlannedRun:
        args, arguments = self.args, [*own, *seed]
        if args.small or self.table.is_study:
            is_batches = (Path(args.data_path) / "cifar-10-batches-py").is_dir()
            arguments += ["--data-set", "CIFAR10" if is_batches else "IMNET"]
        arguments += ["--data-path", args.data_path, "--output-dir", str(folder)]
        if args.steps is not None:
            arguments += ["--max-steps", str(args.steps), "--val-subset", str(FEW_IMAGES)]
        nproc = args.nproc or (1 if args.small or self.table.is_study else None)
        launch = () if nproc is None else ("--nproc", str(nproc))
        return PlannedRun(what, folder, (*arguments, *words), launch, left_out)

    def _network(self, word: str) -> str:
        """A word of a row, with the file of a frozen network in place of its name."""
        if word.startswith("@"):
            return str(self.output / "small" / PRETRAINED / word[1:] / "checkpoint.pth")
        name = _plain_name(word)
        return f"{name}={self.weights[name]}" if name in self.weights else word

    def _chunks(self) -> Iterator[tuple[str, list[str]]]:
        """The user's flags, each with its name and its words."""
        names = {
            flag: action.dest for action in self.parser._actions for flag in action.option_strings
        }
        chunk = list[str]()
        for word in [*self.words, "--"]:
            if word.startswith("--") and chunk:
                yield names.get(chunk[0].partition("=")[0], ""), chunk
                chunk = []
            chunk.append(word)

    def _used(self, own: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The user's words that main.py accepts in this row, and those that the row does not use.

        A flag of a method is not used if main.py refuses it beside the flags of the row. Another
        flag of the user may make it useful: --con-weight does so for --con-temperature.
        """
        used = [(flag, chunk) for flag, chunk in self._chunks() if flag not in all_flags()]
        rest = [(flag, chunk) for flag, chunk in self._chunks() if flag in all_flags()]
        while True:
            base = [*own, *(word for _, chunk in used for word in chunk)]
            accepted = [one for one in rest if not self._is_refused([*base, *one[1]])]
            if not accepted:
                break
            used += accepted
            rest = [one for one in rest if one not in accepted]
        left_out = tuple(word for _, chunk in rest for word in chunk)
        words = (word for one in self._chunks() if one in used for word in one[1])
        return tuple(words), left_out

    def _is_refused(self, words: Sequence[str]) -> bool:
        return any(is_broken for is_broken, _ in mixing_conflicts(self.parser.parse_args(words)))


def _weights(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise InputError(f"--weights {text}: must be NAME=FILE")
    if not Path(file).is_file():
        raise InputError(f"--weights {text}: {file}: no such file")
    return name, file


def _plain_name(word: str) -> str:
    """`resnet50.tv_in1k` -> `resnet50`."""
    return word.partition(".")[0]


def _networks_of(row: Row) -> Iterator[str]:
    """The frozen networks of rehearsals that a row names."""
    yield from (word[1:] for word in row.words if word.startswith("@"))


def _frozen(row: Row) -> Iterator[str]:
    """The values of the flags that name a frozen network."""
    words = row.words
    for flag, value in pairwise(words):
        if flag in ("--motivator", "--attentive-teacher"):
            yield value


def shown(run: PlannedRun) -> str:
    """The command of a run, as it can be typed."""
    return shlex.join(run.command)
