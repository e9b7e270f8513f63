"""Opens data sets by name, and gives the image settings that depend on the name.

Names and folder layouts are DeiT's; `timm/<name>` opens all data sets that timm can read.
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
from timm.utils.misc import natural_key
from torch.utils.data import IterableDataset
from torchvision import datasets as torchvision_datasets

from errors import InputError, as_pair
from pipeline.folders import class_folders, find_images
from pipeline.hugging_face import import_hugging_face
from pipeline.images import (
    Decode,
    Images,
    StreamedImages,
    name_files,
    name_timm,
    read_dataset,
    read_files,
    read_pixels,
    read_timm,
)
from pipeline.pillow import ENDINGS, decode_pillow
from pipeline.spec import Augment, ImageSpec

INAT_YEARS = {"INAT": 2018, "INAT19": 2019}
INAT_CATEGORIES = (
    *("kingdom", "phylum", "class", "order"),
    *("supercategory", "family", "genus", "name"),
)
CIFARS = {"CIFAR": torchvision_datasets.CIFAR100, "CIFAR10": torchvision_datasets.CIFAR10}
DATA_SETS = ("DIGITS", *CIFARS, "IMNET", *INAT_YEARS)  # and timm/<name>
UNFLIPPED = ("DIGITS", "timm/torch/mnist", "timm/torch/kmnist", "timm/torch/qmnist")
CROP_RATIOS = {"DIGITS": 1.0}  # the digits reach the image's border
STREAM_READERS = ("wds", "tfds", "hfids")  # timm's readers that choose the order of the images
# The members of a sample that may hold its image; webdataset turns capitals into small letters.
WDS_IMAGE_KEYS = ";".join(ending[1:] for ending in ENDINGS)
# timm's readers that download the data set, so that `path` need not exist
DOWNLOADING_READERS = ("hfds", "hfids", "tfds")


def image_spec_for(
    name: str, input_size: int | Sequence[int], crop_ratio: float | None = None
) -> ImageSpec:
    """The evaluation preprocessing of data set `name`; always ImageNet's mean and std, as in DeiT.

    Args:
        name: as in `open_images`.
        input_size: side, or (H, W), in pixels.
        crop_ratio: None for the data set's default: 1 for DIGITS, 0.875 for all others.
    """
    if crop_ratio is None:
        crop_ratio = CROP_RATIOS.get(name, 0.875)
    return ImageSpec(as_pair(input_size), crop_ratio=crop_ratio)


def augment_for(name: str, augment: Augment) -> Augment:
    """`augment` for data set `name`: no flip for digits and letters, which it would change."""
    return replace(augment, hflip=0.0) if name in UNFLIPPED else augment


def check_same_classes(train_names: list[str], val_names: list[str]) -> None:
    """Checks that training and validation have the same classes in the same order, at least two.

    Raises:
        InputError: they differ; the message names up to five classes of each kind. Or there is one
            class only, of which every model would predict 100 %.
    """
    if len({*train_names, *val_names}) == 1:
        raise InputError(
            f"the images have one class only ({train_names[0] or 'no class folders'}); training "
            "needs two or more: each class needs its folder in train/ and in val/"
        )
    if train_names == val_names:
        return
    parts = []
    for where, names, others in (
        ("training", train_names, val_names),
        ("validation", val_names, train_names),
    ):
        only = sorted(set(names) - set(others))
        if only:
            parts.append(f"{len(only)} only in {where}: {_first_five(only)}")
    difference = "; ".join(parts) or "their order differs"
    raise InputError(f"training and validation need the same classes; {difference}")


def _first_five(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


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
    """Opens the training or the validation images of a data set.

    Args:
        name: one of `DATA_SETS`, or `timm/<name>` (`timm/` alone reads a folder or tar files as
            timm does).
        path: the data folder (`--data-path`). DIGITS needs none, and `timm/hfds/` uses it as its
            cache.
        train: true for the training images, false for the validation images.
        inat_category: which of `INAT_CATEGORIES` is the label.
        num_classes: `--nb-classes`, only for a timm data set that does not know its classes.
        batch_size, seed: for timm's streams, which shuffle and round to batches themselves.
        decode: decodes image files. Streams, and data sets whose images are no files, do not use
            it.

    Raises:
        InputError: the name is unknown, or the files that the data set needs are missing.
    """
    if name == "DIGITS":
        return _open_digits(train)
    if name not in DATA_SETS and not name.startswith("timm/"):
        raise InputError(
            f"--data-set {name}: unknown; choose {', '.join(DATA_SETS)} or timm/<name>"
        )
    if not path and name in DATA_SETS:
        raise InputError(f"--data-set {name} needs --data-path FOLDER, the folder of its files")
    downloads = [["timm", reader] for reader in DOWNLOADING_READERS]
    if not os.path.exists(path) and name.split("/")[:2] not in downloads:
        raise InputError(f"--data-path {path}: no such folder")
    if name in CIFARS:
        return _open_cifar(CIFARS[name], path, train)
    if name == "IMNET":
        return _open_folder(path, "train" if train else "val", decode)
    if name in INAT_YEARS:
        return _open_inat(path, INAT_YEARS[name], train, inat_category, decode)
    timm_name = name.removeprefix("timm/")
    return _open_timm(
        timm_name, path, train, num_classes, batch_size=batch_size, seed=seed, decode=decode
    )


def _open_digits(train: bool) -> Images:
    """scikit-learn's 1,797 scans of handwritten digits, 8 x 8 pixels.

    A fixed stratified fifth of them is for validation.
    """
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
    labels = digits.target[chosen].tolist()
    return Images(len(chosen), read, names, name_of="image {} of DIGITS".format, labels=labels)


def _open_cifar(kind: type[torchvision_datasets.CIFAR10], path: str, train: bool) -> Images:
    try:
        dataset = kind(path, train=train)
    except RuntimeError as error:
        folder = os.path.join(path, kind.base_folder)
        raise InputError(
            f"--data-path {path}: no complete {kind.__name__} in it; unpack {kind.filename} from "
            f"{kind.url} so that the folder {folder} exists"
        ) from error
    return _images_without_files(dataset, list(dataset.classes), kind.__name__)


def _images_without_files(dataset: Any, class_names: list[str], name: str) -> Images:
    """The images of a torchvision data set, where an image has no file."""
    read, name_of = partial(read_dataset, dataset), f"image {{}} of {name}".format
    labels = [int(label) for label in getattr(dataset, "targets", ())] or None
    return Images(len(dataset), read, class_names, name_of=name_of, labels=labels)


def _images_in_files(
    samples: list[tuple[str, int]], class_names: list[str], decode: Decode, note: str = ""
) -> Images:
    """The images of these files; `samples` are (path, label)."""
    read, name_of = partial(read_files, samples, decode=decode), partial(name_files, samples)
    labels = [label for _, label in samples]
    return Images(len(samples), read, class_names, name_of=name_of, labels=labels, note=note)


def _open_folder(path: str, split: str, decode: Decode) -> Images:
    """Opens `path`/`split`/<class>/.../<image>; the classes are the sorted names of the folders."""
    folder = os.path.join(path, split)
    if not os.path.isdir(folder):
        raise InputError(f"--data-path {path}: the folder {split}/ is missing{_layout_hint(path)}")
    found = find_images(folder)
    files: dict[str, list[str]] = {}
    for parent, images in found.folders:
        if parent != folder:
            name = os.path.relpath(parent, folder).split(os.sep)[0]
            files.setdefault(name, []).extend(os.path.join(parent, image) for image in images)
        elif images:
            found.passed_over["outside the class folders"] = len(images)
    if not files:
        raise InputError(f"{folder}: no class folders; each class needs a folder with its images")
    names = sorted(files)
    if empty := [name for name in names if not files[name]]:
        which = "this folder" if len(empty) == 1 else f"these {len(empty)} folders"
        note = f" ({found.note()})" if found.passed_over else ""
        raise InputError(
            f"{folder}: no image in {_first_five(empty)}{note}; fill or remove {which}"
        )
    samples = [(file, label) for label, name in enumerate(names) for file in files[name]]
    return _images_in_files(samples, names, decode, found.note())


def _open_leaf_folders(folder: str, num_classes: int | None, decode: Decode) -> Images:
    """Opens a folder as timm does: an image's class is the name of the folder that it lies in."""
    found = find_images(folder)
    files = [
        (os.path.join(parent, image), "" if parent == folder else os.path.basename(parent))
        for parent, images in found.folders
        for image in images
    ]
    if not files:
        raise InputError(f"{folder}: no image in it or in its folders")
    names = sorted(sorted({name for _, name in files}), key=natural_key)
    _check_number(names, "timm/", num_classes)
    labels = {name: label for label, name in enumerate(names)}
    files.sort(key=lambda file: natural_key(file[0]))
    return _images_in_files(
        [(file, labels[name]) for file, name in files], names, decode, found.note()
    )


def _layout_hint(path: str) -> str:
    """A hint for a folder whose classes are not below train/ and val/; "" if it has no folders."""
    folders = class_folders(path) if os.path.isdir(path) else []
    found = [name for name in folders if name not in ("train", "val")]
    if not found:
        return ""
    names = ", ".join(found[:3])
    return f"; it contains {names}: if these are classes, move them into train/ and val/"


def _read_json(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: missing; the iNaturalist data set needs it in the folder of its images"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); download it again") from error


def _open_inat(path: str, year: int, train: bool, category: str, decode: Decode) -> Images:
    """Opens iNaturalist.

    The labels follow the first appearance of their category in the training annotations, as for
    DeiT's released weights.
    """
    if category not in INAT_CATEGORIES:
        raise InputError(
            f"--inat-category {category}: unknown; choose {', '.join(INAT_CATEGORIES)}"
        )
    train_json = _read_json(os.path.join(path, f"train{year}.json"))
    split = train_json if train else _read_json(os.path.join(path, f"val{year}.json"))
    records = _read_json(os.path.join(path, "categories.json"))
    if any(category not in record for record in records):
        file = os.path.join(path, "categories.json")
        raise InputError(f"--inat-category {category}: not given for all categories in {file}")
    categories = {record.get("id", index): record[category] for index, record in enumerate(records)}
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
    # DeiT's copy has no folders of supercategories.
    is_flat = bool(files) and not os.path.exists(os.path.join(path, files[0]))
    samples = []
    for image, file in zip(split["images"], files, strict=True):
        parts = file.split("/")
        file_path = os.path.join(path, *(parts[:1] + parts[2:] if is_flat else parts))
        samples.append((file_path, label_of_image[image["id"]]))
    if not samples or not os.path.exists(samples[0][0]):
        raise InputError(
            f"--data-path {path}: no images as {'train' if train else 'val'}{year}.json names them"
        )
    return _images_in_files(samples, list(labels), decode)


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
        if not path.endswith(".tar"):
            return _open_leaf_folders(path, num_classes, decode)
        # An open tar file can neither be pickled nor shared between workers.
        options["cache_tarfiles"] = False
    elif kind not in ("torch", "hfds", *STREAM_READERS) or not which:
        raise InputError(
            f"--data-set timm/{name}: unknown; use timm/, timm/torch/NAME, timm/hfds/NAME, "
            "timm/hfids/NAME, timm/tfds/NAME or timm/wds/NAME"
        )
    package = import_hugging_face() if kind in ("hfds", "hfids") else None
    if kind in STREAM_READERS:
        options.update(is_training=train, batch_size=batch_size, seed=seed)
    if kind in ("wds", "hfids"):
        options["input_img_mode"] = ""  # `StreamedImages` converts: timm would clip 16-bit pixels
    if kind == "wds":
        options["input_key"] = WDS_IMAGE_KEYS
    reasons = []
    for split in splits:
        try:
            source = create_dataset(name, root=path, split=split, search_split=False, **options)
            break
        except ImportError as error:
            raise InputError(
                f"--data-set timm/{name}: {error}; install the package that reads it"
            ) from error
        except (AssertionError, OSError, RuntimeError, ValueError) as error:
            reasons.append(str(error))
    else:
        why = "; ".join(dict.fromkeys(reasons))
        hint = "; timm/hfds/ reads the same data and counts its images" if kind == "hfids" else ""
        raise InputError(
            f"--data-set timm/{name} --data-path {path}: timm cannot open it ({why}){hint}"
        )
    if package is not None:
        _check_columns(source.reader, name)
    names = _timm_class_names(source, name, num_classes)
    if isinstance(source, IterableDataset):
        return StreamedImages(source, names, package)
    if not hasattr(source, "reader"):
        return _images_without_files(source, names, f"timm/{name}")
    reader = source.reader
    read = partial(read_timm, reader, decode=decode)
    name_of = partial(name_timm, reader, path if package is None else which)
    samples = getattr(reader, "samples", None)  # (file, label), for folders and tar files only
    labels = None if samples is None else [label for _, label, *_ in samples]
    return Images(len(source), read, names, package, name_of, labels)


def _check_columns(reader: Any, name: str) -> None:
    """Checks that a Hugging Face data set has the columns that timm reads.

    Raises:
        InputError: the column image or label is missing.
    """
    dataset = getattr(reader, "dataset", None)  # None for a stream
    described = reader.builder.info if dataset is None else dataset
    columns = list(described.features or ("image", "label"))
    if dataset and dataset[0]["image"] is None:  # timm has added the missing column, without values
        columns.remove("image")
    if not {"image", "label"} <= set(columns):
        raise InputError(
            f"--data-set timm/{name}: timm reads the columns image and label, this data set has "
            f"{', '.join(columns)}"
        )


def _find_split(path: str, train: bool) -> str:
    """The folder or tar file of the training or validation images.

    timm itself would take all of `path` if it is missing.

    Raises:
        InputError: it is missing.
    """
    if path.endswith(".tar") and not train:
        return path
    names = ("train", "training") if train else ("val", "valid", "validation", "eval", "test")
    for name in names:
        for candidate in (os.path.join(path, name), os.path.join(path, f"{name}.tar")):
            if os.path.exists(candidate):
                return candidate
    raise InputError(
        f"--data-path {path}: needs a folder {names[0]}/ or a file {names[0]}.tar in it"
    )


def _timm_class_names(source: Any, name: str, num_classes: int | None) -> list[str]:
    """The class names of a timm data set; numbers from 0 to `num_classes` - 1 if it has no names.

    Raises:
        InputError: the number of classes is unknown, or differs from `num_classes`.
    """
    reader = getattr(source, "reader", source)
    labels: dict[Any, int] | None = getattr(reader, "class_to_idx", None)
    labels = labels or getattr(reader, "class_name_to_idx", None) or {}
    in_order = sorted(labels, key=labels.__getitem__) or getattr(source, "classes", [])
    names = [str(name_of_class) for name_of_class in in_order]
    if not names and num_classes is None:
        raise InputError(
            f"--data-set timm/{name}: the number of its classes is not known: give --nb-classes"
        )
    if not names:
        return [str(label) for label in range(num_classes or 0)]
    _check_number(names, f"timm/{name}", num_classes)
    return names


def _check_number(names: list[str], name: str, num_classes: int | None) -> None:
    """Raises InputError if `num_classes` is given and is not the number of `names`."""
    if num_classes not in (None, len(names)):
        raise InputError(
            f"--nb-classes {num_classes}: {name} has {len(names)} classes; leave the flag out"
        )
