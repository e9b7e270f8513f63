"""From a decoded image to a tensor, for training and for evaluation, and from pixels to normalised
values and back.

Level 1: imports `utils`, `cropping` and `randaugment` only. It must not open files, know labels or
mix images. The training recipe is DeiT's, built by timm; inputs of at most `SMALL_SIDE` pixels are
padded and cropped instead of zoomed, as is usual for CIFAR.

Letters: B batch, H height, W width, in pixels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, AugMixAugment, AutoAugment, RandAugment
from timm.data.auto_augment import posterize as timm_posterize
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode
from torchvision import transforms
from torchvision.transforms import functional

from pipeline import randaugment
from pipeline.spec import Augment, ImageSpec

Pixels = Image.Image | np.ndarray  # a decoded RGB image: Pillow's, or (H, W, 3) uint8


def as_image(pixels: Pixels) -> Image.Image:
    """A decoded image as Pillow's."""
    return pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)


def as_tensor(pixels: Pixels) -> torch.Tensor:
    """An RGB image as (3, H, W) uint8, a view of pixels that lie row by row: channels last."""
    rows = np.array(pixels) if isinstance(pixels, Image.Image) else pixels
    return torch.from_numpy(rows).permute(2, 0, 1)


class CropAndResize(RandomResizedCropAndInterpolation):
    """timm's random resized crop with its own draws, for either kind of decoded image; gives
    Pillow's.

    Args:
        resizer: `pillow`, to the bit what timm's gives, or `torch`, whose antialiased resize of
            8-bit pixels differs by one level here and there and takes a third of the time.
        settings: timm's.
    """

    def __init__(self, resizer: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.resizer = resizer

    def __call__(self, pixels: Pixels) -> Image.Image:
        return as_image(self.resized(pixels))

    def resized(self, pixels: Pixels) -> Pixels:
        """The same as the resizer leaves it: an array from torch."""
        view = (
            pixels if isinstance(pixels, Image.Image) else torch.from_numpy(pixels).permute(2, 0, 1)
        )
        top, left, height, width = self.get_params(view, self.scale, self.ratio)
        mode = (
            random.choice(self.interpolation)
            if isinstance(self.interpolation, tuple)
            else self.interpolation
        )
        crop: Pixels
        if isinstance(pixels, Image.Image):
            crop = pixels.crop((left, top, left + width, top + height))
        else:
            crop = pixels[top : top + height, left : left + width]
        if self.resizer == "pillow":
            return functional.resize(as_image(crop), list(self.size), mode)
        crop = crop if isinstance(crop, np.ndarray) else np.array(crop)
        # With its batch from the beginning, torch sees that channels come last, and gives them so.
        # Else Pillow would have to sort the colours of each pixel together, which takes as long as
        # the resize.
        rows = torch.from_numpy(crop)[None].permute(
            0, 3, 1, 2
        )  # (1, 3, height, width), never copied
        resized = torch.nn.functional.interpolate(rows, self.size, mode=mode.value, antialias=True)[
            0
        ]
        return resized.permute(1, 2, 0).numpy()  # (H, W, 3)


class PendingAugment(NamedTuple):
    """Pixels (3, H, W) uint8 and what is left to do to them, in the batch:
    `pipeline.randaugment.DrawOnly`'s rows."""

    pixels: torch.Tensor
    operations: list[randaugment.Row]


# A decoded image -> (3, H, W): for training uint8 pixels or a `PendingAugment`, for evaluation
# normalised float32.
Transform = Callable[[Any], Any]


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
class DeferAugment:
    """The last step of a transform: an image as it is, and what is drawn for it and not done."""

    draw: randaugment.DrawOnly

    def __call__(self, pixels: Pixels) -> PendingAugment:
        return PendingAugment(as_tensor(pixels), self.draw())


def fill_color(spec: ImageSpec) -> tuple[int, ...]:
    """What RandAugment's warps bring in from outside an image, as timm has it: the mean color's
    levels."""
    return tuple(min(255, round(255 * value)) for value in spec.mean)


def build_train_transform(spec: ImageSpec, augment: Augment) -> transforms.Compose:
    """DeiT's training transform up to pixels: a decoded image -> (3, H, W) uint8, channels last.

    Draws from python's, numpy's and torch's generators. Large inputs: random resized crop. Small
    ones: resized only if they differ, then a random crop of the image padded by an eighth of its
    side (4 pixels at 32). The rest is the same: flip, `aa` or colour jitter; with
    `augment.randaugment` on the device, the image and these as they were drawn.
    `pipeline.randaugment_pixels.apply` for those, `normalise` and `pipeline.erasing.erase` follow
    in the batch.
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
    settings = {
        "size": crop.size,
        "scale": crop.scale,
        "ratio": crop.ratio,
        "interpolation": augment.interpolation,
    }
    own_crop = CropAndResize(augment.resize, **settings)
    padded = transforms.RandomCrop(spec.input_size, padding=max(1, round(min(spec.input_size) / 8)))
    small = [ResizeTo(spec.input_size, augment.interpolation), padded]
    if augment.randaugment == "device":
        undone = DeferAugment(randaugment.DrawOnly(after_crop, spec.input_size))
        return transforms.Compose([*(small if spec.is_small else [own_crop.resized]), undone])
    for step in after_crop:
        guard_posterize(step)
    return transforms.Compose([*(small if spec.is_small else [own_crop]), *after_crop, as_tensor])


def build_eval_transform(spec: ImageSpec) -> transforms.Compose:
    """The evaluation transform: PIL RGB -> (3, H, W) float32, nothing random.

    Large inputs: resized, keeping the aspect ratio, until the image covers (H, W) / crop_ratio
    rounded down as in DeiT and timm, then the centre crop. Small ones: resized only if they differ,
    never cropped.
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
    levels = torch.full(
        (), 255.0, device=images.device
    )  # CUDA multiplies by the inverse of a number of the host
    return images.to(torch.float32).div_(levels).sub_(mean).div_(std)


def denormalise(images: torch.Tensor, spec: ImageSpec) -> torch.Tensor:
    """Normalised images (B, 3, H, W) as pixels to look at: uint8 (B, 3, H, W), clipped where
    erasing left the range."""
    mean, std = _mean_and_std(spec, images.device)
    return (images.float() * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)


def _mean_and_std(spec: ImageSpec, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, 3, 1, 1) each, moved without waiting."""
    mean, std = (
        torch.tensor(values).to(device, non_blocking=True) for values in (spec.mean, spec.std)
    )
    return mean.view(1, 3, 1, 1), std.view(1, 3, 1, 1)


# ---------------------------------------------------------------------------- posterize with 0 bits
# RandAugment's magnitude noise reaches the level at which posterize keeps no bit. Pillow returned a
# black image there until version 12 and raises ValueError from 13 on; timm calls it unguarded. At
# DeiT's setting that stops a run within the first few thousand images. The operations of a built
# transform are given the guarded function, so nothing outside it changes and the guard travels into
# loader workers with the transform.


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
