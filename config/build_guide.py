"""What the flags of the motivating pass can ask of a model: sizes and blocks that it can be looked
at in."""

from __future__ import annotations

import argparse
from typing import Any, cast

import torch

import engine
import utils
from config.mixing_flags import weight_of_con
from config.second_networks import Look, build_motivator
from mixers.interface import Guide
from models.build import use_float32_attention
from models.interface import Depth, ImageModel
from pipeline.spec import ImageSpec
from training import precision
from utils import InputError


def check_look_size(model: ImageModel, name: str, size: tuple[int, int]) -> None:
    """Whether the motivating pass can show the images at this height and width.

    Raises:
        InputError: the model takes images of one size, or these sides do not fit.
    """
    given, own = f"--guide-size {size[0]} {size[1]}", model.input_size
    if not model.looks_smaller:
        kind = type(model.network).__name__
        raise InputError(
            f"{given}: {name}, a {kind}, is read at its own size only; a plain ViT or DeiT takes "
            "the flag"
        )
    if size[0] > own[0] or size[1] > own[1] or size == own:
        raise InputError(
            f"{given}: must be smaller than the images, {own[0]} x {own[1]} pixels; leave the flag "
            "out"
        )
    if any(
        side % patch or side < 2 * patch for side, patch in zip(size, model.patch_size, strict=True)
    ):
        fits = [
            max(side // patch, 2) * patch
            for side, patch in zip(size, model.patch_size, strict=True)
        ]
        raise InputError(
            f"{given}: each side must be a multiple of the patch size "
            f"{model.patch_size[0]}x{model.patch_size[1]} of "
            f"{name}, and two patches or more, such as {fits[0]} {fits[1]}"
        )


def check_score_block(model: ImageModel, name: str, block: Depth) -> None:
    """Whether the motivating pass can read its score in this block, or in all.

    Raises:
        InputError: the model has no such block, or is read in its last one only.
    """
    if block is None:
        return
    given = "--score rollout" if block == "rollout" else f"--score-block {block}"
    if not model.score_blocks:
        kind = type(model.network).__name__
        raise InputError(
            f"{given}: {name}, a {kind}, is read in its last block only, as others lie on other "
            "grids; a "
            "ViT, DeiT or CaiT takes the flag"
        )
    if isinstance(block, int) and not 0 < block <= model.score_blocks:
        raise InputError(f"{given}: {name} has the blocks 1 to {model.score_blocks}")


def uses_predictions(args: argparse.Namespace) -> bool:
    """Whether the motivator's predictions are used, not its score alone."""
    return weight_of_con(args.mixer, args.con_weight) > 0


def make_motivator(
    args: argparse.Namespace, model: ImageModel, average: Any, device: torch.device, spec: ImageSpec
) -> tuple[ImageModel, Look]:
    """Whose prediction and score of the clean images guide the training (Table 9), and how it looks
    at them.

    Args:
        average: of the weights, a `ModelEmaV3`, if there is one.
        spec: of the clean images.
    """
    if args.motivator in ("self", "ema"):
        own = model if args.motivator == "self" else cast(ImageModel, average.module)
        return own, own.look
    motivator, look = build_motivator(
        args.motivator, model.num_classes, spec, uses_predictions(args), device
    )
    if args.attn_fp32:
        use_float32_attention(motivator, args.motivator)
    return motivator, look


def make_guide(
    args: argparse.Namespace,
    model: ImageModel,
    device: torch.device,
    average: Any = None,
    spec: ImageSpec | None = None,
) -> Guide:
    """The motivating pass, as exact or as cheap as the flags want it.

    Args:
        average, spec: see `make_motivator`; without `spec` the images are normalised with
            ImageNet's mean and std.
    """
    spec = spec or ImageSpec(model.input_size)
    motivator, look = make_motivator(args, model, average, device, spec)
    name = args.model if args.motivator in ("self", "ema") else args.motivator
    size = None if args.guide_size is None else utils.as_pair(args.guide_size)
    if size is not None:
        check_look_size(motivator, name, size)
    block: Depth = "rollout" if args.score == "rollout" else args.score_block
    check_score_block(motivator, name, block)
    autocast = precision.make_autocast(device, args.guide_amp or args.amp)
    call = torch.compile(look) if args.compile else look
    return engine.make_guide(
        motivator, autocast, call, size, block, uses_predictions(args), model.grid_size
    )
