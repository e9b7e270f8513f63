"""CutMix's box: draw it, clip it, turn it into a share or a mask. Knows no labels and no models."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.boxes import Box

Number = TypeVar("Number", int, Tensor)


def sides_of(image_size: tuple[int, int], share: float) -> tuple[int, int]:
    """Rows and columns of a box of about `share` of the image and of its shape (CutMix, Eq. 2)."""
    ratio = math.sqrt(share)
    return int(image_size[0] * ratio), int(image_size[1] * ratio)


def draw_box(
    image_size: tuple[int, int], sides: tuple[int, int], generator: torch.Generator
) -> Box:
    """A box of `sides` around a centre uniform over the image, clipped at its borders."""
    edges: list[int] = []
    for length, side in zip(image_size, sides, strict=True):
        start, end = around(int(torch.randint(length, (), generator=generator)), side)
        edges += [max(start, 0), min(end, length)]
    return Box(*edges)


def draw_box_inside(
    image_size: tuple[int, int], sides: tuple[int, int], generator: torch.Generator
) -> Box:
    """A box of `sides` uniform over the places where it lies fully inside the image."""
    edges: list[int] = []
    for length, side in zip(image_size, sides, strict=True):
        start = int(torch.randint(length - side + 1, (), generator=generator))
        edges += [start, start + side]
    return Box(*edges)


def draw_box_between(
    image_size: tuple[int, int], ratios: tuple[float, float], generator: torch.Generator
) -> Box:
    """A box whose sides are uniform between two ratios of the image's, fully inside it
    (`--cutmix-minmax`)."""
    sides = []
    for length in image_size:
        low, high = (
            int(length * ratios[0]),
            max(int(length * ratios[1]), int(length * ratios[0]) + 1),
        )
        sides.append(int(torch.randint(low, high, (), generator=generator)))
    return draw_box_inside(image_size, (sides[0], sides[1]), generator)


def around(centre: Number, side: Number) -> tuple[Number, Number]:
    """First position and the one after the last of `side` positions around `centre`, before
    clipping."""
    return centre - side // 2, centre + (side + 1) // 2


def boxes_around(centres: Tensor, sides: Tensor, image_size: tuple[int, int]) -> Tensor:
    """`draw_box` for centres that only the device knows: (B, 2) and (B, 2) -> edges (B, 4) in the
    order of `Box`."""
    start, end = around(centres, sides)
    size = torch.tensor(image_size).to(centres.device, non_blocking=True)
    return torch.stack((start.clamp(min=0), torch.minimum(end, size)), dim=2).flatten(1)
