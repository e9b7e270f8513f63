"""What a training loader gives: samples, and the batch that they are written into.

Level 2: imports `erasing` and `randaugment`, for boxes and operations. It must not know where samples come from or what
becomes of a batch.

Letters: B batch, H height, W width, M boxes to erase per image, L layers of operations.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

import erasing
import randaugment


class Sample(NamedTuple):
    """One training image (3, H, W), its label, its index as `read` gives it, and what will be done to it in the batch:
    the M boxes that will be erased, and before that L operations."""

    image: torch.Tensor
    label: int
    shown: int
    boxes: list[erasing.Box]
    operations: list[randaugment.Row]


class Batch(NamedTuple):
    """images (B, 3, H, W), uint8 with channels last; labels (B,), indices (B,) and boxes (B, M, 4) int64; operations
    (B, L, 8) as `randaugment.as_tensor` orders them, L = 0 where the images need none."""

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    boxes: torch.Tensor
    operations: torch.Tensor


def make_batch(samples: Iterable[tuple[int, Sample]], size: int) -> Batch:
    """`size` samples, each with the row where it belongs; every image is copied once, into its row."""
    images = torch.empty(0)
    rest: list[tuple[int, int, list[erasing.Box], list[randaugment.Row]]] = [(0, 0, [], [])] * size
    for row, sample in samples:
        if images.ndim == 1:
            shape, dtype = (size, *sample.image.shape), sample.image.dtype
            images = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
        images[row] = sample.image
        rest[row] = sample[1:]
    labels, indices, boxes, drawn = zip(*rest, strict=True)
    operations = randaugment.as_tensor(drawn)
    return Batch(images, torch.tensor(labels), torch.tensor(indices), erasing.as_tensor(list(boxes)), operations)


def in_order(samples: list[Sample]) -> Batch:
    """Samples that came one by one."""
    return make_batch(enumerate(samples), len(samples))


def as_it_is(batch: Batch) -> Batch:
    """For torch's loader, which has something done to what is a batch already."""
    return batch
