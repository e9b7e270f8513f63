"""Reads the files of `--config`: YAML with the flags of `main.py` as keys.

A value stays the text that was typed, and goes through its flag's own argparse action. The words of
all files are put in front of the command line's words, so that the command line wins. The
`args.json` of a run is such a file too (JSON is YAML): the record of the run.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from config.parser import GONE, Parser, explicit_flags
from errors import InputError, flag_name, show
from mixers.registry import all_flags, con_weight_of, is_used

# Flags that belong to one call. They are not taken from the record of a run.
OF_ONE_CALL = (
    "device",
    "num_workers",
    "resume",
    "auto_resume",
    "eval",
    "list_models",
    "start_epoch",
    "output_dir",
    "accept_changes",
    "config",
)
# A .json file with all these keys is the record of a run. `config` is younger than some records.
KEYS_OF_RECORD = {*OF_ONE_CALL, "model", "batch_size"} - {"config"}
# Parts of `--variant`, which a record holds even if the command left them out.
PARTS_OF_VARIANT = ("region_head", "consistency", "region_size")

ON, OFF = ("true", "on", "yes"), ("false", "off", "no")
NULL, BOOL = "tag:yaml.org,2002:null", "tag:yaml.org,2002:bool"


class Setting(NamedTuple):
    """One flag in a file."""

    words: list[str]  # the flag and its value as on a command line; empty: as if left out
    value: Any  # what the words mean; None if there are none
    is_recorded: bool  # the file is the record of a run


class Expanded(NamedTuple):
    """A command line with the words of its files."""

    words: list[str]
    typed: list[str]  # what was typed, without `--config`
    settings: dict[str, Setting]  # the flags of all files, by name
    note: str  # what was left out of a record, or ""
    record: str  # the last record among the files, or ""


class MainParser(Parser):
    """The parser of `main.py`: it also reads the files of `--config`."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        line = expand(self, sys.argv[1:] if args is None else args)
        if namespace is not None:
            # Switches that cannot be turned off on a command line, such as --compile.
            off = [name for name, setting in line.settings.items() if setting.value is False]
            vars(namespace).update(dict.fromkeys(off, False))
            return super().parse_args(line.words, namespace)
        parsed = super().parse_args(line.words)
        _check_whole(self, parsed, line)
        if line.note and os.environ.get("RANK", "0") == "0":
            show(line.note)
        return parsed


def _check_whole(parser: Parser, parsed: argparse.Namespace, line: Expanded) -> None:
    """Refuses `--accum-steps` beside `--total-batch`, and a record without an output folder."""
    if parsed.total_batch is not None:
        in_files = [name for name, one in line.settings.items() if one.words]
        if "accum_steps" in {*in_files, *explicit_flags(parser, line.typed)}:
            raise InputError(
                f"--accum-steps {parsed.accum_steps}: contradicts --total-batch "
                f"{parsed.total_batch}, which sets the number of micro-batches; leave out one of "
                "them"
            )
    if not line.record:
        return
    needs_folder = not (parsed.eval or parsed.list_models)
    if needs_folder and "output_dir" not in explicit_flags(parser, line.typed):
        raise InputError(
            f"--config {line.record}: is the record of a run, and its output folder is not taken "
            "from it, so that no run overwrites another: add --output-dir to the command line"
        )


def expand(parser: Parser, argv: Sequence[str]) -> Expanded:
    """Replaces `--config FILE` by the flags in the files.

    Args:
        parser: the parser of `main.py`.
        argv: the command line.

    Raises:
        InputError: names the file, the line, the key and the fix.
    """
    if not any(word.split("=")[0] == "--config" for word in argv):
        return Expanded(list(argv), list(argv), {}, "", "")
    finder = Parser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", action="append", default=[])
    found, typed = finder.parse_known_args(argv)
    given, settings = explicit_flags(parser, typed), dict[str, Setting]()
    record, recorded, note = "", dict[str, Setting](), ""
    for file in found.config:
        read = read_file(parser, file)
        settings.update(read)
        if any(setting.is_recorded for setting in read.values()):
            record, recorded = file, read
    if record:
        left_out = _left_out(recorded, settings, given)
        note = _note(record, recorded, left_out)
        settings = {
            name: setting
            for name, setting in settings.items()
            if not (setting.is_recorded and name in left_out)
        }
    words = [word for setting in settings.values() for word in setting.words]
    # The names of the files stand between: a flag that takes several values ends there.
    words += [f"--config={file}" for file in found.config] + typed
    return Expanded(words, typed, settings, note, record)


# ----------------------------------------------------------------------------------------- one file


def read_file(parser: Parser, file: str) -> dict[str, Setting]:
    """The flags in one file, by name.

    Args:
        parser: the parser of `main.py`.
        file: the path of the file.

    Raises:
        InputError: the file cannot be read, or a key or a value is wrong.
    """
    names, found = _keys_of(parser), dict[str, tuple[str, argparse.Action, Any]]()
    for key, node in _entries(file):
        place = f"--config {file}, line {key.start_mark.line + 1}: {_text(key)}"
        action = names.get(_text(key).replace("_", "-"))
        if action is None:
            raise InputError(f"{place}: {_advice(_text(key), names)}")
        if action.dest in found:
            raise InputError(f"{place}: is in the file twice; remove one of the two lines")
        found[action.dest] = place, action, node
    is_recorded = Path(file).suffix == ".json" and found.keys() >= KEYS_OF_RECORD
    settings = {}
    for name, (place, action, node) in found.items():
        if is_recorded and name in OF_ONE_CALL:
            settings[name] = Setting([], None, True)
            continue
        if name == "config":
            raise InputError(f"{place}: a file cannot name another one; give --config twice")
        try:
            words = _words(action, node)
            settings[name] = Setting(words, _value(action, words), is_recorded)
        except ValueError as error:
            raise InputError(f"{place}: {error}") from error
    return settings


def _entries(file: str) -> list[tuple[Any, Any]]:
    """The nodes of keys and values of a file."""
    try:
        import yaml
    except ImportError as error:
        raise InputError(f"--config {file}: PyYAML is missing: pip install pyyaml") from error
    try:
        text = Path(file).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise InputError(f"--config {file}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--config {file}: is not YAML: {reason}") from error
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"--config {file}: holds no flags; each line must be `flag: value`")
    return root.value


def _text(node: Any) -> str:
    """The text of a key or of a single value. JSON writes some characters as two halves."""
    if not isinstance(node.value, str):
        return "[...]"
    halves = node.value.encode("utf-16", "surrogatepass")
    return halves.decode("utf-16", "replace")


def _keys_of(parser: Parser) -> dict[str, argparse.Action]:
    """The keys that a file may have, with hyphens, and their flags."""
    return {
        name.removeprefix("--"): action
        for action in parser._actions
        for name in action.option_strings
        if action.dest != "help" and not (_is_pair(action) and name.startswith("--no-"))
    }


def _is_pair(action: argparse.Action) -> bool:
    """Whether the flag has a form `--no-...`."""
    return isinstance(action, argparse.BooleanOptionalAction)


def _advice(key: str, names: Mapping[str, Any]) -> str:
    """What to do about a key that is no flag."""
    plain = key.replace("_", "-").removeprefix("--")
    if advice := GONE.get(f"--{plain.lower()}"):
        return advice
    if plain in names:
        return f"write the key without hyphens in front: {plain}"
    if _is_pair(names.get(plain.removeprefix("no-"), argparse.Action([], ""))):
        return f"no such key; write {plain.removeprefix('no-')}: false"
    near = difflib.get_close_matches(plain, names, 1)
    return f"no such flag; {f'did you mean {near[0]}?' if near else '--help lists all flags'}"


# ---------------------------------------------------------------------------------------- one value


def _words(action: argparse.Action, node: Any) -> list[str]:
    """A flag and its value as words of a command line.

    Raises:
        ValueError: says why the flag cannot have this value.
    """
    flag, is_list = action.option_strings[0], node.id == "sequence"
    items = node.value if is_list else [node]
    if any(item.id != "scalar" for item in items):
        raise ValueError("takes single values; a mapping or a list in a list cannot be a value")
    if is_list and action.nargs in (None, 0):
        raise ValueError("takes one value, not a list")
    if is_list and len(items) > 1:
        return [flag, *map(_text, items)]
    if is_list:
        return [f"{flag}={_text(item)}" for item in items] or [flag]
    text, switches_off = _text(node), node.tag == BOOL and node.value.lower() in OFF
    if action.nargs == 0:
        if text.lower() not in (*ON, *OFF):
            raise ValueError(f"{text!r}: takes true or false")
        return [flag] if text.lower() in ON else list(action.option_strings[1:2])
    has_none = "none" in (action.choices or ()) or action.dest == "aa"
    if node.tag == NULL and (action.default is None or action.default == ""):
        return []
    if has_none and (node.tag == NULL or switches_off):
        return [f"{flag}=none"]
    if node.tag == NULL:
        raise ValueError("null: this flag has no such value; remove the line to get the default")
    return [f"{flag}={text}"]


class _Alone(argparse.ArgumentParser):
    """The parser of a single flag."""

    def error(self, message: str) -> Any:
        raise ValueError(re.sub(r"^argument [^:]*: ", "", message))


def _value(action: argparse.Action, words: list[str]) -> Any:
    """What the words of a flag mean.

    Raises:
        ValueError: the flag refuses them.
    """
    if not words:
        return False if action.nargs == 0 else None
    alone = _Alone(add_help=False, allow_abbrev=False)
    alone._add_action(copy.copy(action))
    try:
        return vars(alone.parse_args(words))[action.dest]
    except ValueError as error:
        several = action.nargs if isinstance(action.nargs, int) else 1
        hint = f"; write a list of {several}: [..., ...]" if len(words) <= several > 1 else ""
        raise ValueError(f"{error}{hint}") from error


# --------------------------------------------------------------------------------- record of a run


def _left_out(
    recorded: Mapping[str, Setting], settings: Mapping[str, Setting], given: Mapping[str, Any]
) -> set[str]:
    """Names of the recorded flags that are not taken.

    They belong to one call, or they follow from other flags: a record holds final values.

    Args:
        recorded: the flags of the record.
        settings: the flags of all files; later ones have won.
        given: the flags on the command line.
    """
    names = set(OF_ONE_CALL)
    others = {name: one.value for name, one in settings.items() if not one.is_recorded}
    others.update(given)
    values = {name: one.value for name, one in recorded.items()}
    final = {**values, **others}
    if final.get("total_batch") is not None:
        names.add("accum_steps")
    if given.get("resume"):
        names.add("finetune")
    if "variant" in others:
        names.update(PARTS_OF_VARIANT)
    if values.get("con_weight") == con_weight_of(values.get("mixer", "smmix"), None):
        names.add("con_weight")
        final["con_weight"] = others.get("con_weight")
    if "mixer" in final:
        names.update(name for name in all_flags() if not is_used(name, final))
    return names


def _note(record: str, recorded: Mapping[str, Setting], left_out: set[str]) -> str:
    """The line that says which flags of the record are not taken.

    Flags that only repeat what other flags decide are not mentioned.
    """
    mentioned, flags = set(OF_ONE_CALL), all_flags()
    for name in left_out - mentioned - {"accum_steps", "con_weight"}:
        usual = flags[name].default if name in flags else ""
        value = recorded[name].value if name in recorded else usual
        has_value = (tuple(value) if isinstance(value, list) else value) not in (usual, None)
        mentioned |= {name} if has_value else set()
    names = ", ".join(map(flag_name, sorted(mentioned & recorded.keys())))
    return f"--config {record}: the record of a run; not taken from it: {names}"
