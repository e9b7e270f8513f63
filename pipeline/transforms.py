"""Transforms of decoded images into tensors, for training and evaluation, and normalisation.

The training transform is DeiT's, built by timm. Inputs of at most `SMALL_SIDE` pixels are padded
and cropped instead of resized from a random crop, as is usual for CIFAR.

Letters: B batch, H height, W width, in pixels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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

from pipeline import erasing, randaugment, randaugment_pixels
from pipeline.spec import Augment, ImageSpec

Pixels = Image.Image | np.ndarray  # a decoded RGB image: Pillow's, or (H, W, 3) uint8


def as_image(pixels: Pixels) -> Image.Image:
    """A decoded image as a Pillow image."""
    return pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)


def as_tensor(pixels: Pixels) -> torch.Tensor:
    """An RGB image as (3, H, W) uint8, with channels last in memory."""
    rows = np.array(pixels) if isinstance(pixels, Image.Image) else pixels
    return torch.from_numpy(rows).permute(2, 0, 1)


def resize(pixels: Pixels, size: tuple[int, int], mode: Any, resizer: str) -> Pixels:
    """The image resized to (H, W), as the resizer returns it: Pillow's, or an array from torch.

    Args:
        mode: torchvision's `InterpolationMode`, or several of which one is drawn.
        resizer: `pillow` gives torchvision's result bit for bit. `torch` takes a third of the time;
            its antialiased resize of 8-bit pixels differs by one level in some pixels.
    """
    if isinstance(mode, tuple):
        mode = random.choice(mode)
    if resizer == "pillow":
        return functional.resize(as_image(pixels), list(size), mode)
    rows = pixels if isinstance(pixels, np.ndarray) else np.array(pixels)
    # The batch dimension is added before the permutation: torch then recognises channels last and
    # keeps them. Otherwise the conversion to a Pillow image would have to copy the channels of each
    # pixel together, which takes as long as the resize.
    batch = torch.from_numpy(rows)[None].permute(0, 3, 1, 2)  # (1, 3, height, width), a view
    interpolate = torch.nn.functional.interpolate
    (resized,) = interpolate(batch, size, mode=mode.value, antialias=True)
    return resized.permute(1, 2, 0).numpy()  # (H, W, 3)


class CropAndResize(RandomResizedCropAndInterpolation):
    """timm's random resized crop, with timm's draws, for both kinds of decoded image.

    The result is a Pillow image.

    Args:
        resizer: see `resize`.
        settings: those of timm's class.
    """

    def __init__(self, resizer: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.resizer = resizer

    def __call__(self, pixels: Pixels) -> Image.Image:
        return as_image(self.resized(pixels))

    def resized(self, pixels: Pixels) -> Pixels:
        """The resized crop as the resizer returns it: Pillow's image, or an array from torch."""
        view = pixels if isinstance(pixels, Image.Image) else as_tensor(pixels)
        top, left, height, width = self.get_params(view, self.scale, self.ratio)
        # timm rounds the sides of a crop of an image of 1 or 2 pixels to 0.
        height, width = max(height, 1), max(width, 1)
        _, rows, columns = functional.get_dimensions(view)
        top, left = min(top, rows - height), min(left, columns - width)
        crop: Pixels
        if isinstance(pixels, Image.Image):
            crop = pixels.crop((left, top, left + width, top + height))
        else:
            crop = pixels[top : top + height, left : left + width]
        return resize(crop, self.size, self.interpolation, self.resizer)


class PendingAugment(NamedTuple):
    """An image whose flip and RandAugment are drawn, but not applied yet."""

    pixels: torch.Tensor  # (3, H, W) uint8
    operations: list[randaugment.Row]  # from `pipeline.randaugment.DrawOnly`


# A decoded image -> (3, H, W): for training uint8 pixels or a `PendingAugment`, for evaluation
# normalised float32.
Transform = Callable[[Any], Any]


@dataclass(frozen=True)
class ResizeTo:
    """Resizes to exactly (H, W); an image of that size does not change."""

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
class ResizeToCover:
    """Resizes with the aspect ratio, so that the image just covers (H, W).

    For squares the smaller side becomes their side, as in torchvision's `Resize`.

    Args:
        mode, resizer: see `resize`.
    """

    size: tuple[int, int]
    mode: Any
    resizer: str

    def __call__(self, pixels: Pixels) -> Image.Image:
        if isinstance(pixels, Image.Image):
            width, height = pixels.size
        else:
            height, width, _ = pixels.shape
        rows, columns = self.size
        if height * columns <= width * rows:
            size = rows, int(rows * width / height)
        else:
            size = int(columns * height / width), columns
        return as_image(resize(pixels, size, self.mode, self.resizer))


@dataclass(frozen=True)
class DeferAugment:
    """The last step of a transform: returns the image and the operations drawn for it."""

    draw: randaugment.DrawOnly

    def __call__(self, pixels: Pixels) -> PendingAugment:
        return PendingAugment(as_tensor(pixels), self.draw())


def fill_color(spec: ImageSpec) -> tuple[int, ...]:
    """The levels of pixels that RandAugment's warps move in: the mean colour, as in timm."""
    return tuple(min(255, round(255 * value)) for value in spec.mean)


def build_train_transform(spec: ImageSpec, augment: Augment) -> transforms.Compose:
    """DeiT's training transform up to pixels: a decoded image -> (3, H, W) uint8, channels last.

    Large inputs get a random resized crop. Small inputs are resized only if their size differs,
    padded by an eighth of their side (4 pixels at 32) and randomly cropped. With `augment.src` both
    get DeiT III's simple random crop (arXiv 2204.07118): resized to cover the input size, padded
    with the image's reflection by 4 pixels, or an eighth of a small side, and randomly cropped.

    Then follow the flip, and `aa` or colour jitter. With `augment.randaugment` on the device the
    result is a `PendingAugment`, and `pipeline.randaugment_pixels.apply` applies flip and `aa` in
    the batch. `normalise` and `pipeline.erasing.erase` come last, in the batch.

    It draws from Python's, NumPy's and torch's global generators.
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
    fast_crop = CropAndResize(augment.resize, **settings)
    padding = min(4, max(1, round(min(spec.input_size) / 8)))
    padded_crop = partial(transforms.RandomCrop, spec.input_size, padding=padding)
    on_device = augment.randaugment == "device"
    first: list[Any] = [fast_crop.resized if on_device else fast_crop]
    if augment.src:
        cover = ResizeToCover(spec.input_size, fast_crop.interpolation, augment.resize)
        first = [cover, padded_crop(padding_mode="reflect")]
    elif spec.is_small:
        first = [ResizeTo(spec.input_size, augment.interpolation), padded_crop()]
    if on_device:
        defer = DeferAugment(randaugment.DrawOnly(after_crop, spec.input_size))
        return transforms.Compose([*first, defer])
    for step in after_crop:
        guard_posterize(step)
    return transforms.Compose([*first, *after_crop, as_tensor])


def build_eval_transform(spec: ImageSpec) -> transforms.Compose:
    """The evaluation transform: PIL RGB -> (3, H, W) float32; nothing is random.

    Large inputs are resized, with their aspect ratio, until they cover (H, W) / crop_ratio (rounded
    down as in DeiT and timm); then the centre is cropped. Small inputs are resized only if their
    size differs, and not cropped.
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
    """Normalises pixels (B, 3, H, W) uint8 to float32, on their device and in their memory format.

    On the CPU the values equal those of torchvision's `ToTensor` and `Normalize`, bit for bit.
    """
    mean, std = _mean_and_std(spec, images.device)
    # A tensor, because CUDA multiplies by the inverse of a Python number instead of dividing.
    levels = torch.full((), 255.0, device=images.device)
    return images.to(torch.float32).div_(levels).sub_(mean).div_(std)


def denormalise(images: torch.Tensor, spec: ImageSpec) -> torch.Tensor:
    """Normalised images (B, 3, H, W) as pixels (B, 3, H, W) uint8, for pictures.

    Values outside the range, which come from erasing, are clipped.
    """
    mean, std = _mean_and_std(spec, images.device)
    return (images.float() * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)


@dataclass(frozen=True)
class FinishBatch:
    """The part of the training transform that is done in the batch, on its device.

    Args:
        spec: how the pixels are normalised.
        remode: how erased boxes are filled, see `erasing.erase`.
    """

    spec: ImageSpec
    remode: str

    def __call__(
        self, images: torch.Tensor, boxes: torch.Tensor, operations: torch.Tensor
    ) -> torch.Tensor:
        """Pixels as the model takes them: RandAugment if it is pending, normalised, erased.

        Args:
            images: (B, 3, H, W) uint8.
            boxes: (B, M, 4) int64, on the same device.
            operations: (B, L, 8), on the host; L = 0 for none.

        Returns:
            (B, 3, H, W) float32.
        """
        if operations.shape[1]:
            images = randaugment_pixels.apply(images, operations, fill_color(self.spec))
        return erasing.erase(normalise(images, self.spec), boxes, self.remode)


def _mean_and_std(spec: ImageSpec, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, 3, 1, 1) each, on the device; the host does not wait."""
    mean = torch.tensor(spec.mean).to(device, non_blocking=True)
    std = torch.tensor(spec.std).to(device, non_blocking=True)
    return mean.view(1, 3, 1, 1), std.view(1, 3, 1, 1)


# ---------------------------------------------------------------------------- posterize with 0 bits
# RandAugment's magnitude noise reaches the level at which posterize keeps no bit. Pillow returned a
# black image there up to version 12 and raises ValueError from version 13, which timm does not
# catch. With DeiT's settings that would stop a run within the first few thousand images. Only the
# operations of a built transform get the function below: timm itself is not patched, and loader
# workers receive the function with the transform.


def posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's posterize; a black image, as from older Pillow, if no bit is kept."""
    if bits <= 0:
        return Image.new(image.mode, image.size)
    return timm_posterize(image, bits, **options)


def guard_posterize(step: Any) -> None:
    """Replaces timm's posterize by `posterize` in the operations of one step of a transform."""
    for operation in _operations(step):
        if operation.aug_fn is timm_posterize:
            operation.aug_fn = posterize


def _operations(step: Any) -> Iterator[AugmentOp]:
    """timm's operations in one step of a transform; none for most steps."""
    if isinstance(step, (RandAugment, AugMixAugment)):
        yield from step.ops
    elif isinstance(step, AutoAugment):
        for policy in step.policy:
            yield from policy
