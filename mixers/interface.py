"""What every mixing method takes and returns, and the labels of mixed images.

A mixer holds no model, no train or eval mode and no device. It gets a `Guide`, a function from
clean images to the model's logits and score; calling it is optional. Drawing and applying are
separate: `draw` takes a generator and returns plain values; `apply` takes these values and returns
new tensors. So a test can write the values by hand, and a mix can be repeated.

How to add a method:

1.  Write `mixers/<method>.py`: a subclass of `Mixer` with `draw` (everything random) and `apply`
    (everything else).
2.  If it pastes by a mask, `apply` ends with
    `return self.label(*paste(images, sources, mask), labels, mask)`.
3.  If it has flags, write its options in `mixers/<method>_options.py` (see `mixers/options.py`) and
    `from_options` in the class. Add its line to `METHODS` in `mixers/registry.py`.
4.  Add a row to `MAKERS` in `tests/test_mixers.py`: the tests of all mixers then run on it. Compare
    it with a slow loop that follows its formula.
5.  If it needs a second, frozen network or the gradient at the pixels, `MixerContext` gives it a
    function of images.
6.  If it needs a second network that learns, put the loss of that network into `MixedBatch.terms`
    and its parameters into the groups of the optimizer; the step does the rest.
7.  If its labels depend on the forward pass on the mixed images, set `MixedBatch.need_attention`
    and `MixedBatch.relabel`, as `mixers/transmix.py` does.
8.  If it trains on clean images too, `images` and `labels` may have more rows than the batch.
9.  If its loss is not made of labels and terms, write a criterion in `losses.py`, a function of the
    model's output and the batch.
10. If it needs something new from the forward pass, add it to `MixedBatch.forward_inputs`.

Letters: B batch, C channels, K classes, N image tokens. `source` gives the region, `target`
receives it, `lam` is the source's share. Image i is the target and image B - 1 - i its source.
Where a paper defines the share as that of the other image, `draw` converts it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from errors import InputError
from models.interface import AttentionOf, GuideOutput, ModelOutput
from samplers import view_group

# Clean images (B, C, height, width) -> their logits and score.
Guide = Callable[[Tensor], GuideOutput | ModelOutput]


class Regions(NamedTuple):
    """The source regions and the target regions of a batch, in tokens.

    A corner is the row and column of a region's top left token. Both images of a pair have regions
    of one size.
    """

    source_corners: Tensor  # (B, 2) int64, in the source image of each pair
    target_corners: Tensor  # (B, 2) int64, in the target image
    sizes: Tensor  # (B, 2) int64: rows, columns


@dataclass(frozen=True)
class MixedBatch:
    """A batch ready for the forward pass and the loss. What a method does not use is None.

    Args:
        images: (B, C, height, width).
        labels: (B, K) float32, smoothed and mixed: y_M.
        lam: (B,) float32, the source's share of each image.
        source_labels, target_labels: (B, K) float32: y_A and y_B.
        source_mask: (B, N) bool, true for tokens that belong to the source.
        reference_probs: (B, K) float32, the reference of L_con (Eq. 14).
        clean_logits: (B, K), the guide's logits of the clean images.
        image_attention: (B, N), the score by which regions were chosen, normally the guide's.
        regions: the regions of SMMix.
        mask: (B, 1, height, width) bool, true for pixels that belong to the source.
        terms: losses of the method itself (scalars), which are added to the total.
        need_attention: the attention that the forward pass on the mixed images must return.
        relabel: (batch, output of that forward pass) -> the batch with its final labels.
    """

    images: Tensor
    labels: Tensor
    lam: Tensor | None = None
    source_labels: Tensor | None = None
    target_labels: Tensor | None = None
    source_mask: Tensor | None = None
    reference_probs: Tensor | None = None
    clean_logits: Tensor | None = None
    image_attention: Tensor | None = None
    regions: Regions | None = None
    mask: Tensor | None = None
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    need_attention: AttentionOf | None = None
    relabel: Callable[[MixedBatch, ModelOutput], MixedBatch] | None = None

    def forward_inputs(self) -> dict[str, Any]:
        """The keyword arguments of the model's forward pass on this batch."""
        return {
            "images": self.images,
            "source_mask": self.source_mask,
            "need_attention": self.need_attention,
        }

    def after_forward(self, output: ModelOutput) -> MixedBatch:
        """The batch with its final labels."""
        return self if self.relabel is None else self.relabel(self, output)


class StepRandom(NamedTuple):
    """The generators of one step."""

    shared: torch.Generator  # the same on all ranks
    own: torch.Generator  # another one on each rank


def check_labels(labels: Tensor, batch_size: int, num_classes: int) -> None:
    """Refuses labels that are neither class numbers nor distributions.

    Args:
        labels: (B,) integers from 0 to K - 1, or (B, K) distributions: not negative, each row sums
            to one (within 0.01, for low precisions).

    Raises:
        InputError: names the first label that is wrong.
    """
    if labels.shape == (batch_size,):
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise InputError(f"labels: class numbers must be integers, not {labels.dtype}")
        wrong, rule = (labels < 0) | (labels >= num_classes), f"must be 0 to {num_classes - 1}"
    elif labels.shape == (batch_size, num_classes):
        sums = labels.float().sum(dim=1)
        wrong = ~((labels >= 0).all(dim=1) & ((sums - 1).abs() <= 0.01))
        rule = "must have no negative share and sum to 1"
    else:
        raise InputError(
            f"labels of shape {tuple(labels.shape)}: {batch_size} images of {num_classes} classes "
            f"need class numbers ({batch_size},) or distributions ({batch_size}, {num_classes})"
        )
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise InputError(f"labels[{row}] is {labels[row].tolist()}: {rule}")


def soft_labels(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Label smoothing (Szegedy et al. 2016): (1 - e) * one_hot + e / K.

    Args:
        labels: (B,) int64 class indices, or (B, K) float distributions.
        smoothing: e.

    Returns:
        (B, K) float32; each row sums to one if that of `labels` does.
    """
    one_hot = labels
    if labels.ndim == 1:
        # Not torch's one_hot: on some devices the host waits for it.
        one_hot = labels[:, None] == torch.arange(num_classes, device=labels.device)
    return one_hot.float() * (1.0 - smoothing) + smoothing / num_classes


def mix_labels(source_labels: Tensor, target_labels: Tensor, lam: Tensor) -> Tensor:
    """Eq. 8: y_M = lam * y_A + (1 - lam) * y_B. Labels are (B, K), lam is (B,)."""
    return lam[:, None] * source_labels + (1.0 - lam[:, None]) * target_labels


def draw_beta(
    alpha: float, count: int, generator: torch.Generator, beta: float | None = None
) -> list[float]:
    """`count` numbers from Beta(alpha, beta), where beta is alpha by default.

    NumPy draws them, with a seed from the generator: torch's Beta takes no generator.
    """
    numpy_generator = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
    return numpy_generator.beta(alpha, alpha if beta is None else beta, size=count).tolist()


def send(drawn: Tensor, device: torch.device) -> Tensor:
    """Copies a large draw to the device without waiting.

    On CUDA the host may wait for a copy of more than 64 KiB unless the memory is pinned.
    """
    pinned = drawn.pin_memory() if device.type == "cuda" else drawn
    return pinned.to(device, non_blocking=True)


@dataclass(frozen=True)
class MixerContext:
    """What mixers need from the model and the data.

    Args:
        num_classes: number of classes.
        grid_size: rows and columns of the model's token grid.
        to_bytes: normalised images -> their pixels before normalisation, uint8.
        teacher: clean images -> features (B, D, rows, columns) of a frozen classifier, for
            AttentiveMix.
        groups: see `Mixer`.
    """

    num_classes: int
    grid_size: tuple[int, int]
    to_bytes: Callable[[Tensor], Tensor]
    teacher: Callable[[Tensor], Tensor] | None = None
    groups: int = 1


Draw = TypeVar("Draw")
Value = TypeVar("Value")


class Mixer(ABC, Generic[Draw]):
    """One mixing method.

    `groups` is the number of groups into which repeated augmentation divides a batch
    (`samplers.py:view_group`). What is drawn once per batch is drawn once for each group, so that
    each view of an image meets its own draw.

    Args:
        num_classes: K.
        smoothing: label smoothing e, applied here and nowhere else.
    """

    groups = 1

    def __init__(self, num_classes: int, smoothing: float = 0.1) -> None:
        self.num_classes = num_classes
        self.smoothing = smoothing

    @classmethod
    def from_options(cls, options: Any, context: MixerContext) -> Self:
        """The mixer that the flags describe.

        Args:
            options: of the class in `mixers/registry.py`. A method with flags of its own overrides
                this method, which reads only the smoothing.
        """
        return cls(context.num_classes, options.smoothing)

    @abstractmethod
    def draw(
        self, batch_size: int, image_size: tuple[int, int], generator: torch.Generator
    ) -> Draw:
        """Everything random about one mix, as plain values.

        Args:
            image_size: height and width in pixels.
        """

    @abstractmethod
    def apply(self, images: Tensor, labels: Tensor, drawn: Draw, guide: Guide) -> MixedBatch:
        """The mixed batch. Nothing is random here, and nothing is changed in place.

        Args:
            images: (B, C, height, width), clean.
            labels: (B,) class indices or (B, K) distributions.
            drawn: what `draw` returned.
        """

    def __call__(
        self, images: Tensor, labels: Tensor, guide: Guide, random: StepRandom
    ) -> MixedBatch:
        """`mix` with checked labels, for one's own training loop.

        The check reads the labels, so on a GPU the host waits for it. `main.py` calls `mix`: its
        labels are checked when the data set is opened.

        Raises:
            InputError: see `check_labels`.
        """
        check_labels(labels, len(images), self.num_classes)
        return self.mix(images, labels, guide, random)

    def mix(self, images: Tensor, labels: Tensor, guide: Guide, random: StepRandom) -> MixedBatch:
        """Draws and applies one mix; arguments as in `apply`."""
        height, width = images.shape[-2:]
        drawn = self.draw(len(images), (height, width), random.own)
        return self.apply(images, labels, drawn, guide)

    def label(
        self, mixed: Tensor, lam: Tensor, labels: Tensor, mask: Tensor | None = None
    ) -> MixedBatch:
        """The mixed batch of mixed images, with labels by the source's share (Eq. 8).

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
    """Clean images with smoothed labels: DeiT's recipe without mixing."""

    def draw(
        self, batch_size: int, image_size: tuple[int, int], generator: torch.Generator
    ) -> None:
        return None

    def apply(self, images: Tensor, labels: Tensor, drawn: None, guide: Guide) -> MixedBatch:
        return MixedBatch(images, soft_labels(labels, self.num_classes, self.smoothing))


def pair_up(values: list[Value], batch_size: int, mode: str, groups: int) -> list[Value]:
    """One draw for each image of a batch, shared as `--mixup-mode` says.

    Args:
        values: a draw for each image, of which only the first ones may be used.
        mode: batch: one for each group of views; pair: one for both images of a pair; elem: one for
            each image.
        groups: see `Mixer`.
    """
    if mode == "batch":
        return [values[view_group(entry, batch_size, groups)] for entry in range(batch_size)]
    if mode == "pair":
        return [values[min(i, batch_size - 1 - i)] for i in range(batch_size)]
    return values
