"""TransMix (Chen et al. 2022, arXiv 2111.09833): labels by the attention to the pasted tokens.

Another method mixes the images by a mask (CutMix in their paper). The share of the class token's
attention that falls on the source's tokens is known after the forward pass on the mixed images, so
the labels are computed then. Table 6 of SMMix's paper combines both methods and does not say how.
Here the labels of L_cls follow the attention; those of L_fine are not mixed anyway; and L_con keeps
the share of the area, as its reference exists before the forward pass.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from mixers.interface import Guide, MixedBatch, Mixer, mix_labels
from mixers.masks import region_mask, to_cells
from models.interface import ModelOutput

Draw = TypeVar("Draw")


class TransMix(Mixer[Draw]):
    """Labels with lam = ratio * (share of the area) + (1 - ratio) * (share of the attention).

    Args:
        mixer: the method that mixes the images.
        grid_size: rows and columns of the model's token grid.
        ratio: 0.5 in the authors' code, 0 in the equation of their paper. 1 keeps the labels of
            `mixer`.
    """

    def __init__(self, mixer: Mixer[Draw], grid_size: tuple[int, int], ratio: float = 0.5) -> None:
        super().__init__(mixer.num_classes, mixer.smoothing)
        self.mixer, self.grid_size, self.ratio = mixer, grid_size, ratio

    def draw(
        self, batch_size: int, image_size: tuple[int, int], generator: torch.Generator
    ) -> Draw:
        return self.mixer.draw(batch_size, image_size, generator)

    def apply(self, images: Tensor, labels: Tensor, drawn: Draw, guide: Guide) -> MixedBatch:
        batch = self.mixer.apply(images, labels, drawn, guide)
        if batch.regions is not None:
            regions = batch.regions
            tokens = region_mask(regions.target_corners, regions.sizes, self.grid_size)
        else:
            assert batch.mask is not None
            tokens = to_cells(batch.mask, self.grid_size)
        set_labels = partial(relabel, tokens=tokens, ratio=self.ratio)
        return replace(batch, need_attention="class", relabel=set_labels)


def attention_share(attention: Tensor, tokens: Tensor) -> Tensor:
    """The share (B,) of attention that falls on the given tokens; zero if all attention is zero.

    Args:
        attention: (B, N).
        tokens: (B, N) bool.
    """
    total = attention.sum(dim=1).clamp(min=torch.finfo(attention.dtype).tiny)
    return (attention * tokens).sum(dim=1) / total


def relabel(batch: MixedBatch, output: ModelOutput, tokens: Tensor, ratio: float) -> MixedBatch:
    """The batch with labels by the attention of its forward pass.

    Args:
        output: its `class_attention` (B, N) is the class token's attention, or a substitute if the
            model has no class token.
        tokens: (B, N) bool, true for tokens of the source.
        ratio: see `TransMix`.
    """
    assert output.class_attention is not None
    assert batch.lam is not None
    assert batch.source_labels is not None
    assert batch.target_labels is not None
    lam = ratio * batch.lam + (1 - ratio) * attention_share(output.class_attention, tokens)
    return replace(batch, lam=lam, labels=mix_labels(batch.source_labels, batch.target_labels, lam))
