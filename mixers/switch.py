"""Which method mixes this batch. Knows nothing of what the methods do."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixers.interface import Guide, MixedBatch, Mixer, NoMixing, StepRandom


class Choice(NamedTuple):
    """What the switch decided for one batch."""

    mix: bool
    first: bool


class Switch:
    """Mixes with probability `prob`; then by `first` with probability `first_prob`, by `second`
    otherwise.

    From epoch `off_epoch` on, counted from 0, nothing is mixed.

    The choice is drawn from the generator that all ranks share. Drawn on each rank apart, almost
    every step of an 8-GPU run would wait for some rank's motivating pass (1 - 0.5^8); drawn alike,
    half of the steps stay cheap.
    """

    def __init__(
        self,
        first: Mixer,
        second: Mixer | None = None,
        prob: float = 1.0,
        first_prob: float = 0.5,
        off_epoch: int | None = None,
    ) -> None:
        self.first, self.second, self.prob, self.off_epoch = first, second, prob, off_epoch
        self.first_prob = 1.0 if second is None else first_prob
        self.plain = NoMixing(first.num_classes, first.smoothing)
        self.is_off = False

    def set_epoch(self, epoch: int) -> None:
        """Must be called before an epoch, counted from 0."""
        self.is_off = self.off_epoch is not None and epoch >= self.off_epoch

    def draw(self, generator: torch.Generator) -> Choice:
        mix, first = torch.rand(2, generator=generator).tolist()
        return Choice(mix < self.prob, first < self.first_prob)

    def pick(self, choice: Choice) -> Mixer:
        if self.is_off or not choice.mix:
            return self.plain
        return self.first if choice.first or self.second is None else self.second

    def __call__(
        self, images: Tensor, labels: Tensor, guide: Guide, random: StepRandom
    ) -> MixedBatch:
        return self.pick(self.draw(random.shared))(images, labels, guide, random)
