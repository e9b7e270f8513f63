"""Draws boxes of pixels: CutMix's, clipped at the image's border, and boxes inside the image."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.boxes import Box

Number = TypeVar("Number", int, Tensor)


def sides_of(image_size: tuple[int, int], share: float) -> tuple[int, int]:
    """Rows and columns of a box with this share of the image and the same shape (CutMix, Eq. 2)."""
    ratio = math.sqrt(share)
    return int(image_size[0] * ratio), int(image_size[1] * ratio)


def draw_box(
    image_size: tuple[int, int], sides: tuple[int, int], generator: torch.Generator
) -> Box:
    """A box of `sides`, its centre uniform over the image, clipped at the image's border."""
    edges: list[int] = []
    for length, side in zip(image_size, sides, strict=True):
        centre = int(torch.randint(length, (), generator=generator))
        start, end = interval_around(centre, side)
        edges += [max(start, 0), min(end, length)]
    return Box(*edges)


def draw_box_inside(
    image_size: tuple[int, int], sides: tuple[int, int], generator: torch.Generator
) -> Box:
    """A box of `sides`, uniform over the places where it lies inside the image."""
    edges: list[int] = []
    for length, side in zip(image_size, sides, strict=True):
        start = int(torch.randint(length - side + 1, (), generator=generator))
        edges += [start, start + side]
    return Box(*edges)


def draw_box_between(
    image_size: tuple[int, int], ratios: tuple[float, float], generator: torch.Generator
) -> Box:
    """A box inside the image whose sides are uniform between two shares (`--cutmix-minmax`).

    Args:
        ratios: the lowest and the highest side as shares of the image's side.
    """
    sides = []
    for length in image_size:
        low = int(length * ratios[0])
        high = max(int(length * ratios[1]), low + 1)
        sides.append(int(torch.randint(low, high, (), generator=generator)))
    return draw_box_inside(image_size, (sides[0], sides[1]), generator)


def interval_around(centre: Number, side: Number) -> tuple[Number, Number]:
    """The first of `side` positions around `centre`, and the one after the last, not clipped."""
    return centre - side // 2, centre + (side + 1) // 2


def boxes_around(centres: Tensor, sides: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Boxes with these centres, clipped at the image's border, as tensors on the device.

    Args:
        centres, sides: (B, 2), row and column.

    Returns:
        (B, 4), in the order of `Box`.
    """
    start, end = interval_around(centres, sides)
    size = torch.tensor(image_size).to(centres.device, non_blocking=True)
    return torch.stack((start.clamp(min=0), torch.minimum(end, size)), dim=2).flatten(1)
