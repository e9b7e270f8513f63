"""The settings of image preprocessing (`ImageSpec`) and of augmentation in training (`Augment`)."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from errors import InputError
from pipeline import randaugment as rand

RESIZERS = ("pillow", "torch")
TORCH_INTERPOLATIONS = ("random", "bilinear", "bicubic")  # those that torch can antialias
# Up to this side a random resized crop would keep too few pixels: images are padded and cropped.
SMALL_SIDE = 32
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
ERASE_MODES = ("const", "rand", "pixel")
AUGMENTERS = ("cpu", "device")
_NUMBER = r"\d+(?:\.\d+)?"
# timm ignores unknown names or fails with an assertion, so the names are checked here.
_AUGMENT_NAMES = (
    rf"rand(-(m\d+|n\d+|p{_NUMBER}|mstd{_NUMBER}|mmax\d+|inc[01]|t(weights|3aw?)))*"
    rf"|augmix(-(m\d+|w\d+|d\d+|a{_NUMBER}|b[01]|mstd{_NUMBER}))*"
    rf"|(original|originalr|v0|v0r|3a)(-mstd{_NUMBER})?"
)


@dataclass(frozen=True)
class ImageSpec:
    """How an evaluation image becomes a tensor.

    Checkpoints contain it, so that a model gets the preprocessing that it was trained for.

    Attributes:
        input_size: (H, W) in pixels.
        mean, std: per channel, for pixels in 0..1.
        interpolation: of the resize, one of `INTERPOLATIONS`.
        crop_ratio: the share of the resized image's side that the centre crop keeps, in (0, 1].

    Raises:
        InputError: a value is out of its range.
    """

    input_size: tuple[int, int]
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    crop_ratio: float = 0.875

    def __post_init__(self) -> None:
        if min(self.input_size) < 1:
            raise InputError(
                f"--input-size {self.input_size}: an image needs at least one pixel a side"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(
                f"interpolation {self.interpolation!r} is none of {', '.join(INTERPOLATIONS)}"
            )
        if not 0 < self.crop_ratio <= 1:
            raise InputError(f"--eval-crop-ratio {self.crop_ratio}: must be above 0 and at most 1")

    @property
    def is_small(self) -> bool:
        return min(self.input_size) <= SMALL_SIDE

    def to_plain(self) -> dict[str, Any]:
        """Lists, numbers and strings only, for a checkpoint or JSON."""
        values = asdict(self).items()
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> ImageSpec:
        """The inverse of `to_plain`."""
        values: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()
        }
        if "input_size" not in values:
            raise InputError(
                "the checkpoint's image_spec has no input_size: it is damaged, use another "
                "checkpoint"
            )
        return cls(**values)


@dataclass(frozen=True)
class Augment:
    """The augmentation of training images; the names are those of DeiT's flags.

    Attributes:
        aa: timm's name of an automatic augmentation; None, '' or 'none' for none.
        color_jitter: strength of brightness, contrast and saturation jitter; timm applies it only
            without `aa` (and with `3a`).
        reprob: probability that an image is erased.
        remode: the fill of erased boxes, one of `ERASE_MODES`.
        recount: the largest number of erased boxes per image.
        interpolation: one of `INTERPOLATIONS`, or 'random' for bilinear or bicubic per image.
        hflip: probability of a horizontal flip.
        resize: the library that resizes the random crop, one of `RESIZERS`.
        randaugment: where flip and `aa` are applied: `cpu`, per image in the worker, or `device`,
            in the batch (RandAugment only).
        src: DeiT III's simple random crop instead of a random resized crop.

    Raises:
        InputError: a value is unknown or out of its range, or cannot be combined with another.
    """

    aa: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.3
    reprob: float = 0.25
    remode: str = "pixel"
    recount: int = 1
    interpolation: str = "bicubic"
    hflip: float = 0.5
    resize: str = "pillow"
    randaugment: str = "cpu"
    src: bool = False

    def __post_init__(self) -> None:
        if self.auto and not re.fullmatch(_AUGMENT_NAMES, self.auto):
            raise InputError(
                f"--aa {self.aa}: unknown; use none, rand-m9-mstd0.5-inc1 (or other numbers), "
                "augmix-m3-w3, original, originalr, v0, v0r or 3a"
            )
        if self.interpolation not in (*INTERPOLATIONS, "random"):
            raise InputError(
                f"--train-interpolation {self.interpolation}: use random, "
                f"{', '.join(INTERPOLATIONS)}"
            )
        if self.resize not in RESIZERS:
            raise InputError(f"--resize {self.resize}: use {' or '.join(RESIZERS)}")
        if self.resize == "torch" and self.interpolation not in TORCH_INTERPOLATIONS:
            raise InputError(
                f"--resize torch: has no --train-interpolation {self.interpolation}; "
                f"use --resize pillow, or one of {', '.join(TORCH_INTERPOLATIONS)}"
            )
        if self.remode not in ERASE_MODES:
            raise InputError(f"--remode {self.remode}: use {', '.join(ERASE_MODES)}")
        if self.recount < 1:
            raise InputError(
                f"--recount {self.recount}: must be at least 1; --reprob 0 switches erasing off"
            )
        for flag, value in (("--reprob", self.reprob), ("horizontal flip", self.hflip)):
            if not 0 <= value <= 1:
                raise InputError(f"{flag} {value}: must lie between 0 and 1")
        if self.randaugment not in AUGMENTERS:
            raise InputError(f"--randaugment {self.randaugment}: use {' or '.join(AUGMENTERS)}")
        if self.randaugment == "device":
            self._check_device()

    def _check_device(self) -> None:
        """Refuses what `--randaugment device` does not support."""
        policy = self.auto or ""
        is_encoded = not any(part in policy for part in rand.NOT_ENCODED)
        if not policy.startswith("rand") or not is_encoded:
            raise InputError(
                "--randaugment device: supports timm's rand-... policies without "
                f"{' or '.join(rand.NOT_ENCODED)}, "
                f"not --aa {self.aa}; use --randaugment cpu, or another --aa"
            )
        if self.interpolation not in rand.INTERPOLATIONS:
            raise InputError(
                f"--randaugment device: has no --train-interpolation {self.interpolation}; "
                f"use --randaugment cpu, or one of {', '.join(rand.INTERPOLATIONS)}"
            )

    @property
    def auto(self) -> str | None:
        """`aa`, or None if it is one of the spellings of none."""
        return None if self.aa in (None, "", "none") else self.aa
