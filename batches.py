"""What a training loader gives: samples, and the batch that they are written into.

Level 2: imports `erasing`, for its boxes. It must not know where samples come from or what becomes of a batch.

Letters: B batch, H height, W width, M boxes to erase per image.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

import erasing


class Sample(NamedTuple):
    """One training image (3, H, W), its label, its index as `read` gives it, and the M boxes that will be erased."""

    image: torch.Tensor
    label: int
    shown: int
    boxes: list[erasing.Box]


class Batch(NamedTuple):
    """images (B, 3, H, W), uint8 with channels last; labels (B,), indices (B,) and boxes (B, M, 4) int64."""

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    boxes: torch.Tensor


def make_batch(samples: Iterable[tuple[int, Sample]], size: int) -> Batch:
    """`size` samples, each with the row where it belongs; every image is copied once, into its row."""
    images = torch.empty(0)
    rest: list[tuple[int, int, list[erasing.Box]]] = [(0, 0, [])] * size
    for row, sample in samples:
        if images.ndim == 1:
            shape, dtype = (size, *sample.image.shape), sample.image.dtype
            images = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
        images[row] = sample.image
        rest[row] = sample[1:]
    labels, indices, boxes = zip(*rest, strict=True)
    return Batch(images, torch.tensor(labels), torch.tensor(indices), erasing.as_tensor(list(boxes)))


def in_order(samples: list[Sample]) -> Batch:
    """Samples that came one by one."""
    return make_batch(enumerate(samples), len(samples))


def as_it_is(batch: Batch) -> Batch:
    """For torch's loader, which has something done to what is a batch already."""
    return batch
