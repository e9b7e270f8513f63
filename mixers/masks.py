"""Which pixels come from the source, and pasting them. Knows no labels, no models and no method.

Letters: B batch, C channels, M entries of a score.
"""

from __future__ import annotations

import torch
from torch import Tensor


def paste(images: Tensor, sources: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """x_M = M * x_A + (1 - M) * x_B (paper Eq. 1) for a mask of all or nothing.

    Args:
        images: (B, C, height, width), the targets; stay as they are.
        sources: the same shape; what each target receives where its mask is true.
        mask: (B, 1, height, width) bool.

    Returns:
        The mixed images, new, and lam (B,) float32: the share of pixels that are really the
        source's.
    """
    pixels = mask.shape[2] * mask.shape[3]
    return torch.where(mask, sources, images), mask.flatten(1).sum(dim=1).float() / pixels


def top_mask(scores: Tensor, counts: Tensor) -> Tensor:
    """(B, M) bool: the `counts` (B,) largest scores of each row of (B, M). Counts may differ; ties
    never add any."""
    order = scores.argsort(dim=1, descending=True)
    chosen = (
        torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
    )  # (B, M), by rank
    return torch.zeros_like(chosen).scatter(1, order, chosen)


def first_argmax(scores: Tensor) -> Tensor:
    """Row and column (B, 2) int64 of the largest of (B, rows, columns).

    Ties go to the first in row-major order on every device, which torch's own arg max does not
    promise.
    """
    columns, flat = scores.shape[2], scores.flatten(1)
    places = torch.arange(flat.shape[1], device=flat.device)
    best = flat == flat.amax(dim=1, keepdim=True)
    first = torch.where(best, places, flat.shape[1] - 1).amin(dim=1)  # (B,)
    return torch.stack((first // columns, first % columns), dim=1)


def to_cells(mask: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """A mask of pixels (B, 1, height, width) as one of tokens (B, rows * columns) bool, by nearest
    neighbour."""
    return torch.nn.functional.interpolate(mask.float(), grid_size, mode="nearest").flatten(1) > 0.5


def to_pixels(cells: Tensor, grid_size: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """A mask of cells (B, rows * columns) as one of pixels (B, 1, height, width), by nearest
    neighbour."""
    rows, columns = (
        torch.arange(pixels, device=cells.device) * count // pixels
        for pixels, count in zip(image_size, grid_size, strict=True)
    )
    return cells.unflatten(1, grid_size)[:, None, rows[:, None], columns]
