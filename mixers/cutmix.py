"""CutMix (Yun et al. 2019, arXiv 1905.04899), the baseline of every table.

A random box of the source is pasted at the same place of the target (Eq. 1 of SMMix's paper).
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from mixers.boxes import draw_box, draw_box_between, sides_of
from mixers.cutmix_options import CutMixOptions
from mixers.interface import Guide, MixedBatch, Mixer, MixerContext, draw_beta, pair_up
from mixers.masks import paste
from pipeline.boxes import Box, box_mask, boxes_to_tensor


class CutMix(Mixer[list[Box]]):
    """Pastes a box whose share is drawn from Beta(alpha, alpha), clipped at the image's border.

    lam is the share of the pixels that are pasted.

    Args:
        minmax: draw both sides between these shares of the image's sides (`--cutmix-minmax`); the
            box lies inside the image then.
        mode: draw one box per batch, pair or image.
    """

    def __init__(
        self,
        num_classes: int,
        smoothing: float = 0.1,
        alpha: float = 1.0,
        minmax: tuple[float, float] | None = None,
        mode: str = "batch",
    ) -> None:
        super().__init__(num_classes, smoothing)
        self.alpha, self.minmax, self.mode = alpha, minmax, mode

    @classmethod
    def from_options(cls, options: CutMixOptions, context: MixerContext) -> Self:
        return cls(
            context.num_classes,
            options.smoothing,
            options.cutmix,
            options.cutmix_minmax,
            options.mixup_mode,
        )

    def draw(
        self, batch_size: int, image_size: tuple[int, int], generator: torch.Generator
    ) -> list[Box]:
        def draw_one(share: float) -> Box:
            if self.minmax is not None:
                return draw_box_between(image_size, self.minmax, generator)
            return draw_box(image_size, sides_of(image_size, share), generator)

        boxes = [draw_one(share) for share in draw_beta(self.alpha, batch_size, generator)]
        return pair_up(boxes, batch_size, self.mode, self.groups)

    def apply(self, images: Tensor, labels: Tensor, drawn: list[Box], guide: Guide) -> MixedBatch:
        height, width = images.shape[-2:]
        mask = box_mask(boxes_to_tensor(drawn, images.device), (height, width))
        return self.label(*paste(images, images.flip(0), mask), labels, mask)
