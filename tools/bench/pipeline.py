"""Benchmarks of the input pipeline on one core, from JPEG files to a training batch.

The reference is the work of DeiT's loader worker with timm's transform: decode with Pillow,
RandomResizedCrop, flip, RandAugment, to float, normalise, erase, stack. Our cases run
`pipeline.samples.TrainSamples` as a worker does; the device's part is a separate case, on this core
or, in `finish_cases`, on another device. A measurement is one batch of `BATCH` images; all cases
with one view use the same files and draws.
"""

from __future__ import annotations

import atexit
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from timm.data import create_transform
from torchvision.datasets.folder import pil_loader

import utils
from errors import InputError
from pipeline import images as pipeline_images
from pipeline.erasing import Erasing
from pipeline.images import Decode, Images, decode_simplejpeg, read_files
from pipeline.pillow import ENDINGS, decode_pillow
from pipeline.samples import Batch, TrainSamples
from pipeline.spec import AUGMENTERS, Augment, ImageSpec
from pipeline.transforms import FinishBatch, build_train_transform, guard_posterize
from samplers import Place
from tools.bench.image_folder import make_image_folder
from tools.bench.timing import Case
from utils import keyed_globals

MAX_FILES = 150  # images used from a folder
GENERATED_SIZE = (500, 375)  # width and height of generated pictures
BATCH, REPEATS = 48, 3


class Inputs(NamedTuple):
    """Image files, and how they are augmented."""

    files: list[str]
    spec: ImageSpec
    augment: Augment = Augment()

    def samples(
        self, decode: Decode = decode_pillow, resize: str = "pillow", randaugment: str = "cpu"
    ) -> TrainSamples:
        read = partial(read_files, [(path, 0) for path in self.files], decode=decode)
        transform = build_train_transform(
            self.spec, replace(self.augment, resize=resize, randaugment=randaugment)
        )
        erasing = Erasing(self.augment.reprob, self.augment.recount)
        return TrainSamples(Images(len(self.files), read, ["any"]), transform, 0, erase=erasing)

    def places(self, views: int) -> Iterator[list[Place]]:
        """Endless batches of `BATCH` places, with `views` of each image in a row."""
        numbers = itertools.count()
        while True:
            entries = itertools.islice(numbers, BATCH)
            yield [(0, position // views % len(self.files), position) for position in entries]


def find_files(data_path: str) -> list[str]:
    """At most `MAX_FILES` images at any depth of a folder; without one, generated pictures.

    Raises:
        InputError: the folder holds no image.
    """
    if not data_path:
        temporary = tempfile.TemporaryDirectory()
        atexit.register(temporary.cleanup)
        folder = Path(temporary.name) / "images"
        data_path = str(
            make_image_folder(folder, per_class=12, splits=("train",), size=GENERATED_SIZE)
        )
    names = (path for path in sorted(Path(data_path).rglob("*")) if path.suffix.lower() in ENDINGS)
    files = [str(path) for path in itertools.islice(names, MAX_FILES)]
    if not files:
        raise InputError(f"--data-path {data_path}: holds no image")
    return files


def plain_transform(inputs: Inputs) -> Any:
    """timm's transform as DeiT uses it, with the guard of `pipeline.transforms.posterize`."""
    augment = inputs.augment
    transform = create_transform(
        inputs.spec.input_size,
        is_training=True,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto,
        interpolation=augment.interpolation,
        re_prob=augment.reprob,
        re_mode=augment.remode,
        re_count=augment.recount,
    )
    for step in transform.transforms:
        guard_posterize(step)
    return transform


def plain_batches(
    inputs: Inputs, transform: Any = None, decode: Callable[[str], Any] = pil_loader
) -> Callable[[], Any]:
    """Makes batches as DeiT does, which decodes with torchvision."""
    transform = transform or plain_transform(inputs)
    places = inputs.places(views=1)

    def load() -> torch.Tensor:
        loaded = []
        for place in next(places):
            image = decode(inputs.files[place[1]])
            with keyed_globals("sample", 0, *place):
                loaded.append(transform(image))
        return torch.stack(loaded)  # (B, 3, H, W) float32

    return load


def our_batches(inputs: Inputs, samples: TrainSamples, views: int = 1) -> Callable[[], Batch]:
    """Makes batches as our worker does: pixels, boxes and operations."""
    places = inputs.places(views)
    return lambda: samples.__getitems__(next(places))


def finished(
    inputs: Inputs, batch: Batch, device: torch.device | None = None
) -> Callable[[], torch.Tensor]:
    """The device's part: copy to the device, apply operations, normalise and erase."""
    device = device or torch.device("cpu")
    finish_batch = FinishBatch(inputs.spec, inputs.augment.remode)
    assert batch.boxes is not None
    assert batch.operations is not None
    host_images, host_boxes, operations = (
        part.pin_memory() if device.type == "cuda" else part
        for part in (batch.images, batch.boxes, batch.operations)
    )

    def finish() -> torch.Tensor:
        images, boxes = (part.to(device, non_blocking=True) for part in (host_images, host_boxes))
        return finish_batch(images.contiguous(), boxes, operations)

    return finish


def finish_cases(data_path: str, size: int, batch_size: int, device: torch.device) -> list[Case]:
    """The device's part of a batch, without and with RandAugment; arguments as in `cases`."""
    inputs = Inputs(find_files(data_path), ImageSpec((size, size)))
    places = [(0, position % len(inputs.files), position) for position in range(batch_size)]
    offered = AUGMENTERS[: 1 if device.type == "mps" else 2]  # MPS has no float64
    batches = {name: inputs.samples(randaugment=name).__getitems__(places) for name in offered}
    return [
        Case(f"finish, --randaugment {name}", finished(inputs, batch, device))
        for name, batch in batches.items()
    ]


def in_a_worker(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as in a loader worker, where the global random state need not be restored."""

    def pretending() -> Any:
        with patch.object(utils, "get_worker_info", lambda: "a worker"):
            return run()

    return pretending


def cases(data_path: str, size: int) -> list[Case]:
    """All cases, the reference first. Those with simplejpeg need it to be installed.

    Args:
        data_path: a folder with images anywhere in it, or empty.
        size: side of the training images, in pixels.
    """
    inputs = Inputs(find_files(data_path), ImageSpec((size, size)))
    once = inputs.samples()
    made: list[tuple[str, Callable[[], Any]]] = [
        ("DeiT's: float images of a worker", plain_batches(inputs)),
        ("DeiT's again", plain_batches(inputs)),
        ("pixels, --decoder pillow", our_batches(inputs, once)),
        ("pixels, pillow, --resize torch", our_batches(inputs, inputs.samples(resize="torch"))),
        ("pixels, pillow, 3 views", our_batches(inputs, once, REPEATS)),
    ]
    if pipeline_images.simplejpeg is not None:
        fast = inputs.samples(decode_simplejpeg)
        both = inputs.samples(decode_simplejpeg, "torch")
        least = inputs.samples(decode_simplejpeg, "torch", "device")
        made += [
            ("pixels, simplejpeg (the default)", our_batches(inputs, fast)),
            ("pixels, simplejpeg, --resize torch", our_batches(inputs, both)),
            (
                "pixels, simplejpeg, 3 views (the default with repeats)",
                our_batches(inputs, fast, REPEATS),
            ),
            ("pixels, simplejpeg, --resize torch, 3 views", our_batches(inputs, both, REPEATS)),
            (
                "pixels, simplejpeg, --resize torch, --randaugment device",
                our_batches(inputs, least),
            ),
            (
                "pixels, simplejpeg, --resize torch, --randaugment device, 3 views",
                our_batches(inputs, least, REPEATS),
            ),
        ]
    pending = our_batches(inputs, inputs.samples(randaugment="device"))()
    batch = our_batches(inputs, once)()
    on_device = "the device's part with --randaugment device, on this core"
    made.append(("the device's part, on this core", finished(inputs, batch)))
    made.append((on_device, finished(inputs, pending)))
    return [Case(name, in_a_worker(run), images=BATCH) for name, run in made]
