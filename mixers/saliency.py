"""The fine-grained saliency map by which SaliencyMix places its boxes, for whole batches.

S. Montabone and A. Soto, "Human detection using a mobile platform and novel features derived from a
visual saliency mechanism", Image and Vision Computing 28(3), 2010. SaliencyMix (Uddin et al. 2021,
arXiv 2006.01791) uses OpenCV's detector (`cv2.saliency.StaticSaliencyFineGrained`), which takes one
image at a time on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

# 0.299, 0.587 and 0.114 with fifteen binary places, as OpenCV rounds them; the sum is 2**15.
GRAY = (9798, 19235, 3735)
SCALES = (12, 24, 48, 28, 56, 112)  # half the sides of the windows, in pixels


def fine_grained_saliency(images: Tensor) -> Tensor:
    """How much each pixel differs from the mean of the windows around it.

    The result equals that of OpenCV's detector on the same image, with two exceptions:

    - OpenCV stores the sum of its two maps in eight bits. Where the sum exceeds 255 (a pixel much
      brighter than one window and much darker than another: rare), OpenCV's value wraps round to
      almost 0; here it is the maximum, 1.
    - OpenCV adds a window's corners in float32, which is exact for whole numbers up to 2**24 only.
      If two corners of the integral image exceed that (from about 180 x 180 white pixels), OpenCV's
      sum is wrong by one or two. This changes single pixels of its map, or all pixels by one level
      if their maximum changes. Here the sums are exact.

    Nearly every map reaches 1 at two or more pixels: the one brightest against its surroundings,
    and the one darkest. The map of a constant image is 0 everywhere.

    Args:
        images: (B, 3, H, W), RGB, uint8, not normalised, on any device; H and W at least 1. (The
            published code of SaliencyMix passes normalised floats, and RGB in place of BGR.)

    Returns:
        (B, H, W) float32, from 0 to 1.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        given = f"{images.dtype} of shape {tuple(images.shape)}"
        raise ValueError(f"uint8 images (B, 3, H, W) are needed, not {given}")
    gray = _smooth(_smooth(_gray(images)))
    on, off = _contrasts(gray)
    # OpenCV multiplies the sum by 255 and divides it by the larger maximum of both maps. That
    # maximum is 255, unless it is 0.
    return (_stretch(on) + _stretch(off)).clamp(max=255) * (1 / 255)


def _gray(images: Tensor) -> Tensor:
    """(B, 3, H, W) RGB -> (B, H, W) int32 on 0..255: `cv2.cvtColor`, bit for bit."""
    red, green, blue = images.int().unbind(1)
    return (red * GRAY[0] + green * GRAY[1] + blue * GRAY[2] + (1 << 14)) >> 15


def _smooth(gray: Tensor) -> Tensor:
    """`cv2.GaussianBlur` of 3 x 3 on uint8, bit for bit: (B, H, W) int32 -> the same shape.

    The weights are 1, 2, 1 in both directions, and the result is rounded. The border reflects
    without repeating the edge pixel; a side of one pixel is repeated.
    """
    for dim in (1, 2):
        size = gray.shape[dim]
        inner = min(1, size - 1)  # distance of the pixel that replaces the missing neighbour
        before = torch.cat([gray.narrow(dim, inner, 1), gray.narrow(dim, 0, size - 1)], dim)
        after = torch.cat(
            [gray.narrow(dim, 1, size - 1), gray.narrow(dim, size - 1 - inner, 1)], dim
        )
        gray = before + 2 * gray + after
    return (gray + 8) >> 4


def _contrasts(gray: Tensor) -> tuple[Tensor, Tensor]:
    """The on-centre and off-centre differences of the 2010 paper, each summed over the scales.

    At scale n the window of pixel (y, x) is rows y-n+1..y+n and columns x-n+1..x+n within the
    image. Let g be the pixel, S the sum and A the number of all pixels of the window. The mean of
    its other pixels is (S - g) / (A - 1), and g minus that mean is (g A - S) / (A - 1). Both terms
    are whole numbers below 2**24. So the float32 quotient never reaches the next whole number, and
    cutting off its fraction is exact.

    Returns:
        on, off: (B, H, W) float32, whole numbers.
    """
    _, height, width = gray.shape
    # With zeros around the image no window needs clipping: each of its corners is a plain slice.
    down, across = min(SCALES[-1], height), min(SCALES[-1], width)
    totals = pad(gray, (across, across, down, down)).cumsum(1, dtype=torch.int32)
    totals = totals.cumsum(2, dtype=torch.int32)  # (B, H + 2 down, W + 2 across)
    on = torch.zeros_like(gray, dtype=torch.float32)
    off = torch.zeros_like(on)
    for scale in SCALES:
        strips = _window_sums(totals, 1, scale, height)  # (B, H, W + 2 across)
        sums = _window_sums(strips, 2, scale, width)  # (B, H, W)
        window_rows = _window_sizes(height, scale, gray.device)
        window_columns = _window_sizes(width, scale, gray.device)
        areas = window_rows[:, None] * window_columns  # (H, W)
        # The window of a one-pixel image has no other pixels; the difference is 0 then.
        difference = ((gray * areas - sums) / (areas - 1).clamp(min=1)).trunc()
        on += difference.clamp(min=0)
        off -= difference.clamp(max=0)
    return on, off


def _window_sums(totals: Tensor, dim: int, scale: int, size: int) -> Tensor:
    """The sum over each pixel's window along `dim`.

    Args:
        totals: cumulative sums along `dim`, over `size` pixels and a margin of zeros on both sides.
    """
    margin = (totals.shape[dim] - size) // 2
    # The margin is as wide as the largest scale, or as the image: a larger window adds nothing.
    reach = min(scale, margin)
    return totals.narrow(dim, margin + reach, size) - totals.narrow(dim, margin - reach, size)


def _window_sizes(size: int, scale: int, device: torch.device) -> Tensor:
    """The number of pixels in the window of each of `size` pixels in a row: (size,) int32."""
    places = torch.arange(size, dtype=torch.int32, device=device)
    return (places + scale + 1).clamp(max=size) - (places - scale + 1).clamp(min=0)


def _stretch(values: Tensor) -> Tensor:
    """Scales each map (B, H, W) to whole numbers 0..255, its maximum to 255; zeros stay zeros.

    OpenCV computes floor(255 q), where the quotient q is a float32 and the product a double. Here
    the product is 256 q - q: 256 q is exact in float32, and the result is its floor, minus one
    where its fraction is below q.
    """
    quotient = values / values.amax((1, 2), keepdim=True).clamp(min=1)
    scaled = quotient * 256
    whole = scaled.floor()
    return whole - (scaled - whole < quotient).float()
