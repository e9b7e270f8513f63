"""A random crop, resized, of a decoded image: through Pillow as DeiT does it, or faster through torch.

Level 0: imports nothing from the project. It must not open files, and knows nothing of what comes after the crop.

Letters: H height, W width, in pixels.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import functional

Pixels = Image.Image | np.ndarray  # a decoded RGB image: Pillow's, or (H, W, 3) uint8
RESIZERS = ("pillow", "torch")
OF_TORCH = ("random", "bilinear", "bicubic")  # interpolations that torch has with antialiasing


def as_image(pixels: Pixels) -> Image.Image:
    """A decoded image as Pillow's."""
    return pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)


def as_tensor(pixels: Pixels) -> torch.Tensor:
    """An RGB image as (3, H, W) uint8, a view of pixels that lie row by row: channels last."""
    rows = np.array(pixels) if isinstance(pixels, Image.Image) else pixels
    return torch.from_numpy(rows).permute(2, 0, 1)


class CropAndResize(RandomResizedCropAndInterpolation):
    """timm's random resized crop with its own draws, for either kind of decoded image; gives Pillow's.

    Args:
        resizer: `pillow`, to the bit what timm's gives, or `torch`, whose antialiased resize of 8-bit pixels differs by
            one level here and there and takes a third of the time.
        settings: timm's.
    """

    def __init__(self, resizer: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.resizer = resizer

    def __call__(self, pixels: Pixels) -> Image.Image:
        return as_image(self.resized(pixels))

    def resized(self, pixels: Pixels) -> Pixels:
        """The same as the resizer leaves it: an array from torch."""
        view = pixels if isinstance(pixels, Image.Image) else torch.from_numpy(pixels).permute(2, 0, 1)
        top, left, height, width = self.get_params(view, self.scale, self.ratio)
        mode = random.choice(self.interpolation) if isinstance(self.interpolation, tuple) else self.interpolation
        crop: Pixels
        if isinstance(pixels, Image.Image):
            crop = pixels.crop((left, top, left + width, top + height))
        else:
            crop = pixels[top : top + height, left : left + width]
        if self.resizer == "pillow":
            return functional.resize(as_image(crop), list(self.size), mode)
        crop = crop if isinstance(crop, np.ndarray) else np.array(crop)
        # With its batch from the beginning, torch sees that channels come last, and gives them so. Else Pillow would
        # have to sort the colours of each pixel together, which takes as long as the resize.
        rows = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)  # (1, 3, height, width), never copied
        resized = torch.nn.functional.interpolate(rows, self.size, mode=mode.value, antialias=True)[0]
        return resized.permute(1, 2, 0).numpy()  # (H, W, 3)
