"""Training and evaluation samples with keyed draws, and the batch that they are collated into.

A sample's augmentation depends on its place (seed, epoch, index, position) alone. Resuming and the
number of workers or processes do not change it. Training images are passed on as uint8 pixels, a
quarter of the size of float32; the step normalises and erases them on the device.

Letters: B batch, H height, W width, M boxes to erase per image, L operations per image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from errors import InputError, SampleError
from pipeline import erasing, randaugment
from pipeline.erasing import Erasing
from pipeline.images import Images, StreamedImages, UnreadableSampleError
from pipeline.transforms import PendingAugment, Pixels, Transform
from samplers import Place
from utils import keyed_generator, keyed_globals

SUBSTITUTES = 20  # how many other images are tried in place of an unreadable one

ReadImage = Callable[[int], tuple[Pixels, int]]  # index -> decoded image, label


class Sample(NamedTuple):
    """One training image, and the draws that are applied later, in the batch."""

    image: Tensor  # (3, H, W)
    label: int
    number: int  # index in the data set; for a stream the running number in the epoch
    replaced: bool  # image `number` cannot be read, and `image` is another one
    boxes: list[erasing.Box]  # M, to be erased after the operations
    operations: list[randaugment.Row]  # L, flip and RandAugment on the device; L = 0 for none


class Batch(NamedTuple):
    """A batch of a training loader. Float images need no boxes and no operations."""

    images: Tensor  # (B, 3, H, W), uint8 with channels last in memory, or float
    labels: Tensor  # (B,) int64
    indices: Tensor  # (B,) int64
    replaced: Tensor | None = None  # (B,) bool, see `Sample`
    boxes: Tensor | None = None  # (B, M, 4) int64, see `erasing.as_tensor`
    operations: Tensor | None = None  # (B, L, 8), see `randaugment.as_tensor`; L = 0 for none


def make_batch(samples: Iterable[tuple[int, Sample]], size: int) -> Batch:
    """Collates `size` samples. Each image is copied once, into its row of the batch.

    Args:
        samples: (row in the batch, sample), in any order.
    """
    images = torch.empty(0)
    rows: dict[int, Sample] = {}
    for row, sample in samples:
        if images.ndim == 1:
            shape = (size, *sample.image.shape)
            images = torch.empty(shape, dtype=sample.image.dtype, memory_format=torch.channels_last)
        images[row] = sample.image
        rows[row] = sample._replace(image=torch.empty(0))  # frees its memory: it is copied
    in_order = [rows[row] for row in range(size)]
    return Batch(
        images,
        torch.tensor([sample.label for sample in in_order]),
        torch.tensor([sample.number for sample in in_order]),
        torch.tensor([sample.replaced for sample in in_order]),
        erasing.as_tensor([sample.boxes for sample in in_order]),
        randaugment.as_tensor([sample.operations for sample in in_order]),
    )


def collate_samples(samples: list[Sample]) -> Batch:
    """Collates samples that were read one by one, such as those of a stream."""
    return make_batch(enumerate(samples), len(samples))


def identity_collate(batch: Batch) -> Batch:
    """The collate function for samples that are a batch already."""
    return batch


def draw_sample(
    transform: Transform,
    image: Pixels,
    label: int,
    number: int,
    erase: Erasing,
    replaced: bool = False,
) -> Sample:
    """Makes all draws of one sample: those of the transform, then the boxes to erase."""
    result = transform(image)
    pixels, operations = result if isinstance(result, PendingAugment) else (result, [])
    boxes = erase.draw((pixels.shape[1], pixels.shape[2]))
    return Sample(pixels, label, number, replaced, boxes, operations)


class TrainSamples(Dataset[Sample]):
    """Training samples: a place (epoch, index, position) -> `Sample`, a list of places -> `Batch`.

    All draws are keyed by the seed and the place.

    Args:
        images: the data set.
        transform: a decoded image -> (3, H, W), or `pipeline.transforms.PendingAugment`.
        seed: of the run.
        skip_corrupt: replace an image that cannot be decoded by another image and its label. The
            draw of the other image is keyed too. Errors of the transform are always raised.
        erase: draws the boxes, after all other draws of the sample.
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
        return self.sample_at(place, self.images.__getitem__)

    def __getitems__(self, places: list[Place]) -> Batch:
        """A whole batch, for torch's loader. Several views of one image are decoded once."""
        read = lru_cache(maxsize=1)(self.images.__getitem__)
        rows = sorted(range(len(places)), key=places.__getitem__)
        samples = ((row, self.sample_at(places[row], read)) for row in rows)
        return make_batch(samples, len(places))

    def sample_at(self, place: Place, read: ReadImage) -> Sample:
        """The sample of a place; `read` decodes its image."""
        image, label, replaced = self.read_or_replace(place, read)
        with keyed_globals("sample", self.seed, *place):
            return draw_sample(self.transform, image, label, place[1], self.erase, replaced)

    def read_or_replace(self, place: Place, read: ReadImage) -> tuple[Pixels, int, bool]:
        """The image of a place and its label, or those of a substitute.

        Returns:
            The image, its label, and whether they are those of a substitute.

        Raises:
            SampleError: the image cannot be read, and `skip_corrupt` is false or none of
                `SUBSTITUTES` other images can be read either.
        """
        try:
            return *read(place[1]), False
        except UnreadableSampleError as error:
            if not self.skip_corrupt:
                raise
            bad = error
        generator = keyed_generator("substitute", self.seed, *place)
        draws = torch.randint(len(self.images), (SUBSTITUTES,), generator=generator)
        for other in draws.tolist():
            with suppress(UnreadableSampleError):  # it will be reported when its turn comes
                return *self.images[other], True
        raise SampleError(
            f"{bad.text}; nor can any of {SUBSTITUTES} images drawn in its place"
        ) from bad


class EvalSamples(Dataset[tuple[torch.Tensor, int]]):
    """Evaluation samples: index -> (image (3, H, W) float32, label)."""

    def __init__(self, images: Images, transform: Transform) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.images[index]
        return self.transform(image), label


class StreamedSamples(IterableDataset[Sample]):
    """The training samples of a stream; `Sample.number` is the running number in the epoch.

    Draws are keyed by (seed, epoch, rank, worker, count), and the shards of a worker depend on the
    numbers of workers and ranks. A run can therefore be repeated exactly only with the same numbers
    of both. Each worker gives its share of the epoch's batches, and starts its shards again if
    timm's rounding makes them too short. All ranks therefore make the same number of steps.
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
        """Sets this rank's share of the epoch; the arguments are those of `EpochBatches`."""
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.steps_per_epoch = self.images.num_images // (batch_size * world_size * accum_steps)
        self.num_batches = self.steps_per_epoch * accum_steps

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.images.source.set_epoch(epoch)  # timm shuffles the shards with it

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
                    number = self.rank + self.world_size * (worker + workers * count)
                    sample = draw_sample(self.transform, image, label, number, self.erase)
                yield sample
                count += 1
            if count == begin:
                why = self.images.why_empty(worker + workers * self.rank)
                raise InputError(f"worker {worker} of rank {self.rank} {why}")


class StreamedEvalSamples(IterableDataset[tuple[torch.Tensor, int]]):
    """The evaluation samples of a stream: (image (3, H, W) float32, label)."""

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
    """The training samples of a data set or a stream; arguments as in `TrainSamples`.

    Raises:
        InputError: `skip_corrupt` with a stream.
    """
    if not isinstance(images, StreamedImages):
        return TrainSamples(images, transform, seed, skip_corrupt, erase)
    if skip_corrupt:
        raise InputError(
            "--skip-corrupt is not for streams: timm/wds/ leaves unreadable images out by itself, "
            "the other streams stop at them; leave the flag out"
        )
    return StreamedSamples(images, transform, seed, erase)


def eval_samples(
    images: Images | StreamedImages, transform: Transform
) -> EvalSamples | StreamedEvalSamples:
    """The evaluation samples of a data set or a stream."""
    if isinstance(images, StreamedImages):
        return StreamedEvalSamples(images, transform)
    return EvalSamples(images, transform)
