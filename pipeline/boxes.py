"""Rectangles of pixels: one box, its share of the image, and the mask of a batch of boxes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Box(NamedTuple):
    """The pixels of rows top..bottom-1 and columns left..right-1."""

    top: int
    bottom: int
    left: int
    right: int

    def share(self, image_size: tuple[int, int]) -> float:
        """The box's share of the area of an image of (height, width) pixels."""
        return (self.bottom - self.top) * (self.right - self.left) / (image_size[0] * image_size[1])


def boxes_to_tensor(boxes: list[Box], device: torch.device) -> Tensor:
    """The boxes as (B, 4) int64 on a device, in the order of `Box`; the host does not wait."""
    return torch.tensor(boxes).to(device, non_blocking=True)


def box_mask(edges: Tensor, image_size: tuple[int, int]) -> Tensor:
    """The mask that is true inside each image's box.

    Args:
        edges: (B, 4) int64, in the order of `Box`.
        image_size: (height, width) in pixels.

    Returns:
        (B, 1, height, width) bool.
    """
    rows, columns = (torch.arange(length, device=edges.device) for length in image_size)
    top, bottom, left, right = edges[:, :, None].unbind(1)  # each (B, 1)
    inside_rows = (rows >= top) & (rows < bottom)  # (B, height)
    inside_columns = (columns >= left) & (columns < right)  # (B, width)
    return (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]
