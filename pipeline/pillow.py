"""Decodes an image file with Pillow, as 8-bit RGB, and refuses what has no such form.

What takes too long or too much memory is refused by its header, before it is decoded.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import BinaryIO

import numpy as np
from PIL import Image

File = str | BinaryIO  # a path, or an open file at its beginning

# Endings of the files that are read. Pillow finds the format in the content, not in the ending.
ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".webp", ".avif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".jpf", ".jpc"),
)
# Formats with these endings. Pillow would run Ghostscript for EPS, whatever the file's ending.
FORMATS = ["JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000"]
if find_spec("PIL.AvifImagePlugin"):  # Pillow 11.3 and later
    FORMATS.append("AVIF")
MAX_ASPECT = 100  # an image of 1 x 20,000 pixels needs 5 GB where an evaluation resizes it
# Pillow decodes run lengths of BMP in Python, at 4 million pixels per second, and a file of 1 kB
# can ask for any number of them.
MAX_RLE_PIXELS = 4_000_000

# What Pillow raises for damaged files and files that are no images.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def decode_pillow(file: File) -> Image.Image:
    """The image as RGB.

    Raises:
        One of `UNREADABLE`: the file is missing, damaged or no image, or is refused by
            `check_header` or `as_rgb`.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            check_header(image)
            return as_rgb(image)
    except (*UNREADABLE, MemoryError):
        raise
    except Exception as error:  # AVIF raises RuntimeError, TIFF TypeError, others struct.error
        raise ValueError(f"{type(error).__name__}: {error}") from error


def check_header(image: Image.Image) -> None:
    """Checks the sides of an opened image, which need not be decoded yet.

    Raises:
        ValueError: one side is more than `MAX_ASPECT` times the other, or the image is a BMP of run
            lengths with more than `MAX_RLE_PIXELS`.
    """
    check_aspect(*image.size)
    is_rle = any(tile[0] == "bmp_rle" for tile in getattr(image, "tile", ()))
    if is_rle and image.width * image.height > MAX_RLE_PIXELS:
        raise ValueError(
            f"a BMP with run lengths of {image.width} x {image.height} pixels, more than "
            f"{MAX_RLE_PIXELS:,}"
        )


def check_aspect(width: int, height: int) -> None:
    """Raises ValueError if one side is more than `MAX_ASPECT` times the other."""
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(
            f"{width} x {height} pixels: one side is more than {MAX_ASPECT} times the other"
        )


def as_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB; transparency is dropped.

    Of 16-bit grey the upper byte is kept, as Pillow itself does for 16-bit RGB. Pillow's `convert`
    would clip at 255, so that nearly all pixels became white.

    Raises:
        ValueError: it is not known which values of the pixels are black and white.
    """
    if image.mode == "RGB":
        image.load()
        return image  # `convert` would copy it
    # Pillow scales PGM files of more than 8 bits to 0..65535, in mode I.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        tags = getattr(image, "tag_v2", {})
        bits, white_is_zero = tags.get(258, (16,)), tags.get(262) == 0
        if bits != (16,) or white_is_zero:
            raise ValueError(
                f"a TIFF of {bits[0]} bits{', where 0 is white' * white_is_zero}, which Pillow "
                "reads without scaling; convert it to 8 bits"
            )
        upper = (np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)  # (H, W)
        return Image.fromarray(upper).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(
            f"its pixels are {kind}, of which it is not known what is black and white; convert it "
            "to 8 bits"
        )
    return image.convert("RGB")
