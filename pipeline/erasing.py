"""Random erasing (Zhong et al., 2017): rectangles are drawn in a loader worker and filled in the
batch, on its device.

Level 1: imports `mixers.boxes`, for rectangles. It must not know labels, files or how an image is
decoded. Probability, area, shape, number and tries are those of timm's `RandomErasing`, and so is
the order of its draws.

Letters: B batch, C channels, H height, W width, M boxes per image.
"""

from __future__ import annotations

import math
import random
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.boxes import Box, box_mask

AREA = (0.02, 1 / 3)  # of the image, shared by its boxes
RATIO = (0.3, 1 / 0.3)  # height / width
TRIES = 10  # for a box that fits into the image
NOTHING = Box(0, 0, 0, 0)


class Erasing(NamedTuple):
    """How often an image loses rectangles, and how many at most. `probability` 0 erases nothing and
    draws nothing."""

    probability: float = 0.0
    most: int = 1

    def draw(
        self, image_size: tuple[int, int], chance: random.Random | ModuleType = random
    ) -> list[Box]:
        """The M = `most` boxes of one image of (H, W), empty ones where fewer are erased; none with
        probability 0.

        Args:
            chance: what to draw from; the `random` module itself is python's own generator.
        """
        if self.probability == 0:
            return []
        boxes: list[Box] = []
        if chance.random() <= self.probability:
            count = 1 if self.most == 1 else chance.randint(1, self.most)
            drawn = (_draw_box(image_size, 1 / count, chance) for _ in range(count))
            boxes = [box for box in drawn if box is not None]
        return boxes + [NOTHING] * (self.most - len(boxes))


def _draw_box(
    image_size: tuple[int, int], share: float, chance: random.Random | ModuleType
) -> Box | None:
    """A box fully inside the image; None where no try gave one that fits."""
    height, width = image_size
    for _ in range(TRIES):
        area = chance.uniform(*AREA) * (height * width) * share
        ratio = math.exp(chance.uniform(*map(math.log, RATIO)))
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if rows < height and columns < width:
            top = chance.randint(0, height - rows)
            left = chance.randint(0, width - columns)
            return Box(top, top + rows, left, left + columns)
    return None


def as_tensor(boxes: list[list[Box]]) -> Tensor:
    """The boxes of each image as (B, M, 4) int64, edges in the order of `Box`."""
    return torch.tensor(boxes, dtype=torch.int64).reshape(len(boxes), -1, 4)


def erase(images: Tensor, boxes: Tensor, mode: str) -> Tensor:
    """Fills the boxes of normalised images, from the global generator of their device, which is not
    waited for.

    Args:
        images: (B, C, H, W) float. They must be the caller's own: on the CPU they are changed in
            place, so that only the erased pixels cost anything.
        boxes: (B, M, 4) int64, see `as_tensor`; a later box lies above an earlier one.
        mode: `pixel`, noise N(0, 1) per pixel and channel; `rand`, one such colour per box;
            `const`, zeros.

    Returns:
        (B, C, H, W).
    """
    size = (images.shape[2], images.shape[3])
    masks = [box_mask(edges, size) for edges in boxes.unbind(1)]  # M times (B, 1, H, W)
    if mode != "rand" and masks:  # what fills them does not depend on the box
        masks = [torch.stack(masks).any(dim=0)]
    fill = _fill_few if images.device.type == "cpu" else _fill
    for inside in masks:
        images = fill(images, inside, mode)
    return images


def _fill(images: Tensor, inside: Tensor, mode: str) -> Tensor:
    """One pass over the whole batch, without asking the device where the boxes are."""
    if mode == "pixel":
        return torch.where(inside, torch.randn_like(images), images)
    if mode == "rand":
        return torch.where(inside, images.new_empty(*images.shape[:2], 1, 1).normal_(), images)
    return images.masked_fill(inside, 0.0)


def _fill_few(images: Tensor, inside: Tensor, mode: str) -> Tensor:
    """The same in place, touching only what is erased."""
    pixels = images.movedim(1, -1)  # (B, H, W, C), a view
    image, row, column = inside[:, 0].nonzero(as_tuple=True)
    if mode == "pixel":
        pixels[image, row, column] = images.new_empty(len(image), images.shape[1]).normal_()
    elif mode == "rand":
        pixels[image, row, column] = images.new_empty(*images.shape[:2]).normal_()[image]
    else:
        pixels[image, row, column] = 0.0
    return images
