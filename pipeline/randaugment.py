"""Draws RandAugment (Cubuk et al., 2020) without applying it, as rows of numbers.

`pipeline/randaugment_pixels.py` applies the rows on the batch's device. The draws are timm's: its
RandAugment object runs unchanged, but a `Recorder` replaces the image and an `Encoder` replaces
the function of each operation.

Letters: B batch, L layers (the flip, if any, and the layers of RandAugment), H height and W width
in pixels.
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

NUMBERS = 6  # numbers per operation, for all kinds
COLUMNS = 2 + NUMBERS  # columns of `as_tensor`: kind, image, numbers
# Interpolations of the warps; `random` draws one of the others for each operation.
INTERPOLATIONS = ("bilinear", "bicubic", "random")
NOT_ENCODED = ("-t3a",)  # parts of timm's policy strings that include a blur
ALL_BITS = 255  # a mask that keeps every bit
NO_LEVEL = 256  # a threshold above all levels


class Kind(IntEnum):
    """The kinds of operations and the meaning of a row's numbers.

    A layer's rows are sorted by kind; kinds that are applied by one function are neighbours.
    """

    NOTHING = 0
    FLIP = 1
    RULE = 2  # threshold, number added below it, 1 to invert levels from it upwards, bit mask
    AUTO_CONTRAST = 3
    EQUALIZE = 4
    # Warps: the six numbers of an affine map from the new image to the old one.
    BICUBIC = 5
    BILINEAR = 6
    # Blends: the image's share, which may lie outside 0..1.
    COLOR = 7
    CONTRAST = 8
    BRIGHTNESS = 9
    SHARPNESS = 10


class Row(NamedTuple):
    """One operation on one image; unused numbers are 0."""

    kind: Kind
    numbers: tuple[float, ...] = (0.0,) * NUMBERS


NOTHING, FLIPPED = Row(Kind.NOTHING), Row(Kind.FLIP)


class Recorder:
    """Replaces an image while its operations are drawn, and records them.

    Attributes:
        size: (H, W) of the image.
        rows: the operations drawn so far.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.rows: list[Row] = []

    def record(self, kind: Kind, *numbers: float) -> Recorder:
        """Adds one operation; unused numbers are 0."""
        padding = (0.0,) * (NUMBERS - len(numbers))
        self.rows.append(Row(kind, (*map(float, numbers), *padding)))
        return self


# ----------------------------------------------------------------------------------------- encoding
# timm's operations by name, and how their arguments become numbers.


def _posterize(recorder: Recorder, bits: int) -> Recorder:
    # With `-mmax`, bits may be negative. 0 bits give a black image, as in `transforms.posterize`.
    kept = min(max(bits, 0), 8)
    return recorder.record(Kind.RULE, NO_LEVEL, 0, 0, 256 - 2 ** (8 - kept))


def _affine_map(name: str, level: float, size: tuple[int, int]) -> tuple[float, ...]:
    """(a, b, c, d, e, f) such that new pixel (x, y) is old pixel (a x + b y + c, d x + e y + f)."""
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
    """The affine map of a counterclockwise rotation around (x, y)."""
    angle = math.radians(degrees % 360)
    # Pillow rounds sine and cosine to 15 digits.
    cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
    # The sums are in Pillow's order, so that all bits are equal.
    shift_x, shift_y = sine * y - cosine * x, -sine * x - cosine * y
    return cosine, -sine, shift_x + x, sine, cosine, shift_y + y


ENCODINGS: dict[str, Callable[..., Recorder]] = {
    "AutoContrast": lambda recorder: recorder.record(Kind.AUTO_CONTRAST),
    "Equalize": lambda recorder: recorder.record(Kind.EQUALIZE),
    "Invert": lambda recorder: recorder.record(Kind.RULE, 0, 0, 1, ALL_BITS),
    "Posterize": _posterize,
    "Solarize": lambda recorder, threshold: recorder.record(Kind.RULE, threshold, 0, 1, ALL_BITS),
    "SolarizeAdd": lambda recorder, added: recorder.record(Kind.RULE, 128, added, 0, ALL_BITS),
    "Color": lambda recorder, share: recorder.record(Kind.COLOR, share),
    "Contrast": lambda recorder, share: recorder.record(Kind.CONTRAST, share),
    "Brightness": lambda recorder, share: recorder.record(Kind.BRIGHTNESS, share),
    "Sharpness": lambda recorder, share: recorder.record(Kind.SHARPNESS, share),
}
WARPS = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


class Encoder:
    """Replaces the function of one of timm's operations: draws the same, and records the operation.

    Args:
        name: timm's name of the operation.

    Raises:
        KeyError: the operation has no encoding.
    """

    def __init__(self, name: str) -> None:
        # The suffix changes how the magnitude is drawn, not the operation.
        self.name = re.sub("(Increasing|Original)$", "", name)
        if self.name not in WARPS and self.name not in ENCODINGS:
            raise KeyError(name)

    def __call__(self, recorder: Recorder, *levels: float, resample: Any, **_: Any) -> Recorder:
        """Records one operation.

        Args:
            levels: the arguments that timm passes to the operation's function.
            resample: one of Pillow's resampling filters, or several of which one is drawn.
        """
        if self.name not in WARPS:
            return ENCODINGS[self.name](recorder, *levels)
        chosen = random.choice(resample) if isinstance(resample, (tuple, list)) else resample
        kind = {Resampling.BICUBIC: Kind.BICUBIC, Resampling.BILINEAR: Kind.BILINEAR}[chosen]
        (level,) = levels
        return recorder.record(kind, *_affine_map(self.name, level, recorder.size))


class DrawOnly:
    """Draws the flip and RandAugment: the same generators in the same order as timm's transform.

    Args:
        steps: the steps of timm's transform between crop and tensor: a horizontal flip or none,
            then RandAugment. The functions of its operations are replaced by `Encoder`s.
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
        """Draws the L rows of one image in the order in which they are applied.

        Operations that RandAugment leaves out come last, so that later layers are cheaper.
        """
        flips = [FLIPPED if torch.rand(1) < probability else NOTHING for probability in self.flips]
        rows = flips + self.randaugment(Recorder(self.size)).rows
        return rows + [NOTHING] * (self.layers - len(rows))


# ------------------------------------------------------------------------------- rows of a batch


def as_tensor(drawn: Sequence[Sequence[Row]]) -> Tensor:
    """The rows of a batch as (B, L, 8) float64: kind, image, six numbers.

    Each layer's rows are sorted by kind, so that the images of one kind are neighbours. The host
    then needs only the number of rows of each kind to launch the device's work.

    Args:
        drawn: for each of B images, its L rows.
    """
    layers = []
    for layer in zip(*drawn, strict=True):
        rows = [(row.kind, image, *row.numbers) for image, row in enumerate(layer)]
        layers.append(sorted(rows, key=lambda row: row[0]))
    by_layer = torch.tensor(layers, dtype=torch.float64).reshape(-1, len(drawn), COLUMNS)
    return by_layer.transpose(0, 1).contiguous()


def count_kinds(drawn: Tensor) -> list[list[int]]:
    """The number of rows of each kind, for each layer of `as_tensor`'s result on the host."""
    assert drawn.device.type == "cpu", "reading them elsewhere would wait for the device"
    kinds = drawn[:, :, 0].long()  # (B, L)
    return [torch.bincount(layer, minlength=len(Kind)).tolist() for layer in kinds.unbind(1)]
