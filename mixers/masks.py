"""Pasting by a mask, masks of regions and of the largest scores, and conversion between tokens and
pixels.

Letters: B batch, C channels, M entries of a score, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def paste(images: Tensor, sources: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 1: M * x_A + (1 - M) * x_B for a binary mask M.

    Args:
        images: (B, C, height, width), the targets x_B; not changed.
        sources: x_A, the same shape.
        mask: (B, 1, height, width) bool, true for pixels of the source.

    Returns:
        The mixed images, new, and lam (B,) float32, the share of true pixels in each mask.
    """
    pixels = mask.shape[2] * mask.shape[3]
    return torch.where(mask, sources, images), mask.flatten(1).sum(dim=1).float() / pixels


def top_mask(scores: Tensor, counts: Tensor) -> Tensor:
    """(B, M) bool, true for the largest scores of each row.

    Args:
        scores: (B, M).
        counts: (B,), how many are true in each row, also if there are ties.
    """
    order = scores.argsort(dim=1, descending=True)
    is_first = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]  # (B, M)
    return torch.zeros_like(is_first).scatter(1, order, is_first)


def first_argmax(scores: Tensor) -> Tensor:
    """Row and column (B, 2) int64 of the largest of the scores (B, rows, columns).

    Of equal scores the first in row-major order is chosen, on every device. torch's arg max does
    not promise this.
    """
    columns, flat = scores.shape[2], scores.flatten(1)
    places = torch.arange(flat.shape[1], device=flat.device)
    best = flat == flat.amax(dim=1, keepdim=True)
    first = torch.where(best, places, flat.shape[1] - 1).amin(dim=1)  # (B,)
    return torch.stack((first // columns, first % columns), dim=1)


def region_mask(corners: Tensor, sizes: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """The tokens inside each image's region (the index set of Eq. 10), (B, N) bool.

    Args:
        corners: (B, 2) int64, row and column of the region's top left token.
        sizes: (B, 2) int64, h and w of each region.
    """
    rows, columns = (torch.arange(length, device=corners.device) for length in grid_size)
    top, left = corners[:, :1], corners[:, 1:]  # (B, 1)
    inside_rows = (rows >= top) & (rows < top + sizes[:, :1])  # (B, rows)
    inside_columns = (columns >= left) & (columns < left + sizes[:, 1:])
    return (inside_rows[:, :, None] & inside_columns[:, None, :]).flatten(1)


def to_cells(mask: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Mask of pixels (B, 1, height, width) -> mask of tokens (B, N) bool, by nearest neighbour."""
    return torch.nn.functional.interpolate(mask.float(), grid_size, mode="nearest").flatten(1) > 0.5


def to_pixels(cells: Tensor, grid_size: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """Mask of cells (B, N) -> mask of pixels (B, 1, height, width), by nearest neighbour."""
    rows, columns = (
        torch.arange(pixels, device=cells.device) * count // pixels
        for pixels, count in zip(image_size, grid_size, strict=True)
    )
    return cells.unflatten(1, grid_size)[:, None, rows[:, None], columns]
