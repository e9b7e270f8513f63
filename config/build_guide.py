"""Makes the guide from the flags, and refuses flags that do not fit its motivator."""

from __future__ import annotations

from typing import Any, cast

import torch

import engine
from config.resolve import Flags
from config.second_networks import MotivatingPass, build_motivator
from errors import InputError, as_pair
from mixers.interface import Guide
from mixers.registry import con_weight_of
from models.build import use_float32_attention
from models.interface import ImageModel, ScoreBlock
from pipeline.spec import ImageSpec
from storage.checkpoints import ReadCheckpoint, load_checkpoint
from training import precision


def check_guide_size(model: ImageModel, name: str, size: tuple[int, int]) -> None:
    """Checks that the motivating pass can run on images of this height and width.

    Raises:
        InputError: the model takes images of one size only, or these sides do not fit.
    """
    given, own = f"--guide-size {size[0]} {size[1]}", model.input_size
    if not model.accepts_other_sizes:
        kind = type(model.network).__name__
        raise InputError(
            f"{given}: {name}, a {kind}, takes images of one size only; use the flag with a plain "
            "ViT or DeiT"
        )
    if size[0] > own[0] or size[1] > own[1] or size == own:
        raise InputError(
            f"{given}: must be smaller than the images, {own[0]} x {own[1]} pixels; leave the flag "
            "out"
        )
    patch_size = model.patch_size
    pairs = list(zip(size, patch_size, strict=True))
    if any(side % patch or side < 2 * patch for side, patch in pairs):
        fitting = [max(side // patch, 2) * patch for side, patch in pairs]
        raise InputError(
            f"{given}: each side must be a multiple of the patch size "
            f"{patch_size[0]}x{patch_size[1]} of {name}, and two patches or more, such as "
            f"{fitting[0]} {fitting[1]}"
        )


def check_score_block(model: ImageModel, name: str, block: ScoreBlock) -> None:
    """Checks that the model has a score in this block, or in all blocks with `rollout`.

    Raises:
        InputError: the model has no such block, or a score in its last block only.
    """
    if block is None:
        return
    given = "--score rollout" if block == "rollout" else f"--score-block {block}"
    if not model.score_blocks:
        kind = type(model.network).__name__
        raise InputError(
            f"{given}: {name}, a {kind}, has a score in its last block only, as its other blocks "
            "have other grids; use the flag with a ViT, DeiT or CaiT"
        )
    if isinstance(block, int) and not 0 < block <= model.score_blocks:
        raise InputError(f"{given}: {name} has the blocks 1 to {model.score_blocks}")


def uses_predictions(flags: Flags) -> bool:
    """Whether the predictions of the motivator are used (by L_con), and not only its score."""
    return con_weight_of(flags.mixer, flags.con_weight) > 0


def make_motivator(
    flags: Flags,
    model: ImageModel,
    average: Any,
    device: torch.device,
    spec: ImageSpec,
    read: ReadCheckpoint,
) -> tuple[ImageModel, MotivatingPass]:
    """The motivator (Table 9), and its motivating pass.

    Args:
        average: the average of the weights (`ModelEmaV3`), or None.
        spec: size and normalisation of the clean images.
    """
    if flags.motivator in ("self", "ema"):
        own = model if flags.motivator == "self" else cast(ImageModel, average.module)
        return own, own.motivating_pass
    motivator, motivating_pass = build_motivator(
        flags.motivator, model.num_classes, spec, uses_predictions(flags), device, read
    )
    if flags.attn_fp32:
        use_float32_attention(motivator, flags.motivator)
    return motivator, motivating_pass


def make_guide(
    flags: Flags,
    model: ImageModel,
    device: torch.device,
    average: Any = None,
    spec: ImageSpec | None = None,
    read: ReadCheckpoint = load_checkpoint,
) -> Guide:
    """The guide of a run: its motivator, with size, precision and block of the motivating pass.

    Args:
        average: see `make_motivator`.
        spec: size and normalisation of the clean images; default: ImageNet's mean and std.
        read: reads the file of `--motivator`.

    Raises:
        InputError: the flags do not fit the motivator.
    """
    spec = spec or ImageSpec(model.input_size)
    motivator, motivating_pass = make_motivator(flags, model, average, device, spec, read)
    name = flags.model if flags.motivator in ("self", "ema") else flags.motivator
    size = None if flags.guide_size is None else as_pair(flags.guide_size)
    if size is not None:
        check_guide_size(motivator, name, size)
    block: ScoreBlock = "rollout" if flags.score == "rollout" else flags.score_block
    check_score_block(motivator, name, block)
    return engine.make_guide(
        motivator,
        precision.make_autocast(device, flags.guide_amp or flags.amp),
        torch.compile(motivating_pass) if flags.compile else motivating_pass,
        size,
        block,
        uses_predictions(flags),
        model.grid_size,
    )
