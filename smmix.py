"""SMMix's mixing (paper Sec. 4.1 and the reference of Sec. 4.3): which region of which image goes
where.

Each equation is one small pure function. Nothing here holds a model, knows eval or train, or names
a device; losses are in `losses.py`. Nothing is mixed in place.

Letters: B batch, K classes, N = rows * columns image tokens, (h, w) region in tokens. `source` (A)
gives the region, `target` (B) receives it, `lam` is the source share. Image i is the target and
image B - 1 - i the source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from mixers.interface import Guide, MixedBatch, Mixer, Regions, mix_labels, send, soft_labels
from mixers.masks import first_argmax


@dataclass(frozen=True)
class Variant:
    """The three places where the released code's arithmetic differs from the paper's."""

    region_head: Literal["shared", "separate"] = (
        "shared"  # classifier of the regions: F (Eq. 12), or a second head
    )
    consistency: Literal["probs", "logits"] = (
        "probs"  # reference: mixed probabilities (Eq. 14), or softmax of mixed logits
    )
    region_size: Literal["floor", "integer"] = (
        "floor"  # side: floor(delta * side), or uniform over whole numbers
    )


VARIANTS = {"paper": Variant(), "released": Variant("separate", "logits", "integer")}


@dataclass(frozen=True)
class Scheme:
    """Where a region is taken and where it goes (Table A4), and the score that decides it (Table
    A5); the method's are the defaults."""

    source: Literal["max", "random"] = (
        "max"  # the most attended window, or any, drawn for each image
    )
    target: Literal["min", "max", "corr"] = (
        "min"  # the least or most attended window, or the source region's own place
    )
    score: Literal["guide", "random"] = "guide"  # the motivating pass's, or drawn for each token

    @property
    def needs_score(self) -> bool:
        return self.source == "max" or self.target != "corr"

    @property
    def needs_guide(self) -> bool:
        """For the score; L_con may need it besides."""
        return self.needs_score and self.score == "guide"


MAX_TO_MIN = Scheme()


class Drawn(NamedTuple):
    """What is random about one mix."""

    size: tuple[int, int]  # the region's rows and columns
    source_corners: Tensor | None = (
        None  # (B, 2) int64, of a scheme that draws them; each in the image's source
    )
    score: Tensor | None = None  # (B, N) float32, of a scheme that draws it


def draw_region_size(
    grid_size: tuple[int, int],
    side_ratio: tuple[float, float],
    rule: Literal["floor", "integer"],
    generator: torch.Generator,
) -> tuple[int, int]:
    """The region's rows and columns (Sec. 4.1): one delta ~ U(side_ratio) for both sides.

    `floor`: h = floor(delta * rows), w = floor(delta * columns). `integer`, the released code's:
    uniform over the whole numbers floor(low * side) .. floor(high * side), which gives the two end
    sizes more weight. Either way a side is kept within 1 .. side - 1, so that both regions have
    tokens.
    """
    low, high = side_ratio
    delta = float(torch.rand((), generator=generator, dtype=torch.float64))  # in [0, 1)

    def side(length: int) -> int:
        if rule == "floor":
            drawn = int((low + (high - low) * delta) * length)
        else:
            first, last = int(low * length), int(high * length)
            drawn = first + int(delta * (last - first + 1))
        return min(max(drawn, 1), length - 1)

    return side(grid_size[0]), side(grid_size[1])


def region_scores(
    image_attention: Tensor, grid_size: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """The sum in Eq. 7: attention over every h x w window that lies inside the grid.

    Args:
        image_attention: (B, N), Eq. 6.

    Returns:
        (B, rows - h + 1, columns - w + 1) float32, indexed by the window's top left cell. Windows
        with equal cells have exactly equal sums.
    """
    grid = image_attention.float().unflatten(1, grid_size)  # (B, rows, columns)
    return avg_pool2d(grid[:, None], size, stride=1, divisor_override=1)[:, 0]


def pick_regions(scores: Tensor, largest: bool) -> Tensor:
    """The arg max or arg min of Eq. 7: the best window of each image. Ties go to the first in
    row-major order.

    Args:
        scores: (B, rows, columns) of `region_scores`.

    Returns:
        (B, 2) int64: row and column of the window's top left cell.
    """
    return first_argmax(scores if largest else -scores)


def region_mask(corners: Tensor, size: tuple[int, int], grid_size: tuple[int, int]) -> Tensor:
    """(B, N) bool, true inside each image's h x w region whose top left cell is `corners` (B,
    2)."""
    rows, columns = (torch.arange(length, device=corners.device) for length in grid_size)
    top, left = corners[:, :1], corners[:, 1:]  # (B, 1)
    inside_rows = (rows >= top) & (rows < top + size[0])  # (B, rows)
    inside_columns = (columns >= left) & (columns < left + size[1])
    return (inside_rows[:, :, None] & inside_columns[:, None, :]).flatten(1)


def paste_regions(images: Tensor, regions: Regions, patch_size: tuple[int, int]) -> Tensor:
    """Eq. 8: every image with a region of its source pasted in.

    One pass: each run of pixels as wide as a patch is read from where it comes from, its own place
    or the source's region, and written once. That is the batch's copy and nothing else, and needs
    no scattering.

    Args:
        images: (B, C, height, width), any dtype, channels first or last in memory; stays as it is.
        regions: corners and size in grid cells.
        patch_size: height and width in pixels of a cell.

    Returns:
        (B, C, height, width), new, in the same memory format.
    """
    batch, channels, height, width = images.shape
    is_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    held = images.permute(0, 2, 3, 1) if is_last else images.contiguous()
    planes, run = (
        (1, patch_size[1] * channels) if is_last else (channels, patch_size[1])
    )  # a run's length in memory
    runs = width // patch_size[1]  # per row
    number, rows, columns = (torch.arange(n, device=images.device) for n in (batch, height, runs))

    top, left = (
        regions.target_corners[:, :1] * patch_size[0],
        regions.target_corners[:, 1:],
    )  # (B, 1)
    inside_rows = (rows >= top) & (rows < top + regions.size[0] * patch_size[0])  # (B, height)
    inside_columns = (columns >= left) & (columns < left + regions.size[1])  # (B, runs)
    down, right = (regions.source_corners - regions.target_corners).unbind(1)
    away = (
        (batch - 1 - 2 * number) * planes * height + down * patch_size[0]
    ) * runs + right  # (B,)
    own = (
        number[:, None, None] * planes * height + rows[:, None]
    ) * runs + columns  # (B, height, runs)
    seen = own + away[:, None, None] * (inside_rows[:, :, None] & inside_columns[:, None, :])
    seen = (
        seen[:, None] + (torch.arange(planes, device=images.device) * height * runs)[:, None, None]
    )
    mixed = held.reshape(-1, run).index_select(0, seen.flatten()).view(held.shape)
    return mixed.permute(0, 3, 1, 2) if is_last else mixed


def mix_probs(logits: Tensor, lam: Tensor) -> Tensor:
    """The reference of Eq. 14: lam * Y_A + (1 - lam) * Y_B, Y being the probabilities of the clean
    images.

    Args:
        logits: (B, K) of the clean images.
        lam: (B,).

    Returns:
        (B, K) float32, rows sum to one.
    """
    probs = logits.float().softmax(dim=-1)
    return mix_labels(probs.flip(0), probs, lam)


def mix_logits(logits: Tensor, lam: Tensor) -> Tensor:
    """The released code's reference: the softmax of mixed logits, a normalised geometric mean (B,
    K)."""
    logits = logits.float()
    return mix_labels(logits.flip(0), logits, lam).softmax(dim=-1)


def mix_predictions(
    logits: Tensor, lam: Tensor, rule: Literal["probs", "logits"], temperature: float = 1.0
) -> Tensor:
    """The reference of L_con (B, K) by either rule, of logits that are divided by the temperature
    first."""
    return (mix_probs if rule == "probs" else mix_logits)(logits.float() / temperature, lam)


class SMMix(Mixer[Drawn]):
    """Max-min attention region mixing (Sec. 4.1) with everything that Sec. 4.2 and 4.3 need to
    supervise it.

    Args:
        grid_size: the model's own token grid (rows, columns).
        side_ratio: range of delta.
        variant: paper or released arithmetic.
        fine, con: whether the batch carries what L_fine (Sec. 4.2) and L_con (Sec. 4.3) need. The
            motivating pass is run if L_con or the scheme needs it.
        scheme: where regions come from and go to.
        temperature: of the reference of L_con.

    Raises:
        ValueError: a grid side below 2, where no region can lie beside another.
    """

    def __init__(
        self,
        num_classes: int,
        grid_size: tuple[int, int],
        smoothing: float = 0.1,
        side_ratio: tuple[float, float] = (0.25, 0.75),
        variant: Variant = VARIANTS["paper"],
        fine: bool = True,
        con: bool = True,
        scheme: Scheme = MAX_TO_MIN,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(num_classes, smoothing)
        if min(grid_size) < 2:
            raise ValueError(
                f"a grid of {grid_size[0]} x {grid_size[1]} tokens has no room for two regions"
            )
        self.grid_size, self.side_ratio, self.variant = grid_size, side_ratio, variant
        self.fine, self.con, self.scheme, self.temperature = fine, con, scheme, temperature

    def draw(
        self, batch_size: int, image_size: tuple[int, int], generator: torch.Generator
    ) -> Drawn:
        rows, columns = self.grid_size
        height, width = draw_region_size(
            self.grid_size, self.side_ratio, self.variant.region_size, generator
        )
        corners = score = None
        if self.scheme.source == "random":
            ends = rows - height + 1, columns - width + 1
            corners = torch.stack(
                [torch.randint(end, (batch_size,), generator=generator) for end in ends], dim=1
            )
        if self.scheme.needs_score and self.scheme.score == "random":
            score = torch.rand(batch_size, rows * columns, generator=generator)
        return Drawn((height, width), corners, score)

    def choose(
        self, score: Tensor | None, size: tuple[int, int], corners: Tensor | None = None
    ) -> Regions:
        """Eq. 7 for a whole batch: each target's least attended window, its source's most attended
        one; or what the scheme has in their place.

        Args:
            score: (B, N), if the scheme needs one.
            corners: (B, 2), of the regions in the sources, if the scheme draws them.
        """
        scores = None if score is None else region_scores(score, self.grid_size, size)
        if corners is None:
            assert scores is not None
            corners = pick_regions(scores, largest=True).flip(0)  # (B, 2), now beside their targets
        if self.scheme.target == "corr":
            return Regions(corners, corners, size)
        assert scores is not None
        target_corners = pick_regions(scores, largest=self.scheme.target == "max")
        if (
            len(scores) % 2
        ):  # the middle image of an odd batch is its own source: it stays a plain image
            middle = torch.arange(len(scores), device=scores.device) == len(scores) // 2
            target_corners = torch.where(middle[:, None], corners, target_corners)
        return Regions(corners, target_corners, size)

    def apply(self, images: Tensor, labels: Tensor, drawn: Drawn, guide: Guide) -> MixedBatch:
        size = drawn.size
        corners, score = (
            None if value is None else send(value, images.device)
            for value in (drawn.source_corners, drawn.score)
        )
        clean = guide(images) if self.con or self.scheme.needs_guide else None
        if clean is not None and score is None:
            score = clean.image_attention
        regions = self.choose(score if self.scheme.needs_score else None, size, corners)
        rows, columns = self.grid_size
        patch_size = (images.shape[-2] // rows, images.shape[-1] // columns)
        lam = torch.full(
            (len(images),), size[0] * size[1] / (rows * columns), device=images.device
        )  # (B,)
        target_labels = soft_labels(labels, self.num_classes, self.smoothing)
        source_labels = target_labels.flip(0)
        reference = None
        if self.con:
            assert clean is not None
            assert clean.logits is not None
            reference = mix_predictions(
                clean.logits, lam, self.variant.consistency, self.temperature
            )
        return MixedBatch(
            images=paste_regions(images, regions, patch_size),
            labels=mix_labels(source_labels, target_labels, lam),
            lam=lam,
            source_labels=source_labels,
            target_labels=target_labels,
            source_mask=region_mask(regions.target_corners, size, self.grid_size)
            if self.fine
            else None,
            reference_probs=reference,
            clean_logits=None if clean is None else clean.logits,
            image_attention=score,
            regions=regions,
        )
