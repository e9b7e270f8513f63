"""SMMix: mixing by attention (paper Sec. 4.1) and the reference of L_con (Sec. 4.3).

Each equation is one small pure function. The losses are in `losses.py`; mean tokens and logits of
the regions (Eq. 10 to 12) are computed in `models/interface.py`.

Letters: B batch, C channels, K classes, N = rows * columns image tokens, h x w the region's rows
and columns in tokens. In the paper the source is A, the target B, a clean image's prediction Y and
the source's share lambda_M; here they are `source`, `target`, `logits` or `probs`, and `lam`. Image
i of a batch is the target, image B - 1 - i its source, so `.flip(0)` gives the sources.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from errors import InputError
from mixers.interface import (
    Guide,
    MixedBatch,
    Mixer,
    MixerContext,
    Regions,
    mix_labels,
    pair_up,
    send,
    soft_labels,
)
from mixers.masks import first_argmax, region_mask
from mixers.smmix_options import VARIANTS, Scheme, SMMixOptions, Variant

MAX_TO_MIN = Scheme()


class Drawn(NamedTuple):
    """The random values of one mix."""

    sizes: list[tuple[int, int]]  # B times h, w; the same for both images of a pair
    # (B, 2) int64, with `Scheme.source` random: the source region's corner in the source of image i
    source_corners: Tensor | None = None
    # (B, N) float32, with `Scheme.score` random
    score: Tensor | None = None


def draw_region_size(
    grid_size: tuple[int, int],
    side_ratio: tuple[float, float],
    rule: Literal["floor", "integer"],
    generator: torch.Generator,
) -> tuple[int, int]:
    """The region's rows h and columns w (Sec. 4.1), from one delta ~ U(low, high) for both sides.

    With the rule `floor`, the paper's, h = floor(delta * rows) and w = floor(delta * columns). With
    `integer`, the released code's, each side is uniform over the whole numbers floor(low * side) ..
    floor(high * side), which gives the two end sizes more weight. Both rules then limit a side to
    1 .. side - 1, so that there are tokens inside and outside the region.

    Args:
        grid_size: rows and columns of the token grid.
        side_ratio: low and high, the range of delta.
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
    """The sums of Eq. 7: the score of every h x w window that lies inside the grid.

    Args:
        image_attention: (B, N), the score alpha of each token (Eq. 6).
        size: h, w.

    Returns:
        (B, rows - h + 1, columns - w + 1) float32, indexed by the window's top left token (the
        paper: by its centre). Windows with equal tokens have exactly equal sums.
    """
    grid = image_attention.float().unflatten(1, grid_size)  # (B, rows, columns)
    return avg_pool2d(grid[:, None], size, stride=1, divisor_override=1)[:, 0]


def pick_regions(scores: Tensor, largest: bool) -> Tensor:
    """The arg max or arg min of Eq. 7: the chosen window of each image.

    Of equal windows the first in row-major order is chosen.

    Args:
        scores: what `region_scores` returns, one number for each window.
        largest: arg max, as for the source; else arg min, as for the target.

    Returns:
        (B, 2) int64: row and column of the window's top left token.
    """
    return first_argmax(scores if largest else -scores)


def paste_regions(images: Tensor, regions: Regions, patch_size: tuple[int, int]) -> Tensor:
    """Eq. 8: x_M, each target with the region of its source pasted in.

    The batch is copied once, in strips: the pixels of one row of the image that lie in one patch.
    For each strip of x_M an index gives the strip of the batch that is copied: the one at the same
    place of the target, or inside the target region the matching one of the source region.

    Args:
        images: (B, C, height, width), any dtype, channels first or last in memory; not changed.
        regions: corners and sizes in tokens.
        patch_size: height and width in pixels of a token.

    Returns:
        (B, C, height, width), new, in the same memory format.
    """
    batch, channels, height, width = images.shape
    patch_height, patch_width = patch_size
    # A strip is contiguous in memory. With channels last it holds all channels; with channels first
    # each channel is a separate plane of strips.
    is_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    memory = images.permute(0, 2, 3, 1) if is_last else images.contiguous()
    planes = 1 if is_last else channels
    strip_length = patch_width * channels if is_last else patch_width
    strips_per_row = width // patch_width
    image, row, strip = (
        torch.arange(count, device=images.device) for count in (batch, height, strips_per_row)
    )

    # Which strips of x_M lie inside the target region.
    top = regions.target_corners[:, :1] * patch_height  # (B, 1), in pixels
    left = regions.target_corners[:, 1:]  # (B, 1), in strips
    bottom = top + regions.sizes[:, :1] * patch_height
    inside_rows = (row >= top) & (row < bottom)  # (B, height)
    inside_strips = (strip >= left) & (strip < left + regions.sizes[:, 1:])  # (B, strips)
    is_inside = inside_rows[:, :, None] & inside_strips[:, None, :]  # (B, height, strips)

    # Index of each strip in plane 0, and the distance from there to the strip of the source.
    same_place = (image[:, None, None] * planes * height + row[:, None]) * strips_per_row + strip
    images_to_source = batch - 1 - 2 * image  # from image i to image B - 1 - i
    down, right = (regions.source_corners - regions.target_corners).unbind(1)  # in tokens
    rows_to_source = images_to_source * planes * height + down * patch_height
    to_source = rows_to_source * strips_per_row + right  # (B,)
    index = same_place + to_source[:, None, None] * is_inside  # (B, height, strips)
    to_plane = torch.arange(planes, device=images.device) * height * strips_per_row
    index = index[:, None] + to_plane[:, None, None]  # (B, planes, height, strips)

    strips = memory.reshape(-1, strip_length)
    mixed = strips.index_select(0, index.flatten()).view(memory.shape)
    return mixed.permute(0, 3, 1, 2) if is_last else mixed


def mix_probs(logits: Tensor, lam: Tensor) -> Tensor:
    """The reference in Eq. 14: lam * Y_A + (1 - lam) * Y_B, with Y = softmax(logits).

    Args:
        logits: (B, K), of the clean images.
        lam: (B,).

    Returns:
        (B, K) float32; each row sums to one.
    """
    probs = logits.float().softmax(dim=-1)
    return mix_labels(probs.flip(0), probs, lam)


def mix_logits(logits: Tensor, lam: Tensor) -> Tensor:
    """The released code's reference: softmax(lam * logits_A + (1 - lam) * logits_B), (B, K).

    This is the normalised geometric mean of Y_A and Y_B. Arguments as in `mix_probs`.
    """
    logits = logits.float()
    return mix_labels(logits.flip(0), logits, lam).softmax(dim=-1)


def mix_predictions(
    logits: Tensor, lam: Tensor, rule: Literal["probs", "logits"], temperature: float = 1.0
) -> Tensor:
    """The reference of L_con (B, K) by either rule; the temperature divides the logits first."""
    mix = mix_probs if rule == "probs" else mix_logits
    return mix(logits.float() / temperature, lam)


class SMMix(Mixer[Drawn]):
    """Max-min attention region mixing (Sec. 4.1), with the inputs of L_fine and L_con.

    Args:
        num_classes: K.
        grid_size: rows and columns of the model's token grid.
        smoothing: label smoothing.
        side_ratio: range of delta.
        variant: the arithmetic of the paper or of the released code.
        fine: give the batch what L_fine needs (Sec. 4.2).
        con: give the batch what L_con needs (Sec. 4.3). The motivating pass is run if this or the
            scheme needs it.
        scheme: how regions are chosen.
        temperature: that of the reference of L_con.

    Raises:
        ValueError: the grid has fewer than two rows or columns; no region fits into it then.
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

    @classmethod
    def from_options(cls, options: SMMixOptions, context: MixerContext) -> Self:
        """As for every method.

        Raises:
            InputError: the model's token grid is too small for regions.
        """
        try:
            return cls(
                context.num_classes,
                context.grid_size,
                options.smoothing,
                options.side_ratio,
                options.arithmetic,
                fine=options.fine_weight > 0,
                con=options.has_con,
                scheme=options.scheme,
                temperature=options.con_temperature,
            )
        except ValueError as error:
            raise InputError(
                f"--mixer smmix: {error}; use a larger --input-size or a smaller --patch-size"
            ) from error

    def draw(
        self, batch_size: int, image_size: tuple[int, int], generator: torch.Generator
    ) -> Drawn:
        rows, columns = self.grid_size
        rule = self.variant.region_size
        of_group = [
            draw_region_size(self.grid_size, self.side_ratio, rule, generator)
            for _ in range(self.groups)
        ]
        sizes = pair_up(of_group, batch_size, "batch", self.groups)
        corners = score = None
        if self.scheme.source == "random":

            def draw_below(end: int) -> int:
                return int(torch.randint(end, (), generator=generator))

            tops = [draw_below(rows - h + 1) for h, _ in sizes]
            lefts = [draw_below(columns - w + 1) for _, w in sizes]
            corners = torch.tensor([tops, lefts]).T
        if self.scheme.needs_score and self.scheme.score == "random":
            score = torch.rand(batch_size, rows * columns, generator=generator)
        return Drawn(sizes, corners, score)

    def choose(
        self, score: Tensor | None, sizes: list[tuple[int, int]], corners: Tensor | None = None
    ) -> Regions:
        """Eq. 7 for a batch: the regions of each source and each target, or those of the scheme.

        Args:
            score: (B, N) of the clean images; None if the scheme needs none.
            sizes: h, w for each image.
            corners: (B, 2) of the source regions, if the scheme draws them.
        """
        given = score if corners is None else corners
        assert given is not None
        device, count = given.device, len(sizes)
        sizes_on_device = torch.tensor(sizes).to(device, non_blocking=True)  # (B, 2)
        # One map of window sums for each size that occurs, at most one for each group of views.
        distinct = list(dict.fromkeys(sizes))
        own = torch.tensor([distinct.index(size) for size in sizes]).to(device, non_blocking=True)
        windows = [
            region_scores(score, self.grid_size, size) for size in distinct if score is not None
        ]

        def pick(largest: bool) -> Tensor:
            found = torch.stack([pick_regions(one, largest) for one in windows])  # (S, B, 2)
            return found[own, torch.arange(count, device=device)]

        if corners is None:
            # The arg max of image i belongs to image B - 1 - i, whose source it is.
            corners = pick(largest=True).flip(0)
        if self.scheme.target == "corr":
            return Regions(corners, corners, sizes_on_device)
        target_corners = pick(largest=self.scheme.target == "max")
        if count % 2:
            # The middle image of an odd batch is its own source. Equal corners keep it clean.
            is_middle = torch.arange(count, device=device) == count // 2
            target_corners = torch.where(is_middle[:, None], corners, target_corners)
        return Regions(corners, target_corners, sizes_on_device)

    def apply(self, images: Tensor, labels: Tensor, drawn: Drawn, guide: Guide) -> MixedBatch:
        rows, columns = self.grid_size
        corners, score = (
            None if value is None else send(value, images.device)
            for value in (drawn.source_corners, drawn.score)
        )
        # Motivating pass: the score (Eq. 6) and the logits of the clean images.
        clean = guide(images) if self.con or self.scheme.needs_guide else None
        if clean is not None and score is None:
            score = clean.image_attention
        # Regions: Eq. 7.
        regions = self.choose(score if self.scheme.needs_score else None, drawn.sizes, corners)
        # Mixed images and labels: Eq. 8, with lambda_M = h * w * P^2 / (H * W) = h * w / N.
        patch_size = (images.shape[-2] // rows, images.shape[-1] // columns)
        mixed_images = paste_regions(images, regions, patch_size)
        lam = regions.sizes.prod(dim=1) / (rows * columns)  # (B,)
        target_labels = soft_labels(labels, self.num_classes, self.smoothing)  # (B, K)
        source_labels = target_labels.flip(0)
        mixed_labels = mix_labels(source_labels, target_labels, lam)
        # For L_fine: the tokens of Eq. 10 and 11.
        mask = None
        if self.fine:
            mask = region_mask(regions.target_corners, regions.sizes, self.grid_size)
        # For L_con: the reference in Eq. 14.
        reference = None
        if self.con:
            assert clean is not None
            assert clean.logits is not None
            rule = self.variant.consistency
            reference = mix_predictions(clean.logits, lam, rule, self.temperature)
        return MixedBatch(
            images=mixed_images,
            labels=mixed_labels,
            lam=lam,
            source_labels=source_labels,
            target_labels=target_labels,
            source_mask=mask,
            reference_probs=reference,
            clean_logits=None if clean is None else clean.logits,
            image_attention=score,
            regions=regions,
        )
