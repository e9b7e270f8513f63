"""Pictures of a mixed batch: sources, targets, scores, regions and mixed images.

Letters: B batch, K classes, N = rows * columns image tokens. Image i of a batch is the target, and
image B - 1 - i its source.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset, IterableDataset

from errors import printable
from mixers.interface import MixedBatch, Regions
from pipeline.spec import ImageSpec
from pipeline.transforms import denormalise
from storage.files import write_atomically

Color = tuple[int, int, int]

SMALLEST_PANEL = 160  # pixels; smaller images are enlarged
GAP = 8  # pixels between panels and around them
OUTLINE = 3  # pixels
BACKGROUND, TEXT_COLOR, OUTLINE_EDGE = (255, 255, 255), (32, 32, 32), (0, 0, 0)
# Colours of the outlines. Neither is a colour of the heat map.
SOURCE_COLOR, TARGET_COLOR = (255, 96, 32), (255, 255, 255)
# Colours of the heat map: viridis at 0, 1/4, ..., 1.
HEAT_COLORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
HEAT_OPACITY = 0.6  # of a heat map over its image
TITLES_WITH_REGIONS = ("source", "source: most attended", "target: least attended", "mixed")
TITLES = ("source", "target", "mixed")
TRIES = 16  # samples that are read to find one of a new class


# -------------------------------------------------------------------------------- pairs and samples


class Pair(NamedTuple):
    """The texts and numbers of one row of the picture."""

    source: str  # class name
    target: str  # class name
    lam: float | None  # share of the source; None if the pair is not mixed
    region: str | None  # size of the pasted region; None for a mixer without regions

    @property
    def share(self) -> str:
        return self.short_share if self.lam is None else f"{self.short_share} (source share)"

    @property
    def short_share(self) -> str:
        return "not mixed" if self.lam is None else f"lam = {self.lam:.2f}"

    @property
    def captions(self) -> list[str]:
        """The texts below the panels, one for each panel."""
        return [self.source, *([self.region] if self.region else []), self.target, self.share]

    def __str__(self) -> str:
        parts = [f"source: {self.source}", f"target: {self.target}", self.share]
        return ", ".join([*parts, f"region: {self.region}"] if self.region else parts)


def describe_pairs(
    batch: MixedBatch, labels: Tensor, class_names: Sequence[str], grid_size: tuple[int, int]
) -> list[Pair]:
    """Each pair of a batch once: targets are its first half, with the middle image of an odd batch.

    Args:
        labels: (B,) int64, labels of the clean images.
        class_names: one per label.
        grid_size: the token grid (rows, columns), the unit of `batch.regions`.
    """
    names = [printable(class_names[label], keep="") for label in labels.tolist()]
    regions: list[str | None] = [None] * len(names)
    if batch.regions is not None:
        tokens = "of {} x {} tokens".format(*grid_size)
        regions = [f"{h} x {w} {tokens}" for h, w in batch.regions.sizes.tolist()]
    lams = [None] * len(names) if batch.lam is None else batch.lam.tolist()
    return [
        Pair(names[-1 - i], names[i], lams[i], regions[i]) for i in range((len(names) + 1) // 2)
    ]


def spread_samples(samples: Dataset[tuple[Tensor, int]], count: int) -> tuple[Tensor, Tensor]:
    """`count` samples that are spread evenly over a data set, always the same ones.

    They have different classes if `TRIES` samples from each place contain a new class. The samples
    of a stream are its first ones.

    Args:
        samples: index -> (image (3, H, W), label), or an iterable of these.
        count: number of samples; a smaller data set gives all that it has.

    Returns:
        Images (count, 3, H, W) and labels (count,) int64.
    """
    if isinstance(samples, IterableDataset):
        taken = list(islice(samples, count))
    else:
        length: int = len(samples)  # type: ignore[arg-type]  # torch's Dataset declares none
        edges = [length * i // count for i in range(count + 1)]
        taken = []
        for start, end in pairwise(edges):
            classes = {label for _, label in taken}
            tried = (samples[index] for index in range(start, min(end, start + TRIES)))
            new = next((sample for sample in tried if sample[1] not in classes), None)
            if new is not None or start < end:
                taken.append(new or samples[start])
    return torch.stack([image for image, _ in taken]), torch.tensor([label for _, label in taken])


# ------------------------------------------------------------------------------- layout and drawing


@dataclass(frozen=True)
class Layout:
    """The positions on the page, in pixels: (x, y) of a top left corner, as in Pillow.

    Args:
        image_size: height and width of the images.
        rows: number of rows of panels.
        columns: number of columns of panels.
    """

    image_size: tuple[int, int]
    rows: int
    columns: int

    @property
    def scale(self) -> int:
        """Enlargement of the images, a whole number, so that each pixel stays a square."""
        return max(1, math.ceil(SMALLEST_PANEL / min(self.image_size)))

    @property
    def panel(self) -> tuple[int, int]:
        """Height and width of a panel."""
        return self.image_size[0] * self.scale, self.image_size[1] * self.scale

    @cached_property
    def font(self) -> Any:
        return ImageFont.load_default(min(max(self.panel[1] // 14, 12), 20))

    @property
    def line(self) -> int:
        """Height of a line of text, with the space around it."""
        return 2 * int(self.font.size) + GAP // 2

    @property
    def page(self) -> tuple[int, int]:
        """Width and height of the page."""
        height, width = self.panel
        return GAP + self.columns * (width + GAP), self.line + self.rows * (height + self.line)

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """(x, y) of the top left corner of a panel."""
        height, width = self.panel
        return GAP + column * (width + GAP), self.line + row * (height + self.line)

    def window(
        self,
        row: int,
        column: int,
        cells: Sequence[int],
        size: Sequence[int],
        grid_size: tuple[int, int],
    ) -> tuple[int, int, int, int]:
        """The first and last pixels (x0, y0, x1, y1) of a window in a panel.

        Args:
            cells: row and column of the window's top left grid cell.
            size: rows and columns of the window, in grid cells.
            grid_size: rows and columns of the grid.
        """
        x, y = self.corner(row, column)
        cell_height, cell_width = self.panel[0] // grid_size[0], self.panel[1] // grid_size[1]
        top, left = y + cells[0] * cell_height, x + cells[1] * cell_width
        return left, top, left + size[1] * cell_width - 1, top + size[0] * cell_height - 1


def heat_colors(heat: Tensor) -> Tensor:
    """Colours of a heat map, interpolated between those of `HEAT_COLORS`.

    Args:
        heat: values in 0..1, of any shape.

    Returns:
        (..., 3) float32 in 0..255.
    """
    anchors = torch.tensor(HEAT_COLORS, dtype=torch.float32)
    position = heat.float().clamp(0, 1) * (len(anchors) - 1)
    below = position.long().clamp(max=len(anchors) - 2)
    return torch.lerp(anchors[below], anchors[below + 1], (position - below)[..., None])


def overlay_heat(image: Tensor, scores: Tensor) -> Tensor:
    """A grey image under the heat map of its scores, with one cell of one colour for each token.

    The colours go from the lowest to the highest score of this image.

    Args:
        image: (3, H, W) uint8.
        scores: (rows, columns) float.

    Returns:
        (3, H, W) uint8.
    """
    span = scores.amax() - scores.amin()
    heat = (scores - scores.amin()) / span.clamp(min=torch.finfo(torch.float32).tiny)
    heat = heat[None, None].float()  # (1, 1, rows, columns)
    cells = functional.interpolate(heat, image.shape[1:], mode="nearest")[0, 0]  # (H, W)
    colors = heat_colors(cells).permute(2, 0, 1)  # (3, H, W)
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    grey = (image.float() * luma).sum(dim=0, keepdim=True)  # (1, H, W)
    return torch.lerp(grey.expand_as(colors), colors, HEAT_OPACITY).round().to(torch.uint8)


def fit_text(text: str, font: Any, width: int) -> str:
    """`text`, cut and with an ellipsis if it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    for end in range(len(text), 0, -1):
        cut = text[:end].rstrip() + "…"
        if font.getlength(cut) <= width:
            return cut
    return "…"


class Page:
    """The picture that is drawn."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.image = Image.new("RGB", layout.page, BACKGROUND)
        self.draw = ImageDraw.Draw(self.image)

    def text(self, row: int, column: int, text: str) -> None:
        """Draws a line below a panel, nearer to it than to the next one; row -1 is for titles."""
        layout = self.layout
        x, y = layout.corner(row + 1, column)
        shift = GAP // 4 if row < 0 else -GAP // 4
        center = (x + layout.panel[1] // 2, y - layout.line // 2 + shift)
        fitted = fit_text(text, layout.font, layout.panel[1])
        self.draw.text(center, fitted, TEXT_COLOR, layout.font, anchor="mm")

    def panel(self, row: int, column: int, image: Tensor) -> None:
        """Draws an image (3, H, W) uint8, enlarged."""
        height, width = self.layout.panel
        small = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        large = small.resize((width, height), Image.Resampling.NEAREST)
        self.image.paste(large, self.layout.corner(row, column))

    def fill(self, row: int, images: Sequence[Tensor], captions: Sequence[str]) -> None:
        """Draws the panels of one row from left to right, with a line of text below each."""
        for column, (image, caption) in enumerate(zip(images, captions, strict=True)):
            self.panel(row, column, image)
            self.text(row, column, caption)

    def outline(self, window: tuple[int, int, int, int], color: Color) -> None:
        """Draws a frame just inside the window, between dark lines, visible on any image."""
        x0, y0, x1, y1 = window
        self.draw.rectangle(window, outline=OUTLINE_EDGE, width=OUTLINE + 2)
        self.draw.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), outline=color, width=OUTLINE)

    def regions(self, row: int, regions: Regions, grid_size: tuple[int, int]) -> None:
        """Draws the frames of one row: the region in source, target and mixed image."""
        source, target, size = (part[row].tolist() for part in regions)
        frames = (1, source, SOURCE_COLOR), (2, target, TARGET_COLOR), (3, target, SOURCE_COLOR)
        for column, cell, color in frames:
            self.outline(self.layout.window(row, column, cell, size, grid_size), color)

    def tensor(self) -> Tensor:
        """The picture as (3, height, width) uint8."""
        return torch.from_numpy(np.array(self.image)).permute(2, 0, 1).contiguous()


def mixing_picture(
    images: Tensor,
    batch: MixedBatch,
    labels: Tensor,
    *,
    spec: ImageSpec,
    class_names: Sequence[str],
    grid_size: tuple[int, int],
) -> Tensor:
    """The picture of a mixed batch, with one row per pair.

    A row has the source, the scores of source and target, and the mixed image, with the outlines of
    the regions. For a mixer without regions (CutMix, Mixup) it has source, target and mixed image.

    Args:
        images: (B, 3, H, W), the normalised clean images.
        batch: the mixer's result for these images.
        labels: (B,) int64, labels of the clean images.
        spec: how the images were normalised.
        class_names: one per label.
        grid_size: the model's token grid (rows, columns).

    Returns:
        (3, height, width) uint8, on the CPU.
    """
    clean, mixed = denormalise(images, spec).cpu(), denormalise(batch.images, spec).cpu()
    pairs, regions = describe_pairs(batch, labels, class_names, grid_size), batch.regions
    with_heat = clean
    if batch.image_attention is not None:
        scores = batch.image_attention.detach().cpu().unflatten(1, grid_size)  # (B, rows, columns)
        overlays = [overlay_heat(*one) for one in zip(clean, scores, strict=True)]
        with_heat = torch.stack(overlays)  # (B, 3, H, W)
    titles = TITLES if regions is None else TITLES_WITH_REGIONS
    page = Page(Layout((images.shape[2], images.shape[3]), len(pairs), len(titles)))
    for column, title in enumerate(titles):
        page.text(-1, column, title)
    for row, pair in enumerate(pairs):
        if regions is None:
            page.fill(row, [clean[-1 - row], clean[row], mixed[row]], pair.captions)
        else:
            panels = [clean[-1 - row], with_heat[-1 - row], with_heat[row], mixed[row]]
            page.fill(row, panels, pair.captions)
            page.regions(row, regions, grid_size)
    return page.tensor()


def side_by_side(
    images: Tensor,
    batches: Mapping[str, MixedBatch],
    labels: Tensor,
    *,
    spec: ImageSpec,
    class_names: Sequence[str],
) -> Tensor:
    """The pictures of several mixers side by side, with one row per pair.

    A row has the source, the target and the mixed image of each mixer. The other arguments are
    those of `mixing_picture`.

    Args:
        batches: name of the mixer -> its mixed batch.

    Returns:
        (3, height, width) uint8, on the CPU.
    """
    clean = denormalise(images, spec).cpu()
    mixed = [denormalise(batch.images, spec).cpu() for batch in batches.values()]
    shares = [describe_pairs(batch, labels, class_names, (1, 1)) for batch in batches.values()]
    titles = ("source", "target", *batches)
    page = Page(Layout((images.shape[2], images.shape[3]), len(shares[0]), len(titles)))
    for column, title in enumerate(titles):
        page.text(-1, column, title)
    for row, pairs in enumerate(zip(*shares, strict=True)):
        panels = [clean[-1 - row], clean[row], *(mixed_images[row] for mixed_images in mixed)]
        captions = [pairs[0].source, pairs[0].target, *(pair.short_share for pair in pairs)]
        page.fill(row, panels, captions)
    return page.tensor()


def save_png(picture: Tensor, path: str | Path) -> None:
    """Writes a picture (3, height, width) uint8 to a PNG file, atomically.

    Raises:
        InputError: the folder is not writable, or the disk is full.
    """
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())
    write_atomically(Path(path), lambda stream: image.save(stream, format="PNG", optimize=True))
