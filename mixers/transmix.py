"""TransMix (Chen et al. 2022, arXiv 2111.09833): labels by what the model attends to, on top of any
mixing by a mask.

The image is mixed by another method (CutMix in the paper). The share of the class token's attention
that falls on pasted tokens is known only after the mixed forward pass, so the labels are set then.
SMMix's Table 6 puts these labels on SMMix; how is not published: here the target of L_cls follows
the attention, L_fine's labels are pure already, and L_con keeps the area's share, since its
reference exists before the mixed forward pass.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from mixers.interface import Guide, MixedBatch, Mixer, mix_labels
from mixers.masks import to_cells
from models.interface import ModelOutput

Draw = TypeVar("Draw")


class TransMix(Mixer[Draw]):
    """lam = ratio * (share of the area) + (1 - ratio) * (share of the attention).

    The authors' code takes half of each; their paper's equation is ratio 0. Ratio 1 is the method
    below, unchanged.

    Args:
        mixer: the method that mixes the images.
        grid_size: the model's token grid (rows, columns).
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
        tokens = batch.source_mask
        if tokens is None:
            assert batch.mask is not None
            tokens = to_cells(batch.mask, self.grid_size)
        return replace(
            batch, need_attention="class", relabel=partial(relabel, tokens=tokens, ratio=self.ratio)
        )


def attention_share(attention: Tensor, tokens: Tensor) -> Tensor:
    """The share (B,) of attention (B, N) that falls on the tokens (B, N) bool; zero where nothing
    is attended to."""
    total = attention.sum(dim=1).clamp(min=torch.finfo(attention.dtype).tiny)
    return (attention * tokens).sum(dim=1) / total


def relabel(batch: MixedBatch, output: ModelOutput, tokens: Tensor, ratio: float) -> MixedBatch:
    """The batch with the labels of its own forward pass.

    Args:
        output: with `class_attention` (B, N), or with what the model gives in its place where it
            has no class token.
        tokens: (B, N) bool, those that are the source's.
    """
    assert output.class_attention is not None
    assert batch.lam is not None
    assert batch.source_labels is not None
    assert batch.target_labels is not None
    lam = ratio * batch.lam + (1 - ratio) * attention_share(output.class_attention, tokens)
    return replace(batch, lam=lam, labels=mix_labels(batch.source_labels, batch.target_labels, lam))
