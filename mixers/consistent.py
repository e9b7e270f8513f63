"""Another method's images and labels with what L_con needs beside them: Sec. 4.3 of the paper alone
(Table 7).

Mixes nothing itself; the rule of the reference is handed in, and `smmix.py` owns it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from mixers.interface import Guide, MixedBatch, Mixer

Draw = TypeVar("Draw")


class Consistent(Mixer[Draw]):
    """Adds the reference of Eq. 14, for the share of the area that each image really has.

    Labels that the mixed forward pass decides (TransMix) come later and leave the reference as it
    is.

    Args:
        mixer: the method that mixes; its batches have a `lam` and no reference of their own.
        mix_predictions: the clean images' logits (B, K) and lam (B,) -> the reference (B, K), rows
            sum to one.
    """

    def __init__(
        self, mixer: Mixer[Draw], mix_predictions: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__(mixer.num_classes, mixer.smoothing)
        self.mixer, self.mix_predictions = mixer, mix_predictions

    def draw(
        self, batch_size: int, image_size: tuple[int, int], generator: torch.Generator
    ) -> Draw:
        return self.mixer.draw(batch_size, image_size, generator)

    def apply(self, images: Tensor, labels: Tensor, drawn: Draw, guide: Guide) -> MixedBatch:
        batch, clean = self.mixer.apply(images, labels, drawn, guide), guide(images)
        assert batch.lam is not None
        assert clean.logits is not None
        reference = self.mix_predictions(clean.logits, batch.lam)
        return replace(batch, reference_probs=reference, clean_logits=clean.logits)
