"""The command-line parser of `main.py` and of every tool, without any flags."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from errors import InputError, show

_RANKS_FROM_ENVIRONMENT = (
    "rank and world size come from the environment: torchrun --nproc_per_node=N main.py ..."
)
# Flags that DeiT or the released SMMix code has and this project does not, with what to do instead.
GONE = {
    "--dist-eval": (
        "evaluation is always distributed and counts each image once; leave the flag out"
    ),
    "--local-rank": _RANKS_FROM_ENVIRONMENT,
    "--world-size": _RANKS_FROM_ENVIRONMENT,
    "--dist-url": _RANKS_FROM_ENVIRONMENT,
    "--distributed": _RANKS_FROM_ENVIRONMENT,
    "--side": "the token grid comes from the model; leave the flag out",
    "--min-side-ratio": "use --side-ratio LOW HIGH",
    "--max-side-ratio": "use --side-ratio LOW HIGH",
    "--autoresume": "use --auto-resume",
    "--mixup-off-epoch": "use --mix-off-epoch",
    "--resplit": (
        "random erasing always applies to the whole batch, as DeiT's default does; leave the flag "
        "out"
    ),
    "--cooldown-epochs": "it has no effect in DeiT either; leave the flag out",
    "--patience-epochs": "--sched plateau is not offered; leave the flag out",
    "--threeaugment": "use --aa 3a, timm's name for it",
}


class Parser(argparse.ArgumentParser):
    """Accepts hyphens and underscores alike, refuses abbreviations, and explains removed flags."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        given = [hyphenated(word) for word in (sys.argv[1:] if args is None else args)]
        for word in given:
            if (flag := word.split("=")[0].lower()) in GONE:
                self.error(f"{flag}: {GONE[flag]}")
        parsed = super().parse_args(given, namespace)
        if namespace is None:
            self.check_kinds(parsed)
        return parsed

    def check_kinds(self, args: argparse.Namespace) -> None:
        """Checks that a command line could have given each value, such as those of a checkpoint.

        Raises:
            InputError: a value has another type; the message names its flag.
        """
        for action in self._actions:
            value = getattr(args, action.dest, action.default)
            if action.dest != "help" and not _is_possible(action, value):
                flag = max(action.option_strings, key=len)
                raise InputError(f"{flag} {value!r}: no value that this flag can have")

    def error(self, message: str) -> NoReturn:
        # Each machine has its own command line, so that each may have another mistake.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            advice = self._near_misses(message) or " (--help lists all flags)"
            show(f"error: {message}{advice}", "stderr")
        raise SystemExit(2)

    def _near_misses(self, message: str) -> str:
        """For flags that do not exist: "; did you mean --...?", or "" if none is alike."""
        words = message.partition("unrecognized arguments: ")[2]
        flags = [flag[2:] for action in self._actions for flag in action.option_strings]
        unknown = [word[2:].split("=")[0].lower() for word in words.split() if word[:2] == "--"]
        near = [flag for word in unknown for flag in difflib.get_close_matches(word, flags, 1)]
        found = [f"--{flag}" for flag in dict.fromkeys(near)]
        return f"; did you mean {' and '.join(found)}?" if found else ""


def _is_possible(action: argparse.Action, value: Any) -> bool:
    """Whether the flag of `action` can have this value."""
    kind = action.type or str

    def fits(one: Any) -> bool:
        has_kind = type(one) is kind or (kind is float and type(one) is int)
        return has_kind and (action.choices is None or one in action.choices)

    if value is None:
        return action.default is None
    if action.nargs == 0:
        return type(value) is bool
    is_list_of_fitting = isinstance(value, (list, tuple)) and all(map(fits, value))
    if isinstance(action.nargs, int):
        return is_list_of_fitting and len(value) == action.nargs
    if action.nargs is not None:
        return is_list_of_fitting and len(value) > 0
    if isinstance(action.default, list):  # the flag may be given several times
        return isinstance(value, list) and is_list_of_fitting
    is_default = type(value) is type(action.default) and value == action.default
    return is_default or fits(value)


def hyphenated(word: str) -> str:
    """`--output_dir=a_b` -> `--output-dir=a_b`; words that are not flags stay as they are."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def add_switch(group: Any, name: str, default: bool, text: str) -> None:
    """Adds the pair of flags `--name` and `--no-name`."""
    group.add_argument(
        f"--{name}", action=argparse.BooleanOptionalAction, default=default, help=text
    )


def explicit_flags(parser: Parser, argv: Sequence[str] | None) -> dict[str, Any]:
    """The flags that a command line names, with their values; defaults are left out."""
    # A flag that may be given several times adds to a copy of its list.
    absent = {
        action.dest: [] if isinstance(action.default, list) else object()
        for action in parser._actions
    }
    parsed = vars(parser.parse_args(argv, argparse.Namespace(**absent)))
    return {name: value for name, value in parsed.items() if value is not absent[name]}
