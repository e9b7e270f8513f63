"""RandAugment (Cubuk et al., 2020) drawn without being done: what timm would do to an image, as
rows of numbers.

Level 0: imports nothing from the project. It must not touch pixels:
`pipeline/randaugment_pixels.py` does, on the batch's device. The draws are timm's own: its objects
run as they are, with a `Drawing` in the place of the image and, in the place of each operation's
function, an `Encoder` that notes what is asked for.

Letters: B batch, L layers, which are the flip if there is one and those of RandAugment. H height, W
width, in pixels.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, cast

import torch
from PIL.Image import Resampling
from timm.data.auto_augment import AugmentOp, RandAugment
from torch import Tensor
from torchvision.transforms import RandomHorizontalFlip

NUMBERS = 6  # of an operation, whatever its kind
COLUMNS = 2 + NUMBERS  # of `as_tensor`: kind, image, numbers
INTERPOLATIONS = (
    "bilinear",
    "bicubic",
    "random",
)  # of the warps; random is one of the others per operation
NOT_ENCODED = ("-t3a",)  # timm's sets with a blur, as they are written in its policy string
ALL, NO_LEVEL = 255, 256  # a mask that keeps every bit; a threshold that no level reaches


class Kind(IntEnum):
    """What is done alike. The order is that of the rows in a layer; kinds that share a step stand
    side by side."""

    NOTHING = 0
    FLIP = 1
    RULE = 2  # of levels: threshold, what is added below it, 1 to negate from it on, mask
    AUTO_CONTRAST = 3
    EQUALIZE = 4
    BICUBIC = 5  # warps: the six numbers of an affine map from the new image to the old
    BILINEAR = 6
    COLOR = 7  # blends: the image's share, which may lie outside 0..1
    CONTRAST = 8
    BRIGHTNESS = 9
    SHARPNESS = 10


class Row(NamedTuple):
    """One operation on one image; unused numbers are 0."""

    kind: Kind
    numbers: tuple[float, ...] = (0.0,) * NUMBERS


NOTHING, FLIPPED = Row(Kind.NOTHING), Row(Kind.FLIP)


class Drawing:
    """Stands in the place of an image while its operations are drawn.

    Attributes:
        size: (H, W).
        rows: the operations so far.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.rows: list[Row] = []

    def note(self, kind: Kind, *numbers: float) -> Drawing:
        self.rows.append(Row(kind, (*map(float, numbers), *(0.0,) * (NUMBERS - len(numbers)))))
        return self


# ----------------------------------------------------------------------------------------- encoding
# timm's operations by name, and what their arguments come to.


def _posterize(drawing: Drawing, bits: int) -> Drawing:
    kept = min(
        max(bits, 0), 8
    )  # `-mmax` may ask for fewer than 0 bits; 0 bits is black, as `transforms.posterize` has it
    return drawing.note(Kind.RULE, NO_LEVEL, 0, 0, 256 - 2 ** (8 - kept))


def _map_of(name: str, level: float, size: tuple[int, int]) -> tuple[float, ...]:
    """(a, b, c, d, e, f): the new pixel at (x, y) is the old one at (a x + b y + c, d x + e y +
    f)."""
    height, width = size
    if name == "Rotate":
        return _rotation(level, width / 2, height / 2)
    shear_x, shift_x, shear_y, shift_y = {
        "ShearX": (level, 0.0, 0.0, 0.0),
        "TranslateXRel": (0.0, level * width, 0.0, 0.0),
        "ShearY": (0.0, 0.0, level, 0.0),
        "TranslateYRel": (0.0, 0.0, 0.0, level * height),
    }[name]
    return 1.0, shear_x, shift_x, shear_y, 1.0, shift_y


def _rotation(degrees: float, x: float, y: float) -> tuple[float, ...]:
    """Counterclockwise around (x, y), sine and cosine rounded to 15 digits as Pillow has them."""
    angle = math.radians(degrees % 360)
    cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
    across, down = (
        sine * y - cosine * x,
        -sine * x - cosine * y,
    )  # added in Pillow's order, for equal bits
    return cosine, -sine, across + x, sine, cosine, down + y


RULES: dict[str, Callable[..., Drawing]] = {
    "AutoContrast": lambda drawing: drawing.note(Kind.AUTO_CONTRAST),
    "Equalize": lambda drawing: drawing.note(Kind.EQUALIZE),
    "Invert": lambda drawing: drawing.note(Kind.RULE, 0, 0, 1, ALL),
    "Posterize": _posterize,
    "Solarize": lambda drawing, threshold: drawing.note(Kind.RULE, threshold, 0, 1, ALL),
    "SolarizeAdd": lambda drawing, added: drawing.note(Kind.RULE, 128, added, 0, ALL),
    "Color": lambda drawing, share: drawing.note(Kind.COLOR, share),
    "Contrast": lambda drawing, share: drawing.note(Kind.CONTRAST, share),
    "Brightness": lambda drawing, share: drawing.note(Kind.BRIGHTNESS, share),
    "Sharpness": lambda drawing, share: drawing.note(Kind.SHARPNESS, share),
}
WARPS = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


class Encoder:
    """Takes the place of the function behind one of timm's operations, and draws what that would
    draw.

    Raises:
        KeyError: the operation is one without an encoding.
    """

    def __init__(self, name: str) -> None:
        self.name = re.sub(
            "(Increasing|Original)$", "", name
        )  # variants of the magnitude, not of what is done
        if self.name not in WARPS and self.name not in RULES:
            raise KeyError(name)

    def __call__(self, drawing: Drawing, *levels: float, resample: Any, **_: Any) -> Drawing:
        """Args: what timm passes: its arguments, and one way to resample or several to choose
        from."""
        if self.name not in WARPS:
            return RULES[self.name](drawing, *levels)
        chosen = random.choice(resample) if isinstance(resample, (tuple, list)) else resample
        kind = {Resampling.BICUBIC: Kind.BICUBIC, Resampling.BILINEAR: Kind.BILINEAR}[chosen]
        (level,) = levels
        return drawing.note(kind, *_map_of(self.name, level, drawing.size))


class DrawOnly:
    """Draws the flip and RandAugment as timm's transform would, from the same generators in the
    same order.

    Args:
        steps: of timm's transform, between crop and tensor: a horizontal flip or none, then
            RandAugment, whose operations are encoded from now on.
        size: (H, W) of the images.
    """

    def __init__(self, steps: Sequence[Any], size: tuple[int, int]) -> None:
        *flips, self.randaugment = steps
        assert isinstance(self.randaugment, RandAugment), self.randaugment
        assert all(isinstance(flip, RandomHorizontalFlip) for flip in flips)
        self.flips = [flip.p for flip in flips]
        self.size = size
        for operation in self.randaugment.ops:
            assert isinstance(operation, AugmentOp)
            operation.aug_fn = cast(Any, Encoder(operation.name))

    @property
    def layers(self) -> int:
        return len(self.flips) + self.randaugment.num_layers

    def __call__(self) -> list[Row]:
        """The L rows of one image, as they are done: the flip's own, then those of RandAugment.

        Operations that are left out stand last, so that later layers have less to do.
        """
        flips = [FLIPPED if torch.rand(1) < probability else NOTHING for probability in self.flips]
        rows = flips + self.randaugment(Drawing(self.size)).rows
        return rows + [NOTHING] * (self.layers - len(rows))


# ------------------------------------------------------------------------------------- in the batch


def as_tensor(drawn: Sequence[Sequence[Row]]) -> Tensor:
    """The rows of each image, its layers apart, as (B, L, 8) float64: kind, image, numbers.

    Within each layer rows are sorted by kind, so that a kind's images are neighbours, and the
    number of rows of each kind is all that has to be known where the device is told what to do.
    """
    layers = []
    for layer in zip(*drawn, strict=True):
        rows = [(row.kind, image, *row.numbers) for image, row in enumerate(layer)]
        layers.append(sorted(rows, key=lambda row: row[0]))
    return (
        torch.tensor(layers, dtype=torch.float64)
        .reshape(-1, len(drawn), COLUMNS)
        .transpose(0, 1)
        .contiguous()
    )


def count_kinds(drawn: Tensor) -> list[list[int]]:
    """How many rows of each kind each layer has, from `as_tensor`'s on the host."""
    assert drawn.device.type == "cpu", "reading them elsewhere would wait for the device"
    kinds = drawn[:, :, 0].long()  # (B, L)
    return [torch.bincount(layer, minlength=len(Kind)).tolist() for layer in kinds.unbind(1)]
