"""From images to batches: samples with draws keyed by position, and the loaders.

Level 2: imports `utils`, `images`, `samplers` and `transforms`. It must not know data sets by name, mixing, models or
process groups; ranks are arguments.

A sample's augmentation depends on (seed, epoch, index, position) alone, so resuming, the number of workers and of ranks
leave it as it is. Letters: B batch, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from images import Images, StreamedImages
from samplers import EpochBatches, EvalShard, Place
from transforms import Transform
from utils import InputError, key_seed, keyed_generator, keyed_globals

# ------------------------------------------------------------------------------------------------------ samples


class TrainSamples(Dataset[tuple[torch.Tensor, int, int]]):
    """(epoch, index, position) -> (image (3, H, W) float32, label, index), with draws keyed by that place."""

    def __init__(self, images: Images, transform: Transform, seed: int) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: Place) -> tuple[torch.Tensor, int, int]:
        epoch, index, position = place
        image, label = self.images[index]
        with keyed_globals("sample", self.seed, epoch, index, position):
            return self.transform(image), label, index


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


class StreamedSamples(IterableDataset[tuple[torch.Tensor, int, int]]):
    """A stream's training samples: (image (3, H, W) float32, label, running number of the sample in the epoch).

    Draws are keyed by (seed, epoch, rank, worker, count), and who reads which shard depends on workers and ranks: a run
    repeats exactly only with the same number of both. Every worker deals its share of the epoch's batches and starts
    its shards again where timm's rounding leaves it short, so all ranks make the same number of steps.
    """

    def __init__(self, images: StreamedImages, transform: Transform, seed: int) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed
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

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int, int]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        quota = len(range(worker, self.num_batches, workers)) * self.batch_size
        count = 0
        while count < quota:
            begin = count
            for image, label in islice(self.images, quota - count):
                with keyed_globals("stream", self.seed, self.epoch, self.rank, worker, count):
                    tensor = self.transform(image)
                yield tensor, label, self.rank + self.world_size * (worker + workers * count)
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


def train_samples(images: Images | StreamedImages, transform: Transform, seed: int) -> TrainSamples | StreamedSamples:
    """The training samples of either kind of data set."""
    if isinstance(images, StreamedImages):
        return StreamedSamples(images, transform, seed)
    return TrainSamples(images, transform, seed)


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
    accum_steps: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    timeout: float = 0,
) -> DataLoader[Any]:
    """Loader of (images (B, 3, H, W) float32, labels (B,) int64, indices (B,) int64), per `set_epoch`.

    Args:
        batch_size: B, images of this rank per micro-batch.
        repeats: views of each image per epoch, see `EpochBatches`.
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
            num_images=len(samples), repeats=repeats, make_generator=partial(keyed_generator, seed, "order"), **shares
        )
        if num_workers:
            common.update(num_workers=num_workers, persistent_workers=True, timeout=timeout)
        return DataLoader(samples, batch_sampler=batches, **common)
    if repeats > 1:
        raise InputError("a streamed data set cannot repeat its images within an epoch: add --no-repeated-aug")
    samples.deal(**shares)
    workers = max(1, num_workers)
    samples.images.source.set_loader_cfg(num_workers=workers)
    # its workers are new in each epoch: they learn of it as they start
    loader: DataLoader[Any] = DataLoader(samples, batch_size, num_workers=workers, timeout=timeout, **common)
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
) -> DataLoader[Any]:
    """Loader of (images (B, 3, H, W) float32, labels (B,) int64): every image once over all ranks, nothing padded.

    The last batch may be smaller, and ranks may differ in length.
    """
    shard = None if isinstance(samples, StreamedEvalSamples) else EvalShard(len(samples), rank, world_size)
    return DataLoader(
        samples,
        batch_size,
        sampler=shard,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        persistent_workers=num_workers > 0,
    )


def set_epoch(loader: DataLoader[Any], epoch: int) -> None:
    """Chooses the epoch that the next iteration of a training loader gives, of either kind."""
    samples = loader.dataset
    if isinstance(samples, StreamedSamples):
        samples.set_epoch(epoch)
        loader.generator.manual_seed(key_seed("workers", samples.seed, epoch, samples.rank))
    elif isinstance(loader.batch_sampler, EpochBatches):
        loader.batch_sampler.set_epoch(epoch)


def steps_per_epoch(loader: DataLoader[Any]) -> int:
    """Optimizer steps that a training loader gives per epoch, the same on every rank."""
    source = loader.dataset if isinstance(loader.dataset, StreamedSamples) else loader.batch_sampler
    assert isinstance(source, (StreamedSamples, EpochBatches)), "not a training loader"
    return source.steps_per_epoch
