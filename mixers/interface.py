"""What every mixing method takes and gives. Holds labels and records, no pixels.

A mixer never holds the model under training, a mode or a device. It is given a `Guide`, a function
that shows it the clean images through the model; whether it calls it is its own affair. Drawing and
applying are separate: `draw` takes a generator and returns plain values, `apply` takes those values
and returns new tensors, so that a mix can be written by hand and repeated.

Adding a method, in ten lines:

1.  `mixers/<method>.py`: a subclass of `Mixer` with `draw` (all that is random) and `apply` (all
    that is not).
2.  A method that pastes by a mask ends with `self.label(*paste(images, sources, mask), labels,
    mask)`.
3.  Its own flags go into `config/mixing_flags.py`; in `config/build_mixer.py` they go into
    `MixingSettings`, and its name and maker into `MIXERS`.
4.  `tests/test_mixers.py`: a row in `MAKERS` puts it under the contract; a slow loop from its
    formula is its oracle.
5.  A second, frozen network, or the gradient at the pixels: the maker hands over a function of
    images.
6.  A second network that learns: its loss goes into `MixedBatch.terms`, its parameters into the
    optimizer's groups; the step backpropagates, scales, clips and updates whatever the optimizer
    holds.
7.  Labels that depend on the mixed forward pass: `MixedBatch.need_attention` and `relabel` (see
    `mixers/transmix.py`).
8.  Clean images beside the mixed ones: `images` and `labels` may hold more rows than the batch that
    came in.
9.  A loss of another form than labels and terms: a criterion of its own (`losses.py`), which gets
    output and batch.
10. Something new asked of the model's forward pass: one more entry in `MixedBatch.forward_inputs`,
    none in the step.

Letters: B batch, K classes, N image tokens. `source` gives the patch, `target` receives it, `lam`
is the source share. Image i is the target and image B - 1 - i the source (batch reversal). Methods
whose papers give the share of the other image are converted where their values are drawn, nowhere
else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from models.interface import AttentionOf, GuideOutput, ModelOutput

Guide = Callable[
    [Tensor], GuideOutput | ModelOutput
]  # clean images (B, C, height, width) -> their logits and score


class Regions(NamedTuple):
    """Where the pasted rectangles came from and went to, in grid cells; corners are (row, column)
    of the top left."""

    source_corners: Tensor  # (B, 2) int64: in the source image of each pair
    target_corners: Tensor  # (B, 2) int64: in the target image
    size: tuple[int, int]  # rows, columns


@dataclass(frozen=True)
class MixedBatch:
    """A batch ready for the forward pass and the loss. What a method does not use is `None`."""

    images: Tensor  # (B, C, height, width)
    labels: Tensor  # (B, K) float32: y_M, smoothed and mixed
    lam: Tensor | None = None  # (B,) float32: the source's share of each image
    source_labels: Tensor | None = None  # (B, K) float32: y_A
    target_labels: Tensor | None = None  # (B, K) float32: y_B
    source_mask: Tensor | None = None  # (B, N) bool: tokens that belong to the source
    reference_probs: Tensor | None = (
        None  # (B, K) float32: what Eq. 14 pulls the prediction towards
    )
    clean_logits: Tensor | None = None  # (B, K): the guide's prediction on the clean images
    image_attention: Tensor | None = (
        None  # (B, N): the score of the clean images, the guide's as a rule
    )
    regions: Regions | None = None
    mask: Tensor | None = (
        None  # (B, 1, height, width) bool: pixels that are the source's, where a method has one
    )
    terms: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # the method's own losses (scalars), added to the total
    need_attention: AttentionOf | None = None  # what the mixed forward pass has to show besides
    relabel: Callable[[MixedBatch, ModelOutput], MixedBatch] | None = (
        None  # labels known only after that pass
    )

    def forward_inputs(self) -> dict[str, Any]:
        """The keywords of the model's forward pass on this batch."""
        return {
            "images": self.images,
            "source_mask": self.source_mask,
            "need_attention": self.need_attention,
        }

    def after_forward(self, output: ModelOutput) -> MixedBatch:
        """The batch with its final labels."""
        return self if self.relabel is None else self.relabel(self, output)


class StepRandom(NamedTuple):
    """The generators of one step: what all ranks must choose alike comes from `shared`, the rest
    from `own`."""

    shared: torch.Generator
    own: torch.Generator


def soft_labels(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Label smoothing (Szegedy et al. 2016): (1 - e) * onehot + e / K.

    Args:
        labels: (B,) int64 class indices, or (B, K) float distributions.

    Returns:
        (B, K) float32, rows sum to one if the distributions do.
    """
    classes = torch.arange(num_classes, device=labels.device)
    hot = (
        labels[:, None] == classes if labels.ndim == 1 else labels
    )  # one_hot would read the labels back on some devices
    return hot.float() * (1.0 - smoothing) + smoothing / num_classes


def mix_labels(source_labels: Tensor, target_labels: Tensor, lam: Tensor) -> Tensor:
    """Eq. 8: y_M = lam * y_A + (1 - lam) * y_B, all (B, K) with lam (B,)."""
    return lam[:, None] * source_labels + (1.0 - lam[:, None]) * target_labels


def draw_beta(
    alpha: float, count: int, generator: torch.Generator, beta: float | None = None
) -> list[float]:
    """`count` numbers from Beta(alpha, beta), keyed by the generator (torch's own Beta takes none).

    Args:
        beta: default: alpha.
    """
    seed = int(torch.randint(2**31, (), generator=generator))
    return (
        np.random.default_rng(seed)
        .beta(alpha, alpha if beta is None else beta, size=count)
        .tolist()
    )


def send(drawn: Tensor, device: torch.device) -> Tensor:
    """A large draw on the device, without waiting: CUDA may wait for more than 64 KiB of memory
    that is not pinned."""
    held = drawn.pin_memory() if device.type == "cuda" else drawn
    return held.to(device, non_blocking=True)


Draw = TypeVar("Draw")
Value = TypeVar("Value")


class Mixer(ABC, Generic[Draw]):
    """One mixing method.

    Args:
        num_classes: K.
        smoothing: label smoothing e, applied here and nowhere else.
    """

    def __init__(self, num_classes: int, smoothing: float = 0.1) -> None:
        self.num_classes = num_classes
        self.smoothing = smoothing

    @abstractmethod
    def draw(
        self, batch_size: int, image_size: tuple[int, int], generator: torch.Generator
    ) -> Draw:
        """Everything random about one mix, as plain values. `image_size` is height and width in
        pixels."""

    @abstractmethod
    def apply(self, images: Tensor, labels: Tensor, drawn: Draw, guide: Guide) -> MixedBatch:
        """The mix itself. `images` (B, C, height, width) and `labels` (B,) or (B, K) stay as they
        are."""

    def __call__(
        self, images: Tensor, labels: Tensor, guide: Guide, random: StepRandom
    ) -> MixedBatch:
        height, width = images.shape[-2:]
        return self.apply(
            images, labels, self.draw(len(images), (height, width), random.own), guide
        )

    def label(
        self, mixed: Tensor, lam: Tensor, labels: Tensor, mask: Tensor | None = None
    ) -> MixedBatch:
        """The record of a mix whose labels follow the source's share (Eq. 8).

        Args:
            mixed: (B, C, height, width).
            lam: (B,) float32.
            labels: (B,) or (B, K), of the clean images.
            mask: (B, 1, height, width) bool, if the method has one.
        """
        target = soft_labels(labels, self.num_classes, self.smoothing)
        source = target.flip(0)
        return MixedBatch(mixed, mix_labels(source, target, lam), lam, source, target, mask=mask)


class NoMixing(Mixer[None]):
    """Plain images with smoothed labels: DeiT's recipe without any mixing."""

    def draw(
        self, batch_size: int, image_size: tuple[int, int], generator: torch.Generator
    ) -> None:
        return None

    def apply(self, images: Tensor, labels: Tensor, drawn: None, guide: Guide) -> MixedBatch:
        return MixedBatch(images, soft_labels(labels, self.num_classes, self.smoothing))


def pair_up(values: list[Value], batch_size: int, mode: str) -> list[Value]:
    """Spreads draws over a batch as `--mixup-mode` says: one for all, one for each pair, or one for
    each image."""
    if mode == "batch":
        return values[:1] * batch_size
    if mode == "pair":
        return [values[min(i, batch_size - 1 - i)] for i in range(batch_size)]
    return values
