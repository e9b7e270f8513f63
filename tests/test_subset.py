"""`--subset` and `--val-subset`: which images are trained and evaluated on. `--max-steps`: where a
run ends, and that a longer one goes on exactly."""

from __future__ import annotations

import pickle
import shutil
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import datasets
from errors import InputError
from pipeline.images import Images, even_shares, read_files, read_pixels, take_subset
from tests.image_folders import make_image_folder, message_of
from tests.runs import changed, fingerprint, read_log, run_main, run_small, split


def made_of(counts: list[int]) -> Images:
    """So many images of each class, in turns as long as there are any; each image is its number."""
    labels = [
        label for turn in range(max(counts)) for label, count in enumerate(counts) if turn < count
    ]
    pixels = np.arange(len(labels), dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    names = [f"class {label}" for label in range(len(counts))]
    return Images(len(labels), partial(read_pixels, pixels, np.array(labels)), names, labels=labels)


def numbers_in(images: Images) -> list[int]:
    return [int(np.asarray(images[index][0])[0, 0, 0]) for index in range(len(images))]


# ------------------------------------------------------------------------------------- which images


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.data())
def test_shares_are_as_even_as_the_classes_allow(available: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, sum(available)))
    shares = even_shares(available, count)
    assert sum(shares) == count
    assert all(share <= held for share, held in zip(shares, available, strict=True))
    largest = max(shares)
    assert all(
        share >= largest - 1 or share == held for share, held in zip(shares, available, strict=True)
    )


@pytest.mark.parametrize(
    ("counts", "wanted", "expected"),
    [
        ([10, 10, 10], 6, [2, 2, 2]),
        ([10, 10, 10], 8, [3, 3, 2]),
        ([2, 10, 10], 12, [2, 5, 5]),
        ([4, 4], 8, [4, 4]),
    ],
)
def test_each_class_gives_its_share(counts: list[int], wanted: int, expected: list[int]) -> None:
    whole = made_of(counts)
    part = take_subset(whole, wanted)
    assert len(part) == part.num_images == wanted
    assert part.class_names == whole.class_names
    found = Counter(part[index][1] for index in range(wanted))
    assert [found[label] for label in range(len(counts))] == expected
    numbers = numbers_in(part)
    assert numbers == sorted(set(numbers))  # in the order of the data set, each once
    assert part.labels is not None
    assert list(part.labels) == [part[index][1] for index in range(wanted)]
    assert [part.name_of(index) for index in range(wanted)] == [
        whole.name_of(number) for number in numbers
    ]


def test_a_smaller_part_is_inside_a_larger_one_and_not_merely_the_first() -> None:
    whole = made_of([20, 20])
    parts = [set(numbers_in(take_subset(whole, count))) for count in (4, 10, 20, 40)]
    assert all(small <= large for small, large in pairwise(parts))
    assert numbers_in(take_subset(whole, 10)) != list(range(10))
    assert numbers_in(take_subset(whole, 10)) == numbers_in(take_subset(made_of([20, 20]), 10))
    assert numbers_in(take_subset(whole, 40)) == list(range(40))


def test_files_and_folders_give_parts_that_travel_to_workers(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, ("ant", "bee"), per_class=5)
    for name in ("IMNET", "timm/"):
        part = take_subset(datasets.open_images(name, str(root), True), 4)
        again = pickle.loads(pickle.dumps(part))
        assert [again[index][1] for index in range(4)] == [0, 0, 1, 1]
        assert "ant" in again.name_of(0)
    digits = take_subset(datasets.open_images("DIGITS", "", True), 100)
    assert Counter(digits[index][1] for index in range(100)) == dict.fromkeys(range(10), 10)


def test_what_cannot_be_taken_is_refused(tmp_path: Path) -> None:
    whole = made_of([3, 3])
    assert message_of(InputError, take_subset, whole, 1).endswith(
        "must lie between the 2 classes and the 6 images"
    )
    assert message_of(InputError, take_subset, whole, 7).startswith("--subset 7: must lie between")
    unknown = Images(4, partial(read_files, []), ["one", "two"])
    assert "the labels of this data set are known only when its images are read" in message_of(
        InputError, take_subset, unknown, 2
    )


# ----------------------------------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(
        tmp_path_factory.mktemp("subset"), ("ant", "bee", "cat"), per_class=16, size=(20, 20)
    )


@pytest.mark.slow
def test_a_run_trains_on_the_part_and_evaluates_on_all(photos: Path, tmp_path: Path) -> None:
    words = ("--data-path", photos, "--output-dir", tmp_path / "run")
    run = run_small("--subset 24", *words)
    assert run.code == 0, run.err
    assert "24 to train on, 48 to evaluate on" in run.out
    assert "3 per epoch" in run.out
    other = run_small("--subset 32 --epochs 2 --auto-resume --accept-changes epochs", *words)
    assert other.code == 2
    assert "num_images" in other.err
    refused = run_small("--subset 49 --data-path", photos)
    assert refused.code == 2
    assert "--subset 49: must lie between the 3 classes and the 48 images" in refused.err
    refused = run_small("--val-subset 2 --data-path", photos)
    assert refused.code == 2
    assert "--val-subset 2: must lie between the 3 classes and the 48 images" in refused.err


@pytest.mark.slow
def test_a_run_evaluates_on_a_part_and_a_resumed_one_may_take_another(
    photos: Path, tmp_path: Path
) -> None:
    words = split("--auto-resume --data-path", photos, "--output-dir", tmp_path)
    few = run_small(*words, "--val-subset 6")
    assert few.code == 0, few.err
    assert "48 to train on, 6 to evaluate on" in few.out
    path = tmp_path / "checkpoint.pth"
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "best_acc1": 100.0}, path)  # no accuracy of another run is better
    shutil.rmtree(tmp_path / "checkpoints")

    def best(more: str) -> float:
        words = split("--epochs 2 --accept-changes epochs --data-path", photos)
        done = run_small(*words, "--resume", path, more, "--output-dir", tmp_path / more[-1:])
        assert done.code == 0, done.err
        found = torch.load(tmp_path / more[-1:] / "checkpoint.pth", weights_only=True)
        return float(found["best_acc1"])

    assert best("--val-subset 6") == 100
    assert best("--val-subset 9") == read_log(tmp_path / "9")[-1]["test_acc1"]
    for more, images in (("", 48), ("--val-subset 9", 9)):  # the checkpoint's part is not taken
        whole = run_main("--eval --device cpu --data-path", photos, "--resume", path, more)
        assert whole.code == 0, whole.err
        assert f"{images} images" in whole.out


@pytest.mark.slow
@pytest.mark.parametrize("steps", [6, 9])
def test_a_run_ends_after_its_steps_and_a_longer_one_goes_on_exactly(
    steps: int, photos: Path, tmp_path: Path
) -> None:
    def run(folder: str, words: str = "") -> None:
        done = run_small(
            "--epochs 2",
            words,
            "--auto-resume --data-path",
            photos,
            "--output-dir",
            tmp_path / folder,
        )
        assert done.code == 0, done.err

    run("parts", f"--max-steps {steps}")  # an epoch has 6
    lines = read_log(tmp_path / "parts")
    assert [line["epoch"] for line in lines] == list(range(-(-steps // 6)))
    assert lines[-1]["test_acc1"] >= 0
    status = (tmp_path / "parts/status.json").read_text()
    assert '"done"' in status
    assert f'"step": {steps}' in status
    run("parts", f"--max-steps {steps}")  # nothing is left to do
    assert read_log(tmp_path / "parts") == lines
    run("parts")
    run("whole")
    assert changed(fingerprint(tmp_path / "parts"), fingerprint(tmp_path / "whole")) == []
