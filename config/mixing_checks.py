"""Refuses mixing flags whose values are out of range or that contradict each other."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from config.value_checks import check_values
from errors import as_written
from mixers.options import Limit, PastingOptions, Rule
from mixers.registry import METHODS, all_flags, flags_of_method, options_of, users

# The limits of the flags that belong to no method.
LIMITS: dict[str, Limit] = {
    "mix_off_epoch": "not_negative",
    "mixup_prob": "shares",
    "mixup_switch_prob": "shares",
}


def check_mixing_values(values: Mapping[str, Any]) -> None:
    """Refuses values of mixing flags that are out of range.

    Raises:
        InputError: names the flag and the rule.
    """
    limits = {**LIMITS, **{name: flag.limit for name, flag in all_flags().items()}}
    check_values(
        values,
        **{kind: [n for n, limit in limits.items() if limit == kind] for kind in get_args(Limit)},
    )


def mixing_conflicts(args: argparse.Namespace) -> Iterator[Rule]:
    """The rules between several mixing flags."""
    options = options_of(vars(args))
    yield _rule_of_unused_flags(args)
    yield from options.rules(args)
    yield from _rules_of_labels(
        args, relabels=isinstance(options, PastingOptions) and options.relabels
    )


def _rule_of_unused_flags(args: argparse.Namespace) -> Rule:
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(args).items()}
    usual = flags_of_method(given, args.mixer)
    unused = [
        f"{as_written(name, value)} (for {_users(name)})"
        for name, value in given.items()
        if value != usual[name]
    ]
    message = f"{', '.join(unused)}: --mixer {args.mixer} has no use for it, leave it out"
    return bool(unused), message


def _users(name: str) -> str:
    """The methods that use a flag, for a message."""
    if all_flags()[name].with_con:
        own = [mixer for mixer, method in METHODS.items() if method.options.has_own_con]
        return f"{' or '.join(own)}, or with --con-weight above 0"
    return " or ".join(users(name))


def _rules_of_labels(args: argparse.Namespace, relabels: bool) -> Iterator[Rule]:
    """The rules between flags of the protocol, of the labels and of the cross entropy.

    Args:
        relabels: TransMix computes the labels.
    """
    splits = args.mix_protocol == "split"
    transmix = "--mixer transmix" if args.mixer == "transmix" else "--relabel transmix"
    yield (
        splits and (args.mixer in ("mixup", "none") or args.mixup == 0),
        "--mix-protocol split divides each batch between --mixer and Mixup: give a --mixer "
        "other than mixup and none, and --mixup above 0",
    )
    yield (
        splits and (relabels or args.bce_loss),
        "--mix-protocol split: a batch that two methods mix cannot have "
        f"{transmix if relabels else '--bce-loss'}; use --mix-protocol switch",
    )
    yield (
        args.relabel_ratio != 0.5 and not relabels,
        f"--relabel-ratio {args.relabel_ratio} is for --relabel transmix or --mixer transmix only",
    )
    yield (
        args.bce_loss and relabels,
        "--bce-loss counts every class in a label as present, whatever its share, so the shares of "
        f"{transmix} change nothing: leave out one of them",
    )
    yield (
        args.bce_loss and args.smoothing > 0,
        "--bce-loss counts every class in a label as present, and --smoothing "
        f"{args.smoothing} puts every class into it: add --smoothing 0",
    )
