"""Attentive CutMix (Walawalkar et al. 2020, arXiv 2003.13048): the source's cells that a frozen
classifier finds most telling, at the same places in the target.

With a fixed number of cells (6 of 7 x 7 in the paper) it is the original; with a number drawn from
Beta(alpha, beta) it is AttentiveMix+, the benchmark's version behind the paper's Table 2. Its
documentation says Beta(2, 8), its code drew from Beta(2, 2). Holds no network itself: it is given a
function.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixers.interface import Guide, MixedBatch, Mixer, draw_beta, pair_up
from mixers.masks import paste, to_pixels, top_mask
from utils import InputError


class AttentiveMix(Mixer[list[float]]):
    """lam is the share of the pixels really pasted: k of the feature map's cells.

    Args:
        teacher: clean images (B, C, height, width) -> features (B, D, rows, columns), without
            gradient.
        alpha, beta: of the law of the share of cells.
        cells: a fixed number of cells instead.
        mode: one share per batch, pair or image.
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
        self.teacher, self.alpha, self.beta, self.cells, self.mode = (
            teacher,
            alpha,
            beta,
            cells,
            mode,
        )

    def draw(
        self, batch_size: int, image_size: tuple[int, int], generator: torch.Generator
    ) -> list[float]:
        return pair_up(
            draw_beta(self.alpha, batch_size, generator, self.beta), batch_size, self.mode
        )

    def apply(self, images: Tensor, labels: Tensor, drawn: list[float], guide: Guide) -> MixedBatch:
        scores = self.teacher(images).float().mean(dim=1)  # (B, rows, columns)
        (rows, columns), (height, width) = scores.shape[1:], images.shape[-2:]
        counts = torch.tensor(self.count(drawn, rows * columns)).to(
            images.device, non_blocking=True
        )
        chosen = top_mask(scores.flip(0).flatten(1), counts)  # the source's own best cells
        mask = to_pixels(chosen, (rows, columns), (height, width))
        return self.label(*paste(images, images.flip(0), mask), labels, mask)

    def count(self, shares: list[float], total: int) -> list[int]:
        """How many of `total` cells each image takes.

        Raises:
            InputError: more are asked for than the teacher's map has.
        """
        if self.cells is None:
            return [max(int(share * total), 1) for share in shares]
        if self.cells > total:
            raise InputError(
                f"--attentive-cells {self.cells}: the teacher's map has only {total} cells on such "
                "images"
            )
        return [self.cells] * len(shares)
