"""The input pipeline on one core: from JPEG files to a training batch, beside DeiT's plain one.

The reference is what DeiT's loader worker does with timm's transform: Pillow's decoder, RandomResizedCrop, flip,
RandAugment, float, normalised, erased, stacked. Ours are `loaders.TrainSamples` as a worker runs them; what they leave
to the device is a case of its own, on this core. A measurement is one batch of `BATCH` images, with the same files and
draws in all cases of one view.
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
from torchvision.datasets.folder import IMG_EXTENSIONS

import decoding
import utils
from batches import Batch
from benchmarks.timing import Case
from decoding import Decode, decode_pillow, decode_simplejpeg
from erasing import Erasing, erase
from images import Images, read_files
from loaders import TrainSamples
from samplers import Place
from tests.image_folders import make_image_folder
from transforms import Augment, ImageSpec, build_train_transform, guard_posterize, normalise
from utils import InputError, keyed_globals

FILES, MADE_UP_SIZE = 150, (500, 375)  # so many of a folder; pictures where there is none
BATCH, REPEATS = 48, 3


class Inputs(NamedTuple):
    """Files, and what they are made into."""

    files: list[str]
    spec: ImageSpec
    augment: Augment = Augment()

    def samples(self, decode: Decode = decode_pillow, resize: str = "pillow") -> TrainSamples:
        read = partial(read_files, [(path, 0) for path in self.files], decode=decode)
        transform = build_train_transform(self.spec, replace(self.augment, resize=resize))
        erasing = Erasing(self.augment.reprob, self.augment.recount)
        return TrainSamples(Images(len(self.files), read, ["any"]), transform, 0, erase=erasing)

    def places(self, views: int) -> Iterator[list[Place]]:
        """Batches without end: each of `BATCH` entries, with `views` of an image in a row."""
        numbers = itertools.count()
        while True:
            entries = itertools.islice(numbers, BATCH)
            yield [(0, position // views % len(self.files), position) for position in entries]


def find_files(data_path: str) -> list[str]:
    """At most `FILES` images anywhere under a folder; without one, pictures made up for the occasion.

    Raises:
        InputError: no image is there.
    """
    if not data_path:
        made = tempfile.TemporaryDirectory()
        atexit.register(made.cleanup)
        folder = Path(made.name) / "images"
        data_path = str(make_image_folder(folder, per_class=12, splits=("train",), size=MADE_UP_SIZE))
    names = (path for path in sorted(Path(data_path).rglob("*")) if path.suffix.lower() in IMG_EXTENSIONS)
    files = [str(path) for path in itertools.islice(names, FILES)]
    if not files:
        raise InputError(f"--data-path {data_path}: no image in it")
    return files


def plain_batches(inputs: Inputs) -> Callable[[], Any]:
    """DeiT's own way, through timm's transform (which needs a guard, see `transforms.posterize`)."""
    augment = inputs.augment
    transform = create_transform(
        inputs.spec.input_size, is_training=True, color_jitter=augment.color_jitter, auto_augment=augment.auto,
        interpolation=augment.interpolation, re_prob=augment.reprob, re_mode=augment.remode, re_count=augment.recount,
    )  # fmt: skip
    for step in transform.transforms:
        guard_posterize(step)
    places = inputs.places(views=1)

    def load() -> torch.Tensor:
        made = []
        for place in next(places):
            image = decode_pillow(inputs.files[place[1]])
            with keyed_globals("sample", 0, *place):
                made.append(transform(image))
        return torch.stack(made)  # (B, 3, H, W) float32

    return load


def our_batches(inputs: Inputs, samples: TrainSamples, views: int = 1) -> Callable[[], Batch]:
    """A worker's part: pixels and boxes."""
    places = inputs.places(views)
    return lambda: samples.__getitems__(next(places))


def finished(inputs: Inputs, batch: Batch) -> Callable[[], torch.Tensor]:
    """The device's part, here: normalise and erase."""
    return lambda: erase(normalise(batch.images.contiguous(), inputs.spec), batch.boxes, inputs.augment.remode)


def in_a_worker(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as in a loader worker, where nobody else's random state has to be put back after each sample."""

    def pretending() -> Any:
        with patch.object(utils, "get_worker_info", lambda: "a worker"):
            return run()

    return pretending


def cases(data_path: str, size: int) -> list[Case]:
    """Reference first; the cases with simplejpeg are left out where it is not installed.

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
    if decoding.simplejpeg is not None:
        fast = inputs.samples(decode_simplejpeg)
        both = inputs.samples(decode_simplejpeg, "torch")
        made += [
            ("pixels, simplejpeg (the default)", our_batches(inputs, fast)),
            ("pixels, simplejpeg, --resize torch", our_batches(inputs, both)),
            ("pixels, simplejpeg, 3 views (the default with repeats)", our_batches(inputs, fast, REPEATS)),
            ("pixels, simplejpeg, --resize torch, 3 views", our_batches(inputs, both, REPEATS)),
        ]
    made.append(("the device's part, on this core", finished(inputs, our_batches(inputs, once)())))
    return [Case(name, in_a_worker(run)) for name, run in made]
