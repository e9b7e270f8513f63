"""SaliencyMix (Uddin et al. 2020, arXiv 2006.01791).

A box around the most salient pixel of the source is pasted at the same place of the target. This is
the method of its paper, with the saliency of each source's pixels (`mixers/saliency.py`). The
published code gives its detector normalised floats, whose bytes are read as pixels, and one image
of each batch only: in effect it pastes a CutMix box at a random place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from mixers.boxes import boxes_around, sides_of
from mixers.interface import Guide, MixedBatch, Mixer, MixerContext, draw_beta, pair_up
from mixers.masks import first_argmax, paste
from mixers.options import BetaOptions
from mixers.saliency import fine_grained_saliency
from pipeline.boxes import box_mask


class SaliencyMix(Mixer[list[tuple[int, int]]]):
    """Pastes a box whose share is drawn from Beta(alpha, alpha), clipped at the image's border.

    lam is the share of the pixels that are pasted.

    Args:
        to_bytes: normalised images -> (B, 3, height, width) uint8, their pixels before
            normalisation.
        mode: draw one size per batch, pair or image. Each source has its own place.
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

    @classmethod
    def from_options(cls, options: BetaOptions, context: MixerContext) -> Self:
        (alpha,) = options.mix_alpha or (1.0,)
        return cls(
            context.num_classes, context.to_bytes, options.smoothing, alpha, options.mixup_mode
        )

    def draw(
        self, batch_size: int, image_size: tuple[int, int], generator: torch.Generator
    ) -> list[tuple[int, int]]:
        shares = draw_beta(self.alpha, batch_size, generator)
        sides = [sides_of(image_size, share) for share in shares]
        return pair_up(sides, batch_size, self.mode, self.groups)

    def apply(
        self, images: Tensor, labels: Tensor, drawn: list[tuple[int, int]], guide: Guide
    ) -> MixedBatch:
        saliency = fine_grained_saliency(self.to_bytes(images))  # (B, height, width)
        centres = first_argmax(saliency).flip(0)  # (B, 2), of the sources
        sides = torch.tensor(drawn).to(images.device, non_blocking=True)  # (B, 2)
        height, width = images.shape[-2:]
        edges = boxes_around(centres, sides, (height, width))  # (B, 4)
        mask = box_mask(edges, (height, width))
        return self.label(*paste(images, images.flip(0), mask), labels, mask)
