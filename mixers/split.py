"""Two methods in each batch: one mixes its middle, the other its two ends (`--mix-protocol split`).

Every step then costs the same, and the motivating pass runs on the middle alone. This extends the
paper and DeiT, which draw one method per batch (`mixers/switch.py`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mixers.interface import Guide, MixedBatch, Mixer


class Split(Mixer[tuple[Any, Any]]):
    """Mixes the share `first_share` of each batch by `first`, the rest by `second`.

    The source of image i is image B - 1 - i. Both lie in the middle of the batch or both in its
    ends, so the pairs are the same as without splitting.

    The rows of `second` have no region, no region labels and no reference. They are filled with
    zeros, for which Eq. 13 and 14 give zero. The means over the batch so weight L_fine and L_con by
    the share of `first`, as one method per batch does on average over many steps. Binary cross
    entropy would read the zeros as labels, so it cannot be combined with this.

    Args:
        first: its batches may have regions and a reference, but no `relabel` and no `terms`.
        second: its batches have labels only.
        first_share: between 0 and 1, rounded to whole pairs. The middle image of an odd batch, its
            own source, always belongs to `first`.
    """

    def __init__(self, first: Mixer, second: Mixer, first_share: float = 0.5) -> None:
        super().__init__(first.num_classes, first.smoothing)
        self.first, self.second, self.first_share = first, second, first_share

    def end(self, batch_size: int) -> int:
        """The number of images at each of the two ends of a batch."""
        return round(batch_size * (1 - self.first_share) / 2)

    def draw(
        self, batch_size: int, image_size: tuple[int, int], generator: torch.Generator
    ) -> tuple[Any, Any]:
        num_outer = 2 * self.end(batch_size)
        inner = self.first.draw(batch_size - num_outer, image_size, generator)
        return inner, self.second.draw(num_outer, image_size, generator)

    def apply(
        self, images: Tensor, labels: Tensor, drawn: tuple[Any, Any], guide: Guide
    ) -> MixedBatch:
        """The mixed batch; without clean logits and score, which only some rows would have."""
        count, end = len(images), self.end(len(images))
        if end == 0:
            return self.first.apply(images, labels, drawn[0], guide)
        if 2 * end >= count:
            return self.second.apply(images, labels, drawn[1], guide)
        middle = slice(end, count - end)
        inner = self.first.apply(images[middle], labels[middle], drawn[0], guide)
        assert inner.relabel is None
        assert not inner.terms
        outer_images, outer_labels = (
            torch.cat((whole[:end], whole[count - end :])) for whole in (images, labels)
        )
        outer = self.second.apply(outer_images, outer_labels, drawn[1], guide)

        def join(inside: Tensor, outside: Tensor) -> Tensor:
            return torch.cat((outside[:end], inside, outside[end:]))

        def join_zeros(inside: Tensor | None) -> Tensor | None:
            if inside is None:
                return None
            return join(inside, inside.new_zeros(2 * end, *inside.shape[1:]))

        has_regions = inner.source_mask is not None
        return replace(
            outer,
            images=join(inner.images, outer.images),
            labels=join(inner.labels, outer.labels),
            lam=None if inner.lam is None or outer.lam is None else join(inner.lam, outer.lam),
            source_labels=join_zeros(inner.source_labels) if has_regions else None,
            target_labels=join_zeros(inner.target_labels) if has_regions else None,
            source_mask=join_zeros(inner.source_mask),
            reference_probs=join_zeros(inner.reference_probs),
            mask=None,
        )
