"""Files of every mode and size: their pixels are right, or the file is refused by name."""

from __future__ import annotations

import io
import os
import struct
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import open_images
from errors import SampleError
from pipeline import images as pipeline_images
from pipeline.images import (
    Images,
    StreamedImages,
    UnreadableSampleError,
    decode_simplejpeg,
    read_files,
)
from pipeline.pillow import FORMATS, MAX_ASPECT, MAX_RLE_PIXELS, decode_pillow
from pipeline.spec import Augment, ImageSpec
from pipeline.transforms import build_eval_transform, build_train_transform
from tests.image_folders import make_image_folder, make_webdataset, message_of

DECODERS = [decode_pillow] + [decode_simplejpeg] * (pipeline_images.simplejpeg is not None)
LEVELS = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4  # 0..252, an 8-bit grey ramp
DEEP = Image.fromarray(LEVELS.astype(np.uint16) * 256 + 255)  # the same ramp in 16 bits


def encoded(image: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def with_entry(tiff: bytes, tag: int, value: int) -> bytes:
    """A little-endian TIFF of Pillow's in which an entry of one short has another value."""
    entry = struct.pack("<HHL", tag, 3, 1)
    place = tiff.index(entry) + len(entry)
    return tiff[:place] + struct.pack("<H", value) + tiff[place + 2 :]


def opened(root: Path, name: str = "IMNET") -> Images:
    images = open_images(name, str(root), True)
    assert isinstance(images, Images)
    return images


def refusal(path: Path, content: bytes) -> str:
    """What the error of a data set of this file says, with each decoder the same."""
    path.write_bytes(content)
    said = set()
    for decode in DECODERS:
        read = partial(read_files, [(str(path), 0)], decode=decode)
        images = Images(1, read, ["a"], name_of=lambda index: str(path))
        said.add(message_of(UnreadableSampleError, images.__getitem__, 0))
    assert len(said) == 1
    assert min(said).startswith(f"{path}: cannot be read as an image (")
    return min(said)


# ------------------------------------------------------------------------------------ pixels' modes


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian TIFF", "PGM", "JPEG2000"])
def test_16_bit_grey_keeps_its_upper_byte(kind: str, decode: Any) -> None:
    if kind == "PGM":
        content = b"P5 8 8 65535\n" + np.asarray(DEEP).astype(">u2").tobytes()
    elif kind == "big-endian TIFF":
        big = Image.frombytes("I;16B", (8, 8), np.asarray(DEEP).astype(">u2").tobytes())
        content = encoded(big, "TIFF")
    else:
        content = encoded(DEEP, kind)
    pixels = np.asarray(decode(io.BytesIO(content)))
    assert np.array_equal(pixels, np.repeat(LEVELS[..., None], 3, axis=2))


def test_16_bit_rgb_is_read_as_16_bit_grey_is() -> None:
    """Pillow cannot write it: the file is made here."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    rows = np.repeat(np.asarray(DEEP).astype(">u2")[..., None], 3, axis=2)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    content += chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    pixels = np.asarray(decode_pillow(io.BytesIO(content)))
    assert np.array_equal(pixels, np.repeat(LEVELS[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_keep_their_colours(mode: str) -> None:
    image = Image.fromarray(LEVELS).convert(mode)
    settings = {"transparency": 3} if mode == "P" else {}
    content = encoded(image, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG", **settings)
    pixels = np.asarray(decode_pillow(io.BytesIO(content))).astype(int)
    wanted = np.asarray(image.convert("RGB")).astype(int) if mode == "1" else LEVELS[..., None]
    assert np.abs(pixels - wanted).max() <= 1


def test_pixels_without_a_known_range_are_refused(tmp_path: Path) -> None:
    deep = encoded(DEEP, "TIFF")
    for content, said in (
        (encoded(Image.fromarray(LEVELS / np.float32(252)), "TIFF"), "floating-point numbers"),
        (encoded(Image.fromarray(LEVELS.astype(np.int32)), "TIFF"), "32-bit integers"),
        (with_entry(deep, 262, 0), "a TIFF of 16 bits, where 0 is white"),
        (with_entry(deep, 258, 12), "a TIFF of 12 bits, which Pillow reads without scaling"),
    ):
        assert said in refusal(tmp_path / "x.tif", content)


def test_a_stream_reads_16_bits_as_files_are_read(tmp_path: Path) -> None:
    make_webdataset(tmp_path, ending="png", encode=lambda number: encoded(DEEP, "PNG"))
    images = open_images("timm/wds/shards", str(tmp_path), False, num_classes=3)
    assert isinstance(images, StreamedImages)
    read = [np.asarray(image)[..., 0] for image, _ in images]
    assert len(read) == 12
    assert all(np.array_equal(pixels, LEVELS) for pixels in read)


# ------------------------------------------------------------------------- what takes long or hangs


def test_a_small_bmp_that_asks_for_much_is_refused_at_once(tmp_path: Path) -> None:
    side = int(MAX_RLE_PIXELS**0.5) + 1

    def bmp(side: int) -> bytes:
        header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, 100, 0, 0, 256, 0)
        start = 14 + len(header) + 1024
        data = b"\1\1\0\0" * 200
        first = b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start)
        return first + header + bytes(1024) + data

    begin = time.process_time()
    assert "a BMP with run lengths of 2001 x 2001 pixels" in refusal(tmp_path / "x.bmp", bmp(side))
    assert time.process_time() - begin < 1
    assert decode_pillow(io.BytesIO(bmp(100))).size == (100, 100)


@pytest.mark.parametrize("size", [(1, MAX_ASPECT + 1), (3 * MAX_ASPECT + 1, 3)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_thin_image_is_refused_and_a_less_thin_one_evaluated(
    kind: str, size: tuple[int, int], tmp_path: Path
) -> None:
    said = refusal(tmp_path / "x", encoded(Image.new("RGB", size), kind))
    assert f"{size[0]} x {size[1]} pixels: one side is more than 100 times the other" in said
    content = encoded(Image.new("RGB", (1, MAX_ASPECT)), kind)
    transform = build_eval_transform(ImageSpec((64, 64)))
    for decode in DECODERS:
        pixels = Image.fromarray(np.asarray(decode(io.BytesIO(content))))
        assert transform(pixels).shape == (3, 64, 64)


@pytest.mark.parametrize("resize", ["pillow", "torch"])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 7), (9, 1)])
def test_every_crop_of_a_tiny_image_shows_it(size: tuple[int, int], resize: str) -> None:
    white = Image.new("RGB", size, (255, 255, 255))
    augment = Augment(aa=None, color_jitter=0.0, resize=resize)
    transform = build_train_transform(ImageSpec((64, 64)), augment)
    for seed in range(20):
        torch.manual_seed(seed)
        for pixels in (white, np.array(white)):
            assert transform(pixels).min() == 255


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, per_class=1)
    path = root / "train" / "ant" / "0.jpg"
    path.unlink()
    os.mkfifo(path)
    for name in ("IMNET", "timm/"):
        images, said = opened(root, name), list[str]()

        def read(images: Images = images, said: list[str] = said) -> None:
            said.append(message_of(UnreadableSampleError, images.__getitem__, 0))

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(5)
        assert "it is no regular file" in "".join(said)


# ----------------------------------------------------------------------- errors of Pillow's plugins


@pytest.mark.parametrize("error", [RuntimeError, TypeError, KeyError, struct.error])
def test_whatever_a_plugin_raises_names_the_file(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **more: Any) -> None:
        raise error("inside the plugin")

    monkeypatch.setattr(Image, "open", fail)
    assert f"{error.__name__}: " in refusal(tmp_path / "x.png", b"")


def test_too_little_memory_is_no_fault_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(index: int) -> Any:
        raise MemoryError

    message = message_of(SampleError, Images(1, fail, ["a"]).__getitem__, 0)
    assert message == "image 0: not enough memory; lower --num-workers"


def test_a_program_is_never_run_for_a_file(tmp_path: Path) -> None:
    assert "EPS" not in FORMATS
    assert "cannot identify" in refusal(tmp_path / "x.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n")
