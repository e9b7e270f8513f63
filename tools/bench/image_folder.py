"""Writes a small folder of generated pictures in ImageNet's layout, the same ones each time."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int, size: tuple[int, int] = (48, 40), mode: str = "RGB") -> Image.Image:
    """A gradient with a coloured square, (width, height) pixels, different for every number."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([x, y, np.full_like(x, (number * 37) % 256)], axis=-1).astype(np.uint8)
    side = min(size) // 4
    top, left = (number * 5) % (height - side), (number * 11) % (width - side)
    color = [(number * 83) % 256, 255 - (number * 29) % 256, 128]
    pixels[top : top + side, left : left + side] = color
    return Image.fromarray(pixels).convert(mode)


def jpeg_bytes(number: int, size: tuple[int, int] = (48, 40)) -> bytes:
    """`picture`, encoded as a JPEG file."""
    buffer = io.BytesIO()
    picture(number, size).save(buffer, "JPEG")
    return buffer.getvalue()


def make_image_folder(
    root: Path,
    classes: Sequence[str] = ("ant", "bee"),
    per_class: int = 5,
    splits: Sequence[str] = ("train", "val"),
    size: tuple[int, int] = (48, 40),
) -> Path:
    """Writes root/<split>/<class>/<number>.jpg, as IMNET and `timm/` read it, and returns root."""
    number = 0
    for split in splits:
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(per_class):
                (folder / f"{index}.jpg").write_bytes(jpeg_bytes(number, size))
                number += 1
    return root
