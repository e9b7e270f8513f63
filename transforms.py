"""From a decoded image to a tensor, for training and for evaluation, and from pixels to normalised values and back.

Level 1: imports `utils`, `cropping` and `randaugment` only. It must not open files, know labels or mix images.
The training recipe is DeiT's, built by timm; inputs of at most `SMALL_SIDE` pixels are padded and cropped instead of
zoomed, as is usual for CIFAR.

Letters: B batch, H height, W width, in pixels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, AugMixAugment, AutoAugment, RandAugment
from timm.data.auto_augment import posterize as timm_posterize
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import str_to_interp_mode
from torchvision import transforms

import randaugment
from cropping import OF_TORCH, RESIZERS, CropAndResize, Pixels, as_image, as_tensor
from utils import InputError


class Undone(NamedTuple):
    """Pixels (3, H, W) uint8 and what is left to do to them, in the batch: `randaugment.DrawOnly`'s rows."""

    pixels: torch.Tensor
    operations: list[randaugment.Row]


# A decoded image -> (3, H, W): uint8 pixels for training, also as `Undone`, normalised float32 for evaluation
Transform = Callable[[Any], Any]

SMALL_SIDE = 32  # up to here a random zoom would leave too few pixels, so images are padded and cropped
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
ERASE_MODES = ("const", "rand", "pixel")
AUGMENTERS = ("cpu", "device")
_NUMBER = r"\d+(?:\.\d+)?"
_AUGMENT_NAMES = (  # timm ignores or asserts on what it does not know, so the names are checked here
    rf"rand(-(m\d+|n\d+|p{_NUMBER}|mstd{_NUMBER}|mmax\d+|inc[01]|t(weights|3aw?)))*"
    rf"|augmix(-(m\d+|w\d+|d\d+|a{_NUMBER}|b[01]|mstd{_NUMBER}))*"
    rf"|(original|originalr|v0|v0r|3a)(-mstd{_NUMBER})?"
)


@dataclass(frozen=True)
class ImageSpec:
    """How an evaluation image becomes a tensor; a checkpoint carries it so that a model meets what it was trained for.

    Attributes:
        input_size: (H, W) in pixels.
        mean, std: per channel, of pixels in 0..1.
        interpolation: one of `INTERPOLATIONS`.
        crop_ratio: share of the resized image's side that the centre crop keeps, in (0, 1].

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
            raise InputError(f"--input-size {self.input_size}: an image needs at least one pixel a side")
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(f"interpolation {self.interpolation!r} is none of {', '.join(INTERPOLATIONS)}")
        if not 0 < self.crop_ratio <= 1:
            raise InputError(f"--eval-crop-ratio {self.crop_ratio}: must be above 0 and at most 1")

    @property
    def is_small(self) -> bool:
        return min(self.input_size) <= SMALL_SIDE

    def to_plain(self) -> dict[str, Any]:
        """Lists, numbers and strings only, for a checkpoint or JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> ImageSpec:
        """The inverse of `to_plain`."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()}
        if "input_size" not in values:
            raise InputError("the checkpoint's image_spec has no input_size: it is damaged, use another checkpoint")
        return cls(**values)


@dataclass(frozen=True)
class Augment:
    """What training does to an image, in DeiT's words.

    Attributes:
        aa: timm's name of an automatic augmentation; None, '' or 'none' is none.
        color_jitter: strength of brightness, contrast and saturation jitter; timm applies it only without `aa`
            (and with `3a`).
        reprob: probability that a rectangle is erased; `remode` fills it, `recount` is the largest number of them.
        interpolation: one of `INTERPOLATIONS`, or 'random' for bilinear or bicubic per image.
        hflip: probability of mirroring left and right.
        resize: what resizes the random crop, one of `cropping.RESIZERS`.
        randaugment: where flip and `aa` are done: `cpu`, per image, or `device`, in the batch (RandAugment only).

    Raises:
        InputError: a value is unknown or out of its range, or not offered together with another.
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

    def __post_init__(self) -> None:
        if self.auto and not re.fullmatch(_AUGMENT_NAMES, self.auto):
            raise InputError(
                f"--aa {self.aa}: unknown; use none, rand-m9-mstd0.5-inc1 (or other numbers), augmix-m3-w3, "
                "original, originalr, v0, v0r or 3a"
            )
        if self.interpolation not in (*INTERPOLATIONS, "random"):
            raise InputError(f"--train-interpolation {self.interpolation}: use random, {', '.join(INTERPOLATIONS)}")
        if self.resize not in RESIZERS:
            raise InputError(f"--resize {self.resize}: use {' or '.join(RESIZERS)}")
        if self.resize == "torch" and self.interpolation not in OF_TORCH:
            raise InputError(
                f"--resize torch: has no --train-interpolation {self.interpolation}; use --resize pillow, or one of "
                f"{', '.join(OF_TORCH)}"
            )
        if self.remode not in ERASE_MODES:
            raise InputError(f"--remode {self.remode}: use {', '.join(ERASE_MODES)}")
        if self.recount < 1:
            raise InputError(f"--recount {self.recount}: must be at least 1; --reprob 0 switches erasing off")
        for flag, value in (("--reprob", self.reprob), ("horizontal flip", self.hflip)):
            if not 0 <= value <= 1:
                raise InputError(f"{flag} {value}: a probability lies between 0 and 1")
        if self.randaugment not in AUGMENTERS:
            raise InputError(f"--randaugment {self.randaugment}: use {' or '.join(AUGMENTERS)}")
        if self.randaugment == "device":
            self._check_device()

    def _check_device(self) -> None:
        without = [name for name in randaugment.NOT_ENCODED if name in (self.auto or "")]
        if not (self.auto or "").startswith("rand") or without:
            raise InputError(
                f"--randaugment device: does timm's rand-... policies without {' or '.join(randaugment.NOT_ENCODED)}, "
                f"not --aa {self.aa}; use --randaugment cpu, or another --aa"
            )
        if self.interpolation not in randaugment.INTERPOLATIONS:
            raise InputError(
                f"--randaugment device: has no --train-interpolation {self.interpolation}; use --randaugment cpu, or "
                f"one of {', '.join(randaugment.INTERPOLATIONS)}"
            )

    @property
    def auto(self) -> str | None:
        """`aa`, or None for any spelling of none."""
        return None if self.aa in (None, "", "none") else self.aa


@dataclass(frozen=True)
class ResizeTo:
    """Resizes to exactly (H, W); an image of that size passes untouched."""

    size: tuple[int, int]
    interpolation: str

    def __call__(self, pixels: Pixels) -> Image.Image:
        height, width = self.size
        image = as_image(pixels)
        if image.size == (width, height):
            return image
        mode = "bicubic" if self.interpolation == "random" else self.interpolation
        return transforms.functional.resize(image, [height, width], str_to_interp_mode(mode))


@dataclass(frozen=True)
class LeaveUndone:
    """The last step of a transform: an image as it is, and what is drawn for it and not done."""

    draw: randaugment.DrawOnly

    def __call__(self, pixels: Pixels) -> Undone:
        return Undone(as_tensor(pixels), self.draw())


def fill_color(spec: ImageSpec) -> tuple[int, ...]:
    """What RandAugment's warps bring in from outside an image, as timm has it: the mean color's levels."""
    return tuple(min(255, round(255 * value)) for value in spec.mean)


def build_train_transform(spec: ImageSpec, augment: Augment) -> transforms.Compose:
    """DeiT's training transform up to pixels: a decoded image -> (3, H, W) uint8, channels last.

    Draws from python's, numpy's and torch's generators. Large inputs: random resized crop. Small ones: resized only if
    they differ, then a random crop of the image padded by an eighth of its side (4 pixels at 32). The rest is the same:
    flip, `aa` or colour jitter; with `augment.randaugment` on the device, the image and these as they were drawn.
    `operations.apply` for those, `normalise` and `erasing.erase` follow in the batch.
    """
    large = create_transform(
        input_size=spec.input_size,
        is_training=True,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto,
        interpolation=augment.interpolation,
        mean=spec.mean,
        std=spec.std,
    )
    crop, *after_crop, _to_float, _normalise = large.transforms
    settings = {"size": crop.size, "scale": crop.scale, "ratio": crop.ratio, "interpolation": augment.interpolation}
    own_crop = CropAndResize(augment.resize, **settings)
    padded = transforms.RandomCrop(spec.input_size, padding=max(1, round(min(spec.input_size) / 8)))
    small = [ResizeTo(spec.input_size, augment.interpolation), padded]
    if augment.randaugment == "device":
        undone = LeaveUndone(randaugment.DrawOnly(after_crop, spec.input_size))
        return transforms.Compose([*(small if spec.is_small else [own_crop.resized]), undone])
    for step in after_crop:
        guard_posterize(step)
    return transforms.Compose([*(small if spec.is_small else [own_crop]), *after_crop, as_tensor])


def build_eval_transform(spec: ImageSpec) -> transforms.Compose:
    """The evaluation transform: PIL RGB -> (3, H, W) float32, nothing random.

    Large inputs: resized, keeping the aspect ratio, until the image covers (H, W) / crop_ratio rounded down as in DeiT
    and timm, then the centre crop. Small ones: resized only if they differ, never cropped.
    """
    large = create_transform(
        input_size=spec.input_size,
        is_training=False,
        interpolation=spec.interpolation,
        mean=spec.mean,
        std=spec.std,
        crop_pct=spec.crop_ratio,
    )
    if not spec.is_small:
        return large
    _resize, _crop, *after_crop = large.transforms
    return transforms.Compose([ResizeTo(spec.input_size, spec.interpolation), *after_crop])


def normalise(images: torch.Tensor, spec: ImageSpec) -> torch.Tensor:
    """Pixels uint8 (B, 3, H, W) as float32, on their device and in their memory format.

    On the CPU these are, bit for bit, the values of torchvision's `ToTensor` and `Normalize`.
    """
    mean, std = _mean_and_std(spec, images.device)
    levels = torch.full((), 255.0, device=images.device)  # CUDA multiplies by the inverse of a number of the host
    return images.to(torch.float32).div_(levels).sub_(mean).div_(std)


def denormalise(images: torch.Tensor, spec: ImageSpec) -> torch.Tensor:
    """Normalised images (B, 3, H, W) as pixels to look at: uint8 (B, 3, H, W), clipped where erasing left the range."""
    mean, std = _mean_and_std(spec, images.device)
    return (images.float() * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)


def _mean_and_std(spec: ImageSpec, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, 3, 1, 1) each, moved without waiting."""
    mean, std = (torch.tensor(values).to(device, non_blocking=True) for values in (spec.mean, spec.std))
    return mean.view(1, 3, 1, 1), std.view(1, 3, 1, 1)


# ---------------------------------------------------------------------------------------- posterize with 0 bits
# RandAugment's magnitude noise reaches the level at which posterize keeps no bit. Pillow returned a black image there
# until version 12 and raises ValueError from 13 on; timm calls it unguarded. At DeiT's setting that stops a run within
# the first few thousand images. The operations of a built transform are given the guarded function, so nothing outside
# it changes and the guard travels into loader workers with the transform.


def posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's posterize, with the black image of older Pillow where no bit is kept."""
    if bits <= 0:
        return Image.new(image.mode, image.size)
    return timm_posterize(image, bits, **options)


def guard_posterize(step: Any) -> None:
    """Gives the operations of one step of a transform, if it has any, the guarded function."""
    for operation in _operations(step):
        if operation.aug_fn is timm_posterize:
            operation.aug_fn = posterize


def _operations(step: Any) -> Iterator[AugmentOp]:
    if isinstance(step, (RandAugment, AugMixAugment)):
        yield from step.ops
    elif isinstance(step, AutoAugment):
        for policy in step.policy:
            yield from policy
