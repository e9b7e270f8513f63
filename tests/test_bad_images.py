"""Images that cannot be decoded: which are refused, and what training and evaluation do about
them."""

from __future__ import annotations

import errno
import io
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from datasets import open_images
from errors import InputError, SampleError
from pipeline import loaders
from pipeline.bad_images import BadImages, max_bad_images
from pipeline.images import Images, UnreadableSampleError, read_files
from pipeline.loaders import build_eval_loader, build_train_loader, closing, set_epoch
from pipeline.samples import SUBSTITUTES, TrainSamples, eval_samples, train_samples
from pipeline.spec import Augment, ImageSpec
from pipeline.transforms import build_eval_transform, build_train_transform
from tests.image_folders import (
    DAMAGE,
    damage,
    jpeg_bytes,
    make_cifar,
    make_image_folder,
    make_tar_pair,
    make_webdataset,
    message_of,
    picture,
)
from tests.runs import differences, run_main, run_small, weights_of

SPEC = ImageSpec((32, 32))
EVAL = build_eval_transform(SPEC)


def opened(root: Path, train: bool = True, name: str = "IMNET") -> Images:
    images = open_images(name, str(root), train)
    assert isinstance(images, Images)
    return images


# ------------------------------------------------------------------------ what is refused, what not


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_image_is_named_with_its_reason_and_what_to_do(how: str, tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, per_class=1, size=(120, 90))
    bad = damage(root / "train" / "bee" / "0.jpg", how)
    for name in ("IMNET", "timm/"):
        images = opened(root, name=name)
        assert images[0][1] == 0
        message = message_of(UnreadableSampleError, images.__getitem__, 1)
        assert message.startswith(str(bad))
        assert "cannot be read as an image" in message
        assert DAMAGE[how][1] in message
        assert "replace the file or remove it" in message
        assert "python -m tools.check_data" in message
        assert "--skip-corrupt" in message
        assert "\n" not in message


@pytest.mark.parametrize("kind", ["CMYK", "grey", "PNG named JPEG", "bad EXIF", "one pixel"])
@pytest.mark.filterwarnings("ignore")  # Pillow's, of the EXIF data
def test_an_odd_image_is_read(kind: str, tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, per_class=1)
    path, image = root / "train" / "ant" / "0.jpg", picture(3)
    options: dict[str, Any] = {}
    path.unlink()
    if kind == "PNG named JPEG":
        path = path.with_suffix(".JPEG")
        options = {"format": "PNG"}
    if kind == "bad EXIF":
        options = {"exif": b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff" + bytes(range(60))}
    modes = {"CMYK": "CMYK", "grey": "L"}
    image = (
        Image.new("RGB", (1, 1)) if kind == "one pixel" else image.convert(modes.get(kind, "RGB"))
    )
    image.save(path, **options)
    read, label = opened(root)[0]
    assert (read.mode, read.size, label) == ("RGB", image.size, 0)


def test_truncated_images_are_never_let_pass_for_all() -> None:
    from PIL import ImageFile

    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    for path in Path(loaders.__file__).parent.glob("*.py"):
        assert "LOAD_TRUNCATED_IMAGES" not in path.read_text()


@pytest.mark.filterwarnings("ignore")  # Pillow's, of TIFF files
def test_any_other_damage_is_met_by_the_same_error(tmp_path: Path) -> None:
    """Random bytes in files of many formats: what Pillow raises is always known, and the file is
    named."""
    chance, path = random.Random(0), tmp_path / "x"
    images, refused = (
        Images(1, partial(read_files, [(str(path), 0)]), ["a"], name_of=lambda index: str(path)),
        0,
    )
    for number, kind in enumerate(
        ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000")
    ):
        buffer = io.BytesIO()
        picture(number).save(buffer, kind)
        for _ in range(150):
            content = bytearray(buffer.getvalue()[: chance.randint(20, 2 * len(buffer.getvalue()))])
            for _ in range(chance.randint(0, 30)):
                content[
                    chance.randrange(len(content))
                    if chance.random() < 0.5
                    else chance.randrange(20)
                ] ^= 1 << 5
            path.write_bytes(content)
            try:
                said = images[0][0].mode
            except UnreadableSampleError as error:
                said = error.text
            assert said == "RGB" or said.startswith(str(path))
            refused += said != "RGB"
    assert 300 < refused < 1300


def test_images_without_files_of_their_own_are_named_by_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert opened(tmp_path, name="DIGITS").name_of(17) == "image 17 of DIGITS"
    make_cifar(tmp_path, "CIFAR10", monkeypatch)
    for name in ("CIFAR10", "timm/torch/cifar10"):
        assert opened(tmp_path, name=name).name_of(17) == f"image 17 of {name}"
    root = make_tar_pair(tmp_path)
    assert opened(root, name="timm/").name_of(3) == f"bee/1.jpg (image 3 of {root / 'train.tar'})"


# -------------------------------------------------------------------------------------- substitutes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 training images; 2, 7 and 13 are damaged."""
    root = make_image_folder(tmp_path / "images", ("ant", "bee", "cat"), per_class=8)
    for path, how in (
        ("ant/2.jpg", "cut in half"),
        ("ant/7.jpg", "a web page"),
        ("bee/5.jpg", "a bomb"),
    ):
        damage(root / "train" / path, how)
    return root


BAD = {2, 7, 13}
EVERY = torch.ones(10, dtype=torch.bool)  # image of a batch was replaced


def shown(
    folder: Path, epochs: tuple[int, ...] = (0, 1), start: int = 0, **more
) -> list[tuple[bytes, int, int]]:
    """(image, label, index) of every sample of some epochs, in the order in which a loader gives
    them; the index i of a replaced image as ~i."""
    samples = train_samples(
        opened(folder), build_train_transform(SPEC, Augment()), seed=0, skip_corrupt=True
    )
    loader = build_train_loader(samples, **{"batch_size": 6, "repeats": 3, **more})
    found = []
    with closing(loader):
        for epoch in epochs:
            set_epoch(loader, epoch, start)
            for batch in loader:
                indices = torch.where(batch.replaced, ~batch.indices, batch.indices)
                triples = zip(batch.images, batch.labels.tolist(), indices.tolist(), strict=True)
                found += [
                    (image.numpy().tobytes(), label, index) for image, label, index in triples
                ]
    return found


def test_substitutes_are_the_same_however_they_are_loaded(folder: Path) -> None:
    alone = shown(folder, repeats=1)
    assert {~index for *_, index in alone if index < 0} == BAD
    assert sorted(index if index >= 0 else ~index for *_, index in alone) == sorted(
        [*range(24)] * 2
    )
    for workers in (2, 3):
        assert shown(folder, repeats=1, num_workers=workers) == alone
    assert shown(folder, (1,), start=12, repeats=1) == alone[36:]  # as a resumed run would ask
    assert shown(folder) == shown(folder)


def test_substitutes_are_the_same_at_every_world_size(folder: Path) -> None:
    one, two, three = (
        sorted(
            sample
            for rank in range(size)
            for sample in shown(folder, batch_size=6 // size, rank=rank, world_size=size)
        )
        for size in (1, 2, 3)
    )
    assert one == two == three
    assert any(index < 0 for *_, index in one)


def test_a_substitute_is_another_image_with_its_own_label(folder: Path) -> None:
    images = opened(folder)
    samples = TrainSamples(images, EVAL, seed=0, skip_corrupt=True)
    whole = {
        EVAL(images[index][0]).numpy().tobytes(): index for index in range(24) if index not in BAD
    }
    drawn = set()
    for position in range(40):
        image, label, number, replaced, *_ = samples[0, 7, position]
        other = whole[image.numpy().tobytes()]
        assert (number, replaced, label) == (7, True, images[other][1])
        drawn.add(other)
    assert len(drawn) > 10
    assert samples[0, 8, 0][2:4] == (8, False)


def test_what_is_not_a_damaged_file_is_not_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(image: Image.Image) -> torch.Tensor:
        raise OSError("a bug in a transform")

    with pytest.raises(OSError, match=r"^a bug in a transform$"):
        TrainSamples(opened(folder), fail, 0, skip_corrupt=True)[0, 0, 0]

    def no_more_files(index: int) -> tuple[Image.Image, int]:
        raise OSError(errno.EMFILE, "Too many open files")

    for read, said in (
        (no_more_files, "lower --num-workers"),
        (lambda index: (picture(0), 9), "--nb-classes"),
    ):
        samples = TrainSamples(Images(3, read, ["a"]), EVAL, 0, skip_corrupt=True)
        assert said in message_of(SampleError, samples.__getitem__, (0, 0, 0))


def test_a_set_of_damaged_images_alone_ends_after_some_tries(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, per_class=2)
    for path in (root / "train").glob("*/*.jpg"):
        damage(path)
    samples = TrainSamples(opened(root), EVAL, 0, skip_corrupt=True)
    message = message_of(SampleError, samples.__getitem__, (0, 0, 0))
    assert message.startswith(str(root / "train" / "ant" / "0.jpg"))
    assert f"nor can any of {SUBSTITUTES} images drawn in its place" in message


def test_streams_are_refused(tmp_path: Path) -> None:
    make_webdataset(tmp_path)
    images = open_images("timm/wds/shards", str(tmp_path), True, num_classes=3)
    assert "--skip-corrupt is not for streams" in message_of(
        InputError, train_samples, images, EVAL, 0, True
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_never_replaces(workers: int, folder: Path) -> None:
    bad = damage(folder / "val" / "bee" / "3.jpg")
    loader = build_eval_loader(
        eval_samples(opened(folder, False), EVAL), batch_size=4, num_workers=workers, timeout=60
    )

    def evaluate() -> None:
        with closing(loader):
            list(loader)

    assert message_of(SampleError, evaluate).startswith(str(bad))


# ----------------------------------------------------------------------------------------- counting


def test_the_limit_is_a_thousandth_and_ten_of_few() -> None:
    assert [max_bad_images(number) for number in (1, 9_999, 11_000, 1_281_167)] == [
        10,
        10,
        11,
        1281,
    ]


def test_ranks_come_to_know_the_same_images_and_each_is_new_once() -> None:
    ranks = [BadImages(50, "image {}".format) for _ in range(2)]
    assert ranks[0].add(torch.tensor([4, 3, 9, 3]), torch.tensor([False, True, True, True])) == 2
    assert ranks[0].add(torch.tensor([9, 0]), torch.tensor([True, False])) == 0
    assert ranks[1].add(torch.tensor([9, 0]), torch.tensor([True, True])) == 2
    states = [rank.state() for rank in ranks]
    assert states == [[3, 9], [0, 9]]
    assert [rank.merge(states) for rank in ranks] == [[0, 3, 9]] * 2
    assert [rank.merge([rank.state() for rank in ranks]) for rank in ranks] == [[], []]
    assert [rank.add(torch.tensor([0, 3, 9]), EVERY[:3]) for rank in ranks] == [0, 0]
    said = ranks[0].report([0, 3])
    assert "3 so far, at most 10" in said
    assert said.endswith("image 0\n  image 3")
    resumed = BadImages(50, "image {}".format)
    resumed.load(ranks[0].state())
    assert resumed.add(torch.tensor([0, 3, 9, 4]), EVERY[:4]) == 1
    assert resumed.state() == [0, 3, 4, 9]


def test_one_more_than_the_limit_ends_the_run_with_the_list() -> None:
    corrupt = BadImages(50, "image {}".format)
    corrupt.add(torch.arange(10), EVERY)
    corrupt.merge([corrupt.state()])
    corrupt.stop_if_too_many()
    corrupt.add(torch.tensor([10]), EVERY[:1])
    corrupt.merge([corrupt.state()])
    message = message_of(InputError, corrupt.stop_if_too_many)
    assert "11 of 50 training images cannot be read" in message
    assert "--skip-corrupt replaces at most 10" in message
    assert all(f"\n  image {index}" in message for index in range(11))


# --------------------------------------------------------------------------------------- whole runs


def test_a_run_with_damaged_images_names_each_once_and_is_the_same_with_workers(
    folder: Path,
) -> None:
    words = "--skip-corrupt --epochs 2 --batch-size 4 --num-workers"
    runs = [run_small(f"{words} {workers} --data-path", folder) for workers in (0, 2)]
    assert differences(*(weights_of(run.training) for run in runs)) == []
    for run in runs:
        said = run.out + run.err
        for name in ("ant/2.jpg", "ant/7.jpg", "bee/5.jpg"):
            assert said.count(str(folder / "train" / name)) == 1
        assert "3 so far, at most 10" in said


def test_p11_a_run_bears_ten_of_few_images_and_no_more(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, per_class=20)
    ants = [root / "train" / "ant" / f"{number}.jpg" for number in range(11)]
    for path in ants[:10]:
        damage(path)
    words = "--skip-corrupt --batch-size 40 --num-workers 2 --data-path"
    assert run_small(words, root).code == 0
    damage(ants[10])
    run = run_small(words, root)
    assert run.code == 2
    assert "error: 11 of 40 training images cannot be read" in run.err
    assert all(str(path) in run.err for path in ants)


def test_a_run_stops_at_a_damaged_validation_image_by_name(folder: Path) -> None:
    bad = damage(folder / "val" / "cat" / "4.jpg")
    run = run_small("--skip-corrupt --batch-size 12 --data-path", folder)
    assert run.code == 2
    assert str(bad) in run.err


def test_an_evaluation_counts_what_a_stream_left_out(tmp_path: Path) -> None:
    words = "--data-set timm/wds/shards --nb-classes 3 --batch-size 4 --no-repeated-aug"
    output = tmp_path / "output"
    root = make_webdataset(tmp_path / "whole")
    assert run_small(words, "--data-path", root, "--output-dir", output).code == 0
    checkpoint = output / "checkpoint.pth"

    def partly_damaged(number: int) -> bytes:
        return jpeg_bytes(number)[: 40 if number % 6 == 1 else None]

    for folder, encode, said in (
        ("whole", jpeg_bytes, "on 12 images\n"),
        ("some", partly_damaged, "on 10 images; 2 of 12 were left out\n"),
        ("none", lambda number: b"", "error: no image was evaluated"),
    ):
        root = make_webdataset(tmp_path / folder, encode=encode)
        run = run_main(
            "--eval --device cpu --num-workers 0 --resume", checkpoint, "--data-path", root
        )
        assert (said in run.out + run.err, run.code) == (True, 2 * (folder == "none"))
