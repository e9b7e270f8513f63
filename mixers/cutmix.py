"""CutMix (Yun et al. 2019, arXiv 1905.04899): a random box of the source at the same place in the target (paper Eq. 1).

The baseline of every table. Uses no model and no global state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.boxes import Box, draw_box, draw_box_between
from mixers.interface import Guide, MixedBatch, Mixer, draw_beta, mix_labels, pair_up, soft_labels


class CutMix(Mixer[list[Box]]):
    """A box whose share is drawn from Beta(alpha, alpha), then clipped; lam is the share really pasted.

    Args:
        minmax: draw both sides between these ratios instead (`--cutmix-minmax`).
        mode: one box per batch, pair or image.
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

    def draw(self, batch_size: int, image_size: tuple[int, int], generator: torch.Generator) -> list[Box]:
        def one(share: float) -> Box:
            if self.minmax is not None:
                return draw_box_between(image_size, self.minmax, generator)
            return draw_box(image_size, share, generator)

        boxes = [one(share) for share in draw_beta(self.alpha, batch_size, generator)]
        return pair_up(boxes, batch_size, self.mode)

    def apply(self, images: Tensor, labels: Tensor, drawn: list[Box], guide: Guide) -> MixedBatch:
        height, width = images.shape[-2:]
        edges = torch.tensor(drawn).to(images.device, non_blocking=True)  # (B, 4)
        top, bottom, left, right = edges[:, :, None].unbind(1)  # each (B, 1)
        rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
        inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None, :]
        mixed = torch.where(inside[:, None], images.flip(0), images)
        lam = torch.tensor([box.share((height, width)) for box in drawn]).to(images.device, non_blocking=True)
        target = soft_labels(labels, self.num_classes, self.smoothing)
        return MixedBatch(mixed, mix_labels(target.flip(0), target, lam), lam)
