"""Random erasing (Zhong et al., 2017), drawn in a loader worker and applied on the batch's device.

Probability, area, shape, number of boxes, number of tries and the order of the draws are those of
timm's `RandomErasing`.

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

AREA = (0.02, 1 / 3)  # share of the image, divided among its boxes
RATIO = (0.3, 1 / 0.3)  # height / width
TRIES = 10  # draws of one box until it fits into the image
NOTHING = Box(0, 0, 0, 0)


class Erasing(NamedTuple):
    """The settings of random erasing.

    Attributes:
        probability: that an image is erased at all; 0 erases nothing and draws nothing.
        max_boxes: the largest number of boxes per image.
    """

    probability: float = 0.0
    max_boxes: int = 1

    def draw(
        self, image_size: tuple[int, int], generator: random.Random | ModuleType = random
    ) -> list[Box]:
        """Draws the boxes of one image.

        Args:
            image_size: (H, W) in pixels.
            generator: Python's global generator (the `random` module) by default.

        Returns:
            M = `max_boxes` boxes, of which unused ones are empty. With probability 0 the list is
            empty.
        """
        if self.probability == 0:
            return []
        boxes: list[Box] = []
        if generator.random() <= self.probability:
            count = 1 if self.max_boxes == 1 else generator.randint(1, self.max_boxes)
            drawn = (_draw_box(image_size, 1 / count, generator) for _ in range(count))
            boxes = [box for box in drawn if box is not None]
        return boxes + [NOTHING] * (self.max_boxes - len(boxes))


def _draw_box(
    image_size: tuple[int, int], share: float, generator: random.Random | ModuleType
) -> Box | None:
    """A box that lies inside the image, or None if none of `TRIES` draws fits."""
    height, width = image_size
    for _ in range(TRIES):
        area = generator.uniform(*AREA) * (height * width) * share
        ratio = math.exp(generator.uniform(*map(math.log, RATIO)))
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if rows < height and columns < width:
            top = generator.randint(0, height - rows)
            left = generator.randint(0, width - columns)
            return Box(top, top + rows, left, left + columns)
    return None


def as_tensor(boxes: list[list[Box]]) -> Tensor:
    """The boxes of each image as (B, M, 4) int64, edges in the order of `Box`."""
    return torch.tensor(boxes, dtype=torch.int64).reshape(len(boxes), -1, 4)


def erase(images: Tensor, boxes: Tensor, mode: str) -> Tensor:
    """Fills the boxes of normalised images; the host does not wait for the device.

    The fill is drawn from the global generator of the images' device.

    Args:
        images: (B, C, H, W) float. On the CPU they are changed in place, so that only erased pixels
            take time; nothing else may use them.
        boxes: (B, M, 4) int64, see `as_tensor`; a later box covers an earlier one.
        mode: `pixel` fills with noise N(0, 1) per pixel and channel, `rand` with one such colour
            per box, `const` with zeros.

    Returns:
        (B, C, H, W).
    """
    size = (images.shape[2], images.shape[3])
    masks = [box_mask(edges, size) for edges in boxes.unbind(1)]  # M times (B, 1, H, W)
    if mode != "rand" and masks:
        # The fill does not depend on the box: one pass over all boxes is enough.
        masks = [torch.stack(masks).any(dim=0)]
    fill = _fill_in_place if images.device.type == "cpu" else _fill
    for inside in masks:
        images = fill(images, inside, mode)
    return images


def _fill(images: Tensor, inside: Tensor, mode: str) -> Tensor:
    """Fills with one pass over the whole batch; the host does not read the device."""
    if mode == "pixel":
        return torch.where(inside, torch.randn_like(images), images)
    if mode == "rand":
        return torch.where(inside, images.new_empty(*images.shape[:2], 1, 1).normal_(), images)
    return images.masked_fill(inside, 0.0)


def _fill_in_place(images: Tensor, inside: Tensor, mode: str) -> Tensor:
    """Fills in place and writes the erased pixels only."""
    pixels = images.movedim(1, -1)  # (B, H, W, C), a view
    image, row, column = inside[:, 0].nonzero(as_tuple=True)
    if mode == "pixel":
        pixels[image, row, column] = images.new_empty(len(image), images.shape[1]).normal_()
    elif mode == "rand":
        pixels[image, row, column] = images.new_empty(*images.shape[:2]).normal_()[image]
    else:
        pixels[image, row, column] = 0.0
    return images
