"""What the flags of the motivating pass can ask of a model: sizes and blocks that it can be looked at in."""

from __future__ import annotations

from models.interface import Depth, ImageModel
from utils import InputError


def check_look_size(model: ImageModel, name: str, size: tuple[int, int]) -> None:
    """Whether the motivating pass can show the images at this height and width.

    Raises:
        InputError: the model takes images of one size, or these sides do not fit.
    """
    given, own = f"--guide-size {size[0]} {size[1]}", model.input_size
    if not model.looks_smaller:
        kind = type(model.network).__name__
        raise InputError(f"{given}: {name}, a {kind}, is read at its own size only; a plain ViT or DeiT takes the flag")
    if size[0] > own[0] or size[1] > own[1] or size == own:
        raise InputError(f"{given}: must be smaller than the images, {own[0]} x {own[1]} pixels; leave the flag out")
    if any(side % patch or side < 2 * patch for side, patch in zip(size, model.patch_size, strict=True)):
        fits = [max(side // patch, 2) * patch for side, patch in zip(size, model.patch_size, strict=True)]
        raise InputError(
            f"{given}: each side must be a multiple of the patch size {model.patch_size[0]}x{model.patch_size[1]} of "
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
            f"{given}: {name}, a {kind}, is read in its last block only, as others lie on other grids; a "
            "ViT, DeiT or CaiT takes the flag"
        )
    if isinstance(block, int) and not 0 < block <= model.score_blocks:
        raise InputError(f"{given}: {name} has the blocks 1 to {model.score_blocks}")
