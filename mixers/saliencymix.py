"""SaliencyMix (Uddin et al. 2020, arXiv 2006.01791): a box around the source's most salient pixel,
at the same place in the target.

Saliency is read from the pixels themselves (`mixers/saliency.py`), image by image. The published
code hands the detector normalised floats, whose bytes it takes for pixels, and only one image of
each batch; what it pastes is in effect a CutMix box at a random place. This is the method of the
paper. Uses no model and no global state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixers.boxes import boxes_around, sides_of
from mixers.interface import Guide, MixedBatch, Mixer, draw_beta, pair_up
from mixers.masks import first_argmax, paste
from mixers.saliency import fine_grained_saliency
from pipeline.boxes import box_mask


class SaliencyMix(Mixer[list[tuple[int, int]]]):
    """The box's share is drawn from Beta(alpha, alpha), then clipped at the borders; lam is the
    share really pasted.

    Args:
        to_bytes: normalised images -> (B, 3, height, width) uint8, the pixels they were.
        mode: one size per batch, pair or image. The place is each source's own.
    """

    def __init__(
        self,
        num_classes: int,
        to_bytes: Callable[[Tensor], Tensor],
        smoothing: float = 0.1,
        alpha: float = 1.0,
        mode: str = "batch",
    ) -> None:
        super().__init__(num_classes, smoothing)
        self.to_bytes, self.alpha, self.mode = to_bytes, alpha, mode

    def draw(
        self, batch_size: int, image_size: tuple[int, int], generator: torch.Generator
    ) -> list[tuple[int, int]]:
        sides = [
            sides_of(image_size, share) for share in draw_beta(self.alpha, batch_size, generator)
        ]
        return pair_up(sides, batch_size, self.mode)

    def apply(
        self, images: Tensor, labels: Tensor, drawn: list[tuple[int, int]], guide: Guide
    ) -> MixedBatch:
        centres = first_argmax(fine_grained_saliency(self.to_bytes(images))).flip(
            0
        )  # (B, 2), of the sources
        sides = torch.tensor(drawn).to(images.device, non_blocking=True)
        height, width = images.shape[-2:]
        mask = box_mask(boxes_around(centres, sides, (height, width)), (height, width))
        return self.label(*paste(images, images.flip(0), mask), labels, mask)
