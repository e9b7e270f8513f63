"""ResizeMix (Qin et al. 2020, arXiv 2012.11101): the whole source, made small, somewhere on the
target.

Two placements are published. `inside`, the authors': a box of tau times the image's sides, tau ~
U(scope), fully inside the image. `clipped`, that of the benchmark behind the paper's Table 2: a box
around a centre uniform over the image, clipped at its borders, into which the source is squeezed.
Uses no model and no global state.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mixers.boxes import draw_box, draw_box_inside
from mixers.interface import Guide, MixedBatch, Mixer, pair_up
from mixers.masks import paste
from pipeline.boxes import Box, box_mask, edges_of


class ResizeMix(Mixer[list[Box]]):
    """lam is the share of the pixels really pasted.

    Args:
        scope: range of tau, the pasted copy's side as a share of the image's.
        placement: see above.
        mode: tau is drawn once per batch, pair or image. Places are drawn for each image with
            `inside`, and like tau with `clipped`, as published.
    """

    def __init__(
        self,
        num_classes: int,
        smoothing: float = 0.1,
        scope: tuple[float, float] = (0.1, 0.8),
        placement: Literal["inside", "clipped"] = "inside",
        mode: str = "batch",
    ) -> None:
        super().__init__(num_classes, smoothing)
        self.scope, self.placement, self.mode = scope, placement, mode

    def draw(
        self, batch_size: int, image_size: tuple[int, int], generator: torch.Generator
    ) -> list[Box]:
        low, high = self.scope
        taus = (
            low + (high - low) * torch.rand(batch_size, generator=generator, dtype=torch.float64)
        ).tolist()
        sides = [
            (max(int(tau * image_size[0]), 1), max(int(tau * image_size[1]), 1)) for tau in taus
        ]
        if self.placement == "clipped":
            boxes = pair_up(
                [draw_box(image_size, one, generator) for one in sides], batch_size, self.mode
            )
        else:
            sides = pair_up(sides, batch_size, self.mode)
            boxes = [draw_box_inside(image_size, one, generator) for one in sides]
        if (
            batch_size % 2
        ):  # the middle image of an odd batch is its own source: it stays a plain image
            boxes[batch_size // 2] = Box(0, 0, 0, 0)
        return boxes

    def apply(self, images: Tensor, labels: Tensor, drawn: list[Box], guide: Guide) -> MixedBatch:
        height, width = images.shape[-2:]
        edges = edges_of(drawn, images.device)
        mask = box_mask(edges, (height, width))
        return self.label(*paste(images, resize_into(images.flip(0), edges), mask), labels, mask)


def resize_into(images: Tensor, edges: Tensor) -> Tensor:
    """Each image squeezed into its box by nearest neighbour, as both published versions do.

    The pixel at distance y from the top of a box of h rows shows row floor(y * height / h). Outside
    the boxes the result means nothing.

    Args:
        images: (B, C, height, width).
        edges: (B, 4): top, bottom, left, right.

    Returns:
        (B, C, height, width), new.
    """

    def seen(length: int, start: Tensor, end: Tensor) -> Tensor:
        places = torch.arange(length, device=images.device) - start[:, None]  # (B, length)
        side = (end - start).clamp(min=1)[:, None]
        return (places * length).div(side, rounding_mode="floor").clamp(0, length - 1)

    top, bottom, left, right = edges.unbind(1)
    rows, columns = seen(images.shape[2], top, bottom), seen(images.shape[3], left, right)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return images[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
