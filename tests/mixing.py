"""Mixers as flags make them, for tests that need one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from config.build_mixer import build_mixer
from config.flags import get_args_parser
from mixers.interface import MixerContext
from mixers.switch import Switch
from pipeline.spec import ImageSpec
from pipeline.transforms import denormalise


def to_bytes(images: Tensor) -> Tensor:
    """Images whose values lie between 0 and 1 as bytes."""
    return images.float().clamp(0, 1).mul(255).round().to(torch.uint8)


def fake_teacher(images: Tensor) -> Tensor:
    """Images (B, C, height, width) -> features (B, 1, 2, 3): the mean of each cell, sharpened."""
    return (
        torch.nn.functional.adaptive_avg_pool2d(images.float(), (2, 3))
        .mean(dim=1, keepdim=True)
        .sin()
    )


def make_switch(
    num_classes: int,
    grid_size: tuple[int, int],
    teacher: Callable[[Tensor], Tensor] | None = None,
    **flags: Any,
) -> Switch:
    """The switch that `main.py` would build with these flags, everything else at its default."""
    args = get_args_parser().parse_args([])
    vars(args).update(flags)
    pixels = partial(denormalise, spec=ImageSpec((1, 1)))
    return build_mixer(args, MixerContext(num_classes, grid_size, pixels, teacher))
