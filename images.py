"""One image with its label, from a file, an array or timm's readers, as PIL RGB.

Level 1: imports `utils` only. It must not know data sets by name, transforms or loaders. What reads images travels into
loader workers, so all of it can be pickled.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from utils import InputError, SampleError


class Images(Dataset[tuple[Image.Image, int]]):
    """(PIL RGB image, label) by index.

    Args:
        read: index -> (PIL RGB image, label); picklable, as it travels into workers.
        class_names: one per label.
        package: what `read` needs; pickled ahead of it.
    """

    def __init__(
        self,
        num_images: int,
        read: Callable[[int], tuple[Image.Image, int]],
        class_names: list[str],
        package: HuggingFace | None = None,
    ) -> None:
        self.package = package  # the first attribute, so the first to be unpickled
        self.num_images = num_images
        self.read = read
        self.class_names = class_names

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.read(index)
        return image, check_label(label, self.class_names, f"image {index}")


class StreamedImages(IterableDataset[tuple[Image.Image, int]]):
    """(PIL RGB image, label) in timm's order, which shards over ranks and workers itself; for timm's iterable readers.

    timm's readers leave unreadable images out with a warning (wds) or stop there (hfids), and in distributed evaluation
    may repeat or miss a few. `package` is what `source` needs.
    """

    def __init__(self, source: Any, class_names: list[str], package: HuggingFace | None = None) -> None:
        self.package = package  # the first attribute, so the first to be unpickled
        self.source = source
        self.num_images: int = source.reader.num_samples
        self.class_names = class_names

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        try:
            for image, label in self.source:
                yield image.convert("RGB"), check_label(label, self.class_names, "a streamed image")
        except (OSError, RuntimeError, SyntaxError, ValueError) as error:
            raise SampleError(f"the stream cannot be read any further ({error})") from error


def check_label(label: Any, class_names: list[str], what: str) -> int:
    """`label` as an int.

    Raises:
        SampleError: it names no class.
    """
    if label is None or not 0 <= int(label) < len(class_names):
        raise SampleError(f"{what} has label {label}, outside the {len(class_names)} classes: check --nb-classes")
    return int(label)


def decode(file: str | IO[bytes], name: str) -> Image.Image:
    """Reads a whole image as RGB, whatever its mode. `name` stands for it in messages.

    Raises:
        SampleError: the file is missing, is no image, or is damaged.
    """
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SampleError(f"{name}: cannot be read as an image ({error}); replace the file or remove it") from error


# ------------------------------------------------------------------------------------------------------ readers


def read_pixels(pixels: np.ndarray, labels: np.ndarray, index: int) -> tuple[Image.Image, int]:
    return Image.fromarray(pixels[index]).convert("RGB"), int(labels[index])


def read_files(samples: list[tuple[str, int]], index: int) -> tuple[Image.Image, int]:
    path, label = samples[index]
    return decode(path, path), label


def read_dataset(dataset: Any, index: int) -> tuple[Image.Image, int]:
    image, label = dataset[index]
    return image.convert("RGB"), label


def read_timm(reader: Any, where: str, index: int) -> tuple[Image.Image, int]:
    """Not through timm's data set, which replaces an unreadable image by the next one."""
    file, label, *_ = reader[index]
    with file:
        return decode(file, f"{getattr(file, 'name', 'an image')} (number {index} of {where})"), label


# ---------------------------------------------------------------------------------------- Hugging Face's `datasets`


class HuggingFace:
    """Stands in a pickle ahead of what needs the package, so that a spawned worker imports the package first."""

    def __reduce__(self) -> tuple[Callable[[], HuggingFace], tuple[()]]:
        return import_hugging_face, ()


def import_hugging_face() -> HuggingFace:
    """Lets `datasets` name the Hugging Face package from here on, which our file of that name hides.

    It stays so, because the package and timm import parts of it when they need them. Our modules keep their references.

    Raises:
        InputError: the package is not installed.
    """
    here = os.path.dirname(os.path.realpath(__file__))
    bound = sys.modules.get("datasets")
    if bound is not None and os.path.realpath(bound.__file__ or "") != os.path.join(here, "datasets.py"):
        return HuggingFace()
    path = sys.path[:]
    sys.path[:] = [folder for folder in path if os.path.realpath(folder) != here]
    sys.modules.pop("datasets", None)
    try:
        importlib.import_module("datasets")
    except ImportError as error:
        if bound is not None:
            sys.modules["datasets"] = bound
        raise InputError(f"--data-set timm/hfds/ and timm/hfids/ need: pip install datasets ({error})") from error
    finally:
        sys.path[:] = path
    return HuggingFace()
