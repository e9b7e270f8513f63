"""From a file to pixels: Pillow's decoder, and a faster one for JPEGs that gives the same pixels.

Level 0: imports nothing from the project. It must not know data sets, transforms or loaders.

The faster one is simplejpeg (libjpeg-turbo without Pillow around it). It is strict: at the first thing out of order it
leaves the file to Pillow, whose word on what can be read is the only one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

File = str | BinaryIO  # a path, or a file that is open at its beginning
Decode = Callable[[File], Image.Image | np.ndarray]
START_OF_JPEG = b"\xff\xd8\xff"


def decode_pillow(file: File) -> Image.Image:
    """The image as RGB; what Pillow raises is told by `images.Images`."""
    with Image.open(file) as image:
        if image.mode != "RGB":
            return image.convert("RGB")
        image.load()
        return image  # converting would copy it


def decode_simplejpeg(file: File) -> Image.Image | np.ndarray:
    """The image of a sound JPEG as (H, W, 3) uint8, RGB; of any other file as `decode_pillow` gives it."""
    if isinstance(file, str):
        with open(file, "rb") as opened:
            content = opened.read()
    else:
        content = file.read()
    pixels = _decode_strictly(content)
    if pixels is not None:
        return pixels
    if not isinstance(file, str):
        file.seek(0)
    return decode_pillow(file)


def _decode_strictly(content: bytes) -> np.ndarray | None:
    """Pixels of a JPEG without a fault, in the colours that Pillow would give, and of a size that it would accept."""
    if not content.startswith(START_OF_JPEG):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if colours not in ("YCbCr", "Gray") or height * width > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        return simplejpeg.decode_jpeg(content, "RGB", strict=True)
    except Exception:  # whatever it says, Pillow has the last word
        return None
