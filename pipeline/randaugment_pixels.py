"""RandAugment's operations on a batch of pixels, on its device, with the levels that Pillow gives.

Level 1: imports `randaugment`, for what was drawn. It must not draw, and knows no labels, files or
transforms. What Pillow computes in floating point is computed here in the same precision and order,
everything else in integers: results are equal to the bit (compared on the CPU; not run on CUDA).
The device is never waited for: which images an operation is for is known on the host.

Letters: B batch, H height, W width, in pixels; n images of one operation; P = H * W.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from pipeline.randaugment import Kind, count_kinds

LEVELS = 256
GRAY = (19595, 38470, 7471)  # weights of red, green and blue in 65536ths
TABLES = (Kind.RULE, Kind.AUTO_CONTRAST, Kind.EQUALIZE)
BLENDS = (Kind.COLOR, Kind.CONTRAST, Kind.BRIGHTNESS, Kind.SHARPNESS)


def apply(images: Tensor, drawn: Tensor, fill: tuple[int, ...]) -> Tensor:
    """Does to each image what was drawn for it. How much is launched does not depend on B or on the
    images.

    Args:
        images: (B, 3, H, W) uint8, on any device that has float64.
        drawn: `pipeline.randaugment.as_tensor`'s, on the host.
        fill: level per channel of what a warp brings in from outside.

    Returns:
        (B, 3, H, W) uint8, in the same memory format.
    """
    images = images.clone()
    there = drawn.to(images.device, non_blocking=True)  # (B, L, 8)
    for layer, counts in enumerate(count_kinds(drawn)):
        ends = list(accumulate(counts))
        rows, numbers = there[:, layer, 1].long(), there[:, layer, 2:]  # (B,), (B, 6)
        for kinds in ((Kind.FLIP,), TABLES, (Kind.BICUBIC,), (Kind.BILINEAR,), BLENDS):
            begin, end = ends[kinds[0] - 1], ends[kinds[-1]]
            if begin == end:
                continue
            old, own = images.index_select(0, rows[begin:end]).contiguous(), numbers[begin:end]
            if kinds == (Kind.FLIP,):
                new = old.flip(3)
            elif kinds == TABLES:
                new = look_up(old, own, [counts[kind] for kind in kinds])
            elif kinds == BLENDS:
                new = blend(old, own[:, 0], [counts[kind] for kind in kinds])
            else:
                new = warp(old, own, fill, cubic=kinds == (Kind.BICUBIC,))
            images.index_copy_(0, rows[begin:end], new)
    return images


# ------------------------------------------------------------------------------------------- tables


def look_up(images: Tensor, numbers: Tensor, counts: list[int]) -> Tensor:
    """Every level replaced by that of a table of its image and channel.

    Args:
        images: (n, 3, H, W) uint8, those of each kind in `TABLES` together.
        numbers: (n, 6), of use to the first kind only.
        counts: images of each kind.
    """
    levels = images.flatten(2).long()  # (n, 3, P)
    _, stretched, equalized = levels.split(counts)
    tables = torch.cat(
        [rule_tables(numbers[: counts[0]]), contrast_tables(stretched), equal_tables(equalized)]
    )  # (n, 3, 256)
    return tables.gather(2, levels).view_as(images)


def rule_tables(numbers: Tensor) -> Tensor:
    """(n, 3, 256) uint8 of rules: threshold, what is added below it, 1 to negate from it on, and
    mask."""
    threshold, added, negated, mask = numbers[:, :4].long()[:, :, None].unbind(1)  # (n, 1) each
    level = torch.arange(LEVELS, device=numbers.device)
    above = torch.where(negated == 1, LEVELS - 1 - level, level)
    ruled = (
        torch.where(level < threshold, (level + added).clamp(max=LEVELS - 1), above) & mask
    )  # (n, 256)
    return ruled.to(torch.uint8)[:, None].expand(-1, 3, -1)


def contrast_tables(levels: Tensor) -> Tensor:
    """(n, 3, 256) uint8 that stretch a channel's levels (n, 3, P) to 0..255; one of a single level
    keeps it."""
    table = torch.arange(LEVELS, device=levels.device).expand(*levels.shape[:2], -1)  # (n, 3, 256)
    if not len(levels):
        return table.to(torch.uint8)
    low, high = (edge[:, :, None].double() for edge in levels.aminmax(dim=2))  # (n, 3, 1)
    scale = torch.full_like(low, LEVELS - 1) / (high - low).clamp(min=1)
    stretched = (table * scale - low * scale).clamp(0, LEVELS - 1)  # truncated below, as by Pillow
    return torch.where(high > low, stretched, table.double()).to(torch.uint8)


def equal_tables(levels: Tensor) -> Tensor:
    """(n, 3, 256) uint8 that spread a channel's levels (n, 3, P) evenly; one of a single level
    keeps it."""
    table = torch.arange(LEVELS, device=levels.device).expand(*levels.shape[:2], -1)  # (n, 3, 256)
    counts = torch.zeros_like(table, dtype=torch.int64, memory_format=torch.contiguous_format)
    counts.scatter_add_(
        2, levels, counts.new_ones(()).expand_as(levels)
    )  # integers: the same in any order
    last = torch.where(counts > 0, table, 0).amax(
        dim=2, keepdim=True
    )  # (n, 3, 1), the highest level that is there
    step = (levels.shape[2] - counts.gather(2, last)) // (LEVELS - 1)
    below = counts.cumsum(dim=2) - counts
    spread = (step // 2 + below) // step.clamp(min=1)
    return torch.where(step > 0, spread.clamp(max=LEVELS - 1), table).to(torch.uint8)


# -------------------------------------------------------------------------------------------- warps


def warp(images: Tensor, maps: Tensor, fill: tuple[int, ...], cubic: bool) -> Tensor:
    """Pillow's affine transform: levels interpolated between pixel centres, edges repeated,
    fractions cut off.

    Args:
        images: (n, 3, H, W) uint8.
        maps: (n, 6) float64, from a new pixel to an old one, see `pipeline.randaugment.Kind`.
        fill: level per channel of new pixels that lie outside the old image.
        cubic: with a cubic of slope -1 through four pixels; otherwise linearly between two.
    """
    height, width = images.shape[2:]
    x, y = _places(maps, height, width)  # (n, H, W) each
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = x - 0.5, y - 0.5
    left, top = x.floor(), y.floor()
    right_share, lower_share = (
        (at - edge)[:, None].flatten(2) for at, edge in ((x, left), (y, top))
    )  # (n, 1, P)
    reach = range(-1, 3) if cubic else range(2)
    columns = torch.stack(
        [(left.long() + by).clamp_(0, width - 1) for by in reach], dim=1
    )  # (n, 2 or 4, H, W)
    rows = [(top.long() + by).clamp_(0, height - 1) * width for by in reach]
    between = _cubic if cubic else _linear
    pixels, lines = images.flatten(2).to(torch.int16), []
    for row in rows:
        index = (row[:, None] + columns).flatten(1)[:, None].expand(-1, 3, -1)
        lines.append(
            between(*pixels.gather(2, index).chunk(len(reach), dim=2), share=right_share)
        )  # (n, 3, P)
    new = between(*lines, share=lower_share).clamp_(0, LEVELS - 1).to(torch.uint8).view_as(images)
    outside = torch.stack([inside.new_full((1, 1), level, dtype=torch.uint8) for level in fill])
    return torch.where(inside[:, None], new, outside)


def _places(maps: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Where the new pixels' centres lie in the old image: columns and rows, (n, H, W) float64."""
    column = torch.arange(width, device=maps.device, dtype=maps.dtype) + 0.5
    row = (torch.arange(height, device=maps.device, dtype=maps.dtype) + 0.5)[:, None]
    a, b, c, d, e, f = maps[:, :, None, None].unbind(1)  # (n, 1, 1)
    return a * column + b * row + c, d * column + e * row + f


def _linear(first: Tensor, second: Tensor, *, share: Tensor) -> Tensor:
    return first + (second - first) * share


def _cubic(
    first: Tensor, second: Tensor, third: Tensor, fourth: Tensor, *, share: Tensor
) -> Tensor:
    """Between the second and the third, by Horner's rule. Pixels come as int16, which holds all
    differences."""
    slope = third - first
    square = (first - second) * 2 + third - fourth
    cube = second - first - third + fourth
    return ((share * cube).add_(square).mul_(share).add_(slope).mul_(share)).add_(second)


# ------------------------------------------------------------------------------------------- blends


def blend(images: Tensor, shares: Tensor, counts: list[int]) -> Tensor:
    """Between the image and what has no color, no contrast, no light or no sharpness, or beyond it.

    Args:
        images: (n, 3, H, W) uint8, those of each kind in `BLENDS` together.
        shares: (n,), the image's.
        counts: images of each kind.
    """
    pixels = images.to(torch.int32)
    colored, contrasted, bright, sharp = pixels.split(counts)
    base = torch.cat(
        [gray_of(colored), mean_of(contrasted), torch.zeros_like(bright), smooth_of(sharp)]
    )
    moved = (pixels - base).to(torch.float32) * shares.to(torch.float32)[:, None, None, None]
    return (base + moved).clamp_(0, LEVELS - 1).to(torch.uint8)


def gray_of(pixels: Tensor) -> Tensor:
    """Luma of int32 (n, 3, H, W) in each channel."""
    red, green, blue = (
        channel * weight for channel, weight in zip(pixels.unbind(1), GRAY, strict=True)
    )
    return ((red + green + blue + 2**15) >> 16)[:, None].expand_as(pixels)


def mean_of(pixels: Tensor) -> Tensor:
    """Its mean, rounded, everywhere."""
    luma = gray_of(pixels)[:, :1]
    size = pixels.shape[2] * pixels.shape[3]
    mean = (luma.sum(dim=(2, 3), keepdim=True) * 2 + size) // (2 * size)  # (n, 1, 1, 1) int64
    return mean.to(torch.int32).expand_as(pixels)


def smooth_of(pixels: Tensor) -> Tensor:
    """The mean of each pixel, counted five times, and its eight neighbors, rounded; pixels at the
    edge stay."""
    if min(pixels.shape[2:]) < 3:
        return pixels
    lines = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    sums = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:] + 4 * pixels[:, :, 1:-1, 1:-1]
    smooth = pixels.clone()
    smooth[:, :, 1:-1, 1:-1] = (2 * sums + 13) // 26
    return smooth
