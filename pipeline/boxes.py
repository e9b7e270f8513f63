"""A rectangle of pixels, its share of an image, and a batch of them as a mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Box(NamedTuple):
    """Rows top..bottom-1 and columns left..right-1, in pixels."""

    top: int
    bottom: int
    left: int
    right: int

    def share(self, image_size: tuple[int, int]) -> float:
        """The box's share of the image's area."""
        return (self.bottom - self.top) * (self.right - self.left) / (image_size[0] * image_size[1])


def edges_of(boxes: list[Box], device: torch.device) -> Tensor:
    """(B, 4) int64 on a device, moved without waiting."""
    return torch.tensor(boxes).to(device, non_blocking=True)


def box_mask(edges: Tensor, image_size: tuple[int, int]) -> Tensor:
    """(B, 1, height, width) bool, true inside each image's box; edges (B, 4) in the order of
    `Box`."""
    rows, columns = (torch.arange(length, device=edges.device) for length in image_size)
    top, bottom, left, right = edges[:, :, None].unbind(1)  # each (B, 1)
    inside_rows, inside_columns = (
        (rows >= top) & (rows < bottom),
        (columns >= left) & (columns < right),
    )
    return (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]
