"""The picture of one mixed batch: who gave which region to whom, and what the guide was looking at.

Level 2: knows `MixedBatch` and pixels and draws with Pillow; only `save_png` writes a file. It must
not know which method mixed, how a model is built, or training.

Letters: B batch, K classes, N = rows * columns image tokens. Image i is the target and image B - 1
- i the source.
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
from torch.utils.data import Dataset, IterableDataset

from mixers.interface import MixedBatch, Regions
from pipeline.spec import ImageSpec
from pipeline.transforms import denormalise
from storage.files import write_atomically

Color = tuple[int, int, int]

SMALLEST_PANEL = 160  # pixels; smaller images are enlarged
GAP = 8  # pixels between panels and around them
OUTLINE = 3  # pixels
PAPER, INK, HALO = (255, 255, 255), (32, 32, 32), (0, 0, 0)
SOURCE_COLOR, TARGET_COLOR = (
    (255, 96, 32),
    (255, 255, 255),
)  # of the outlines; neither is on the heat map's scale
HEAT = (
    (68, 1, 84),
    (59, 82, 139),
    (33, 145, 140),
    (94, 201, 98),
    (253, 231, 37),
)  # viridis at 0, 1/4, ..., 1
HEAT_SHARE = 0.6  # of a heat map laid over its image
TITLES_WITH_REGIONS = ("source", "source: most attended", "target: least attended", "mixed")
TITLES = ("source", "target", "mixed")
TRIES = 16  # samples looked at for each one taken


# ---------------------------------------------------------------------------- what there is to show


class Pair(NamedTuple):
    """One row of the picture, in words and numbers."""

    source: str
    target: str
    lam: float | None  # the source's share; None where nothing was mixed
    region: str | None  # size of the pasted region

    @property
    def share(self) -> str:
        return self.short_share if self.lam is None else f"{self.short_share} (source share)"

    @property
    def short_share(self) -> str:
        return "not mixed" if self.lam is None else f"lam = {self.lam:.2f}"

    @property
    def captions(self) -> list[str]:
        """What stands below the panels, one text each."""
        return [self.source, *([self.region] if self.region else []), self.target, self.share]

    def __str__(self) -> str:
        parts = [f"source: {self.source}", f"target: {self.target}", self.share]
        return ", ".join([*parts, f"region: {self.region}"] if self.region else parts)


def describe_pairs(
    batch: MixedBatch, labels: Tensor, class_names: Sequence[str], grid_size: tuple[int, int]
) -> list[Pair]:
    """Every pair of a batch once, the first half of the batch as targets; the middle of an odd
    batch is its own source.

    Args:
        labels: (B,) int64, of the clean images.
        class_names: one per label.
        grid_size: the token grid (rows, columns) that `batch.regions` counts in.
    """
    region = None
    if batch.regions is not None:
        (height, width), (rows, columns) = batch.regions.size, grid_size
        region = f"{height} x {width} of {rows} x {columns} tokens"
    names = [class_names[label] for label in labels.tolist()]
    lams = [None] * len(names) if batch.lam is None else batch.lam.tolist()
    return [Pair(names[-1 - i], names[i], lams[i], region) for i in range((len(names) + 1) // 2)]


def spread_samples(samples: Dataset[tuple[Tensor, int]], count: int) -> tuple[Tensor, Tensor]:
    """`count` fixed samples from all over a data set, of different classes where they are near; of
    a stream the first.

    Args:
        samples: index -> (image (3, H, W), label), or an iterable of these.
        count: fewer are given if the data set has fewer.

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
            seen = {label for _, label in taken}
            found = (samples[index] for index in range(start, min(end, start + TRIES)))
            new = next((sample for sample in found if sample[1] not in seen), None)
            if new is not None or start < end:
                taken.append(new or samples[start])
    return torch.stack([image for image, _ in taken]), torch.tensor([label for _, label in taken])


# ---------------------------------------------------------------------------------- how it is shown


@dataclass(frozen=True)
class Layout:
    """Where everything lies on the page, in pixels. Places are (x, y) of a top left corner, as
    Pillow counts.

    Args:
        image_size: height and width of the images.
        rows, columns: of panels.
    """

    image_size: tuple[int, int]
    rows: int
    columns: int

    @property
    def scale(self) -> int:
        """Whole, so that nearest neighbour keeps every pixel a square."""
        return max(1, math.ceil(SMALLEST_PANEL / min(self.image_size)))

    @property
    def panel(self) -> tuple[int, int]:
        """Height and width."""
        return self.image_size[0] * self.scale, self.image_size[1] * self.scale

    @cached_property
    def font(self) -> Any:
        return ImageFont.load_default(min(max(self.panel[1] // 14, 12), 20))

    @property
    def line(self) -> int:
        """Height of a line of text with the space around it."""
        return 2 * int(self.font.size) + GAP // 2

    @property
    def page(self) -> tuple[int, int]:
        """Width and height."""
        height, width = self.panel
        return GAP + self.columns * (width + GAP), self.line + self.rows * (height + self.line)

    def corner(self, row: int, column: int) -> tuple[int, int]:
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
        """First and last pixels (x0, y0, x1, y1) of a window whose top left grid cell is
        `cells`."""
        x, y = self.corner(row, column)
        cell_height, cell_width = self.panel[0] // grid_size[0], self.panel[1] // grid_size[1]
        top, left = y + cells[0] * cell_height, x + cells[1] * cell_width
        return left, top, left + size[1] * cell_width - 1, top + size[0] * cell_height - 1


def heat_colors(heat: Tensor) -> Tensor:
    """Values in 0..1 of any shape as colours (..., 3) float32 in 0..255, by interpolation between
    those of `HEAT`."""
    anchors = torch.tensor(HEAT, dtype=torch.float32)
    place = heat.float().clamp(0, 1) * (len(anchors) - 1)
    below = place.long().clamp(max=len(anchors) - 2)
    return torch.lerp(anchors[below], anchors[below + 1], (place - below)[..., None])


def overlay_heat(image: Tensor, scores: Tensor) -> Tensor:
    """An image in grey under its attention in colour, one flat cell for each token, from its own
    least to its most.

    Args:
        image: (3, H, W) uint8.
        scores: (rows, columns) float.
    """
    span = scores.amax() - scores.amin()
    heat = (scores - scores.amin()) / span.clamp(min=torch.finfo(torch.float32).tiny)
    cells = torch.nn.functional.interpolate(
        heat[None, None].float(), image.shape[1:], mode="nearest"
    )[0, 0]
    colors = heat_colors(cells).permute(2, 0, 1)  # (3, H, W)
    grey = (image.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(
        dim=0, keepdim=True
    )
    return torch.lerp(grey.expand_as(colors), colors, HEAT_SHARE).round().to(torch.uint8)


def fit_text(text: str, font: Any, width: int) -> str:
    """`text`, or as much of its beginning as `width` pixels hold, with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    end = next(
        (
            end
            for end in range(len(text), 0, -1)
            if font.getlength(text[:end].rstrip() + "…") <= width
        ),
        0,
    )
    return text[:end].rstrip() + "…"


class Page:
    """A picture while it is drawn."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.image = Image.new("RGB", layout.page, PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def text(self, row: int, column: int, text: str) -> None:
        """A line below a panel, nearer to it than to the next one; row -1 is the line of titles."""
        layout = self.layout
        x, y = layout.corner(row + 1, column)
        nearer = GAP // 4 if row < 0 else -GAP // 4
        place = (x + layout.panel[1] // 2, y - layout.line // 2 + nearer)
        self.draw.text(
            place, fit_text(text, layout.font, layout.panel[1]), INK, layout.font, anchor="mm"
        )

    def panel(self, row: int, column: int, image: Tensor) -> None:
        """An image (3, H, W) uint8, enlarged."""
        height, width = self.layout.panel
        small = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        large = small.resize((width, height), Image.Resampling.NEAREST)
        self.image.paste(large, self.layout.corner(row, column))

    def fill(self, row: int, images: Sequence[Tensor], captions: Sequence[str]) -> None:
        """Panels from left to right with a line below each."""
        for column, (image, caption) in enumerate(zip(images, captions, strict=True)):
            self.panel(row, column, image)
            self.text(row, column, caption)

    def outline(self, window: tuple[int, int, int, int], color: Color) -> None:
        """A frame just inside the window's pixels, between dark lines so that it is seen on any
        ground."""
        x0, y0, x1, y1 = window
        self.draw.rectangle(window, outline=HALO, width=OUTLINE + 2)
        self.draw.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), outline=color, width=OUTLINE)

    def regions(self, row: int, regions: Regions, grid_size: tuple[int, int]) -> None:
        """The frames of one row: taken from the source, given up by the target, and pasted."""
        source, target = regions.source_corners[row].tolist(), regions.target_corners[row].tolist()
        for column, cell, color in (
            (1, source, SOURCE_COLOR),
            (2, target, TARGET_COLOR),
            (3, target, SOURCE_COLOR),
        ):
            self.outline(self.layout.window(row, column, cell, regions.size, grid_size), color)

    def tensor(self) -> Tensor:
        """(3, height, width) uint8."""
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
    """Rows of source, source's attention, target's attention and mixed image, the regions outlined;
    one row per pair.

    Without regions (CutMix, Mixup) the rows are source, target and mixed image.

    Args:
        images: (B, 3, H, W), normalised, as the mixer got them.
        batch: what the mixer made of them.
        labels: (B,) int64.
        spec: how the images were normalised.
        class_names: one per label.
        grid_size: the model's token grid (rows, columns).

    Returns:
        (3, height, width) uint8, on the CPU.
    """
    clean, mixed = denormalise(images, spec).cpu(), denormalise(batch.images, spec).cpu()
    pairs, regions = describe_pairs(batch, labels, class_names, grid_size), batch.regions
    looked = clean
    if batch.image_attention is not None:
        scores = batch.image_attention.detach().cpu().unflatten(1, grid_size)  # (B, rows, columns)
        looked = torch.stack(
            [overlay_heat(*one) for one in zip(clean, scores, strict=True)]
        )  # (B, 3, H, W)
    titles = TITLES if regions is None else TITLES_WITH_REGIONS
    page = Page(Layout((images.shape[2], images.shape[3]), len(pairs), len(titles)))
    for column, title in enumerate(titles):
        page.text(-1, column, title)
    for row, pair in enumerate(pairs):
        sources = [clean[-1 - row]] if regions is None else [clean[-1 - row], looked[-1 - row]]
        target = clean[row] if regions is None else looked[row]
        page.fill(row, [*sources, target, mixed[row]], pair.captions)
        if regions is not None:
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
    """Rows of source, target and what each method makes of them; one row per pair. Arguments as in
    `mixing_picture`.

    Args:
        batches: by the name of the method.

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
        panels = [clean[-1 - row], clean[row], *(made[row] for made in mixed)]
        page.fill(
            row, panels, [pairs[0].source, pairs[0].target, *(pair.short_share for pair in pairs)]
        )
    return page.tensor()


def save_png(picture: Tensor, path: str | Path) -> None:
    """Writes (3, height, width) uint8 as a PNG file, whole or not at all.

    Raises:
        InputError: the folder cannot be written, or the disk is full.
    """
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())
    write_atomically(Path(path), lambda stream: image.save(stream, format="PNG", optimize=True))
