"""The flags of mixing and its loss, and which of them contradict. Builds nothing.

`config/build_mixer.py` holds the same names as `MixingSettings`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from utils import InputError

METHODS = (
    "smmix",
    "cutmix",
    "mixup",
    "none",
    "resizemix",
    "fmix",
    "attentivemix",
    "saliencymix",
    "transmix",
)
PASTING_METHODS = (
    "smmix",
    "cutmix",
    "resizemix",
    "fmix",
    "attentivemix",
    "saliencymix",
    "transmix",
)
VARIANT_FLAGS = ("region_head", "consistency", "region_size")

# Flags of some methods only: default, and the methods. Anything but the default is refused with
# another method.
METHOD_FLAGS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "cutmix_minmax": (None, ("cutmix", "transmix")),
    "mix_alpha": (None, ("fmix", "attentivemix", "saliencymix")),
    "resize_scope": ((0.1, 0.8), ("resizemix",)),
    "resize_placement": ("inside", ("resizemix",)),
    "fmix_decay": (3.0, ("fmix",)),
    "attentive_teacher": (None, ("attentivemix",)),
    "attentive_cells": (None, ("attentivemix",)),
    "relabel": ("none", PASTING_METHODS),
    "variant": ("paper", ("smmix",)),
    **dict.fromkeys(VARIANT_FLAGS, (None, ("smmix",))),
    "consistency": (None, PASTING_METHODS),
    "source_region": ("max", ("smmix",)),
    "target_region": ("min", ("smmix",)),
    "score": ("attention", ("smmix",)),
    "score_block": (None, ("smmix",)),
    "guide_size": (None, PASTING_METHODS),
    "guide_amp": (None, PASTING_METHODS),
    "motivator": ("self", PASTING_METHODS),
    "fine_weight": (1.0, ("smmix",)),
    "fine_temperature": (1.0, ("smmix",)),
    "con_weight": (None, PASTING_METHODS),
    "con_temperature": (1.0, PASTING_METHODS),
}
GUIDE_FLAGS = ("guide_size", "guide_amp", "motivator")  # how the clean images are looked at
CONSISTENCY_FLAGS = (
    *GUIDE_FLAGS,
    "consistency",
    "con_temperature",
)  # beside smmix these need L_con
POSITIVE = ("attentive_cells", "fine_temperature", "con_temperature")
NOT_NEGATIVE = ("mixup", "cutmix", "fmix_decay", "mix_off_epoch", "fine_weight", "con_weight")
SHARES = ("mixup_prob", "mixup_switch_prob", "smoothing", "relabel_ratio")
RANGES = ("side_ratio", "cutmix_minmax", "resize_scope")


def add_method_flags(group: Any, methods: Sequence[str] = METHODS) -> None:
    """Adds what says how images are mixed to a parser or to a group of one; `methods` are the
    choices of `--mixer`."""

    own = partial(_add_own, group)
    group.add_argument("--mixer", default="smmix", choices=methods, help="what mixes the images")
    group.add_argument("--mixup", default=0.8, type=float, help="Mixup's alpha; 0 turns Mixup off")
    group.add_argument(
        "--cutmix", default=1.0, type=float, help="CutMix's alpha, for --mixer cutmix and transmix"
    )
    own("cutmix-minmax", type=float, nargs=2, help="sides of CutMix's box as ratios")
    group.add_argument(
        "--mixup-mode",
        default="batch",
        choices=["batch", "pair", "elem"],
        help="draws per batch, pair or image, of every method but smmix",
    )
    own(
        "mix-alpha",
        type=float,
        nargs="+",
        metavar="ALPHA",
        help="one number, or for attentivemix two, of the Beta "
        "law of the share; default: fmix and saliencymix 1, attentivemix 2 8",
    )
    own(
        "resize-scope",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="range of the pasted copy's side as a share of the image's",
    )
    own(
        "resize-placement",
        choices=["inside", "clipped"],
        help="the authors', or that of the paper's Table 2",
    )
    own("fmix-decay", type=float, help="how fast the spectrum of FMix's noise falls")
    own(
        "attentive-teacher",
        metavar="NAME[=CHECKPOINT]",
        help="the classifier of attentivemix: timm's name (timm "
        "downloads its weights), a name with a file of weights, or a checkpoint of main.py",
    )
    own(
        "attentive-cells",
        type=int,
        help="fixed number of pasted cells, 6 in the paper; default: drawn, AttentiveMix+",
    )
    own(
        "relabel",
        choices=["none", "transmix"],
        help="labels by what the mixed forward pass attends to",
    )
    group.add_argument(
        "--relabel-ratio",
        default=0.5,
        type=float,
        help="weight of the area in TransMix's share; 0 is "
        "its paper's equation, 1 leaves the labels alone",
    )
    own(
        "variant",
        choices=["paper", "released"],
        help="SMMix's arithmetic: the paper's, or the released code's",
    )
    own("region-head", choices=["shared", "separate"], help="overrides --variant")
    own(
        "consistency",
        choices=["probs", "logits"],
        help="what L_con compares with: mixed probabilities, or the "
        "softmax of mixed logits; overrides --variant",
    )
    own("region-size", choices=["floor", "integer"], help="overrides --variant")
    own(
        "source-region",
        choices=["max", "random"],
        help="where SMMix takes its region: the most attended one, or any",
    )
    own(
        "target-region",
        choices=["min", "max", "corr"],
        help="where SMMix puts its region: over the least or the most "
        "attended one, or at the place it was taken from",
    )
    group.add_argument(
        "--side-ratio",
        default=(0.25, 0.75),
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="range of the region's side as a share of the image's",
    )
    group.add_argument("--smoothing", default=0.1, type=float, help="label smoothing")


def _add_own(group: Any, name: str, **keywords: Any) -> None:
    group.add_argument(f"--{name}", default=METHOD_FLAGS[name.replace("-", "_")][0], **keywords)


def add_training_flags(group: Any) -> None:
    """Adds what says how often images are mixed, at what cost, and what is made of them."""
    group.add_argument(
        "--mix-protocol",
        default="switch",
        choices=["switch", "single", "split"],
        help="switch: --mixer shares its steps with Mixup, unless --mixup is 0; single: it gets "
        "them all; split: it shares each batch with Mixup",
    )
    group.add_argument(
        "--mixup-prob", default=1.0, type=float, help="share of batches that are mixed at all"
    )
    group.add_argument(
        "--mixup-switch-prob",
        default=0.5,
        type=float,
        help="share of mixed batches, or with split of "
        "each batch, that --mixer gets when Mixup is on too",
    )
    group.add_argument(
        "--mix-off-epoch", type=int, help="nothing is mixed from this epoch on, counted from 0"
    )
    _add_own(
        group,
        "motivator",
        metavar="self|ema|NAME|NAME=CHECKPOINT|CHECKPOINT",
        help="whose prediction and score "
        "of the clean images guide the training: the model's own, its averaged weights', or those "
        "of a frozen "
        "network: timm's name (timm downloads its weights), a name with a file of weights, or a "
        "checkpoint of "
        "main.py",
    )
    _add_own(
        group,
        "guide-size",
        type=int,
        nargs="+",
        metavar="SIDE",
        help="the motivating pass sees the images at "
        "this size: one side, or height and width, in pixels; default: the training's",
    )
    _add_own(
        group,
        "guide-amp",
        choices=["fp16", "bf16", "none"],
        help="precision of the motivating pass; default: --amp",
    )
    _add_own(group, "fine-weight", type=float, help="weight of L_fine; 0 leaves it out")
    _add_own(
        group,
        "con-weight",
        type=float,
        help="weight of L_con; with 0 it is left out, and the motivating pass "
        "ends where its score is read; default: 1 for smmix, 0 for the other methods that paste",
    )
    _add_own(
        group,
        "fine-temperature",
        type=float,
        metavar="T",
        help="of L_fine's predictions: softmax(logits / T)",
    )
    _add_own(
        group,
        "con-temperature",
        type=float,
        metavar="T",
        help="of both sides of L_con, which is then T^2 times the divergence",
    )
    _add_own(
        group,
        "score",
        choices=["attention", "rollout", "random"],
        help="what SMMix chooses its regions by: one "
        "block's attention, the mean of all blocks', or a random number for each token",
    )
    _add_own(
        group,
        "score-block",
        type=int,
        metavar="D",
        help="the motivating pass reads its score in block D, counted from 1; default: the last",
    )
    group.add_argument(
        "--bce-loss", action="store_true", help="binary cross entropy for L_cls and L_fine"
    )


def con_weight_of(mixer: str, given: float | None) -> float:
    """The weight of L_con: as `given`, else the method's own."""
    return float(mixer == "smmix") if given is None else given


def flags_of_method(flags: Mapping[str, Any], mixer: str) -> dict[str, Any]:
    """The flags for one of several methods: what is another's own goes back to its default."""
    own = {**flags, "mixer": mixer}
    return {
        **own,
        **{name: METHOD_FLAGS[name][0] for name in METHOD_FLAGS if not _is_of(name, own)},
    }


def _is_of(name: str, flags: Mapping[str, Any]) -> bool:
    """Whether the method has a use for a flag of `METHOD_FLAGS`."""
    mixer = flags["mixer"]
    has_con = mixer == "smmix" or con_weight_of(mixer, flags.get("con_weight")) > 0
    return mixer in METHOD_FLAGS[name][1] and (has_con or name not in CONSISTENCY_FLAGS)


def needs_guide(args: argparse.Namespace) -> bool:
    """Whether anything looks at the clean images."""
    by_score = args.mixer == "smmix" and args.score != "random" and not follows_no_score(args)
    return by_score or con_weight_of(args.mixer, getattr(args, "con_weight", None)) > 0


def follows_no_score(args: argparse.Namespace) -> bool:
    """Whether SMMix's regions follow no score."""
    return args.source_region == "random" and args.target_region == "corr"


def check_values(
    values: Mapping[str, Any],
    positive: Sequence[str] = POSITIVE,
    not_negative: Sequence[str] = NOT_NEGATIVE,
    shares: Sequence[str] = SHARES,
    ranges: Sequence[str] = RANGES,
) -> None:
    """Refuses numbers out of their range; flags that are absent or left open pass.

    Raises:
        InputError: names the flag and the rule.
    """
    for name, value in values.items():
        for number in value if isinstance(value, (list, tuple)) else [value]:
            require(
                not isinstance(number, float) or math.isfinite(number),
                name,
                value,
                "must be a finite number",
            )
    for names, holds, rule in (
        (positive, lambda value: value > 0, "must be above 0"),
        (not_negative, lambda value: value >= 0, "must not be negative"),
        (shares, lambda value: 0 <= value <= 1, "must lie between 0 and 1"),
        (
            ranges,
            lambda value: 0 <= value[0] <= value[1] <= 1,
            "must be two shares, the lower first",
        ),
    ):
        for name in names:
            if (value := values.get(name)) is not None:
                require(holds(value), name, value, rule)


def require(holds: bool, name: str, value: Any, rule: str) -> None:
    """Refuses a flag's value.

    Raises:
        InputError: unless `holds`.
    """
    if not holds:
        raise InputError(f"{_written(name, value)}: {rule}")


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _written(name: str, value: Any) -> str:
    """A flag as it stands on a command line."""
    words = value if isinstance(value, (list, tuple)) else [value]
    return " ".join(map(str, ("--" + name.replace("_", "-"), *words)))


def conflicts(args: argparse.Namespace) -> list[tuple[bool, str]]:
    """(whether it is broken, what to say) of each rule between several mixing flags."""
    mixer, alphas = args.mixer, args.mix_alpha or []
    relabels = args.relabel == "transmix" or mixer == "transmix"
    splits = args.mix_protocol == "split"
    foreign = [
        f"{_written(name, value)} (for {_users(name)})"
        for name, (default, _) in METHOD_FLAGS.items()
        if not _is_of(name, vars(args))
        and _plain(value := getattr(args, name, default)) != default  # main.py's, some
    ]
    return [
        (bool(foreign), f"{', '.join(foreign)}: --mixer {mixer} has no use for it, leave it out"),
        *_conflicts_of_the_pass(args),
        (
            mixer == "mixup" and args.mixup == 0,
            "--mixup 0 leaves --mixer mixup nothing to do; use --mixer none",
        ),
        (
            mixer in ("cutmix", "transmix") and args.cutmix <= 0 and args.cutmix_minmax is None,
            f"--cutmix {args.cutmix}: --mixer {mixer} needs an alpha above 0, or --cutmix-minmax",
        ),
        (
            len(alphas) > (2 if mixer == "attentivemix" else 1)
            or any(alpha <= 0 for alpha in alphas),
            f"{_written('mix_alpha', alphas)}: takes one number above 0, and with attentivemix up "
            "to two",
        ),
        (
            mixer == "attentivemix" and not args.attentive_teacher,
            "--mixer attentivemix needs --attentive-teacher NAME=CHECKPOINT (resnet50=FILE, say), "
            "or a timm name whose "
            "weights can be downloaded, such as resnet50.tv_in1k",
        ),
        (
            mixer == "attentivemix" and args.attentive_cells is not None and bool(alphas),
            "--attentive-cells fixes what --mix-alpha would draw: give one of them",
        ),
        (
            splits and (mixer in ("mixup", "none") or args.mixup == 0),
            "--mix-protocol split shares each batch between --mixer and Mixup: give another "
            "--mixer than mixup and "
            "none, and --mixup above 0",
        ),
        (
            splits and (relabels or args.bce_loss),
            "--mix-protocol split: a batch with images of two kinds cannot have "
            f"{'labels from TransMix' if relabels else '--bce-loss'}; use --mix-protocol switch",
        ),
        (
            args.relabel_ratio != 0.5 and not relabels,
            f"--relabel-ratio {args.relabel_ratio} is for --relabel transmix or --mixer transmix "
            "only",
        ),
        (
            args.bce_loss and relabels,
            "--bce-loss takes every class with a share as present, so shares set anew change "
            "nothing: leave out one",
        ),
        (
            args.bce_loss and args.smoothing > 0,
            "--bce-loss counts each class with a share in a label as present, and --smoothing "
            f"{args.smoothing} gives "
            "every class one: add --smoothing 0",
        ),
    ]


def _users(name: str) -> str:
    return (
        "smmix, or with --con-weight above 0"
        if name in CONSISTENCY_FLAGS
        else " or ".join(METHOD_FLAGS[name][1])
    )


def _conflicts_of_the_pass(args: argparse.Namespace) -> list[tuple[bool, str]]:
    """Rules of the flags that say what the clean images are looked at for, and of the terms of the
    loss."""
    smmix, con = args.mixer == "smmix", con_weight_of(args.mixer, getattr(args, "con_weight", None))
    fine_temperature, con_temperature = (
        getattr(args, f"{term}_temperature", 1.0) for term in ("fine", "con")
    )
    unseen = [
        name
        for name in (*GUIDE_FLAGS, "score_block")
        if getattr(args, name, METHOD_FLAGS[name][0]) != METHOD_FLAGS[name][0]
    ]
    named = ", ".join(_written(name, getattr(args, name)) for name in unseen)
    scored = [
        name
        for name in ("score", "score_block")
        if getattr(args, name, METHOD_FLAGS[name][0]) != METHOD_FLAGS[name][0]
    ]
    return [
        (
            len(scored) > 1,
            f"--score {args.score} is no score of one block: leave out --score-block, or --score",
        ),
        (
            smmix and follows_no_score(args) and bool(scored),
            "--source-region random with --target-region corr follows no score: leave out "
            f"{' and '.join('--' + name.replace('_', '-') for name in scored)}",
        ),
        (
            smmix and bool(unseen) and not needs_guide(args),
            f"{named}: nothing looks at the clean images, as regions follow no score of theirs and "
            "--con-weight is 0; "
            "leave it out",
        ),
        (
            smmix and con == 0 and con_temperature != 1,
            f"--con-temperature {con_temperature} is of L_con, which --con-weight 0 leaves out: "
            "leave out one of them",
        ),
        (
            fine_temperature != 1 and getattr(args, "fine_weight", 1.0) == 0,
            f"--fine-temperature {fine_temperature} is of L_fine, which --fine-weight 0 leaves "
            "out: leave out one of "
            "them",
        ),
        (
            fine_temperature != 1 and args.bce_loss,
            f"--fine-temperature {fine_temperature} is of a softmax, and --bce-loss has none: "
            "leave out one of them",
        ),
    ]
