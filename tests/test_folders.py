"""Which files and folders become images and classes, what is refused and what is passed over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from timm.data.readers.reader_image_folder import find_images_and_targets
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from datasets import open_images
from errors import InputError
from pipeline.folders import find_images
from pipeline.images import Images, take_subset
from pipeline.pillow import ENDINGS
from tests.image_folders import jpeg_bytes, make_image_folder, message_of
from tests.runs import run_small
from tools import check_data

FOLDERS = ["IMNET", "timm/"]


def opened(root: Path, name: str = "IMNET") -> Images:
    images = open_images(name, str(root), True)
    assert isinstance(images, Images)
    return images


def files_of(images: Images) -> list[tuple[str, int]]:
    assert images.labels is not None
    return [(images.name_of(index), label) for index, label in enumerate(images.labels)]


def test_files_have_the_order_and_labels_of_torchvision_and_timm(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, ("b10", "b9", "B"), splits=("train",))
    for name in ("b9/sub/x.png", "b9/sub-2/y.BMP", "b9-c/a/1.jpeg", "b9/10.jpg"):
        path = root / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg_bytes(0))
    folder = str(root / "train")
    names = sorted(os.listdir(folder))
    labels = {name: label for label, name in enumerate(names)}
    assert opened(root).class_names == names
    assert files_of(opened(root)) == make_dataset(folder, labels, extensions=IMG_EXTENSIONS)
    wanted, in_order = find_images_and_targets(folder, types=set(ENDINGS))
    assert files_of(opened(root, "timm/")) == wanted
    assert opened(root, "timm/").class_names == list(in_order)


@pytest.mark.parametrize("name", FOLDERS)
def test_hidden_folders_and_files_are_no_classes_and_no_images(name: str, tmp_path: Path) -> None:
    root = make_image_folder(tmp_path)
    wanted = files_of(opened(root, name))
    for hidden in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "ant/.ipynb_checkpoints"):
        (root / "train" / hidden).mkdir()
        (root / "train" / hidden / "0.jpg").write_bytes(jpeg_bytes(0))
    (root / "train" / "ant" / "._0.jpg").write_bytes(b"of a Mac")
    images = opened(root, name)
    assert (files_of(images), images.class_names, images.note) == (wanted, ["ant", "bee"], "")


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("target", ["train/ant", "train", ".", "train/bee", "val/.."])
def test_a_folder_that_is_reached_twice_is_refused(target: str, name: str, tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "data", per_class=2)
    (root / "train" / "ant" / "link").symlink_to(root / target, target_is_directory=True)
    message = message_of(InputError, open_images, name, str(root), True)
    assert "remove the link" in message
    assert str(root / "train") in message


@pytest.mark.parametrize("name", FOLDERS)
def test_links_to_other_folders_are_followed(name: str, tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "data", per_class=2)
    (root / "train" / "ant").rename(tmp_path / "ant")
    (root / "train" / "ant").symlink_to(tmp_path / "ant", target_is_directory=True)
    (root / "train").rename(tmp_path / "train")
    (root / "train").symlink_to(tmp_path / "train", target_is_directory=True)
    assert [label for _, label in files_of(opened(root, name))] == [0, 0, 1, 1]


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("which", ["train", "train/bee", "train/bee/deep"])
def test_a_folder_that_cannot_be_read_is_named(
    which: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests may run as root, who may read all."""
    root = make_image_folder(tmp_path)
    (root / "train" / "bee" / "deep").mkdir()
    locked, scandir = str(root / which), os.scandir

    def refuse(path: str) -> object:
        if str(path) == locked:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    message = message_of(InputError, open_images, name, str(root), True)
    assert message.startswith(f"{locked}: the folder cannot be read (Permission denied)")


def test_no_file_costs_a_call_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = dict.fromkeys(("stat", "lstat"), 0)
    for name in calls:
        real = getattr(os, name)

        def count(*words: object, name: str = name, real: object = real, **more: object) -> object:
            calls[name] += 1
            return real(*words, **more)  # type: ignore[operator]

        monkeypatch.setattr(os, name, count)
    roots = [make_image_folder(tmp_path / str(n), per_class=n, splits=("train",)) for n in (2, 40)]
    used = []
    for root in roots:
        before = sum(calls.values())
        find_images(str(root))
        used.append(sum(calls.values()) - before - len(root.parts))
    assert used[0] - len(roots[0].parts) == used[1] - len(roots[1].parts)


@pytest.mark.parametrize("name", FOLDERS)
def test_one_class_is_refused(name: str, tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, classes=("ant",))
    run = run_small(f"--data-set {name} --data-path", root)
    assert run.code == 2
    assert "the images have one class only (ant)" in run.err


def test_images_without_class_folders_are_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0.jpg").write_bytes(jpeg_bytes(0))
    run = run_small("--data-set timm/ --data-path", tmp_path)
    assert (run.code, "one class only (no class folders)" in run.err) == (2, True)
    assert "no class folders" in message_of(InputError, opened, tmp_path)


def test_halves_without_a_class_in_common_are_refused(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path)
    for name in ("ant", "bee"):
        (root / "val" / name).rename(root / "val" / f"{name}s")
    run = run_small("--data-path", root)
    assert run.code == 2
    assert "2 only in training: ant, bee; 2 only in validation: ants, bees" in run.err


# ----------------------------------------------------------------------------------- passed over


@pytest.mark.parametrize("name", FOLDERS)
def test_every_ending_that_pillow_reads_is_an_image(name: str, tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, per_class=1)
    for ending in ENDINGS:
        (root / "train" / "ant" / f"a{ending.upper()}").write_bytes(jpeg_bytes(0))
    images = opened(root, name)
    assert len(images) == 2 + len(ENDINGS)
    assert images.note == ""
    assert {".gif", ".avif", ".jfif", ".jpe", *IMG_EXTENSIONS} <= set(ENDINGS)


def test_files_that_are_no_images_are_counted_and_told_once(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, per_class=4)
    for name in ("ant/1.heic", "bee/2.HEIC", "bee/list.txt", "bee/notes", "0.jpg"):
        (root / "train" / name).write_bytes(jpeg_bytes(0))
    note = (
        "training images: passed over 5 files that are not read as images: 2 .heic, 1 .txt, "
        "1 without an ending, 1 outside the class folders; Pillow reads .heic only with "
        "pillow-heif: convert these files"
    )
    run = run_small("--batch-size 4 --epochs 2 --data-path", root)
    assert (run.code, (run.out + run.err).count(note)) == (0, 1)
    assert "validation images: passed" not in run.out + run.err
    part = take_subset(opened(root), 4)
    assert f"training images: {part.note}" == note


def test_check_data_tells_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_image_folder(tmp_path)
    for number in range(7):
        (root / "val" / "ant" / f"0.end{number}").touch()
    check_data.main(["--data-path", str(root), "--num-workers", "0"])
    out = capsys.readouterr().out
    assert "validation images: passed over 7 files that are not read as images: 1 .end" in out
    assert ", ...\n" in out


def test_an_empty_class_says_what_it_holds(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path)
    (root / "train" / "cow").mkdir()
    (root / "train" / "cow" / "1.heic").touch()
    message = message_of(InputError, opened, root)
    assert "no image in cow (passed over 1 files" in message
    assert "pillow-heif" in message
