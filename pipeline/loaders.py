"""Builds the loaders of training and evaluation batches, and chooses their epoch.

Letters: B batch, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from errors import InputError
from pipeline.samples import (
    EvalSamples,
    StreamedEvalSamples,
    StreamedSamples,
    TrainSamples,
    collate_samples,
    identity_collate,
)
from pipeline.workers import Loader, explain_errors
from samplers import EpochBatches, EvalShard
from utils import key_seed, keyed_generator


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
    """A loader of `Batch`; `set_epoch` chooses its epoch.

    Args:
        batch_size: B, images of this rank per micro-batch.
        rank, world_size: number of this process, and the number of processes.
        seed: of the order of the images.
        repeats: views of each image per epoch, see `EpochBatches`.
        layout: how the views are distributed to ranks, see `EpochBatches`.
        accum_steps: micro-batches per step.
        num_workers: worker processes; 0 loads in this process. A stream has at least one worker,
            because torch gives a new seed per epoch to workers only.
        pin_memory: whether batches are copied to pinned memory.
        timeout: seconds to wait for a batch of a worker; 0 waits without limit.

    Raises:
        InputError: the images do not fill one step, or a stream would have to repeat its images.
    """
    _check_one_step(samples.images.num_images, batch_size, world_size, accum_steps)
    shares: dict[str, Any] = {
        "batch_size": batch_size,
        "rank": rank,
        "world_size": world_size,
        "accum_steps": accum_steps,
    }
    # torch draws the workers' seeds from `generator` and not from the global generator, so starting
    # workers does not change the run's draws.
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
    # Its workers are started in each epoch, because they read the epoch when they start.
    common.update(
        batch_size=batch_size, num_workers=workers, timeout=timeout, collate_fn=collate_samples
    )
    loader = Loader(samples, **common)
    set_epoch(loader, 0)
    return loader


def _check_one_step(num_images: int, batch_size: int, world_size: int, accum_steps: int) -> None:
    largest = num_images // (world_size * accum_steps)
    if batch_size <= largest:
        return
    fix = f"use at most {largest}"
    if largest == 0:
        fix = "add images, or use fewer processes or accumulation steps"
    raise InputError(
        f"--batch-size {batch_size}: {num_images} training images do not fill one step of "
        f"{world_size} processes x {accum_steps} batches; {fix}"
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
    """A loader of (images (B, 3, H, W) float32, labels (B,) int64) for evaluation.

    Each image is evaluated once, by one rank. Nothing is padded: the last batch may be smaller, and
    ranks may have different numbers of batches. Arguments as in `build_train_loader`.
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
    """Ends the loaders' workers on exit, and turns torch's errors about workers into messages.

    torch raises the error about a dead worker wherever the process is at that moment, so this
    context must contain all work.

    Raises:
        StuckLoader: a worker hangs or was killed. The message names it and its next images.
    """
    try:
        with explain_errors(*loaders):
            yield
    finally:
        for loader in loaders:
            loader.close()


def set_epoch(loader: DataLoader[Any], epoch: int, start: int = 0) -> None:
    """Chooses the epoch that the next iteration of a training loader yields.

    Args:
        start: number of images of this epoch that all ranks together have trained on already. It
            must be 0 for a stream, which can be resumed only at the beginning of an epoch.
    """
    samples = loader.dataset
    if isinstance(samples, StreamedSamples):
        assert start == 0, "streams are resumed at the beginning of an epoch"
        samples.set_epoch(epoch)
        loader.generator.manual_seed(key_seed("workers", samples.seed, epoch, samples.rank))
    elif isinstance(loader.batch_sampler, EpochBatches):
        loader.batch_sampler.set_epoch(epoch, start)


def steps_per_epoch(loader: DataLoader[Any]) -> int:
    """Optimizer steps per epoch of a training loader, the same on all ranks."""
    source = loader.dataset if isinstance(loader.dataset, StreamedSamples) else loader.batch_sampler
    assert isinstance(source, (StreamedSamples, EpochBatches)), "not a training loader"
    return source.steps_per_epoch


def can_start_mid_epoch(loader: DataLoader[Any]) -> bool:
    """Whether a training loader can start at any step of an epoch; a stream cannot."""
    return not isinstance(loader.dataset, StreamedSamples)


def largest_share(loader: DataLoader[Any]) -> int:
    """The largest number of batches of one rank in evaluation; 0 (unknown) for a stream."""
    if not isinstance(loader.sampler, EvalShard):
        return 0
    assert loader.batch_size is not None
    return -(-loader.sampler.largest // loader.batch_size)
