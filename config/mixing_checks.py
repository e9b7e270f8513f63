"""Refuses mixing flags whose values are out of range or that contradict each other."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from config.mixing_flags import (
    CONSISTENCY_FLAGS,
    GUIDE_FLAGS,
    METHOD_FLAGS,
    con_weight_of,
    is_used,
    needs_guide,
    needs_score,
)
from config.value_checks import as_written, check_values, option

POSITIVE = ("attentive_cells", "fine_temperature", "con_temperature")
NOT_NEGATIVE = (
    "mixup",
    "cutmix",
    "fmix_decay",
    "mix_off_epoch",
    "fine_weight",
    "con_weight",
    "con_warmup_epochs",
)
SHARES = ("mixup_prob", "mixup_switch_prob", "smoothing", "relabel_ratio")
RANGES = ("side_ratio", "cutmix_minmax", "resize_scope")

Rule = tuple[bool, str]  # whether the rule is broken, and the message


def check_mixing_values(values: Mapping[str, Any]) -> None:
    """Refuses values of mixing flags that are out of range.

    Raises:
        InputError: names the flag and the rule.
    """
    check_values(values, POSITIVE, NOT_NEGATIVE, SHARES, RANGES)


def mixing_conflicts(args: argparse.Namespace) -> list[Rule]:
    """The rules between several mixing flags."""
    return [
        _rule_of_unused_flags(args),
        *_rules_of_guide(args),
        *_rules_of_terms(args),
        *_rules_of_methods(args),
        *_rules_of_labels(args),
    ]


def _value_of(args: argparse.Namespace, name: str) -> Any:
    """The value of a flag of `METHOD_FLAGS`. Not every command has all of them."""
    value = getattr(args, name, METHOD_FLAGS[name][0])
    return tuple(value) if isinstance(value, list) else value


def _is_set(args: argparse.Namespace, name: str) -> bool:
    return _value_of(args, name) != METHOD_FLAGS[name][0]


def _rule_of_unused_flags(args: argparse.Namespace) -> Rule:
    unused = [
        f"{as_written(name, getattr(args, name))} (for {_users(name)})"
        for name in METHOD_FLAGS
        if _is_set(args, name) and not is_used(name, vars(args))
    ]
    message = f"{', '.join(unused)}: --mixer {args.mixer} has no use for it, leave it out"
    return bool(unused), message


def _users(name: str) -> str:
    """The methods that use a flag of `METHOD_FLAGS`, for a message."""
    if name in CONSISTENCY_FLAGS:
        return "smmix, or with --con-weight above 0"
    return " or ".join(METHOD_FLAGS[name][1])


def _rules_of_guide(args: argparse.Namespace) -> list[Rule]:
    """The rules between flags of the score and of the motivating pass."""
    smmix = args.mixer == "smmix"
    of_score = [name for name in ("score", "score_block") if _is_set(args, name)]
    of_guide = [name for name in (*GUIDE_FLAGS, "score_block") if _is_set(args, name)]
    written = ", ".join(as_written(name, getattr(args, name)) for name in of_guide)
    score = _value_of(args, "score")
    return [
        (
            len(of_score) > 1,
            f"--score {score} does not use one block alone: leave out --score-block, or --score",
        ),
        (
            smmix and bool(of_score) and not needs_score(args),
            "--source-region random with --target-region corr uses no score: leave out "
            f"{' and '.join(map(option, of_score))}",
        ),
        (
            smmix and bool(of_guide) and not needs_guide(args),
            f"{written}: no motivating pass is run, as the regions do not use its score and "
            "--con-weight is 0; leave it out",
        ),
    ]


def _rules_of_terms(args: argparse.Namespace) -> list[Rule]:
    """The rules between flags of L_fine and L_con."""
    con_weight = con_weight_of(args.mixer, _value_of(args, "con_weight"))
    fine_temperature = _value_of(args, "fine_temperature")
    of_con = [name for name in ("con_temperature", "con_warmup_epochs") if _is_set(args, name)]
    written = ", ".join(as_written(name, getattr(args, name)) for name in of_con)
    return [
        (
            args.mixer == "smmix" and con_weight == 0 and bool(of_con),
            f"{written} is for L_con, which --con-weight 0 removes: leave out one of them",
        ),
        (
            fine_temperature != 1 and _value_of(args, "fine_weight") == 0,
            f"--fine-temperature {fine_temperature} is for L_fine, which --fine-weight 0 removes: "
            "leave out one of them",
        ),
        (
            fine_temperature != 1 and args.bce_loss,
            f"--fine-temperature {fine_temperature} is for a softmax, and --bce-loss has none: "
            "leave out one of them",
        ),
    ]


def _rules_of_methods(args: argparse.Namespace) -> list[Rule]:
    """The rules between flags of single methods."""
    mixer, alphas = args.mixer, args.mix_alpha or []
    most_alphas = 2 if mixer == "attentivemix" else 1
    return [
        (
            mixer == "mixup" and args.mixup == 0,
            "--mixup 0 leaves --mixer mixup nothing to do; use --mixer none",
        ),
        (
            mixer in ("cutmix", "transmix") and args.cutmix <= 0 and args.cutmix_minmax is None,
            f"--cutmix {args.cutmix}: --mixer {mixer} needs an alpha above 0, or --cutmix-minmax",
        ),
        (
            len(alphas) > most_alphas or any(alpha <= 0 for alpha in alphas),
            f"{as_written('mix_alpha', alphas)}: takes one number above 0, and with attentivemix "
            "up to two",
        ),
        (
            mixer == "attentivemix" and not args.attentive_teacher,
            "--mixer attentivemix needs --attentive-teacher NAME=CHECKPOINT, such as "
            "resnet50=FILE, or a timm name whose weights can be downloaded, such as "
            "resnet50.tv_in1k",
        ),
        (
            mixer == "attentivemix" and args.attentive_cells is not None and bool(alphas),
            "--attentive-cells fixes what --mix-alpha would draw: give one of them",
        ),
    ]


def _rules_of_labels(args: argparse.Namespace) -> list[Rule]:
    """The rules between flags of the protocol, of the labels and of the cross entropy."""
    relabels = args.relabel == "transmix" or args.mixer == "transmix"
    splits = args.mix_protocol == "split"
    return [
        (
            splits and (args.mixer in ("mixup", "none") or args.mixup == 0),
            "--mix-protocol split divides each batch between --mixer and Mixup: give a --mixer "
            "other than mixup and none, and --mixup above 0",
        ),
        (
            splits and (relabels or args.bce_loss),
            "--mix-protocol split: a batch that two methods mix cannot have "
            f"{'labels from TransMix' if relabels else '--bce-loss'}; use --mix-protocol switch",
        ),
        (
            args.relabel_ratio != 0.5 and not relabels,
            f"--relabel-ratio {args.relabel_ratio} is for --relabel transmix or --mixer transmix "
            "only",
        ),
        (
            args.bce_loss and relabels,
            "--bce-loss counts every class in a label as present, whatever its share, so the "
            "shares that TransMix computes change nothing: leave out one of them",
        ),
        (
            args.bce_loss and args.smoothing > 0,
            "--bce-loss counts every class in a label as present, and --smoothing "
            f"{args.smoothing} puts every class into it: add --smoothing 0",
        ),
    ]
