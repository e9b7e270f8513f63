"""Data sets by name, their samples with draws keyed by position, and the loaders.

Level 2: imports `utils`, `samplers` and `transforms`. It must not know mixing, models or process groups; ranks are
arguments. Names and folder layouts are DeiT's; `timm/<name>` reaches whatever timm reads.

A sample's augmentation depends on (seed, epoch, index, position) alone, so resuming, the number of workers and of ranks
leave it as it is. Letters: B batch, H height, W width.

Longer than our files are, as in DeiT: all that turns a data set's name into batches. It falls into three parts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchvision import datasets as torchvision_datasets
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from samplers import EpochBatches, EvalShard, Place
from transforms import Augment, ImageSpec, Transform
from utils import InputError, SampleError, as_pair, key_seed, keyed_generator, keyed_globals

INAT_YEARS = {"INAT": 2018, "INAT19": 2019}
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
CIFARS = {"CIFAR": torchvision_datasets.CIFAR100, "CIFAR10": torchvision_datasets.CIFAR10}
DATA_SETS = ("DIGITS", *CIFARS, "IMNET", *INAT_YEARS)  # and timm/<name>
FLIPS = dict.fromkeys(("DIGITS", "timm/torch/mnist", "timm/torch/kmnist", "timm/torch/qmnist"), 0.0)
CROP_RATIOS = {"DIGITS": 1.0}  # the scans touch their borders
STREAMS = ("wds", "tfds", "hfids")


def image_spec_for(name: str, input_size: int | Sequence[int], crop_ratio: float | None = None) -> ImageSpec:
    """How images of data set `name` are shown to a model at evaluation; ImageNet's mean and std everywhere, as in DeiT.

    `crop_ratio` None is the data set's own: 0.875, and all of the image where it is drawn up to its border.
    """
    return ImageSpec(as_pair(input_size), crop_ratio=CROP_RATIOS.get(name, 0.875) if crop_ratio is None else crop_ratio)


def augment_for(name: str, augment: Augment) -> Augment:
    """`augment` without what would change the class: a mirrored digit or letter is another sign."""
    return replace(augment, hflip=FLIPS.get(name, augment.hflip))


# ------------------------------------------------------------------------------------------------------- images


class Images(Dataset[tuple[Image.Image, int]]):
    """(PIL RGB image, label) by index.

    Args:
        read: index -> (PIL RGB image, label); picklable, as it travels into workers.
        class_names: one per label.
    """

    def __init__(self, num_images: int, read: Callable[[int], tuple[Image.Image, int]], class_names: list[str]) -> None:
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

    timm's readers leave unreadable images out with a warning, and in distributed evaluation may repeat or miss a few.
    """

    def __init__(self, source: Any, class_names: list[str]) -> None:
        self.source = source
        self.num_images: int = source.reader.num_samples
        self.class_names = class_names

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        for image, label in self.source:
            yield image.convert("RGB"), check_label(label, self.class_names, "a streamed image")


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


def check_same_classes(train_names: list[str], val_names: list[str]) -> None:
    """Holds training and validation to the same classes in the same order.

    Raises:
        InputError: they differ; a few of the classes are named.
    """
    if train_names == val_names:
        return
    parts = []
    for where, names, others in (("training", train_names, val_names), ("validation", val_names, train_names)):
        only = sorted(set(names) - set(others))
        if only:
            parts.append(f"{len(only)} only in {where}: {', '.join(only[:5])}{', ...' if len(only) > 5 else ''}")
    raise InputError(f"training and validation need the same classes; {'; '.join(parts) or 'their order differs'}")


def open_images(
    name: str,
    path: str,
    train: bool,
    *,
    inat_category: str = "name",
    num_classes: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> Images | StreamedImages:
    """Opens one half of a data set.

    Args:
        name: one of `DATA_SETS`, or `timm/<name>` (`timm/` alone reads a folder or tar files as timm does).
        path: the data folder (`--data-path`); DIGITS needs none.
        train: training images, or those held out.
        inat_category: which of `INAT_CATEGORIES` is the label.
        num_classes: `--nb-classes`, only for a timm data set that does not know its classes.
        batch_size, seed: for timm's streams, which shuffle and round by themselves.

    Raises:
        InputError: unknown name, or files that are not where the data set needs them.
    """
    if name == "DIGITS":
        return _open_digits(train)
    if name not in DATA_SETS and not name.startswith("timm/"):
        raise InputError(f"--data-set {name}: unknown; choose {', '.join(DATA_SETS)} or timm/<name>")
    if not os.path.exists(path) and name.split("/")[:2] not in (["timm", "hfds"], ["timm", "hfids"], ["timm", "tfds"]):
        raise InputError(f"--data-path {path}: no such folder")
    if name in CIFARS:
        return _open_cifar(CIFARS[name], path, train)
    if name == "IMNET":
        return _open_folder(path, "train" if train else "val")
    if name in INAT_YEARS:
        return _open_inat(path, INAT_YEARS[name], train, inat_category)
    return _open_timm(name.removeprefix("timm/"), path, train, num_classes, batch_size=batch_size, seed=seed)


def _read_pixels(pixels: np.ndarray, labels: np.ndarray, index: int) -> tuple[Image.Image, int]:
    return Image.fromarray(pixels[index]).convert("RGB"), int(labels[index])


def _read_files(samples: list[tuple[str, int]], index: int) -> tuple[Image.Image, int]:
    path, label = samples[index]
    return decode(path, path), label


def _read_dataset(dataset: Any, index: int) -> tuple[Image.Image, int]:
    image, label = dataset[index]
    return image.convert("RGB"), label


def _read_timm(reader: Any, index: int) -> tuple[Image.Image, int]:
    """Not through timm's data set, which replaces an unreadable image by the next one."""
    file, label, *_ = reader[index]
    with file:
        return decode(file, f"{getattr(file, 'name', 'an image')} (number {index} of {reader.root})"), label


def _open_digits(train: bool) -> Images:
    """scikit-learn's 1,797 scans of handwritten digits, 8 x 8; a fixed stratified fifth is held out."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise InputError("--data-set DIGITS reads the scans inside scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    kept, held_out = train_test_split(
        np.arange(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target
    )
    chosen = np.sort(kept if train else held_out)
    pixels = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)  # (N, 8, 8), grey
    read = partial(_read_pixels, pixels, digits.target[chosen])
    return Images(len(chosen), read, [str(digit) for digit in digits.target_names])


def _open_cifar(kind: type[torchvision_datasets.CIFAR10], path: str, train: bool) -> Images:
    try:
        dataset = kind(path, train=train)
    except RuntimeError as error:
        raise InputError(
            f"--data-path {path}: no complete {kind.__name__} here; unpack {kind.filename} from {kind.url} so that the "
            f"folder {os.path.join(path, kind.base_folder)} exists"
        ) from error
    return Images(len(dataset), partial(_read_dataset, dataset), list(dataset.classes))


def _class_folders(path: str) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir())


def _open_folder(path: str, split: str) -> Images:
    """`path`/`split`/<class>/.../<image>; the classes are the folders in the order of their names."""
    folder = os.path.join(path, split)
    if not os.path.isdir(folder):
        found = [name for name in _class_folders(path) if name not in ("train", "val")] if os.path.isdir(path) else []
        hint = (
            f"; it holds {', '.join(found[:3])}: if these are classes, move them into train/ and val/" if found else ""
        )
        raise InputError(f"--data-path {path}: the folder {split}/ is missing{hint}")
    names = _class_folders(folder)
    if not names:
        raise InputError(f"{folder}: no class folders; each class needs a folder of its images")
    labels = {name: label for label, name in enumerate(names)}
    samples = make_dataset(folder, labels, extensions=IMG_EXTENSIONS, allow_empty=True)
    empty = sorted(set(names) - {names[label] for _, label in samples})
    if empty:
        raise InputError(
            f"{folder}: no image in {', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}; fill or remove "
            f"{'this folder' if len(empty) == 1 else f'these {len(empty)} folders'}"
        )
    return Images(len(samples), partial(_read_files, samples), names)


def _read_json(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; the iNaturalist data set needs it beside its images") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); download it again") from error


def _open_inat(path: str, year: int, train: bool, category: str) -> Images:
    """Labels are numbered as their category first appears in the training annotations, like DeiT's released weights."""
    if category not in INAT_CATEGORIES:
        raise InputError(f"--inat-category {category}: unknown; choose {', '.join(INAT_CATEGORIES)}")
    train_json = _read_json(os.path.join(path, f"train{year}.json"))
    split = train_json if train else _read_json(os.path.join(path, f"val{year}.json"))
    records = _read_json(os.path.join(path, "categories.json"))
    if any(category not in record for record in records):
        raise InputError(
            f"--inat-category {category}: {os.path.join(path, 'categories.json')} does not give it for all"
        )
    categories = {record.get("id", place): record[category] for place, record in enumerate(records)}
    labels: dict[str, int] = {}
    for annotation in train_json["annotations"]:
        labels.setdefault(categories[annotation["category_id"]], len(labels))

    label_of_image = {}
    for annotation in split["annotations"]:
        name = categories[annotation["category_id"]]
        if name not in labels:
            raise InputError(f"val{year}.json: {category} {name} has no training image in train{year}.json")
        label_of_image[annotation["image_id"]] = labels[name]
    files = [image["file_name"] for image in split["images"]]
    flat = bool(files) and not os.path.exists(
        os.path.join(path, files[0])
    )  # DeiT's copy lacks the supercategory folder
    samples = []
    for image, file in zip(split["images"], files, strict=True):
        parts = file.split("/")
        place = os.path.join(path, *(parts[:1] + parts[2:] if flat else parts))
        samples.append((place, label_of_image[image["id"]]))
    if not samples or not os.path.exists(samples[0][0]):
        raise InputError(f"--data-path {path}: no images as {'train' if train else 'val'}{year}.json names them")
    return Images(len(samples), partial(_read_files, samples), list(labels))


def _open_timm(
    name: str, path: str, train: bool, num_classes: int | None, *, batch_size: int, seed: int
) -> Images | StreamedImages:
    kind = name.partition("/")[0].lower()
    splits: Sequence[str] = ("train",) if train else ("validation", "val", "test")
    options: dict[str, Any] = {}
    if kind == "":
        path = _find_split(path, train)
        if path.endswith(".tar"):
            options["cache_tarfiles"] = False  # an open tar file can neither be pickled nor shared between workers
    elif kind not in ("torch", "hfds", *STREAMS):
        raise InputError(f"--data-set timm/{name}: use timm/ alone, or timm/torch/..., hfds/, hfids/, tfds/ or wds/...")
    if kind in ("hfds", "hfids") and __name__ == "datasets":
        raise InputError(
            f"--data-set timm/{name}: timm reads it with the package `datasets`, which our file of that name hides; "
            "export it to an image folder (IMNET) or to WebDataset shards (timm/wds/...)"
        )
    if kind in STREAMS:
        options.update(is_training=train, batch_size=batch_size, seed=seed)
    reasons = []
    for split in splits:
        try:
            source = create_dataset(name, root=path, split=split, search_split=False, **options)
            break
        except ImportError as error:
            raise InputError(f"--data-set timm/{name}: {error}; install the package it reads with") from error
        except (AssertionError, OSError, RuntimeError, ValueError) as error:
            reasons.append(str(error))
    else:
        raise InputError(
            f"--data-set timm/{name} --data-path {path}: timm cannot open it ({'; '.join(dict.fromkeys(reasons))})"
        )
    names = _timm_class_names(source, name, num_classes)
    if isinstance(source, IterableDataset):
        return StreamedImages(source, names)
    if hasattr(source, "reader"):
        return Images(len(source), partial(_read_timm, source.reader), names)
    return Images(len(source), partial(_read_dataset, source), names)


def _find_split(path: str, train: bool) -> str:
    """The folder or tar file of one half. timm itself would take all of `path` where the half is missing."""
    if path.endswith(".tar") and not train:
        return path
    names = ("train", "training") if train else ("val", "valid", "validation", "eval", "test")
    for place in (os.path.join(path, name + ending) for name in names for ending in ("", ".tar")):
        if os.path.exists(place):
            return place
    raise InputError(f"--data-path {path}: needs a folder {names[0]}/ or a file {names[0]}.tar in it")


def _timm_class_names(source: Any, name: str, num_classes: int | None) -> list[str]:
    reader = getattr(source, "reader", source)
    labels: dict[Any, int] = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
    names = [str(known) for known in sorted(labels, key=labels.__getitem__) or getattr(source, "classes", [])]
    if not names and num_classes is None:
        raise InputError(f"--data-set timm/{name} does not say how many classes it has: give --nb-classes")
    if names and num_classes not in (None, len(names)):
        raise InputError(f"--nb-classes {num_classes}: timm/{name} has {len(names)} classes; leave the flag out")
    return names or [str(label) for label in range(num_classes or 0)]


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
