"""Another mixing method together with L_con (paper Sec. 4.3, Table 7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from mixers.interface import Guide, MixedBatch, Mixer

Draw = TypeVar("Draw")


class Consistent(Mixer[Draw]):
    """Adds the reference of Eq. 14 to the batches of another mixer, with their `lam`.

    TransMix changes labels after the forward pass on the mixed images; the reference stays.

    Args:
        mixer: the method that mixes. Its batches have a `lam` and no reference.
        mix_predictions: logits (B, K) of the clean images and lam (B,) -> the reference (B, K);
            see `smmix.py:mix_predictions`.
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
