"""Reads one RGB image and its label from a file, an array or one of timm's readers.

Everything here can be pickled, because it is sent to loader workers.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from errors import InputError, SampleError
from pipeline.hugging_face import HuggingFace
from pipeline.pillow import UNREADABLE, File, as_rgb, check_aspect, decode_pillow
from utils import key_seed

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

Decode = Callable[[File], Image.Image | np.ndarray]
START_OF_JPEG = b"\xff\xd8\xff"


def decode_simplejpeg(file: File) -> Image.Image | np.ndarray:
    """A valid JPEG as (H, W, 3) uint8 RGB; any other file as `decode_pillow` returns it."""
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
    """The pixels of a JPEG, or None if Pillow has to decode the file.

    simplejpeg decodes only JPEGs without errors, in the colour spaces where it agrees with Pillow
    and up to the size that Pillow accepts.
    """
    if not content.startswith(START_OF_JPEG):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if colours not in ("YCbCr", "Gray") or height * width > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        check_aspect(width, height)
        return simplejpeg.decode_jpeg(content, "RGB", strict=True)
    except Exception:  # fall back to Pillow on any error
        return None


# Errors of the process and not of the file.
RESOURCE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class UnreadableSampleError(SampleError):
    """An image cannot be decoded.

    `StopRun.text` finds the message after the text "SampleError: ", so the name must end with it.
    """


class Images(Dataset[tuple[Any, int]]):
    """A data set: index -> (RGB image, label).

    The image is Pillow's, or (H, W, 3) uint8 if the decoder returns arrays.

    Args:
        read: index -> (RGB image, label); picklable, because it is sent to workers.
        class_names: one per label.
        package: the package that `read` needs; it is unpickled before `read`.
        name_of: index -> name of the image in messages: the path of its file if it has one.
        labels: of all images, if they are known without reading the images.
        note: what was passed over when the images were searched for; "" for nothing.
    """

    def __init__(
        self,
        num_images: int,
        read: Callable[[int], tuple[Any, int]],
        class_names: list[str],
        package: HuggingFace | None = None,
        name_of: Callable[[int], str] = "image {}".format,
        labels: Sequence[int] | None = None,
        note: str = "",
    ) -> None:
        self.package = package  # must be the first attribute, to be unpickled first
        self.num_images = num_images
        self.read = read
        self.class_names = class_names
        self.name_of = name_of
        self.labels = labels
        self.note = note

    def __len__(self) -> int:
        return self.num_images

    def fingerprint(self) -> str:
        """A hash of the labels and file names in their order, or "" if the labels are not known.

        It depends neither on the folder nor on the content of the files.
        """
        if self.labels is None:
            return ""
        digest = hashlib.blake2b(digest_size=16)
        for index, label in enumerate(self.labels):
            line = f"{label} {os.path.basename(self.name_of(index))}\n"
            digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The decoded image as RGB, and its label.

        Raises:
            UnreadableSampleError: the file is missing, damaged or no image.
            SampleError: the label is outside the classes, or the process has too many open files or
                too little memory.
        """
        try:
            image, label = self.read(index)
        except (*UNREADABLE, MemoryError) as error:
            name = self.name_of(index)
            if isinstance(error, MemoryError) or getattr(error, "errno", None) in RESOURCE_ERRORS:
                reason = str(error) or "not enough memory"
                raise SampleError(f"{name}: {reason}; lower --num-workers") from error
            raise UnreadableSampleError(
                f"{name}: cannot be read as an image ({error}); replace the file or remove it. "
                "python -m tools.check_data finds all such files, "
                "--skip-corrupt trains without them"
            ) from error
        return image, check_label(label, self.class_names, self.name_of(index))


class StreamedImages(IterableDataset[tuple[Image.Image, int]]):
    """A data set of one of timm's iterable readers: yields (PIL RGB image, label) in timm's order.

    timm distributes the shards over ranks and workers. Its readers leave unreadable images out with
    a warning (wds) or stop at them (hfids). In distributed evaluation they may repeat or miss a few
    images.

    Args:
        source: timm's `IterableImageDataset`.
        class_names: one per label.
        package: the package that `source` needs; it is unpickled before `source`.
    """

    note = ""  # as in `Images`

    def __init__(
        self, source: Any, class_names: list[str], package: HuggingFace | None = None
    ) -> None:
        self.package = package  # must be the first attribute, to be unpickled first
        self.source = source
        self.num_images: int = source.reader.num_samples
        self.class_names = class_names

    def fingerprint(self) -> str:
        """Always "": labels and names are not known before the stream is read."""
        return ""

    def why_empty(self, place: int) -> str:
        """Why a loader worker got no image; `place`: its number among the workers of all ranks."""
        split = getattr(self.source.reader, "split_info", None)  # not every reader lists its files
        if split is None or place >= len(split.filenames):
            return "has no shard to read: lower --num-workers"
        return (
            "found no image in its shards: each sample needs an image that Pillow reads (.jpg, "
            ".jpeg, .png, ...) and its label (.cls); the warnings above say what was left out"
        )

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        try:
            for image, label in self.source:
                check_aspect(*image.size)
                yield as_rgb(image), check_label(label, self.class_names, "a streamed image")
        except (*UNREADABLE, RuntimeError, TypeError) as error:
            raise SampleError(f"the stream cannot be read any further ({error})") from error


def take_subset(images: Images | StreamedImages, count: int, flag: str = "--subset") -> Images:
    """A subset of `count` images with equal numbers of all classes.

    A class with too few images gives all of them. If the count cannot be divided equally, the first
    classes give one image more. Each class gives its images in the order of a hash of their
    numbers. The subset therefore does not depend on the run's seed, and a larger subset contains
    every smaller one.

    Args:
        flag: the flag that has the count, for messages.

    Raises:
        InputError: `count` is larger than the number of images or smaller than the number of
            classes, or the labels are not known before the images are read.
    """
    labels = None if isinstance(images, StreamedImages) else images.labels
    if isinstance(images, StreamedImages) or labels is None:
        raise InputError(
            f"{flag} {count}: the labels of this data set are known only when its images are "
            "read; use --data-set IMNET, CIFAR, CIFAR10, INAT, INAT19, DIGITS or timm/ (folders)"
        )
    classes = len(images.class_names)
    if not classes <= count <= len(images):
        raise InputError(
            f"{flag} {count}: must lie between the {classes} classes and the {len(images)} images"
        )
    members: list[list[int]] = [[] for _ in range(classes)]
    for index, label in enumerate(labels):
        members[check_label(label, images.class_names, images.name_of(index))].append(index)
    shares = even_shares([len(of_class) for of_class in members], count)
    chosen: list[int] = []
    for share, of_class in zip(shares, members, strict=True):
        chosen += sorted(of_class, key=partial(key_seed, "subset"))[:share]
    chosen.sort()
    return Images(
        count,
        partial(read_chosen, images.read, chosen),
        images.class_names,
        images.package,
        partial(name_chosen, images.name_of, chosen),
        [labels[index] for index in chosen],
        images.note,
    )


def even_shares(available: Sequence[int], count: int) -> list[int]:
    """Divides `count` as equally as possible, where share i is at most `available[i]`.

    Returns:
        The shares, whose sum is `count`. Of those that could be larger, the first are larger by
        one where it cannot be divided equally.
    """
    level = 0
    while level < max(available) and sum(min(most, level + 1) for most in available) <= count:
        level += 1
    shares = [min(most, level) for most in available]
    can_give_more = [i for i, most in enumerate(available) if most > level]
    one_more = can_give_more[: count - sum(shares)]
    return [share + (i in one_more) for i, share in enumerate(shares)]


def check_label(label: Any, class_names: list[str], what: str) -> int:
    """`label` as an int.

    Raises:
        SampleError: the label is missing, or is not in 0..number of classes - 1.
    """
    if label is None or not 0 <= int(label) < len(class_names):
        raise SampleError(
            f"{what} has label {label}, outside the {len(class_names)} classes: check --nb-classes"
        )
    return int(label)


def pick_decoder(name: str) -> Decode:
    """The decoder that `--decoder` names; `auto` is simplejpeg if it is installed.

    Raises:
        InputError: `name` is simplejpeg, which is not installed.
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
# index -> (RGB image, label), and index -> name. `Images` turns their errors into messages.


def read_pixels(pixels: np.ndarray, labels: np.ndarray, index: int) -> tuple[Image.Image, int]:
    return Image.fromarray(pixels[index]).convert("RGB"), int(labels[index])


def read_files(
    samples: list[tuple[str, int]], index: int, decode: Decode = decode_pillow
) -> tuple[Any, int]:
    """Raises OSError for a path that is no regular file: a pipe would never end."""
    path, label = samples[index]
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("it is no regular file")
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
    return as_rgb(image), label


def read_timm(reader: Any, index: int, decode: Decode = decode_pillow) -> tuple[Any, int]:
    """Reads without timm's data set, which replaces an unreadable image by the next one."""
    file, label, *_ = reader[index]
    with file:
        return decode(file), label


def name_timm(reader: Any, where: str, index: int) -> str:
    """The image's file and number, or its number alone.

    Some readers have no files, and a Hugging Face reader would read the image to find its name.
    """
    number = f"image {index} of {where}"
    if not hasattr(reader, "samples"):
        return number
    return f"{reader.filename(index, absolute=True)} ({number})"
