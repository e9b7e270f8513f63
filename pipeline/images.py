"""One image with its label, from a file, an array or timm's readers, as RGB.

Level 1: imports `utils` and `decoding` only. It must not know data sets by name, transforms or
loaders. What reads images travels into loader workers, so all of it can be pickled.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from pipeline.hugging_face import HuggingFace
from utils import InputError, SampleError, key_seed

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

File = str | BinaryIO  # a path, or a file that is open at its beginning
Decode = Callable[[File], Image.Image | np.ndarray]
START_OF_JPEG = b"\xff\xd8\xff"


def decode_pillow(file: File) -> Image.Image:
    """The image as RGB; what Pillow raises is told by `pipeline.images.Images`."""
    with Image.open(file) as image:
        if image.mode != "RGB":
            return image.convert("RGB")
        image.load()
        return image  # converting would copy it


def decode_simplejpeg(file: File) -> Image.Image | np.ndarray:
    """The image of a sound JPEG as (H, W, 3) uint8, RGB; of any other file as `decode_pillow` gives
    it."""
    if isinstance(file, str):
        with open(file, "rb") as opened:
            content = opened.read()
    else:
        content = file.read()
    pixels = _decode_strictly(content)
    if pixels is not None:
        return pixels
    if not isinstance(file, str):
        file.seek(0)
    return decode_pillow(file)


def _decode_strictly(content: bytes) -> np.ndarray | None:
    """Pixels of a JPEG without a fault, in the colours that Pillow would give, and of a size that
    it would accept."""
    if not content.startswith(START_OF_JPEG):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if colours not in ("YCbCr", "Gray") or height * width > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        return simplejpeg.decode_jpeg(content, "RGB", strict=True)
    except Exception:  # whatever it says, Pillow has the last word
        return None


# What Pillow raises for a file that is no image, or a damaged one; a test damages files of many
# formats at random.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
RESOURCE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class UnreadableSampleError(SampleError):
    """An image cannot be decoded. Its name ends like its parent's, by which `StopRun.text` finds
    the message."""


class Images(Dataset[tuple[Any, int]]):
    """(RGB image, label) by index; the image is Pillow's, or (H, W, 3) uint8 from a decoder that
    gives arrays.

    Args:
        read: index -> (RGB image, label); picklable, as it travels into workers.
        class_names: one per label.
        package: what `read` needs; pickled ahead of it.
        name_of: index -> what to call the image in messages, its file's path where it has one.
        labels: of all images, where they are known without reading these.
    """

    def __init__(
        self,
        num_images: int,
        read: Callable[[int], tuple[Any, int]],
        class_names: list[str],
        package: HuggingFace | None = None,
        name_of: Callable[[int], str] = "image {}".format,
        labels: Sequence[int] | None = None,
    ) -> None:
        self.package = package  # the first attribute, so the first to be unpickled
        self.num_images = num_images
        self.read = read
        self.class_names = class_names
        self.name_of = name_of
        self.labels = labels

    def __len__(self) -> int:
        return self.num_images

    def fingerprint(self) -> str:
        """Tells these images from others by the order of their labels and file names, wherever they
        lie; "" where the labels are not known. Not by what is in the files."""
        if self.labels is None:
            return ""
        digest = hashlib.blake2b(digest_size=16)
        for index, label in enumerate(self.labels):
            digest.update(
                f"{label} {os.path.basename(self.name_of(index))}\n".encode(
                    errors="surrogateescape"
                )
            )
        return digest.hexdigest()

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The whole image, decoded, as RGB, and its label.

        Raises:
            UnreadableSampleError: the file is missing, is no image, or is damaged.
            SampleError: the label names no class, or the process may open no more files.
        """
        try:
            image, label = self.read(index)
        except UNREADABLE as error:
            if getattr(error, "errno", None) in RESOURCE_ERRORS:
                raise SampleError(f"{self.name_of(index)}: {error}; lower --num-workers") from error
            raise UnreadableSampleError(
                f"{self.name_of(index)}: cannot be read as an image ({error}); replace the file or "
                "remove it. "
                "python -m tools.check_data finds all such files, --skip-corrupt trains without "
                "them"
            ) from error
        return image, check_label(label, self.class_names, self.name_of(index))


class StreamedImages(IterableDataset[tuple[Image.Image, int]]):
    """(PIL RGB image, label) in timm's order, which shards over ranks and workers itself; for
    timm's iterable readers.

    timm's readers leave unreadable images out with a warning (wds) or stop there (hfids), and in
    distributed evaluation may repeat or miss a few. `package` is what `source` needs.
    """

    def __init__(
        self, source: Any, class_names: list[str], package: HuggingFace | None = None
    ) -> None:
        self.package = package  # the first attribute, so the first to be unpickled
        self.source = source
        self.num_images: int = source.reader.num_samples
        self.class_names = class_names

    def fingerprint(self) -> str:
        """As of `Images`: nothing is known before it is read."""
        return ""

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        try:
            for image, label in self.source:
                yield image.convert("RGB"), check_label(label, self.class_names, "a streamed image")
        except (OSError, RuntimeError, SyntaxError, ValueError) as error:
            raise SampleError(f"the stream cannot be read any further ({error})") from error


def take_subset(images: Images | StreamedImages, count: int) -> Images:
    """`count` of the images, as many of each class as of any other; a class that has fewer gives
    all it has.

    The same ones whatever the seed of a run, and among those of any larger count: each class gives
    its images in the order of a hash of their numbers. What does not divide evenly goes to the
    first classes.

    Raises:
        InputError: more than there are, fewer than classes, or the labels are not known before the
            images are read.
    """
    labels = None if isinstance(images, StreamedImages) else images.labels
    if isinstance(images, StreamedImages) or labels is None:
        raise InputError(
            f"--subset {count}: the labels of this data set are known only when its images are "
            "read; take one of image "
            "folders, or IMNET, CIFAR, CIFAR10, INAT, INAT19 or DIGITS"
        )
    classes = len(images.class_names)
    if not classes <= count <= len(images):
        raise InputError(
            f"--subset {count}: must lie between the {classes} classes and the {len(images)} images"
        )
    members: list[list[int]] = [[] for _ in range(classes)]
    for index, label in enumerate(labels):
        members[check_label(label, images.class_names, images.name_of(index))].append(index)
    chosen: list[int] = []
    for share, label in zip(
        even_shares([len(held) for held in members], count), range(classes), strict=True
    ):
        chosen += sorted(members[label], key=partial(key_seed, "subset"))[:share]
    chosen.sort()
    return Images(
        count,
        partial(read_chosen, images.read, chosen),
        images.class_names,
        images.package,
        partial(name_chosen, images.name_of, chosen),
        [labels[index] for index in chosen],
    )


def even_shares(available: Sequence[int], count: int) -> list[int]:
    """How many each of several heaps gives so that they give `count`: all alike, but none more than
    it has."""
    level = 0
    while level < max(available) and sum(min(held, level + 1) for held in available) <= count:
        level += 1
    shares = [min(held, level) for held in available]
    more = [place for place, held in enumerate(available) if held > level][: count - sum(shares)]
    return [share + (place in more) for place, share in enumerate(shares)]


def check_label(label: Any, class_names: list[str], what: str) -> int:
    """`label` as an int.

    Raises:
        SampleError: it names no class.
    """
    if label is None or not 0 <= int(label) < len(class_names):
        raise SampleError(
            f"{what} has label {label}, outside the {len(class_names)} classes: check --nb-classes"
        )
    return int(label)


def pick_decoder(name: str) -> Decode:
    """The function behind `--decoder`; `auto` is simplejpeg where it is installed.

    Raises:
        InputError: simplejpeg is asked for and not installed.
    """
    if name == "pillow" or (name == "auto" and simplejpeg is None):
        return decode_pillow
    if simplejpeg is None:
        raise InputError(
            "--decoder simplejpeg: the package is missing; pip install -r requirements-fast.txt, "
            "or --decoder auto"
        )
    return decode_simplejpeg


# ------------------------------------------------------------------------------------------ readers
# index -> (RGB image, label), and index -> name. What they raise is told by `Images`.


def read_pixels(pixels: np.ndarray, labels: np.ndarray, index: int) -> tuple[Image.Image, int]:
    return Image.fromarray(pixels[index]).convert("RGB"), int(labels[index])


def read_files(
    samples: list[tuple[str, int]], index: int, decode: Decode = decode_pillow
) -> tuple[Any, int]:
    path, label = samples[index]
    return decode(path), label


def name_files(samples: list[tuple[str, int]], index: int) -> str:
    return samples[index][0]


def read_chosen(
    read: Callable[[int], tuple[Any, int]], chosen: list[int], index: int
) -> tuple[Any, int]:
    return read(chosen[index])


def name_chosen(name_of: Callable[[int], str], chosen: list[int], index: int) -> str:
    return name_of(chosen[index])


def read_dataset(dataset: Any, index: int) -> tuple[Image.Image, int]:
    image, label = dataset[index]
    return image.convert("RGB"), label


def read_timm(reader: Any, index: int, decode: Decode = decode_pillow) -> tuple[Any, int]:
    """Not through timm's data set, which replaces an unreadable image by the next one."""
    file, label, *_ = reader[index]
    with file:
        return decode(file), label


def name_timm(reader: Any, where: str, index: int) -> str:
    """Numbered where the reader knows no file, and in a Hugging Face set, where it reads an image
    to name it."""
    number = f"image {index} of {where}"
    if not hasattr(reader, "samples"):
        return number
    return f"{reader.filename(index, absolute=True)} ({number})"


# ------------------------------------------------------------------------ Hugging Face's `datasets`
