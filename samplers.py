"""The order of the images of an epoch, distributed to ranks and batches.

It includes repeated augmentation (Hoffer et al., 2020; Berman et al., 2019) as DeiT trains with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler

Place = tuple[int, int, int]  # (epoch, image index, position in the epoch's global order)
LAYOUTS = ("blocks", "strided")


class EpochBatches(Sampler[list[Place]]):
    """The training batches of one rank, as lists of places (epoch, image index, position).

    The epoch's order is one permutation for all ranks. With `repeats` R each image occurs R times
    in a row, and the order is cut to `num_images` entries, so that an epoch has the same length as
    without repeats. (DeiT does the same, but first rounds the number down to a multiple of 256,
    which gives no batch at all for 255 images.)

    Micro-batch k of all W ranks together takes the W * B positions from k * W * B. With the layout
    `blocks`, rank r takes the r-th block of B of them: the R views of an image are in one batch,
    which decodes the image once. With `strided`, as in DeiT, rank r takes every W-th of them from
    the r-th: the views are on neighbouring ranks. Draws keyed by the position are the same at every
    world size and in both layouts. Without repeats the layout is always strided.

    Only whole steps are made. The rest of the order is dropped, and each epoch drops other images.

    With R > 1 the second half of every batch is reversed. Mixing pairs entry i with entry B-1-i;
    without the reversal, the middle of a batch would mix two views of one image, which teaches
    nothing. After it, partners are ceil(B/2) positions apart (with `strided` W times as many), so
    they are different images if that is at least R (R = 3: B >= 5). The middle entry of an odd
    batch is always its own partner.

    Args:
        num_images: images in the data set.
        batch_size: B, entries per micro-batch of this rank.
        make_generator: epoch -> the generator that draws the epoch's permutation, the same on all
            ranks.
        rank, world_size: number r of this process, and the number W of processes.
        repeats: R, views of one image in a row.
        layout: one of `LAYOUTS`.
        accum_steps: micro-batches per optimizer step.
        shuffle: false keeps the order of the data set.
    """

    def __init__(
        self,
        *,
        num_images: int,
        batch_size: int,
        make_generator: Callable[[int], torch.Generator],
        rank: int = 0,
        world_size: int = 1,
        repeats: int = 1,
        layout: str = "blocks",
        accum_steps: int = 1,
        shuffle: bool = True,
    ) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.make_generator = make_generator
        self.rank = rank
        self.world_size = world_size
        self.repeats = repeats
        self.layout = layout if repeats > 1 else "strided"
        self.accum_steps = accum_steps
        self.shuffle = shuffle
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Chooses the epoch of the next iteration, and its first position.

        Args:
            start: number of images of this epoch that all ranks together have trained on already:
                whole steps, possibly at another world size.
        """
        self.epoch, self.start = epoch, start

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch, the same on every rank."""
        return self.num_images // (self.batch_size * self.world_size * self.accum_steps)

    def __len__(self) -> int:
        """The number of micro-batches of this rank in the next iteration."""
        done = self.start // (self.world_size * self.batch_size)
        return self.steps_per_epoch * self.accum_steps - done

    def _share(self) -> slice:
        """The part of a micro-batch's positions that this rank takes."""
        if self.layout == "strided":
            return slice(self.rank, None, self.world_size)
        return slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)

    def __iter__(self) -> Iterator[list[Place]]:
        if self.shuffle:
            generator = self.make_generator(self.epoch)
            images = torch.randperm(self.num_images, generator=generator).tolist()
        else:
            images = list(range(self.num_images))
        epoch, step = self.epoch, self.world_size * self.batch_size
        for start in range(self.start, self.start + len(self) * step, step):
            positions = range(start, start + step)[self._share()]
            batch = [(epoch, images[position // self.repeats], position) for position in positions]
            if self.repeats > 1:
                middle = (self.batch_size + 1) // 2
                batch[middle:] = batch[middle:][::-1]
            yield batch


class EvalShard(Sampler[int]):
    """The indices r, r + W, ... that rank r of W evaluates.

    Nothing is padded: each image is evaluated once, by one rank. The numbers of images of two ranks
    may therefore differ by one.
    """

    def __init__(self, num_images: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, num_images, world_size)
        self.largest = -(-num_images // world_size)  # number of images of the first rank

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
