"""The faster decoder against Pillow's: the same pixels, the same refusals, the same words."""

from __future__ import annotations

import builtins
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import open_images
from errors import InputError
from pipeline import images as pipeline_images
from pipeline.images import (
    Images,
    UnreadableSampleError,
    decode_simplejpeg,
    pick_decoder,
)
from pipeline.pillow import decode_pillow
from pipeline.samples import TrainSamples
from pipeline.spec import Augment, ImageSpec
from pipeline.transforms import build_train_transform
from tests.image_folders import (
    DAMAGE,
    damage,
    make_image_folder,
    make_tar_pair,
    message_of,
    picture,
)

needs_it = pytest.mark.skipif(
    pipeline_images.simplejpeg is None, reason="simplejpeg is not installed"
)


def jpeg(
    number: int = 0, mode: str = "RGB", size: tuple[int, int] = (90, 61), **settings: Any
) -> bytes:
    buffer = io.BytesIO()
    picture(number, size).convert(mode).save(buffer, "JPEG", **settings)
    return buffer.getvalue()


ROTATED = Image.Exif()
ROTATED[0x0112] = 6
KINDS: dict[str, bytes] = {
    "4:2:0": jpeg(0),
    "4:4:4": jpeg(1, subsampling=0),
    "4:2:2": jpeg(2, subsampling=1),
    "grey": jpeg(3, "L"),
    "progressive": jpeg(4, progressive=True),
    "restarts": jpeg(5, restart_marker_rows=1),
    "low quality": jpeg(6, quality=8),
    "one pixel": jpeg(7, size=(1, 1)),
    "rotated by EXIF": jpeg(8, exif=ROTATED),
}


@needs_it
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_pillows_bit_for_bit(kind: str, tmp_path: Path) -> None:
    expected = np.array(decode_pillow(io.BytesIO(KINDS[kind])))
    fast = decode_simplejpeg(io.BytesIO(KINDS[kind]))
    assert isinstance(fast, np.ndarray)
    assert np.array_equal(fast, expected)
    (tmp_path / "a").write_bytes(KINDS[kind])
    assert np.array_equal(np.array(decode_simplejpeg(str(tmp_path / "a"))), expected)


@needs_it
@pytest.mark.parametrize(
    "kind", ["CMYK", "RGB without YCbCr", "PNG", "too large for Pillow's liking"]
)
def test_what_only_pillow_knows_goes_to_pillow(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    png = io.BytesIO()
    picture(0).save(png, "PNG")
    content = {
        "CMYK": jpeg(0, "CMYK"),
        "RGB without YCbCr": jpeg(0, keep_rgb=True),
        "PNG": png.getvalue(),
    }
    if kind.startswith("too"):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90 * 61 - 1)
        with pytest.warns(Image.DecompressionBombWarning):
            assert isinstance(decode_simplejpeg(io.BytesIO(jpeg())), Image.Image)
        return
    image = decode_simplejpeg(io.BytesIO(content[kind]))
    assert isinstance(image, Image.Image)
    assert image == decode_pillow(io.BytesIO(content[kind]))


@needs_it
def test_damaged_files_are_refused_or_read_as_pillow_does() -> None:
    """Bits flipped and ends cut at random: what simplejpeg takes, Pillow takes too and sees the
    same in it."""
    chance, taken, left = random.Random(0), 0, 0
    for number in range(3000):
        content = bytearray(chance.choice([*KINDS.values()]))
        if chance.random() < 0.3:
            del content[chance.randint(4, len(content)) :]
        for _ in range(chance.choice((0, 1, 1, 2, 5))):
            reach = (
                len(content) if number % 2 else min(len(content), 700)
            )  # half of them in the header
            content[chance.randrange(reach)] ^= 1 << chance.randrange(8)
        pixels = pipeline_images._decode_strictly(bytes(content))
        taken, left = taken + (pixels is not None), left + (pixels is None)
        if pixels is not None:
            assert np.array_equal(pixels, np.array(decode_pillow(io.BytesIO(content))))
    assert min(taken, left) > 500


@needs_it
@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["IMNET", "timm/"])
def test_an_image_that_cannot_be_read_is_named_as_with_pillow(
    how: str, name: str, tmp_path: Path
) -> None:
    root = make_image_folder(tmp_path, per_class=1, size=(120, 90))
    bad = damage(root / "train" / "bee" / "0.jpg", how)
    said = []
    for decode in (decode_pillow, decode_simplejpeg):
        images = open_images(name, str(root), True, decode=decode)
        assert isinstance(images, Images)
        said.append(message_of(UnreadableSampleError, images.__getitem__, 1).split("<")[0])
    assert said[0] == said[1]
    assert said[1].startswith(str(bad))
    assert DAMAGE[how][1] in said[1]


@needs_it
@pytest.mark.parametrize("resize", ["pillow", "torch"])
@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("name", ["IMNET", "timm/", "tar"])
def test_training_batches_do_not_depend_on_the_decoder(
    name: str, side: int, resize: str, tmp_path: Path
) -> None:
    root = make_tar_pair(tmp_path) if name == "tar" else make_image_folder(tmp_path)
    transform, batches = build_train_transform(ImageSpec((side, side)), Augment(resize=resize)), []
    for decode in (decode_pillow, decode_simplejpeg):
        images = open_images("timm/" if name == "tar" else name, str(root), True, decode=decode)
        assert isinstance(images, Images)
        samples = TrainSamples(images, transform, seed=0)
        batches.append(samples.__getitems__([(0, index, index) for index in (3, 0, 1, 0)]))
    assert torch.equal(batches[0].images, batches[1].images)
    assert torch.equal(batches[0].labels, batches[1].labels)


def test_a_missing_file_is_the_systems_error(tmp_path: Path) -> None:
    for name in ("auto", "pillow"):
        with pytest.raises(FileNotFoundError):
            pick_decoder(name)(str(tmp_path / "none.jpg"))


def test_the_decoder_is_picked_by_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_images, "simplejpeg", None)
    assert pick_decoder("pillow") is pick_decoder("auto") is decode_pillow
    with pytest.raises(InputError, match=r"--decoder simplejpeg.*requirements-fast\.txt"):
        pick_decoder("simplejpeg")
    monkeypatch.setattr(pipeline_images, "simplejpeg", builtins)
    assert pick_decoder("simplejpeg") is pick_decoder("auto") is decode_simplejpeg
    assert pick_decoder("pillow") is decode_pillow
