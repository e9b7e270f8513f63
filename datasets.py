"""Data sets by name: the images of each, and what their names imply for transforms.

Level 2: imports `utils`, `decoding`, `images` and `transforms`. It must not know loaders, mixing,
models or process groups. Names and folder layouts are DeiT's; `timm/<name>` reaches whatever timm
reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from timm.data import create_dataset
from torch.utils.data import IterableDataset
from torchvision import datasets as torchvision_datasets
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from pipeline.hugging_face import import_hugging_face
from pipeline.images import (
    Decode,
    Images,
    StreamedImages,
    decode_pillow,
    name_files,
    name_timm,
    read_dataset,
    read_files,
    read_pixels,
    read_timm,
)
from pipeline.spec import Augment, ImageSpec
from utils import InputError, as_pair

INAT_YEARS = {"INAT": 2018, "INAT19": 2019}
INAT_CATEGORIES = (
    "kingdom",
    "phylum",
    "class",
    "order",
    "supercategory",
    "family",
    "genus",
    "name",
)
CIFARS = {"CIFAR": torchvision_datasets.CIFAR100, "CIFAR10": torchvision_datasets.CIFAR10}
DATA_SETS = ("DIGITS", *CIFARS, "IMNET", *INAT_YEARS)  # and timm/<name>
FLIPS = dict.fromkeys(("DIGITS", "timm/torch/mnist", "timm/torch/kmnist", "timm/torch/qmnist"), 0.0)
CROP_RATIOS = {"DIGITS": 1.0}  # the scans touch their borders
STREAMS = ("wds", "tfds", "hfids")


def image_spec_for(
    name: str, input_size: int | Sequence[int], crop_ratio: float | None = None
) -> ImageSpec:
    """How images of data set `name` are shown to a model at evaluation; ImageNet's mean and std
    everywhere, as in DeiT.

    `crop_ratio` None is the data set's own: 0.875, and all of the image where it is drawn up to its
    border.
    """
    return ImageSpec(
        as_pair(input_size),
        crop_ratio=CROP_RATIOS.get(name, 0.875) if crop_ratio is None else crop_ratio,
    )


def augment_for(name: str, augment: Augment) -> Augment:
    """`augment` without what would change the class: a mirrored digit or letter is another sign."""
    return replace(augment, hflip=FLIPS.get(name, augment.hflip))


def check_same_classes(train_names: list[str], val_names: list[str]) -> None:
    """Holds training and validation to the same classes in the same order.

    Raises:
        InputError: they differ; a few of the classes are named.
    """
    if train_names == val_names:
        return
    parts = []
    for where, names, others in (
        ("training", train_names, val_names),
        ("validation", val_names, train_names),
    ):
        only = sorted(set(names) - set(others))
        if only:
            parts.append(
                f"{len(only)} only in {where}: "
                f"{', '.join(only[:5])}{', ...' if len(only) > 5 else ''}"
            )
    raise InputError(
        "training and validation need the same classes; "
        f"{'; '.join(parts) or 'their order differs'}"
    )


def open_images(
    name: str,
    path: str,
    train: bool,
    *,
    inat_category: str = "name",
    num_classes: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    decode: Decode = decode_pillow,
) -> Images | StreamedImages:
    """Opens one half of a data set.

    Args:
        name: one of `DATA_SETS`, or `timm/<name>` (`timm/` alone reads a folder or tar files as
            timm does).
        path: the data folder (`--data-path`); DIGITS needs none, and for `timm/hfds/` it is the
            cache.
        train: training images, or those held out.
        inat_category: which of `INAT_CATEGORIES` is the label.
        num_classes: `--nb-classes`, only for a timm data set that does not know its classes.
        batch_size, seed: for timm's streams, which shuffle and round by themselves.
        decode: what decodes files; streams and sets whose images are no files decode by themselves.

    Raises:
        InputError: unknown name, or files that are not where the data set needs them.
    """
    if name == "DIGITS":
        return _open_digits(train)
    if name not in DATA_SETS and not name.startswith("timm/"):
        raise InputError(
            f"--data-set {name}: unknown; choose {', '.join(DATA_SETS)} or timm/<name>"
        )
    if not path and name in DATA_SETS:
        raise InputError(f"--data-set {name} needs --data-path FOLDER, where its files are")
    if not os.path.exists(path) and name.split("/")[:2] not in (
        ["timm", "hfds"],
        ["timm", "hfids"],
        ["timm", "tfds"],
    ):
        raise InputError(f"--data-path {path}: no such folder")
    if name in CIFARS:
        return _open_cifar(CIFARS[name], path, train)
    if name == "IMNET":
        return _open_folder(path, "train" if train else "val", decode)
    if name in INAT_YEARS:
        return _open_inat(path, INAT_YEARS[name], train, inat_category, decode)
    timms = name.removeprefix("timm/")
    return _open_timm(
        timms, path, train, num_classes, batch_size=batch_size, seed=seed, decode=decode
    )


def _open_digits(train: bool) -> Images:
    """scikit-learn's 1,797 scans of handwritten digits, 8 x 8; a fixed stratified fifth is held
    out."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise InputError(
            "--data-set DIGITS reads the scans inside scikit-learn: pip install scikit-learn"
        ) from error
    digits = load_digits()
    kept, held_out = train_test_split(
        np.arange(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target
    )
    chosen = np.sort(kept if train else held_out)
    pixels = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)  # (N, 8, 8), grey
    read = partial(read_pixels, pixels, digits.target[chosen])
    names = [str(digit) for digit in digits.target_names]
    return Images(
        len(chosen),
        read,
        names,
        name_of="image {} of DIGITS".format,
        labels=digits.target[chosen].tolist(),
    )


def _open_cifar(kind: type[torchvision_datasets.CIFAR10], path: str, train: bool) -> Images:
    try:
        dataset = kind(path, train=train)
    except RuntimeError as error:
        raise InputError(
            f"--data-path {path}: no complete {kind.__name__} here; unpack {kind.filename} from "
            f"{kind.url} so that the "
            f"folder {os.path.join(path, kind.base_folder)} exists"
        ) from error
    return _numbered(dataset, list(dataset.classes), kind.__name__)


def _numbered(dataset: Any, class_names: list[str], what: str) -> Images:
    """Images of a torchvision data set, which have no file each."""
    name_of, labels = f"image {{}} of {what}".format, getattr(dataset, "targets", None)
    known = None if labels is None else [int(label) for label in labels]
    return Images(
        len(dataset), partial(read_dataset, dataset), class_names, name_of=name_of, labels=known
    )


def _in_files(samples: list[tuple[str, int]], class_names: list[str], decode: Decode) -> Images:
    """Images from (path, label) of each."""
    read = partial(read_files, samples, decode=decode)
    labels = [label for _, label in samples]
    return Images(
        len(samples), read, class_names, name_of=partial(name_files, samples), labels=labels
    )


def _class_folders(path: str) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir())


def _open_folder(path: str, split: str, decode: Decode) -> Images:
    """`path`/`split`/<class>/.../<image>; the classes are the folders in the order of their
    names."""
    folder = os.path.join(path, split)
    if not os.path.isdir(folder):
        found = (
            [name for name in _class_folders(path) if name not in ("train", "val")]
            if os.path.isdir(path)
            else []
        )
        hint = (
            f"; it holds {', '.join(found[:3])}: if these are classes, move them into train/ and "
            "val/"
            if found
            else ""
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
            f"{folder}: no image in {', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}; "
            "fill or remove "
            f"{'this folder' if len(empty) == 1 else f'these {len(empty)} folders'}"
        )
    return _in_files(samples, names, decode)


def _read_json(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: missing; the iNaturalist data set needs it beside its images"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); download it again") from error


def _open_inat(path: str, year: int, train: bool, category: str, decode: Decode) -> Images:
    """Labels are numbered as their category first appears in the training annotations, like DeiT's
    released weights."""
    if category not in INAT_CATEGORIES:
        raise InputError(
            f"--inat-category {category}: unknown; choose {', '.join(INAT_CATEGORIES)}"
        )
    train_json = _read_json(os.path.join(path, f"train{year}.json"))
    split = train_json if train else _read_json(os.path.join(path, f"val{year}.json"))
    records = _read_json(os.path.join(path, "categories.json"))
    if any(category not in record for record in records):
        raise InputError(
            f"--inat-category {category}: {os.path.join(path, 'categories.json')} does not give it "
            "for all"
        )
    categories = {record.get("id", place): record[category] for place, record in enumerate(records)}
    labels: dict[str, int] = {}
    for annotation in train_json["annotations"]:
        labels.setdefault(categories[annotation["category_id"]], len(labels))

    label_of_image = {}
    for annotation in split["annotations"]:
        name = categories[annotation["category_id"]]
        if name not in labels:
            raise InputError(
                f"val{year}.json: {category} {name} has no training image in train{year}.json"
            )
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
        raise InputError(
            f"--data-path {path}: no images as {'train' if train else 'val'}{year}.json names them"
        )
    return _in_files(samples, list(labels), decode)


def _open_timm(
    name: str,
    path: str,
    train: bool,
    num_classes: int | None,
    *,
    batch_size: int,
    seed: int,
    decode: Decode,
) -> Images | StreamedImages:
    kind, _, which = name.partition("/")
    kind = kind.lower()
    splits: Sequence[str] = ("train",) if train else ("validation", "val", "test")
    options: dict[str, Any] = {}
    if kind == "":
        path = _find_split(path, train)
        if path.endswith(".tar"):
            options["cache_tarfiles"] = (
                False  # an open tar file can neither be pickled nor shared between workers
            )
    elif kind not in ("torch", "hfds", *STREAMS) or not which:
        raise InputError(
            f"--data-set timm/{name}: use timm/ alone, or timm/torch/..., hfds/, hfids/, tfds/ or "
            "wds/..."
        )
    package = import_hugging_face() if kind in ("hfds", "hfids") else None
    if kind in STREAMS:
        options.update(is_training=train, batch_size=batch_size, seed=seed)
    reasons = []
    for split in splits:
        try:
            source = create_dataset(name, root=path, split=split, search_split=False, **options)
            break
        except ImportError as error:
            raise InputError(
                f"--data-set timm/{name}: {error}; install the package it reads with"
            ) from error
        except (AssertionError, OSError, RuntimeError, ValueError) as error:
            reasons.append(str(error))
    else:
        why = "; ".join(dict.fromkeys(reasons))
        hint = "; timm/hfds/ reads the same data and counts it itself" if kind == "hfids" else ""
        raise InputError(
            f"--data-set timm/{name} --data-path {path}: timm cannot open it ({why}){hint}"
        )
    if package is not None:
        _check_columns(source.reader, name)
    names = _timm_class_names(source, name, num_classes)
    if isinstance(source, IterableDataset):
        return StreamedImages(source, names, package)
    if hasattr(source, "reader"):
        name_of = partial(name_timm, source.reader, path if package is None else which)
        samples = getattr(source.reader, "samples", None)  # of folders and tar files: (file, label)
        labels = None if samples is None else [label for _, label, *_ in samples]
        return Images(
            len(source),
            partial(read_timm, source.reader, decode=decode),
            names,
            package,
            name_of,
            labels,
        )
    return _numbered(source, names, f"timm/{name}")


def _check_columns(reader: Any, name: str) -> None:
    """Holds a Hugging Face set to the columns that timm reads."""
    mapped = getattr(reader, "dataset", None)  # a stream has none
    columns = list(
        (reader.builder.info if mapped is None else mapped).features or ("image", "label")
    )
    if mapped and mapped[0]["image"] is None:  # timm has added what was missing, empty
        columns.remove("image")
    if not {"image", "label"} <= set(columns):
        raise InputError(
            f"--data-set timm/{name}: timm reads the columns image and label, this set has "
            f"{', '.join(columns)}"
        )


def _find_split(path: str, train: bool) -> str:
    """The folder or tar file of one half. timm itself would take all of `path` where the half is
    missing."""
    if path.endswith(".tar") and not train:
        return path
    names = ("train", "training") if train else ("val", "valid", "validation", "eval", "test")
    for place in (os.path.join(path, name + ending) for name in names for ending in ("", ".tar")):
        if os.path.exists(place):
            return place
    raise InputError(
        f"--data-path {path}: needs a folder {names[0]}/ or a file {names[0]}.tar in it"
    )


def _timm_class_names(source: Any, name: str, num_classes: int | None) -> list[str]:
    reader = getattr(source, "reader", source)
    labels: dict[Any, int] = (
        getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
    )
    names = [
        str(known)
        for known in sorted(labels, key=labels.__getitem__) or getattr(source, "classes", [])
    ]
    if not names and num_classes is None:
        raise InputError(
            f"--data-set timm/{name} does not say how many classes it has: give --nb-classes"
        )
    if names and num_classes not in (None, len(names)):
        raise InputError(
            f"--nb-classes {num_classes}: timm/{name} has {len(names)} classes; leave the flag out"
        )
    return names or [str(label) for label in range(num_classes or 0)]
