"""The fine-grained saliency map (Montabone & Soto 2010) that SaliencyMix looks for its boxes in, in
batched operations.

S. Montabone and A. Soto, "Human detection using a mobile platform and novel features derived from a
visual saliency mechanism", Image and Vision Computing 28(3), 2010. SaliencyMix (Uddin et al. 2021,
arXiv 2006.01791) takes the detector from OpenCV (`cv2.saliency.StaticSaliencyFineGrained`), which
reads one image at a time on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

GRAY = (
    9798,
    19235,
    3735,
)  # 0.299, 0.587 and 0.114 in fifteen binary places, as OpenCV rounds them: they sum to 2**15
SCALES = (12, 24, 48, 28, 56, 112)  # half the sides of the windows, in pixels


def fine_grained_saliency(images: Tensor) -> Tensor:
    """How much each pixel differs from the mean of the windows around it: (B, H, W), float32, 0..1.

    Equal to the map of OpenCV's detector given the same image in its own channel order, but in two
    cases:

    - OpenCV stores the sum of its two maps in eight bits. Where it exceeds 255 (a pixel much
      brighter than one window and much darker than another: rare), OpenCV's value wraps round to
      almost 0; here it stays at the maximum, 1.
    - OpenCV adds a window's corners in float32, which holds whole numbers up to 2**24 only. Where
      two corners of the integral image pass that (from some 180 x 180 white pixels), its sum is off
      by one or two, and with it single pixels of the map, or all by a level if it was their
      maximum; here the sums are exact.

    Nearly every map reaches 1 at two pixels or more: the brightest against its surroundings, and
    the darkest. That of a constant image is 0 everywhere.

    Args:
        images: (B, 3, H, W), RGB, uint8 before any normalisation, on any device. The published code
            of SaliencyMix passes normalised floats, and RGB where BGR is read; this is the detector
            as it is meant. H and W from 1.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"uint8 images (B, 3, H, W) are needed, not {images.dtype} of shape "
            f"{tuple(images.shape)}"
        )
    gray = _smooth(_smooth(_gray(images)))
    on, off = _contrasts(gray)
    # OpenCV scales the sum to 255 times itself over the larger maximum of the two, which is 255
    # wherever it is not 0.
    return (_stretch(on) + _stretch(off)).clamp(max=255) * (1 / 255)


def _gray(images: Tensor) -> Tensor:
    """(B, 3, H, W) RGB -> (B, H, W) int32 on 0..255: `cv2.cvtColor`, bit for bit."""
    red, green, blue = images.int().unbind(1)
    return (red * GRAY[0] + green * GRAY[1] + blue * GRAY[2] + (1 << 14)) >> 15


def _smooth(gray: Tensor) -> Tensor:
    """(B, H, W) int32, weighted 1-2-1 down and across, rounded: `cv2.GaussianBlur` of 3 x 3 on
    uint8, bit for bit.

    The border reflects without its edge; a side of one pixel has nothing to reflect and repeats it.
    """
    for dim in (1, 2):
        size = gray.shape[dim]
        inner = min(1, size - 1)  # the neighbour that stands in for the missing one
        before = torch.cat([gray.narrow(dim, inner, 1), gray.narrow(dim, 0, size - 1)], dim)
        after = torch.cat(
            [gray.narrow(dim, 1, size - 1), gray.narrow(dim, size - 1 - inner, 1)], dim
        )
        gray = before + 2 * gray + after
    return (gray + 8) >> 4


def _contrasts(gray: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's on-centre and off-centre differences, added over the scales: twice (B, H, W),
    float32, whole numbers.

    At scale n the surroundings of pixel (y, x) are rows y-n+1..y+n and columns x-n+1..x+n within
    the image, without the pixel itself. With S their sum including the pixel g and A their number,
    g minus their mean (S - g) / (A - 1) is (g A - S) / (A - 1). All terms are whole and below
    2**24, so that float32 divides them without reaching the next whole number, and cutting off the
    fraction is exact.
    """
    _, height, width = gray.shape
    # Zeros around the image stand for clipping the windows: every corner of a window is then a
    # plain slice.
    down, across = min(SCALES[-1], height), min(SCALES[-1], width)
    totals = (
        pad(gray, (across, across, down, down))
        .cumsum(1, dtype=torch.int32)
        .cumsum(2, dtype=torch.int32)
    )
    on = torch.zeros_like(gray, dtype=torch.float32)
    off = torch.zeros_like(on)
    for scale in SCALES:
        strips = _window_sums(totals, 1, scale, height)  # (B, H, W + 2 across)
        sums = _window_sums(strips, 2, scale, width)  # (B, H, W)
        areas = _window_sizes(height, scale, gray.device)[:, None] * _window_sizes(
            width, scale, gray.device
        )
        # An image of one pixel has no surroundings; its difference is 0.
        difference = ((gray * areas - sums) / (areas - 1).clamp(min=1)).trunc()
        on += difference.clamp(min=0)
        off -= difference.clamp(max=0)
    return on, off


def _window_sums(totals: Tensor, dim: int, scale: int, size: int) -> Tensor:
    """Each pixel's sum over its window along `dim`; `totals` runs over `size` pixels and a margin
    on both sides."""
    margin = (totals.shape[dim] - size) // 2
    reach = min(
        scale, margin
    )  # the margin ends at the largest scale, or where any window holds the whole side
    return totals.narrow(dim, margin + reach, size) - totals.narrow(dim, margin - reach, size)


def _window_sizes(size: int, scale: int, device: torch.device) -> Tensor:
    """How many of `size` pixels in a row are in the window around each: (size,), int32."""
    places = torch.arange(size, dtype=torch.int32, device=device)
    return (places + scale + 1).clamp(max=size) - (places - scale + 1).clamp(min=0)


def _stretch(values: Tensor) -> Tensor:
    """(B, H, W) of at least 0 -> whole numbers on 0..255, the image's maximum to 255; an image of
    zeros stays so.

    OpenCV's floor(255 q), where the quotient q is a float32 and the product a double. The product
    is taken here as 256 q - q: 256 q is exact in float32, and its floor falls by one where its
    fraction is below q.
    """
    quotient = values / values.amax((1, 2), keepdim=True).clamp(min=1)
    scaled = quotient * 256
    whole = scaled.floor()
    return whole - (scaled - whole < quotient).float()
