"""From images to batches: samples with draws keyed by position, and the loaders.

Level 3: imports `utils`, `batches`, `images`, `erasing`, `samplers`, `transforms` and `workers`. It must not know data
sets by name, mixing, models or process groups; ranks are arguments.

A sample's augmentation depends on (seed, epoch, index, position) alone, so resuming, the number of workers and of ranks
leave it as it is. Training images are handed over as pixels, a quarter of their size as float32; the step normalises
and erases them on its device. Letters: B batch, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from batches import Batch, Sample, as_it_is, in_order, make_batch
from cropping import Pixels
from erasing import Erasing
from images import Images, StreamedImages, UnreadableSampleError
from samplers import EpochBatches, EvalShard, Place
from transforms import Transform, Undone
from utils import InputError, SampleError, key_seed, keyed_generator, keyed_globals
from workers import Loader, explaining

SUBSTITUTES = 20  # images that are tried in the place of one that cannot be read

# ------------------------------------------------------------------------------------------------------ samples


def draw_sample(transform: Transform, image: Pixels, label: int, shown: int, erase: Erasing) -> Sample:
    """All draws of one sample: those of the transform, then the boxes."""
    made = transform(image)
    pixels, operations = made if isinstance(made, Undone) else (made, [])
    return Sample(pixels, label, shown, erase.draw((pixels.shape[1], pixels.shape[2])), operations)


class TrainSamples(Dataset[Sample]):
    """(epoch, index, position) -> `Sample`, with draws keyed by that place; many places at once -> `Batch`.

    Args:
        transform: a decoded image -> (3, H, W), or `transforms.Undone`.
        erase: draws the boxes, last of a sample's draws.
        skip_corrupt: an image that cannot be decoded is replaced by another with its own label, drawn from the same
            place, and its index i is given as ~i = -1 - i. Errors of the transform surface either way.
    """

    def __init__(
        self, images: Images, transform: Transform, seed: int, skip_corrupt: bool = False, erase: Erasing | None = None
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
        """What torch's loader asks for: a whole batch. Views of one image share its decoding, one after the other."""
        look = lru_cache(maxsize=1)(self.images.__getitem__)
        rows = sorted(range(len(places)), key=places.__getitem__)
        return make_batch(((row, self.show(places[row], look)) for row in rows), len(places))

    def show(self, place: Place, look: Callable[[int], tuple[Pixels, int]]) -> Sample:
        """The sample of a place, its image decoded by `look`."""
        image, label, shown = self.read(place, look)
        with keyed_globals("sample", self.seed, *place):
            return draw_sample(self.transform, image, label, shown, self.erase)

    def read(self, place: Place, look: Callable[[int], tuple[Pixels, int]]) -> tuple[Pixels, int, int]:
        """The image of a place or its substitute, the label, and the index, inverted for a substitute.

        Raises:
            SampleError: it cannot be read, and replacing is off or none of `SUBSTITUTES` others can be read either.
        """
        index = place[1]
        try:
            return *look(index), index
        except UnreadableSampleError as error:
            if not self.skip_corrupt:
                raise
            bad = error
        draws = torch.randint(
            len(self.images), (SUBSTITUTES,), generator=keyed_generator("substitute", self.seed, *place)
        )
        for other in draws.tolist():
            with suppress(UnreadableSampleError):  # that one is counted where it is itself due
                return *self.images[other], ~index
        raise SampleError(f"{bad.text}; nor can any of {SUBSTITUTES} images drawn in its place") from bad


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

    Draws are keyed by (seed, epoch, rank, worker, count), and who reads which shard depends on workers and ranks: a run
    repeats exactly only with the same number of both. Every worker deals its share of the epoch's batches and starts
    its shards again where timm's rounding leaves it short, so all ranks make the same number of steps.
    """

    def __init__(self, images: StreamedImages, transform: Transform, seed: int, erase: Erasing | None = None) -> None:
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
                raise InputError(f"worker {worker} of rank {self.rank} has no shard to read: lower --num-workers")


class StreamedEvalSamples(IterableDataset[tuple[torch.Tensor, int]]):
    """A stream's (image (3, H, W) float32, label)."""

    def __init__(self, images: StreamedImages, transform: Transform) -> None:
        self.images = images
        self.transform = transform

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        for image, label in self.images:
            yield self.transform(image), label


def train_samples(
    images: Images | StreamedImages, transform: Transform, seed: int, skip_corrupt: bool = False,
    erase: Erasing | None = None,
) -> TrainSamples | StreamedSamples:  # fmt: skip
    """The training samples of either kind of data set; arguments as in `TrainSamples`.

    Raises:
        InputError: unreadable images of a stream shall be replaced.
    """
    if not isinstance(images, StreamedImages):
        return TrainSamples(images, transform, seed, skip_corrupt, erase)
    if skip_corrupt:
        raise InputError(
            "--skip-corrupt is not for streams: timm/wds/ leaves unreadable images out by itself, the others stop "
            "there; leave the flag out"
        )
    return StreamedSamples(images, transform, seed, erase)


def eval_samples(images: Images | StreamedImages, transform: Transform) -> EvalSamples | StreamedEvalSamples:
    """The evaluation samples of either kind of data set."""
    if isinstance(images, StreamedImages):
        return StreamedEvalSamples(images, transform)
    return EvalSamples(images, transform)


# ------------------------------------------------------------------------------------------------------ loaders


def build_train_loader(
    samples: TrainSamples | StreamedSamples,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    repeats: int = 1,
    layout: str = "blocks",
    accum_steps: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    timeout: float = 0,
) -> Loader:
    """Loader of `Batch`, per `set_epoch`.

    Args:
        batch_size: B, images of this rank per micro-batch.
        repeats: views of each image per epoch, see `EpochBatches`.
        layout: how they are dealt to ranks.
        num_workers: 0 loads in this process; a stream always has a worker, as torch seeds only workers anew.
        timeout: seconds to wait for a worker, 0 for ever.

    Raises:
        InputError: not one optimizer step's worth of images, or repeats of a stream.
    """
    _check_one_step(samples.images.num_images, batch_size, world_size, accum_steps)
    shares: dict[str, Any] = {
        "batch_size": batch_size,
        "rank": rank,
        "world_size": world_size,
        "accum_steps": accum_steps,
    }
    # torch draws the workers' seeds from `generator`, so that starting them leaves the run's own generator alone
    common: dict[str, Any] = {"pin_memory": pin_memory, "generator": torch.Generator()}
    if isinstance(samples, TrainSamples):
        batches = EpochBatches(
            num_images=len(samples), repeats=repeats, layout=layout,
            make_generator=partial(keyed_generator, seed, "order"), **shares,
        )  # fmt: skip
        if num_workers:
            common.update(num_workers=num_workers, persistent_workers=True, timeout=timeout)
        common.update(batch_sampler=batches, collate_fn=as_it_is)
        return Loader(samples, name_of=samples.images.name_of, **common)
    if repeats > 1:
        raise InputError("a streamed data set cannot repeat its images within an epoch: add --no-repeated-aug")
    samples.deal(**shares)
    workers = max(1, num_workers)
    samples.images.source.set_loader_cfg(num_workers=workers)
    # its workers are new in each epoch: they learn of it as they start
    common.update(batch_size=batch_size, num_workers=workers, timeout=timeout, collate_fn=in_order)
    loader = Loader(samples, **common)
    set_epoch(loader, 0)
    return loader


def _check_one_step(num_images: int, batch_size: int, world_size: int, accum_steps: int) -> None:
    fits = num_images // (world_size * accum_steps)
    if batch_size > fits:
        fix = f"use at most {fits}" if fits else "add images, or use fewer processes or accumulation steps"
        raise InputError(
            f"--batch-size {batch_size}: {num_images} training images do not fill one step of {world_size} processes x "
            f"{accum_steps} batches; {fix}"
        )


def build_eval_loader(
    samples: EvalSamples | StreamedEvalSamples,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    timeout: float = 0,
) -> Loader:
    """Loader of (images (B, 3, H, W) float32, labels (B,) int64): every image once over all ranks, nothing padded.

    The last batch may be smaller, and ranks may differ in length.
    """
    settings: dict[str, Any] = {"batch_size": batch_size, "pin_memory": pin_memory, "generator": torch.Generator()}
    if num_workers:
        settings.update(num_workers=num_workers, persistent_workers=True, timeout=timeout)
    if isinstance(samples, StreamedEvalSamples):
        return Loader(samples, **settings)
    shard = EvalShard(len(samples), rank, world_size)
    return Loader(samples, name_of=samples.images.name_of, sampler=shard, **settings)


@contextmanager
def closing(*loaders: Loader) -> Iterator[None]:
    """Ends the loaders' workers at the end, and says what became of a worker that failed inside.

    torch tells of a dead worker wherever the process is at that moment, so all of the work belongs inside.

    Raises:
        StuckLoader: a worker hangs or was killed; it and the images that it owes are named.
    """
    try:
        with explaining(*loaders):
            yield
    finally:
        for loader in loaders:
            loader.close()


def set_epoch(loader: DataLoader[Any], epoch: int, start: int = 0) -> None:
    """Chooses the epoch that the next iteration of a training loader gives, of either kind.

    Args:
        start: images of all ranks that are done in it; a stream has no place to go on from but its beginning.
    """
    samples = loader.dataset
    if isinstance(samples, StreamedSamples):
        assert start == 0, "streams are resumed at the beginning of an epoch"
        samples.set_epoch(epoch)
        loader.generator.manual_seed(key_seed("workers", samples.seed, epoch, samples.rank))
    elif isinstance(loader.batch_sampler, EpochBatches):
        loader.batch_sampler.set_epoch(epoch, start)


def steps_per_epoch(loader: DataLoader[Any]) -> int:
    """Optimizer steps that a training loader gives per epoch, the same on every rank."""
    source = loader.dataset if isinstance(loader.dataset, StreamedSamples) else loader.batch_sampler
    assert isinstance(source, (StreamedSamples, EpochBatches)), "not a training loader"
    return source.steps_per_epoch


def can_start_within(loader: DataLoader[Any]) -> bool:
    """Whether an epoch of this training loader can begin at any of its steps: not so with a stream."""
    return not isinstance(loader.dataset, StreamedSamples)


def largest_share(loader: DataLoader[Any]) -> int:
    """Batches of an evaluation loader on the rank that has most; 0 for a stream, which does not know."""
    if not isinstance(loader.sampler, EvalShard):
        return 0
    assert loader.batch_size is not None
    return -(-loader.sampler.largest // loader.batch_size)
