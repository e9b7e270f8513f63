"""Which image comes when: the order of one epoch, dealt to ranks and batches, with repeated
augmentation.

Level 0: imports nothing from the project. It deals in numbers only; it must not know images, labels
or transforms. Repeated augmentation after Hoffer et al. (2020) and Berman et al. (2019), in the
form DeiT trains with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler

Place = tuple[int, int, int]  # (epoch, image index, position in the epoch's global order)
LAYOUTS = ("blocks", "strided")


class EpochBatches(Sampler[list[Place]]):
    """Training batches of one rank; each entry says which image and at which place of the whole
    epoch.

    The epoch's order is one permutation for all ranks. With `repeats` R each image stands R times
    in a row and the order is cut to `num_images` entries, so an epoch costs what it costs without
    repeats (DeiT does the same, but first rounds the count down to a multiple of 256, which leaves
    nothing of 255 images). Micro-batch k of all ranks together takes the positions from k * W * B
    on. Within, with `layout` blocks, rank r of W has the B positions from r * B on, so that the R
    views of an image lie in one batch, which decodes it once; strided, as in DeiT, it has those at
    r, r + W, ..., and the views lie on neighbouring ranks. Draws keyed by the position are the same
    at every world size and in both layouts. Without repeats the layout is strided, whatever is
    asked for.

    Only whole optimizer steps are dealt, and the rest of the order is dropped; another epoch drops
    other images.

    With R > 1 the second half of every batch is reversed. Mixing pairs entry i with entry B-1-i; in
    the plain order the middle of a batch would then mix two views of one photo, which teaches
    nothing. After the reversal partners lie ceil(B/2) places apart, and strided W times as many, so
    they are different images whenever that is at least R (R = 3: B >= 5). The middle entry of an
    odd batch is its own partner either way.

    Args:
        num_images: images in the data set.
        batch_size: B, entries per micro-batch of this rank.
        make_generator: epoch -> the generator that draws this epoch's permutation; equal on all
            ranks.
        rank, world_size: which of how many processes this is.
        repeats: R, views of one image in a row.
        layout: one of `LAYOUTS`.
        accum_steps: micro-batches per optimizer step.
        shuffle: False deals the images in their own order.
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
        """Chooses the epoch that the next iteration deals, and from which of its positions on.

        Args:
            start: images of all ranks that are done in this epoch: whole optimizer steps, at
                whatever world size.
        """
        self.epoch, self.start = epoch, start

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch, the same on every rank."""
        return self.num_images // (self.batch_size * self.world_size * self.accum_steps)

    def __len__(self) -> int:
        """Micro-batches of this rank that the next iteration deals."""
        return self.steps_per_epoch * self.accum_steps - self.start // (
            self.world_size * self.batch_size
        )

    def _share(self) -> slice:
        """This rank's part of the positions of all ranks."""
        if self.layout == "strided":
            return slice(self.rank, None, self.world_size)
        return slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)

    def __iter__(self) -> Iterator[list[Place]]:
        if self.shuffle:
            images = torch.randperm(
                self.num_images, generator=self.make_generator(self.epoch)
            ).tolist()
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
    """Indices r, r + W, ... of one rank for evaluation. Nothing is padded: every image is seen
    once, by one rank.

    Ranks may therefore differ in length by one.
    """

    def __init__(self, num_images: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, num_images, world_size)
        self.largest = -(-num_images // world_size)  # how many the first rank has

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
