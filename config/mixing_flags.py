"""The flags of mixing and of its loss, and which mixing methods use them.

`config/build_mixer.py` holds their values as `MixingSettings`; `config/mixing_checks.py` refuses
flags that contradict each other.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

PASTING_METHODS = (
    "smmix",
    "cutmix",
    "resizemix",
    "fmix",
    "attentivemix",
    "saliencymix",
    "transmix",
)
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

# Flags that only some methods use: default value, and these methods. With another method any other
# value is refused.
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
    "region_head": (None, ("smmix",)),
    "consistency": (None, PASTING_METHODS),
    "region_size": (None, ("smmix",)),
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
    "con_warmup_epochs": (0, PASTING_METHODS),
}
# How the guide is made.
GUIDE_FLAGS = ("guide_size", "guide_amp", "motivator")
# Methods other than smmix use these with L_con only.
CONSISTENCY_FLAGS = (*GUIDE_FLAGS, "consistency", "con_temperature", "con_warmup_epochs")


# --------------------------------------------------------------------------------------- the flags


def add_method_flags(group: Any, methods: Sequence[str] = METHODS) -> None:
    """Adds the flags that say how images are mixed.

    Args:
        group: a parser, or one of its argument groups.
        methods: the choices of `--mixer`.
    """
    _add_draw_flags(group, methods)
    _add_flags_of_other_methods(group)
    _add_smmix_flags(group)
    group.add_argument("--smoothing", default=0.1, type=float, help="label smoothing")


def add_training_flags(group: Any) -> None:
    """Adds the flags that say how often images are mixed, by which guide, and with which loss."""
    _add_protocol_flags(group)
    _add_guide_flags(group)
    _add_loss_flags(group)


def _add_with_default(group: Any, name: str, **keywords: Any) -> None:
    """Adds a flag of `METHOD_FLAGS`, which holds its default."""
    group.add_argument(f"--{name}", default=METHOD_FLAGS[name.replace("-", "_")][0], **keywords)


def _add_draw_flags(group: Any, methods: Sequence[str]) -> None:
    group.add_argument("--mixer", default="smmix", choices=methods, help="mixing method")
    group.add_argument("--mixup", default=0.8, type=float, help="Mixup's alpha; 0 turns Mixup off")
    group.add_argument(
        "--cutmix", default=1.0, type=float, help="CutMix's alpha, for --mixer cutmix and transmix"
    )
    _add_with_default(
        group,
        "cutmix-minmax",
        type=float,
        nargs=2,
        help="range of the sides of CutMix's box as shares of the image's sides",
    )
    group.add_argument(
        "--mixup-mode",
        default="batch",
        choices=["batch", "pair", "elem"],
        help="draw once per batch, pair or image; for every method but smmix",
    )


def _add_flags_of_other_methods(group: Any) -> None:
    _add_with_default(
        group,
        "mix-alpha",
        type=float,
        nargs="+",
        metavar="ALPHA",
        help="parameters of the Beta distribution of the source's share: one number, or two for "
        "attentivemix; default: 1 for fmix and saliencymix, 2 8 for attentivemix",
    )
    _add_with_default(
        group,
        "resize-scope",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="range of the pasted copy's side as a share of the image's side",
    )
    _add_with_default(
        group,
        "resize-placement",
        choices=["inside", "clipped"],
        help="inside: the box is inside the image, as in the authors' code; clipped: it is cut at "
        "the border, as in the benchmark behind the paper's Table 2",
    )
    _add_with_default(
        group,
        "fmix-decay",
        type=float,
        help="exponent with which the spectrum of FMix's noise falls",
    )
    _add_with_default(
        group,
        "attentive-teacher",
        metavar="NAME[=CHECKPOINT]",
        help="classifier of attentivemix: a timm name (timm downloads its weights), a name with a "
        "file of weights, or a checkpoint of main.py",
    )
    _add_with_default(
        group,
        "attentive-cells",
        type=int,
        help="fixed number of pasted cells, 6 in its paper; default: drawn, as in AttentiveMix+",
    )
    _add_with_default(
        group,
        "relabel",
        choices=["none", "transmix"],
        help="transmix: labels follow the attention of the forward pass on the mixed images",
    )
    group.add_argument(
        "--relabel-ratio",
        default=0.5,
        type=float,
        help="weight of the area in TransMix's share; 0 is the equation of its paper, 1 keeps the "
        "labels of the mixing method",
    )


def _add_smmix_flags(group: Any) -> None:
    _add_with_default(
        group,
        "variant",
        choices=["paper", "released"],
        help="arithmetic of SMMix: that of the paper, or that of the released code",
    )
    _add_with_default(
        group,
        "region-head",
        choices=["shared", "separate"],
        help="classifier of the regions: the model's head, or a second one; overrides --variant",
    )
    _add_with_default(
        group,
        "consistency",
        choices=["probs", "logits"],
        help="reference of L_con: mixed probabilities, or the softmax of mixed logits; overrides "
        "--variant",
    )
    _add_with_default(
        group,
        "region-size",
        choices=["floor", "integer"],
        help="side of the region: rounded down from a real number, or drawn from whole numbers; "
        "overrides --variant",
    )
    _add_with_default(
        group,
        "source-region",
        choices=["max", "random"],
        help="where SMMix takes its region: the most attended one, or a random one",
    )
    _add_with_default(
        group,
        "target-region",
        choices=["min", "max", "corr"],
        help="where SMMix pastes its region: over the least or the most attended region, or at the "
        "place from which it was taken",
    )
    group.add_argument(
        "--side-ratio",
        default=(0.25, 0.75),
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="range of the region's side as a share of the image's side",
    )


def _add_protocol_flags(group: Any) -> None:
    group.add_argument(
        "--mix-protocol",
        default="switch",
        choices=["switch", "single", "split"],
        help="switch: each batch is mixed by --mixer or by Mixup, unless --mixup is 0; single: "
        "always by --mixer; split: one part of each batch by --mixer, the rest by Mixup",
    )
    group.add_argument("--mixup-prob", default=1.0, type=float, help="share of batches to mix")
    group.add_argument(
        "--mixup-switch-prob",
        default=0.5,
        type=float,
        help="share of --mixer when Mixup is on too: of the mixed batches (switch), or of the "
        "images of each batch (split)",
    )
    group.add_argument(
        "--mix-off-epoch", type=int, help="epoch, counted from 0, from which nothing is mixed"
    )


def _add_guide_flags(group: Any) -> None:
    _add_with_default(
        group,
        "motivator",
        metavar="self|ema|NAME|NAME=CHECKPOINT|CHECKPOINT",
        help="network that runs the motivating pass: the model itself, the average of its weights, "
        "or a frozen network: a timm name (timm downloads its weights), a name with a file of "
        "weights, or a checkpoint of main.py",
    )
    _add_with_default(
        group,
        "guide-size",
        type=int,
        nargs="+",
        metavar="SIDE",
        help="size to which images are resized for the motivating pass: one side, or height and "
        "width, in pixels; default: not resized",
    )
    _add_with_default(
        group,
        "guide-amp",
        choices=["fp16", "bf16", "none"],
        help="precision of the motivating pass; default: --amp",
    )
    _add_with_default(
        group,
        "score",
        choices=["attention", "rollout", "random"],
        help="score by which SMMix chooses its regions: the attention of one block, the mean over "
        "all blocks, or a random number for each token",
    )
    _add_with_default(
        group,
        "score-block",
        type=int,
        metavar="D",
        help="block whose attention is the score, counted from 1; default: the last",
    )


def _add_loss_flags(group: Any) -> None:
    _add_with_default(
        group, "fine-weight", type=float, help="weight of L_fine; 0 removes it from the loss"
    )
    _add_with_default(
        group,
        "con-weight",
        type=float,
        help="weight of L_con; 0 removes it from the loss, and the motivating pass ends once the "
        "score is known; default: 1 for smmix, 0 for the other methods that paste",
    )
    _add_with_default(
        group,
        "fine-temperature",
        type=float,
        metavar="T",
        help="temperature of the predictions in L_fine: softmax(logits / T)",
    )
    _add_with_default(
        group,
        "con-temperature",
        type=float,
        metavar="T",
        help="temperature of both sides of L_con, which becomes T^2 times the divergence",
    )
    _add_with_default(
        group,
        "con-warmup-epochs",
        type=int,
        metavar="N",
        help="the weight of L_con rises linearly from 0 over the first N epochs, step by step; an "
        "addition to the paper",
    )
    group.add_argument(
        "--bce-loss", action="store_true", help="binary cross entropy for L_cls and L_fine"
    )


# ----------------------------------------------------------------------- which method uses a flag


def con_weight_of(mixer: str, given: float | None) -> float:
    """The weight of L_con: `given`, or else the default of the method."""
    return float(mixer == "smmix") if given is None else given


def is_used(name: str, flags: Mapping[str, Any]) -> bool:
    """Whether the method `flags["mixer"]` uses this flag of `METHOD_FLAGS`."""
    mixer = flags["mixer"]
    has_con = mixer == "smmix" or con_weight_of(mixer, flags.get("con_weight")) > 0
    return mixer in METHOD_FLAGS[name][1] and (has_con or name not in CONSISTENCY_FLAGS)


def flags_of_method(flags: Mapping[str, Any], mixer: str) -> dict[str, Any]:
    """The same flags with this `--mixer`: flags that it does not use have their defaults."""
    own = {**flags, "mixer": mixer}
    unused = {name: METHOD_FLAGS[name][0] for name in METHOD_FLAGS if not is_used(name, own)}
    return {**own, **unused}


def needs_score(args: argparse.Namespace) -> bool:
    """Whether SMMix chooses at least one region by a score."""
    return args.source_region != "random" or args.target_region != "corr"


def needs_guide(args: argparse.Namespace) -> bool:
    """Whether the motivating pass is run, for the score or for L_con."""
    uses_its_score = args.mixer == "smmix" and args.score != "random" and needs_score(args)
    has_con = con_weight_of(args.mixer, getattr(args, "con_weight", None)) > 0
    return uses_its_score or has_con
