"""ResizeMix (Qin et al. 2020, arXiv 2012.11101): pastes the whole source, resized.

The sides of the box are tau times those of the image, with tau ~ U(scope). Two placements are
published. `inside`, the authors': the box lies inside the image. `clipped`, that of the benchmark
behind Table 2 of SMMix's paper: the centre is uniform over the image, the box is clipped at the
image's border, and the source is resized to what remains.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from torch import Tensor

from mixers.boxes import draw_box, draw_box_inside
from mixers.interface import Guide, MixedBatch, Mixer, MixerContext, pair_up
from mixers.masks import paste
from mixers.resizemix_options import ResizeMixOptions
from pipeline.boxes import Box, box_mask, boxes_to_tensor


class ResizeMix(Mixer[list[Box]]):
    """Pastes the resized source. lam is the share of the pixels that are pasted.

    Args:
        scope: range of tau, the side of the resized source as a share of the image's side.
        placement: see the module.
        mode: draw one tau per batch, pair or image. As published, the place is drawn for each image
            with `inside`, and together with tau with `clipped`.
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

    @classmethod
    def from_options(cls, options: ResizeMixOptions, context: MixerContext) -> Self:
        return cls(
            context.num_classes,
            options.smoothing,
            options.resize_scope,
            options.resize_placement,
            options.mixup_mode,
        )

    def draw(
        self, batch_size: int, image_size: tuple[int, int], generator: torch.Generator
    ) -> list[Box]:
        low, high = self.scope
        uniform = torch.rand(batch_size, generator=generator, dtype=torch.float64)
        taus = (low + (high - low) * uniform).tolist()
        all_sides = [
            (max(int(tau * image_size[0]), 1), max(int(tau * image_size[1]), 1)) for tau in taus
        ]
        if self.placement == "clipped":
            boxes = [draw_box(image_size, sides, generator) for sides in all_sides]
            boxes = pair_up(boxes, batch_size, self.mode, self.groups)
        else:
            all_sides = pair_up(all_sides, batch_size, self.mode, self.groups)
            boxes = [draw_box_inside(image_size, sides, generator) for sides in all_sides]
        if batch_size % 2:
            # The middle image of an odd batch is its own source: it stays clean.
            boxes[batch_size // 2] = Box(0, 0, 0, 0)
        return boxes

    def apply(self, images: Tensor, labels: Tensor, drawn: list[Box], guide: Guide) -> MixedBatch:
        height, width = images.shape[-2:]
        edges = boxes_to_tensor(drawn, images.device)
        mask = box_mask(edges, (height, width))
        return self.label(*paste(images, resize_into(images.flip(0), edges), mask), labels, mask)


def resize_into(images: Tensor, edges: Tensor) -> Tensor:
    """Each image resized into its box by nearest neighbour, as both published versions do.

    Row y of a box of h rows is row floor(y * height / h) of the image. Pixels outside the box have
    no meaning.

    Args:
        images: (B, C, height, width).
        edges: (B, 4): top, bottom, left, right.

    Returns:
        (B, C, height, width), new.
    """

    def positions(length: int, start: Tensor, end: Tensor) -> Tensor:
        places = torch.arange(length, device=images.device) - start[:, None]  # (B, length)
        side = (end - start).clamp(min=1)[:, None]
        return (places * length).div(side, rounding_mode="floor").clamp(0, length - 1)

    top, bottom, left, right = edges.unbind(1)
    rows = positions(images.shape[2], top, bottom)  # (B, height)
    columns = positions(images.shape[3], left, right)  # (B, width)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return images[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
