"""From images to batches: samples with draws keyed by position, and the loaders.

Level 3: imports `utils`, `batches`, `images`, `erasing`, `samplers`, `transforms` and `workers`. It
must not know data sets by name, mixing, models or process groups; ranks are arguments.

A sample's augmentation depends on (seed, epoch, index, position) alone, so resuming, the number of
workers and of ranks leave it as it is. Training images are handed over as pixels, a quarter of
their size as float32; the step normalises and erases them on its device. Letters: B batch, H
height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from pipeline.samples import (
    EvalSamples,
    StreamedEvalSamples,
    StreamedSamples,
    TrainSamples,
    collate_samples,
    identity_collate,
)
from pipeline.workers import Loader, explaining
from samplers import EpochBatches, EvalShard
from utils import InputError, key_seed, keyed_generator

# ------------------------------------------------------------------------------------------ samples


# ------------------------------------------------------------------------------------------ loaders


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
        num_workers: 0 loads in this process; a stream always has a worker, as torch seeds only
            workers anew.
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
    # torch draws the workers' seeds from `generator`, so that starting them leaves the run's own
    # generator alone
    common: dict[str, Any] = {"pin_memory": pin_memory, "generator": torch.Generator()}
    if isinstance(samples, TrainSamples):
        batches = EpochBatches(
            num_images=len(samples),
            repeats=repeats,
            layout=layout,
            make_generator=partial(keyed_generator, seed, "order"),
            **shares,
        )
        if num_workers:
            common.update(num_workers=num_workers, persistent_workers=True, timeout=timeout)
        common.update(batch_sampler=batches, collate_fn=identity_collate)
        return Loader(samples, name_of=samples.images.name_of, **common)
    if repeats > 1:
        raise InputError(
            "a streamed data set cannot repeat its images within an epoch: add --no-repeated-aug"
        )
    samples.deal(**shares)
    workers = max(1, num_workers)
    samples.images.source.set_loader_cfg(num_workers=workers)
    # its workers are new in each epoch: they learn of it as they start
    common.update(
        batch_size=batch_size, num_workers=workers, timeout=timeout, collate_fn=collate_samples
    )
    loader = Loader(samples, **common)
    set_epoch(loader, 0)
    return loader


def _check_one_step(num_images: int, batch_size: int, world_size: int, accum_steps: int) -> None:
    fits = num_images // (world_size * accum_steps)
    if batch_size > fits:
        fix = (
            f"use at most {fits}"
            if fits
            else "add images, or use fewer processes or accumulation steps"
        )
        raise InputError(
            f"--batch-size {batch_size}: {num_images} training images do not fill one step of "
            f"{world_size} processes x "
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
    """Loader of (images (B, 3, H, W) float32, labels (B,) int64): every image once over all ranks,
    nothing padded.

    The last batch may be smaller, and ranks may differ in length.
    """
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "pin_memory": pin_memory,
        "generator": torch.Generator(),
    }
    if num_workers:
        settings.update(num_workers=num_workers, persistent_workers=True, timeout=timeout)
    if isinstance(samples, StreamedEvalSamples):
        return Loader(samples, **settings)
    shard = EvalShard(len(samples), rank, world_size)
    return Loader(samples, name_of=samples.images.name_of, sampler=shard, **settings)


@contextmanager
def closing(*loaders: Loader) -> Iterator[None]:
    """Ends the loaders' workers at the end, and says what became of a worker that failed inside.

    torch tells of a dead worker wherever the process is at that moment, so all of the work belongs
    inside.

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
        start: images of all ranks that are done in it; a stream has no place to go on from but its
            beginning.
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
    """Whether an epoch of this training loader can begin at any of its steps: not so with a
    stream."""
    return not isinstance(loader.dataset, StreamedSamples)


def largest_share(loader: DataLoader[Any]) -> int:
    """Batches of an evaluation loader on the rank that has most; 0 for a stream, which does not
    know."""
    if not isinstance(loader.sampler, EvalShard):
        return 0
    assert loader.batch_size is not None
    return -(-loader.sampler.largest // loader.batch_size)
