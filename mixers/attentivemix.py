"""Attentive CutMix (Walawalkar et al. 2020, arXiv 2003.13048).

A frozen classifier, given as a function, scores the cells of its last feature map. The best cells
of the source are pasted at the same places of the target. The original has a fixed number of cells
(6 of 7 x 7). AttentiveMix+, the version of the benchmark behind Table 2 of SMMix's paper, draws the
number from a Beta distribution: Beta(2, 8) in its documentation, Beta(2, 2) in its code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from errors import InputError
from mixers.attentivemix_options import AttentiveMixOptions
from mixers.interface import Guide, MixedBatch, Mixer, MixerContext, draw_beta, pair_up
from mixers.masks import paste, to_pixels, top_mask


class AttentiveMix(Mixer[list[float]]):
    """Pastes the best cells of the source. lam is the share of the pixels that are pasted.

    Args:
        teacher: clean images (B, C, height, width) -> features (B, D, rows, columns), without
            gradient.
        alpha, beta: the share of cells is drawn from Beta(alpha, beta).
        cells: a fixed number of cells, used instead.
        mode: draw one share per batch, pair or image.
    """

    def __init__(
        self,
        num_classes: int,
        teacher: Callable[[Tensor], Tensor],
        smoothing: float = 0.1,
        alpha: float = 2.0,
        beta: float = 8.0,
        cells: int | None = None,
        mode: str = "batch",
    ) -> None:
        super().__init__(num_classes, smoothing)
        self.teacher, self.alpha, self.beta = teacher, alpha, beta
        self.cells, self.mode = cells, mode

    @classmethod
    def from_options(cls, options: AttentiveMixOptions, context: MixerContext) -> Self:
        assert context.teacher is not None
        alphas = options.mix_alpha or (2.0, 8.0)
        return cls(
            context.num_classes,
            context.teacher,
            options.smoothing,
            alphas[0],
            alphas[-1],
            options.attentive_cells,
            options.mixup_mode,
        )

    def draw(
        self, batch_size: int, image_size: tuple[int, int], generator: torch.Generator
    ) -> list[float]:
        shares = draw_beta(self.alpha, batch_size, generator, self.beta)
        return pair_up(shares, batch_size, self.mode, self.groups)

    def apply(self, images: Tensor, labels: Tensor, drawn: list[float], guide: Guide) -> MixedBatch:
        scores = self.teacher(images).float().mean(dim=1)  # (B, rows, columns)
        (rows, columns), (height, width) = scores.shape[1:], images.shape[-2:]
        counts = torch.tensor(self.count(drawn, rows * columns))
        counts = counts.to(images.device, non_blocking=True)  # (B,)
        chosen = top_mask(scores.flip(0).flatten(1), counts)  # (B, rows * columns), of the sources
        mask = to_pixels(chosen, (rows, columns), (height, width))
        return self.label(*paste(images, images.flip(0), mask), labels, mask)

    def count(self, shares: list[float], total: int) -> list[int]:
        """How many of `total` cells are pasted into each image.

        Raises:
            InputError: `cells` is more than the teacher's map has.
        """
        if self.cells is None:
            return [max(int(share * total), 1) for share in shares]
        if self.cells > total:
            raise InputError(
                f"--attentive-cells {self.cells}: the teacher's feature map has only {total} cells"
            )
        return [self.cells] * len(shares)
