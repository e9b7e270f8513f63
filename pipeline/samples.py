"""What a training loader gives: samples, and the batch that they are written into.

Level 2: imports `erasing` and `randaugment`, for boxes and operations. It must not know where
samples come from or what becomes of a batch.

Letters: B batch, H height, W width, M boxes to erase per image, L layers of operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from pipeline import erasing, randaugment
from pipeline.erasing import Erasing
from pipeline.images import Images, StreamedImages, UnreadableSampleError
from pipeline.transforms import Pixels, Transform, Undone
from samplers import Place
from utils import InputError, SampleError, keyed_generator, keyed_globals


class Sample(NamedTuple):
    """One training image (3, H, W), its label, its index as `read` gives it, and what will be done
    to it in the batch: the M boxes that will be erased, and before that L operations."""

    image: torch.Tensor
    label: int
    shown: int
    boxes: list[erasing.Box]
    operations: list[randaugment.Row]


class Batch(NamedTuple):
    """images (B, 3, H, W), uint8 with channels last; labels (B,), indices (B,) and boxes (B, M, 4)
    int64; operations (B, L, 8) as `pipeline.randaugment.as_tensor` orders them, L = 0 where the
    images need none."""

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    boxes: torch.Tensor
    operations: torch.Tensor


def make_batch(samples: Iterable[tuple[int, Sample]], size: int) -> Batch:
    """`size` samples, each with the row where it belongs; every image is copied once, into its
    row."""
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
    return Batch(
        images,
        torch.tensor(labels),
        torch.tensor(indices),
        erasing.as_tensor(list(boxes)),
        operations,
    )


def in_order(samples: list[Sample]) -> Batch:
    """Samples that came one by one."""
    return make_batch(enumerate(samples), len(samples))


def as_it_is(batch: Batch) -> Batch:
    """For torch's loader, which has something done to what is a batch already."""
    return batch


SUBSTITUTES = 20  # images that are tried in the place of one that cannot be read


def draw_sample(
    transform: Transform, image: Pixels, label: int, shown: int, erase: Erasing
) -> Sample:
    """All draws of one sample: those of the transform, then the boxes."""
    made = transform(image)
    pixels, operations = made if isinstance(made, Undone) else (made, [])
    return Sample(pixels, label, shown, erase.draw((pixels.shape[1], pixels.shape[2])), operations)


class TrainSamples(Dataset[Sample]):
    """(epoch, index, position) -> `Sample`, with draws keyed by that place; many places at once ->
    `Batch`.

    Args:
        transform: a decoded image -> (3, H, W), or `pipeline.transforms.Undone`.
        erase: draws the boxes, last of a sample's draws.
        skip_corrupt: an image that cannot be decoded is replaced by another with its own label,
            drawn from the same place, and its index i is given as ~i = -1 - i. Errors of the
            transform surface either way.
    """

    def __init__(
        self,
        images: Images,
        transform: Transform,
        seed: int,
        skip_corrupt: bool = False,
        erase: Erasing | None = None,
    ) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed
        self.skip_corrupt = skip_corrupt
        self.erase = erase or Erasing()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: Place) -> Sample:
        return self.show(place, self.images.__getitem__)

    def __getitems__(self, places: list[Place]) -> Batch:
        """What torch's loader asks for: a whole batch. Views of one image share its decoding, one
        after the other."""
        look = lru_cache(maxsize=1)(self.images.__getitem__)
        rows = sorted(range(len(places)), key=places.__getitem__)
        return make_batch(((row, self.show(places[row], look)) for row in rows), len(places))

    def show(self, place: Place, look: Callable[[int], tuple[Pixels, int]]) -> Sample:
        """The sample of a place, its image decoded by `look`."""
        image, label, shown = self.read(place, look)
        with keyed_globals("sample", self.seed, *place):
            return draw_sample(self.transform, image, label, shown, self.erase)

    def read(
        self, place: Place, look: Callable[[int], tuple[Pixels, int]]
    ) -> tuple[Pixels, int, int]:
        """The image of a place or its substitute, the label, and the index, inverted for a
        substitute.

        Raises:
            SampleError: it cannot be read, and replacing is off or none of `SUBSTITUTES` others can
                be read either.
        """
        index = place[1]
        try:
            return *look(index), index
        except UnreadableSampleError as error:
            if not self.skip_corrupt:
                raise
            bad = error
        draws = torch.randint(
            len(self.images),
            (SUBSTITUTES,),
            generator=keyed_generator("substitute", self.seed, *place),
        )
        for other in draws.tolist():
            with suppress(UnreadableSampleError):  # that one is counted where it is itself due
                return *self.images[other], ~index
        raise SampleError(
            f"{bad.text}; nor can any of {SUBSTITUTES} images drawn in its place"
        ) from bad


class EvalSamples(Dataset[tuple[torch.Tensor, int]]):
    """index -> (image (3, H, W) float32, label)."""

    def __init__(self, images: Images, transform: Transform) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.images[index]
        return self.transform(image), label


class StreamedSamples(IterableDataset[Sample]):
    """A stream's training samples; `shown` is the running number of the sample in the epoch.

    Draws are keyed by (seed, epoch, rank, worker, count), and who reads which shard depends on
    workers and ranks: a run repeats exactly only with the same number of both. Every worker deals
    its share of the epoch's batches and starts its shards again where timm's rounding leaves it
    short, so all ranks make the same number of steps.
    """

    def __init__(
        self, images: StreamedImages, transform: Transform, seed: int, erase: Erasing | None = None
    ) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed
        self.erase = erase or Erasing()
        self.epoch = 0
        self.deal(batch_size=1, rank=0, world_size=1, accum_steps=1)

    def deal(self, *, batch_size: int, rank: int, world_size: int, accum_steps: int) -> None:
        """Fixes this rank's share; the arguments are those of `EpochBatches`."""
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.steps_per_epoch = self.images.num_images // (batch_size * world_size * accum_steps)
        self.num_batches = self.steps_per_epoch * accum_steps

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.images.source.set_epoch(epoch)  # timm orders the shards by it

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        quota = len(range(worker, self.num_batches, workers)) * self.batch_size
        count = 0
        while count < quota:
            begin = count
            for image, label in islice(self.images, quota - count):
                with keyed_globals("stream", self.seed, self.epoch, self.rank, worker, count):
                    shown = self.rank + self.world_size * (worker + workers * count)
                    sample = draw_sample(self.transform, image, label, shown, self.erase)
                yield sample
                count += 1
            if count == begin:
                raise InputError(
                    f"worker {worker} of rank {self.rank} has no shard to read: lower --num-workers"
                )


class StreamedEvalSamples(IterableDataset[tuple[torch.Tensor, int]]):
    """A stream's (image (3, H, W) float32, label)."""

    def __init__(self, images: StreamedImages, transform: Transform) -> None:
        self.images = images
        self.transform = transform

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        for image, label in self.images:
            yield self.transform(image), label


def train_samples(
    images: Images | StreamedImages,
    transform: Transform,
    seed: int,
    skip_corrupt: bool = False,
    erase: Erasing | None = None,
) -> TrainSamples | StreamedSamples:
    """The training samples of either kind of data set; arguments as in `TrainSamples`.

    Raises:
        InputError: unreadable images of a stream shall be replaced.
    """
    if not isinstance(images, StreamedImages):
        return TrainSamples(images, transform, seed, skip_corrupt, erase)
    if skip_corrupt:
        raise InputError(
            "--skip-corrupt is not for streams: timm/wds/ leaves unreadable images out by itself, "
            "the others stop "
            "there; leave the flag out"
        )
    return StreamedSamples(images, transform, seed, erase)


def eval_samples(
    images: Images | StreamedImages, transform: Transform
) -> EvalSamples | StreamedEvalSamples:
    """The evaluation samples of either kind of data set."""
    if isinstance(images, StreamedImages):
        return StreamedEvalSamples(images, transform)
    return EvalSamples(images, transform)
