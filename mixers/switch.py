"""Draws which of two methods mixes a batch (paper Sec. 5.1, as DeiT does)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixers.interface import Guide, MixedBatch, Mixer, NoMixing, StepRandom


class Choice(NamedTuple):
    """The draw of one batch."""

    mix: bool  # else the batch stays clean
    first: bool  # by the first method, else by the second


class Switch:
    """Mixes each batch by one of two methods, or not at all.

    All ranks draw the same choice, from their shared generator. If each rank drew its own, almost
    every step of 8 GPUs would wait for the motivating pass of some rank (1 - 0.5^8 of the steps)
    instead of half of them.

    Args:
        first, second: the two methods; without a second one the first gets all mixed batches.
        prob: share of batches that are mixed.
        first_prob: share of the mixed batches that `first` gets.
        off_epoch: epoch, counted from 0, from which nothing is mixed.
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
        """Must be called before each epoch, with its number counted from 0."""
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
        return self.pick(self.draw(random.shared)).mix(images, labels, guide, random)
