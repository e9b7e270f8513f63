"""Mixup (Zhang et al. 2018, arXiv 1710.09412): the weighted mean of two images."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from mixers.interface import Guide, MixedBatch, Mixer, MixerContext, draw_beta, pair_up
from mixers.mixup_options import MixupOptions


class Mixup(Mixer[list[float]]):
    """x_M = lam * x_A + (1 - lam) * x_B with lam ~ Beta(alpha, alpha).

    Args:
        mode: draw one lam per batch, pair or image.
    """

    def __init__(
        self, num_classes: int, smoothing: float = 0.1, alpha: float = 0.8, mode: str = "batch"
    ) -> None:
        super().__init__(num_classes, smoothing)
        self.alpha, self.mode = alpha, mode

    @classmethod
    def from_options(cls, options: MixupOptions, context: MixerContext) -> Self:
        return cls(context.num_classes, options.smoothing, options.mixup, options.mixup_mode)

    def draw(
        self, batch_size: int, image_size: tuple[int, int], generator: torch.Generator
    ) -> list[float]:
        return pair_up(
            draw_beta(self.alpha, batch_size, generator), batch_size, self.mode, self.groups
        )

    def apply(self, images: Tensor, labels: Tensor, drawn: list[float], guide: Guide) -> MixedBatch:
        lam = torch.tensor(drawn).to(images.device, non_blocking=True)  # (B,)
        weight = lam.to(images.dtype)[:, None, None, None]
        return self.label(torch.lerp(images, images.flip(0), weight), lam, labels)
