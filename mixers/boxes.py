"""CutMix's box: draw it, clip it, turn its area into a share. Knows no labels and no models."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Box(NamedTuple):
    """Rows top..bottom-1 and columns left..right-1, in pixels."""

    top: int
    bottom: int
    left: int
    right: int

    def share(self, image_size: tuple[int, int]) -> float:
        """The box's share of the image's area."""
        return (self.bottom - self.top) * (self.right - self.left) / (image_size[0] * image_size[1])


def draw_box(image_size: tuple[int, int], share: float, generator: torch.Generator) -> Box:
    """A box of about `share` of the image around a centre uniform over it, clipped at the borders (CutMix, Eq. 2)."""
    (height, width), ratio = image_size, math.sqrt(share)
    rows, columns = int(height * ratio), int(width * ratio)
    centre_row = int(torch.randint(height, (), generator=generator))
    centre_column = int(torch.randint(width, (), generator=generator))
    return Box(
        max(centre_row - rows // 2, 0),
        min(centre_row + (rows + 1) // 2, height),
        max(centre_column - columns // 2, 0),
        min(centre_column + (columns + 1) // 2, width),
    )


def draw_box_between(image_size: tuple[int, int], ratios: tuple[float, float], generator: torch.Generator) -> Box:
    """A box whose sides are uniform between two ratios of the image's, fully inside it (`--cutmix-minmax`)."""
    edges = []
    for length in image_size:
        low, high = int(length * ratios[0]), max(int(length * ratios[1]), int(length * ratios[0]) + 1)
        side = int(torch.randint(low, high, (), generator=generator))
        start = int(torch.randint(length - side + 1, (), generator=generator))
        edges += [start, start + side]
    return Box(*edges)
