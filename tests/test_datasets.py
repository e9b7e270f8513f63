"""Every data set name on files made here, and what each wrong input says."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import datasets
from datasets import augment_for, check_same_classes, image_spec_for, open_images
from errors import InputError, SampleError
from pipeline.images import Images
from pipeline.spec import Augment, ImageSpec
from tests.image_folders import (
    INAT_ORDER,
    INAT_RECORDS,
    jpeg_bytes,
    make_cifar,
    make_image_folder,
    make_inat,
    make_tar_pair,
    make_webdataset,
    message_of,
    picture,
)


def opened(name: str, path: Path | str = "", train: bool = True, **more) -> Images:
    images = open_images(name, str(path), train, **more)
    assert isinstance(images, Images)
    for index in (0, len(images) - 1):
        image, label = images[index]
        assert image.mode == "RGB"
        assert type(label) is int
        assert 0 <= label < len(images.class_names)
    return images


def labels_of(images: Images) -> list[int]:
    return [images[index][1] for index in range(len(images))]


# ----------------------------------------------------------------------------------- every data set


def test_digits_are_split_once_for_all_seeds() -> None:
    train, held_out = opened("DIGITS"), opened("DIGITS", train=False, seed=5)
    assert (len(train), len(held_out)) == (1437, 360)
    assert train.class_names == held_out.class_names == list("0123456789")
    assert set(Counter(labels_of(held_out)).values()) <= {35, 36, 37}
    image, _ = train[0]
    assert image.size == (8, 8)
    scans = [
        np.asarray(images[i][0]).tobytes()
        for images in (train, held_out)
        for i in range(len(images))
    ]
    assert len(set(scans)) > 1790  # two scans may look alike, two halves may not
    assert max(np.asarray(train[i][0]).max() for i in range(50)) == 255
    again = opened("DIGITS", seed=9)
    assert [np.asarray(again[i][0]).tobytes() for i in range(1437)] == scans[:1437]


@pytest.mark.parametrize(
    ("name", "kind", "classes"), [("CIFAR", "CIFAR100", 100), ("CIFAR10", "CIFAR10", 10)]
)
def test_cifar(
    name: str, kind: str, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cifar(tmp_path, kind, monkeypatch)
    train, val = opened(name, tmp_path), opened(name, tmp_path, train=False)
    assert len(train.class_names) == classes
    assert len(train) == (20 if kind == "CIFAR100" else 100)
    assert len(val) == 20
    assert np.array_equal(np.asarray(train[7][0]), np.asarray(picture(7, (32, 32))))


def test_image_folder_in_the_order_of_names(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, ("wasp", "Bee", "ant"), per_class=2)
    (root / "train" / "ant" / "deeper").mkdir()
    (root / "train" / "ant" / "deeper" / "x.PNG").write_bytes(
        jpeg_bytes(0)
    )  # a JPEG by another name
    (root / "train" / "ant" / "notes.txt").write_text("no image")
    train, val = opened("IMNET", root), opened("IMNET", root, train=False)
    assert train.class_names == val.class_names == ["Bee", "ant", "wasp"]
    assert labels_of(train) == [0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(("name", "year"), [("INAT", 2018), ("INAT19", 2019)])
@pytest.mark.parametrize("flat", [False, True])
def test_inat_numbers_classes_as_training_meets_them(
    name: str, year: int, flat: bool, tmp_path: Path
) -> None:
    make_inat(tmp_path, year, flat=flat)
    train, val = opened(name, tmp_path), opened(name, tmp_path, train=False)
    assert (
        train.class_names
        == val.class_names
        == [INAT_RECORDS[i]["name"] for i in INAT_ORDER]
        == ["kite", "fern", "wren"]
    )
    assert labels_of(train) == [0, 0, 1, 1, 2, 2]
    assert labels_of(val) == [1, 1, 2, 2, 0, 0]  # listed by category: fern, wren, kite
    kingdoms = opened(name, tmp_path, inat_category="kingdom")
    assert kingdoms.class_names == ["Animalia", "Plantae"]
    assert labels_of(kingdoms) == [0, 0, 1, 1, 0, 0]


def test_timm_folder_tar_and_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_image_folder(tmp_path / "folder", ("b", "a"), per_class=2)
    tars = make_tar_pair(tmp_path / "tars", ("b", "a"))
    for root in (folder, tars):
        for train in (True, False):
            images = opened("timm/", root, train)
            assert images.class_names == ["a", "b"]
            assert labels_of(images) == [0, 0, 1, 1]
    assert len(opened("timm/", tars / "val.tar", train=False)) == 4
    make_cifar(tmp_path, "CIFAR10", monkeypatch)
    assert len(opened("timm/torch/cifar10", tmp_path)) == 100
    assert opened("timm/torch/cifar10", tmp_path, train=False).class_names[3] == "class 3"


def test_timm_grey_images_become_rgb(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for half in ("train", "t10k"):
        header = [0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 28, 0, 0, 0, 28]
        (raw / f"{half}-images-idx3-ubyte").write_bytes(bytes(header) + bytes(2 * 28 * 28))
        (raw / f"{half}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 3, 9]))
    assert labels_of(opened("timm/torch/mnist", tmp_path)) == [3, 9]


# ---------------------------------------------------------------------------------- what errors say


def test_unknown_names_list_the_choices(tmp_path: Path) -> None:
    for name in ("imnet", "IMAGENET", "", "digits", "timm"):
        message = message_of(InputError, open_images, name, str(tmp_path), True)
        assert "--data-set" in message
        assert all(choice in message for choice in (*datasets.DATA_SETS, "timm/<name>"))
    assert "timm/torch/" in message_of(InputError, open_images, "timm/foo/bar", str(tmp_path), True)


@pytest.mark.parametrize(
    "name", ["CIFAR", "CIFAR10", "IMNET", "INAT", "INAT19", "timm/", "timm/torch/cifar10"]
)
def test_a_missing_path_is_named(name: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    assert f"--data-path {missing}" in message_of(InputError, open_images, name, missing, True)
    assert str(tmp_path) in message_of(
        InputError, open_images, name, str(tmp_path), True
    )  # there, but empty


def test_missing_parts_of_each_layout_are_named(tmp_path: Path) -> None:
    assert "cifar-100-python" in message_of(InputError, open_images, "CIFAR", str(tmp_path), True)
    assert "cifar-10-batches-py" in message_of(
        InputError, open_images, "CIFAR10", str(tmp_path), True
    )
    assert "train2018.json" in message_of(InputError, open_images, "INAT", str(tmp_path), True)
    assert "train.tar" in message_of(InputError, open_images, "timm/", str(tmp_path), True)
    root = make_inat(tmp_path / "inat")
    assert "--inat-category color" in message_of(
        InputError, open_images, "INAT", str(root), True, inat_category="color"
    )
    (root / "val2018.json").write_text("{")
    assert "val2018.json" in message_of(InputError, open_images, "INAT", str(root), False)
    (root / "categories.json").unlink()
    assert "categories.json" in message_of(InputError, open_images, "INAT", str(root), True)


def test_inat_without_its_images_or_with_a_new_class_says_so(tmp_path: Path) -> None:
    root = make_inat(tmp_path)
    val = json.loads((root / "val2018.json").read_text())
    train = json.loads((root / "train2018.json").read_text())
    train["annotations"] = [one for one in train["annotations"] if one["category_id"] != 1]
    train["images"] = [one for one in train["images"] if "/1/" not in one["file_name"]]
    (root / "train2018.json").write_text(json.dumps(train))
    assert "wren has no training image" in message_of(
        InputError, open_images, "INAT", str(root), False
    )
    val["images"] = [{**one, "file_name": "lost/" + one["file_name"]} for one in val["images"]]
    val["annotations"] = [one for one in val["annotations"] if one["category_id"] != 1]
    (root / "val2018.json").write_text(json.dumps({**val, "images": val["images"][-2:]}))
    assert "no images as val2018.json" in message_of(
        InputError, open_images, "INAT", str(root), False
    )


def test_folder_mistakes_are_named(tmp_path: Path) -> None:
    flat = make_image_folder(tmp_path, splits=("flat",)) / "flat"
    message = message_of(InputError, open_images, "IMNET", str(flat), True)
    assert "train/" in message
    assert "ant, bee" in message
    only_train = make_image_folder(tmp_path / "only", splits=("train",))
    assert "the folder val/ is missing" in message_of(
        InputError, open_images, "IMNET", str(only_train), False
    )
    assert "val/" in message_of(InputError, open_images, "timm/", str(only_train), False)
    (only_train / "val").mkdir()
    assert "no class folders" in message_of(
        InputError, open_images, "IMNET", str(only_train), False
    )
    (only_train / "train" / "cow").mkdir()
    (only_train / "train" / "cow" / "list.txt").touch()
    assert "no image in cow" in message_of(InputError, open_images, "IMNET", str(only_train), True)
    file = tmp_path / "file"
    file.touch()
    assert "train/ is missing" in message_of(InputError, open_images, "IMNET", str(file), True)


def test_training_on_one_tar_alone_is_refused(tmp_path: Path) -> None:
    tars = make_tar_pair(tmp_path)
    assert "train.tar" in message_of(InputError, open_images, "timm/", str(tars / "val.tar"), True)


def test_the_halves_must_have_the_same_classes() -> None:
    check_same_classes(["a", "b"], ["a", "b"])
    message = message_of(InputError, check_same_classes, ["a", "b", "c"], ["a", "b", "d"])
    assert "only in training: c" in message
    assert "only in validation: d" in message
    many = message_of(InputError, check_same_classes, [str(n) for n in range(100, 200)], [])
    assert "100 only in training" in many
    assert len(many) < 200
    assert "order" in message_of(InputError, check_same_classes, ["a", "b"], ["b", "a"])


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install scikit-learn" in message_of(InputError, open_images, "DIGITS", "", True)
    monkeypatch.setattr(sys, "path", [str(Path(datasets.__file__).parent)])
    for name in ("timm/hfds/some/set", "timm/hfids/some/set"):
        assert "pip install datasets" in message_of(InputError, open_images, name, "", True)
    assert sys.modules["datasets"] is datasets


def test_class_counts_come_from_the_data_where_it_knows_them(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "folder")
    assert "--nb-classes 7" in message_of(
        InputError, open_images, "timm/", str(root), True, num_classes=7
    )
    shards = make_webdataset(tmp_path / "shards")
    message = message_of(InputError, open_images, "timm/wds/shards", str(shards), True)
    assert "--nb-classes" in message


def test_what_timm_cannot_open_says_why(tmp_path: Path) -> None:
    message = message_of(
        InputError, open_images, "timm/wds/shards", str(tmp_path), False, num_classes=3
    )
    assert f"--data-path {tmp_path}" in message
    assert "split validation not found" in message
    message = message_of(InputError, open_images, "timm/torch/nothing", str(tmp_path), True)
    assert message.count("Unknown torchvision dataset nothing") == 1
    for name in (
        "timm/hfds",
        "timm/torch/",
        "timm/wds",
    ):  # timm itself would take these for folders of classes
        assert "hfds/" in message_of(InputError, open_images, name, str(tmp_path), True)


def test_a_label_outside_the_classes_is_named(tmp_path: Path) -> None:
    shards = make_webdataset(tmp_path, num_classes=3)
    images = open_images("timm/wds/shards", str(shards), False, num_classes=2)
    assert "--nb-classes" in message_of(SampleError, list, images)


# ------------------------------------------------------------------------------- per-data-set facts


def test_mirroring_is_left_out_where_it_would_change_the_class() -> None:
    assert augment_for("DIGITS", Augment()).hflip == 0.0
    assert augment_for("timm/torch/mnist", Augment()).hflip == 0.0
    assert augment_for("IMNET", Augment(aa=None)) == Augment(aa=None)


def test_the_crop_is_the_data_sets_own_unless_it_is_given() -> None:
    for name in ("IMNET", "CIFAR", "timm/torch/mnist"):
        assert (
            image_spec_for(name, 224)
            == image_spec_for(name, 224, None)
            == ImageSpec((224, 224), crop_ratio=0.875)
        )
    assert image_spec_for("DIGITS", (48, 32)) == image_spec_for("DIGITS", (48, 32), None)
    assert image_spec_for("DIGITS", (48, 32), None) == ImageSpec((48, 32), crop_ratio=1.0)
    assert image_spec_for("DIGITS", 64, 0.9) == ImageSpec((64, 64), crop_ratio=0.9)
    assert image_spec_for("IMNET", 64, 1.0) == ImageSpec((64, 64), crop_ratio=1.0)
