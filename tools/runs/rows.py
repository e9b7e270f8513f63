"""Reads `recipes/tables.yaml`: the rows of the paper's tables and of our own studies."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from errors import InputError
from tools.runs.records import Row

FOLDER = Path(__file__).resolve().parent.parent.parent / "recipes"

FILE_KEYS = {"models", "rehearsal", "pretrained", "tables"}
LAYER_KEYS = {"recipe", "flags"}
TABLE_KEYS = {*LAYER_KEYS, "title", "columns", "for", "open", "notes", "ours", "queue", "rows"}
ROW_KEYS = {*LAYER_KEYS, "label", "paper", "for", "small", "notes", "ours"}


class Planned(NamedTuple):
    """Runs of a queue: each of these rows with each of these seeds; the seed changes last."""

    rows: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Table:
    """One table.

    Args:
        name: the short name, such as `table7`.
        title: the title for readers.
        columns: the recipes of its columns.
        rows: each row for each column, then each row's rehearsal.
        notes: what stands between a run and the paper's figure.
        open_flags: flags that rows set and that a user may change, with another --output.
        queue: the order of the runs, if the table has one.
        ours: names of the rows that are not the paper's.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    open_flags: tuple[str, ...]
    queue: tuple[Planned, ...]
    ours: tuple[str, ...]

    def names(self) -> list[str]:
        """The names of the rows, in their order."""
        return list(dict.fromkeys(row.name for row in self.rows))

    @property
    def is_study(self) -> bool:
        """Whether it is our study, whose recipe is that of the rehearsals."""
        return self.rows[0].is_study

    def is_available(self, name: str) -> bool:
        """Whether the row of this name can be run."""
        return any(row.flags is not None for row in self.rows if row.name == name)

    def find(self, name: str, column: str, small: bool = False) -> Row:
        """The row of this name; a rehearsal has no column."""
        return next(
            row
            for row in self.rows
            if row.name == name and row.small == small and (small or row.model == column)
        )


class Tables(NamedTuple):
    """All tables.

    Args:
        tables: name -> table, in the paper's order.
        labels: recipe of a column -> its name for readers.
        rehearsal: the recipe of all rehearsals.
        pretrained: name of a frozen network of rehearsals -> its flags.
    """

    tables: dict[str, Table]
    labels: dict[str, str]
    rehearsal: str
    pretrained: dict[str, tuple[str, ...]]

    def rows(self) -> list[Row]:
        return [row for table in self.tables.values() for row in table.rows]


def read_tables(file: Path = FOLDER / "tables.yaml") -> Tables:
    """All tables of the file.

    Raises:
        InputError: the file cannot be read, or it has a wrong key or value; names the place.
    """
    content = _read(file)
    where = file.name
    _check_keys(where, content, FILE_KEYS, required=FILE_KEYS)
    rehearsal = str(content["rehearsal"])
    _check_recipes(where, [*content["models"], rehearsal], file.parent)
    pretrained = {
        str(name): _words(f"{where}, {name}", text) for name, text in content["pretrained"].items()
    }
    tables = {
        str(name): _Reader(f"{where}, {name}", str(name), entry, file.parent, rehearsal).table()
        for name, entry in content["tables"].items()
    }
    labels = {str(name): str(label) for name, label in content["models"].items()}
    return Tables(tables, labels, rehearsal, pretrained)


class _Reader:
    """Reads one table.

    Args:
        where: the place in the file, for messages.
        entry: the content of the table.
        folder: the folder of the recipes.
        rehearsal: the recipe of all rehearsals.
    """

    def __init__(self, where: str, name: str, entry: Any, folder: Path, rehearsal: str) -> None:
        self.where, self.name, self.entry = where, name, entry
        self.folder, self.rehearsal = folder, rehearsal
        _check_keys(where, entry, TABLE_KEYS, required={"title", "columns", "rows"})
        self.columns = tuple(map(str, entry["columns"]))
        _check_recipes(where, self.columns, folder)
        self.is_study = self.columns == (rehearsal,)

    def table(self) -> Table:
        entry, rows = self.entry, self.entry["rows"]
        all_ours = bool(entry.get("ours"))
        _check_keys(f"{self.where}, for", entry.get("for", {}), set(self.columns))
        made, notes = list[Row](), [str(note) for note in entry.get("notes", ())]
        for name, row in rows.items():
            where = f"{self.where}, row {name}"
            _check_keys(where, row, ROW_KEYS, required={"label"})
            _check_keys(f"{where}, for", row.get("for", {}), set(self.columns))
            notes += map(str, row.get("notes", ()))
            made += self.rows_of(where, str(name), row)
        if not self.is_study:
            made += [
                self.rehearsal_of(f"{self.where}, row {name}", str(name), row)
                for name, row in rows.items()
            ]
        ours = [str(name) for name, row in rows.items() if all_ours or row.get("ours")]
        return Table(
            self.name,
            str(entry["title"]),
            self.columns,
            tuple(made),
            tuple(" ".join(note.split()) for note in notes),
            tuple(map(str, entry.get("open", ()))),
            tuple(self.planned(one) for one in entry.get("queue", ())),
            tuple(ours),
        )

    def rows_of(self, where: str, name: str, row: Mapping[str, Any]) -> Iterable[Row]:
        """The row for each column."""
        figures = row.get("paper") or [None] * len(self.columns)
        if len(figures) != len(self.columns):
            raise InputError(
                f"{where}: has {len(figures)} figures for {len(self.columns)} columns; write ~ "
                "where the paper has none"
            )
        for column, figure in zip(self.columns, figures, strict=True):
            layers = [
                self.entry,
                self.entry.get("for", {}).get(column, {}),
                row,
                row.get("for", {}).get(column, {}),
            ]
            recipes, flags = [column], list[str]()
            for layer in layers:
                recipes += [str(layer["recipe"])] if "recipe" in layer else []
                flags += _words(where, layer.get("flags", ""))
            _check_recipes(where, recipes, self.folder)
            yield self.row(
                name, row, column, figure, recipes, flags if "flags" in row else None, False
            )

    def rehearsal_of(self, where: str, name: str, row: Mapping[str, Any]) -> Row:
        text = row.get("small", row.get("flags"))
        flags = None if text is None else _words(where, text)
        return self.row(name, row, self.rehearsal, None, [self.rehearsal], flags, True)

    def row(
        self,
        name: str,
        row: Mapping[str, Any],
        column: str,
        figure: float | None,
        recipes: Sequence[str],
        flags: Sequence[str] | None,
        small: bool,
    ) -> Row:
        return Row(
            table=self.name,
            name=name,
            label=str(row["label"]),
            model=column,
            figure=figure,
            recipes=tuple(str(self.folder / f"{recipe}.yaml") for recipe in recipes),
            flags=None if flags is None else tuple(flags),
            own_flags=(
                *_words(self.where, row.get("flags", "")),
                *_words(self.where, row.get("small", "")),
            ),
            small=small,
            title=str(self.entry["title"]),
            is_study=self.is_study,
        )

    def planned(self, entry: Any) -> Planned:
        where = f"{self.where}, queue"
        _check_keys(where, entry, {"rows", "seeds"}, required={"rows", "seeds"})
        for name in entry["rows"]:
            if name not in self.entry["rows"]:
                raise InputError(f"{where}: {name}: the table has no such row")
        return Planned(tuple(map(str, entry["rows"])), tuple(map(int, entry["seeds"])))


# ------------------------------------------------------------------------------------- the contents


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        _refuse_twice(file, yaml.compose(text, Loader=yaml.SafeLoader))
        content = yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeError) as error:
        raise InputError(f"{file}: is not YAML: {' '.join(str(error).split())}") from error
    return dict(content) if isinstance(content, dict) else {}


def _refuse_twice(file: Path, node: Any) -> None:
    """Refuses a key that stands twice in a mapping; YAML would take the last one."""
    keys = list[str]()
    for entry in node.value if isinstance(node, yaml.CollectionNode) else ():
        key, value = entry if isinstance(node, yaml.MappingNode) else (None, entry)
        if key is not None:
            if key.value in keys:
                line = key.start_mark.line + 1
                raise InputError(f"{file}, line {line}: {key.value}: is in the file twice")
            keys.append(key.value)
        _refuse_twice(file, value)


def _check_keys(
    where: str, entry: Any, known: set[str], required: Iterable[str] = frozenset()
) -> None:
    """Refuses an entry that is no mapping, has an unknown key, or lacks a required one."""
    if not isinstance(entry, dict):
        raise InputError(f"{where}: must be a mapping with the keys {', '.join(sorted(known))}")
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted(known))}"
            raise InputError(f"{where}: {key}: no such key; {hint}")
    for key in required:
        if key not in entry:
            raise InputError(f"{where}: the key {key} is missing")


def _check_recipes(where: str, recipes: Iterable[Any], folder: Path) -> None:
    known = sorted({path.stem for path in folder.glob("*.yaml")} - {"tables"})
    for recipe in recipes:
        if recipe not in known:
            near = difflib.get_close_matches(str(recipe), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"recipes: {', '.join(known)}"
            raise InputError(f"{where}: {recipe}: no such recipe; {hint}")


def _words(where: str, text: Any) -> tuple[str, ...]:
    if not isinstance(text, str):
        raise InputError(f"{where}: {text}: flags are text, as on a command line")
    return tuple(shlex.split(text))
