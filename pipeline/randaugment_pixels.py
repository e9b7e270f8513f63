"""Applies drawn RandAugment operations to a batch of pixels on its device.

The results equal Pillow's, bit for bit (compared on the CPU; not run on CUDA): what Pillow computes
in floating point is computed here in the same precision and order, everything else in integers. It
draws nothing, and the host never waits for the device.

Letters: B batch, H height and W width in pixels, n images of one operation, P = H * W.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from pipeline.randaugment import Kind, count_kinds

LEVELS = 256
GRAY = (19595, 38470, 7471)  # weights of red, green and blue, divided by 65536
TABLES = (Kind.RULE, Kind.AUTO_CONTRAST, Kind.EQUALIZE)
BLENDS = (Kind.COLOR, Kind.CONTRAST, Kind.BRIGHTNESS, Kind.SHARPNESS)


def apply(images: Tensor, drawn: Tensor, fill: tuple[int, ...]) -> Tensor:
    """Applies to each image the operations that were drawn for it.

    The number of launched kernels depends neither on B nor on the images.

    Args:
        images: (B, 3, H, W) uint8, on any device that supports float64.
        drawn: (B, L, 8), the result of `pipeline.randaugment.as_tensor`, on the host.
        fill: level per channel of pixels that a warp moves in from outside the image.

    Returns:
        (B, 3, H, W) uint8, in the same memory format.
    """
    images = images.clone()
    on_device = drawn.to(images.device, non_blocking=True)  # (B, L, 8)
    for layer, counts in enumerate(count_kinds(drawn)):
        ends = list(accumulate(counts))
        rows, numbers = on_device[:, layer, 1].long(), on_device[:, layer, 2:]  # (B,), (B, 6)
        for kinds in ((Kind.FLIP,), TABLES, (Kind.BICUBIC,), (Kind.BILINEAR,), BLENDS):
            begin, end = ends[kinds[0] - 1], ends[kinds[-1]]
            if begin == end:
                continue
            old = images.index_select(0, rows[begin:end]).contiguous()
            parameters = numbers[begin:end]
            if kinds == (Kind.FLIP,):
                new = old.flip(3)
            elif kinds == TABLES:
                new = apply_tables(old, parameters, [counts[kind] for kind in kinds])
            elif kinds == BLENDS:
                new = blend(old, parameters[:, 0], [counts[kind] for kind in kinds])
            else:
                new = warp(old, parameters, fill, cubic=kinds == (Kind.BICUBIC,))
            images.index_copy_(0, rows[begin:end], new)
    return images


# ------------------------------------------------------------------------------------------- tables


def apply_tables(images: Tensor, numbers: Tensor, counts: list[int]) -> Tensor:
    """Replaces every level by its entry in a table of the image and channel.

    Args:
        images: (n, 3, H, W) uint8, sorted by their kind in `TABLES`.
        numbers: (n, 6), used by `Kind.RULE` only.
        counts: number of images of each kind.
    """
    levels = images.flatten(2).long()  # (n, 3, P)
    _, stretched, equalized = levels.split(counts)
    by_rule = rule_tables(numbers[: counts[0]])
    tables = torch.cat([by_rule, autocontrast_tables(stretched), equalize_tables(equalized)])
    return tables.gather(2, levels).view_as(images)


def rule_tables(numbers: Tensor) -> Tensor:
    """(n, 3, 256) uint8 from the numbers of `Kind.RULE`."""
    threshold, added, inverted, mask = numbers[:, :4].long()[:, :, None].unbind(1)  # (n, 1) each
    level = torch.arange(LEVELS, device=numbers.device)
    below = (level + added).clamp(max=LEVELS - 1)
    above = torch.where(inverted == 1, LEVELS - 1 - level, level)
    ruled = torch.where(level < threshold, below, above) & mask  # (n, 256)
    return ruled.to(torch.uint8)[:, None].expand(-1, 3, -1)


def autocontrast_tables(levels: Tensor) -> Tensor:
    """(n, 3, 256) uint8 that stretch each channel's levels (n, 3, P) to 0..255.

    A channel with a single level keeps it.
    """
    table = torch.arange(LEVELS, device=levels.device).expand(*levels.shape[:2], -1)  # (n, 3, 256)
    if not len(levels):
        return table.to(torch.uint8)
    low, high = (edge[:, :, None].double() for edge in levels.aminmax(dim=2))  # (n, 3, 1)
    scale = torch.full_like(low, LEVELS - 1) / (high - low).clamp(min=1)
    stretched = (table * scale - low * scale).clamp(0, LEVELS - 1)
    # The cast truncates, like Pillow.
    return torch.where(high > low, stretched, table.double()).to(torch.uint8)


def equalize_tables(levels: Tensor) -> Tensor:
    """(n, 3, 256) uint8 that equalize the histogram of each channel's levels (n, 3, P).

    A channel with a single level keeps it.
    """
    table = torch.arange(LEVELS, device=levels.device).expand(*levels.shape[:2], -1)  # (n, 3, 256)
    counts = torch.zeros_like(table, dtype=torch.int64, memory_format=torch.contiguous_format)
    # The sums are of integers, so their order does not change them.
    counts.scatter_add_(2, levels, counts.new_ones(()).expand_as(levels))
    # (n, 3, 1), the highest level that occurs
    last = torch.where(counts > 0, table, 0).amax(dim=2, keepdim=True)
    step = (levels.shape[2] - counts.gather(2, last)) // (LEVELS - 1)
    below = counts.cumsum(dim=2) - counts
    spread = (step // 2 + below) // step.clamp(min=1)
    return torch.where(step > 0, spread.clamp(max=LEVELS - 1), table).to(torch.uint8)


# -------------------------------------------------------------------------------------------- warps


def warp(images: Tensor, maps: Tensor, fill: tuple[int, ...], cubic: bool) -> Tensor:
    """Pillow's affine transform.

    Levels are interpolated between pixel centres, edge pixels are repeated and fractions truncated.

    Args:
        images: (n, 3, H, W) uint8.
        maps: (n, 6) float64, from a new pixel to an old one, see `pipeline.randaugment.Kind`.
        fill: level per channel of new pixels that lie outside the old image.
        cubic: interpolates four pixels by a cubic with slope -1; otherwise two pixels are
            interpolated linearly.
    """
    height, width = images.shape[2:]
    x, y = _old_positions(maps, height, width)  # (n, H, W) each
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = x - 0.5, y - 0.5
    left, top = x.floor(), y.floor()
    right_share = (x - left)[:, None].flatten(2)  # (n, 1, P)
    lower_share = (y - top)[:, None].flatten(2)
    offsets = range(-1, 3) if cubic else range(2)
    near = [(left.long() + offset).clamp_(0, width - 1) for offset in offsets]
    columns = torch.stack(near, dim=1)  # (n, 2 or 4, H, W)
    rows = [(top.long() + offset).clamp_(0, height - 1) * width for offset in offsets]
    interpolate = _cubic if cubic else _linear
    pixels, lines = images.flatten(2).to(torch.int16), []
    for row in rows:
        index = (row[:, None] + columns).flatten(1)[:, None].expand(-1, 3, -1)
        neighbours = pixels.gather(2, index).chunk(len(offsets), dim=2)
        lines.append(interpolate(*neighbours, share=right_share))  # (n, 3, P)
    levels = interpolate(*lines, share=lower_share)
    new = levels.clamp_(0, LEVELS - 1).to(torch.uint8).view_as(images)
    outside = torch.stack([inside.new_full((1, 1), level, dtype=torch.uint8) for level in fill])
    return torch.where(inside[:, None], new, outside)


def _old_positions(maps: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Columns and rows of the new pixels' centres in the old image, (n, H, W) float64 each."""
    column = torch.arange(width, device=maps.device, dtype=maps.dtype) + 0.5
    row = (torch.arange(height, device=maps.device, dtype=maps.dtype) + 0.5)[:, None]
    a, b, c, d, e, f = maps[:, :, None, None].unbind(1)  # (n, 1, 1)
    return a * column + b * row + c, d * column + e * row + f


def _linear(first: Tensor, second: Tensor, *, share: Tensor) -> Tensor:
    return first + (second - first) * share


def _cubic(
    first: Tensor, second: Tensor, third: Tensor, fourth: Tensor, *, share: Tensor
) -> Tensor:
    """The cubic between the second and the third pixel, by Horner's rule.

    Pixels are int16, which holds all differences.
    """
    slope = third - first
    square = (first - second) * 2 + third - fourth
    cube = second - first - third + fourth
    return ((share * cube).add_(square).mul_(share).add_(slope).mul_(share)).add_(second)


# ------------------------------------------------------------------------------------------- blends


def blend(images: Tensor, shares: Tensor, counts: list[int]) -> Tensor:
    """Blends each image with itself without colour, contrast, brightness or sharpness.

    Args:
        images: (n, 3, H, W) uint8, sorted by their kind in `BLENDS`.
        shares: (n,), the image's share; the blend extrapolates if it lies outside 0..1.
        counts: number of images of each kind.
    """
    pixels = images.to(torch.int32)
    colored, contrasted, bright, sharp = pixels.split(counts)
    black = torch.zeros_like(bright)
    base = torch.cat([to_gray(colored), mean_gray(contrasted), black, smooth(sharp)])
    moved = (pixels - base).to(torch.float32) * shares.to(torch.float32)[:, None, None, None]
    return (base + moved).clamp_(0, LEVELS - 1).to(torch.uint8)


def to_gray(pixels: Tensor) -> Tensor:
    """The luma of int32 pixels (n, 3, H, W), the same in all channels."""
    weighted = zip(pixels.unbind(1), GRAY, strict=True)
    red, green, blue = (channel * weight for channel, weight in weighted)
    return ((red + green + blue + 2**15) >> 16)[:, None].expand_as(pixels)


def mean_gray(pixels: Tensor) -> Tensor:
    """The rounded mean of each image's luma, in all pixels."""
    luma = to_gray(pixels)[:, :1]
    size = pixels.shape[2] * pixels.shape[3]
    mean = (luma.sum(dim=(2, 3), keepdim=True) * 2 + size) // (2 * size)  # (n, 1, 1, 1) int64
    return mean.to(torch.int32).expand_as(pixels)


def smooth(pixels: Tensor) -> Tensor:
    """The rounded mean of each pixel (weight 5) and its eight neighbours, like Pillow's filter.

    Pixels at the edge do not change.
    """
    if min(pixels.shape[2:]) < 3:
        return pixels
    lines = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    sums = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:] + 4 * pixels[:, :, 1:-1, 1:-1]
    smoothed = pixels.clone()
    smoothed[:, :, 1:-1, 1:-1] = (2 * sums + 13) // 26
    return smoothed
