"""Two methods in each batch: its middle by one, its two ends by the other. Knows nothing of what
the methods do.

Every step then costs the same, and a motivating pass is shown the middle alone. An extension: the
paper and DeiT draw one method per batch (`mixers/switch.py`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mixers.interface import Guide, MixedBatch, Mixer


class Split(Mixer[tuple[Any, Any]]):
    """Mixes the share `first_share` of each batch by `first`, the rest by `second`.

    Image i's partner is image B - 1 - i; the middle of a batch and its two ends together are closed
    under that, so all pairs are those of an undivided batch.

    The rows of `second` have no region, no region labels and no reference: zeros stand there, with
    which Eq. 13 and 14 give zero. Means over the batch then weigh these terms by the share of
    `first`, as drawing one method per batch does over many steps. (Binary cross entropy takes zeros
    for labels: it does not go with this.)

    Args:
        first: may bring regions and a reference, but no labels that the forward pass decides, and
            no losses of its own.
        second: labels only.
        first_share: between 0 and 1; rounded to whole pairs. The middle image of an odd batch, its
            own partner, is always of `first`.
    """

    def __init__(self, first: Mixer, second: Mixer, first_share: float = 0.5) -> None:
        super().__init__(first.num_classes, first.smoothing)
        self.first, self.second, self.first_share = first, second, first_share

    def end(self, batch_size: int) -> int:
        """How many images at either end of a batch are not in its middle."""
        return round(batch_size * (1 - self.first_share) / 2)

    def draw(
        self, batch_size: int, image_size: tuple[int, int], generator: torch.Generator
    ) -> tuple[Any, Any]:
        at_ends = 2 * self.end(batch_size)
        inner = self.first.draw(batch_size - at_ends, image_size, generator)
        return inner, self.second.draw(at_ends, image_size, generator)

    def apply(
        self, images: Tensor, labels: Tensor, drawn: tuple[Any, Any], guide: Guide
    ) -> MixedBatch:
        """The clean predictions and scores of the middle are not given on: they belong to some of
        the rows only."""
        count, end = len(images), self.end(len(images))
        if end == 0:
            return self.first.apply(images, labels, drawn[0], guide)
        if 2 * end >= count:
            return self.second.apply(images, labels, drawn[1], guide)
        middle = slice(end, count - end)
        inner = self.first.apply(images[middle], labels[middle], drawn[0], guide)
        assert inner.relabel is None
        assert not inner.terms
        at_ends, their_labels = (
            torch.cat((whole[:end], whole[count - end :])) for whole in (images, labels)
        )
        outer = self.second.apply(at_ends, their_labels, drawn[1], guide)

        def rows(inside: Tensor, outside: Tensor) -> Tensor:
            return torch.cat((outside[:end], inside, outside[end:]))

        def or_zeros(inside: Tensor | None) -> Tensor | None:
            return (
                None
                if inside is None
                else rows(inside, inside.new_zeros(2 * end, *inside.shape[1:]))
            )

        with_regions = inner.source_mask is not None
        return replace(
            outer,
            images=rows(inner.images, outer.images),
            labels=rows(inner.labels, outer.labels),
            lam=None if inner.lam is None or outer.lam is None else rows(inner.lam, outer.lam),
            source_labels=or_zeros(inner.source_labels) if with_regions else None,
            target_labels=or_zeros(inner.target_labels) if with_regions else None,
            source_mask=or_zeros(inner.source_mask),
            reference_probs=or_zeros(inner.reference_probs),
            mask=None,
        )
