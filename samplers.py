"""The order of the images of an epoch, distributed to ranks and batches.

It includes repeated augmentation (Hoffer et al., 2020; Berman et al., 2019) as DeiT trains with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler

Place = tuple[int, int, int]  # (epoch, image index, position in the epoch's global order)
LAYOUTS = ("blocks", "strided")


def count_groups(repeats: int, layout: str) -> int:
    """The number of groups of views in a batch, see `EpochBatches`."""
    return repeats if layout == "blocks" else 1


def view_group(entry: int, batch_size: int, groups: int) -> int:
    """The group of views to which an entry of a batch belongs, from 0.

    The pairs of a batch (entry i and entry B-1-i) are divided equally among `groups` groups, but
    among no more than there are pairs. The first group has the outermost pairs.
    """
    pairs = (batch_size + 1) // 2
    pair = min(entry, batch_size - 1 - entry)
    return (2 * pair + 1) * min(groups, pairs) // (2 * pairs)


def view_order(batch_size: int, groups: int) -> list[int]:
    """The order in which the successive positions of one rank fill its batch.

    The views of an image are successive positions. They come to different groups (`view_group`), as
    if on different ranks, and no pair has two views of one image. With one group the second half
    of the batch is reversed, which keeps the views of an image out of one pair.
    """
    by_view = sorted(range(batch_size), key=lambda position: position % groups)
    sizes = Counter(view_group(entry, batch_size, groups) for entry in range(batch_size))
    fronts: list[int] = []
    backs: list[int] = []
    for number in range(len(sizes)):
        start = len(fronts) + len(backs)
        group = sorted(by_view[start : start + sizes[number]])
        half = (len(group) + 1) // 2
        fronts += group[:half]
        backs += group[half:]
    return fronts + backs[::-1]


class EpochBatches(Sampler[list[Place]]):
    """The training batches of one rank, as lists of places (epoch, image index, position).

    The epoch's order is one permutation for all ranks. With `repeats` R each image occurs R times
    in a row, and the order is cut to `num_images` entries, so that an epoch has the same length as
    without repeats. (DeiT does the same, but first rounds the number down to a multiple of 256,
    which gives no batch at all for 255 images.)

    Micro-batch k of all W ranks together takes the W * B positions from k * W * B. With the layout
    `blocks`, rank r takes the r-th block of B of them: the R views of an image are in one batch,
    which decodes the image once, and in different groups of it (`view_order`). With `strided`, as
    in DeiT, rank r takes every W-th of them from the r-th: the views are on neighbouring ranks.
    Draws keyed by the position are the same at every world size and in both layouts. Without
    repeats the layout is always strided.

    Only whole steps are made. The rest of the order is dropped, and each epoch drops other images.

    Mixing pairs entry i with entry B-1-i. With R > 1 the batch is laid out so that no pair has two
    views of one image: a mix of them teaches nothing. It holds for B >= 5 with R = 3, and in
    general for B > 2R + 1. The middle entry of an odd batch is always its own partner.

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
        self.order = view_order(batch_size, count_groups(repeats, layout))
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
            yield [batch[entry] for entry in self.order] if self.repeats > 1 else batch


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
