"""SMMix's mixing against slow loops written from the paper's formulas (Eq. 7, 8 and the reference
of Eq. 14)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from math import floor, sqrt
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixers.interface import MixedBatch, Regions, StepRandom
from mixers.masks import region_mask
from mixers.smmix_options import VARIANTS, Variant
from models.interface import ModelOutput
from smmix import (
    Drawn,
    SMMix,
    draw_region_size,
    mix_logits,
    mix_probs,
    paste_regions,
    pick_regions,
    region_scores,
)
from tests.conftest import FakeGuide
from utils import keyed_generator

Size = tuple[int, int]
GRIDS: list[tuple[Size, Size]] = [  # grid, region
    ((2, 2), (1, 1)),
    ((4, 4), (2, 2)),
    ((4, 6), (3, 2)),
    ((6, 3), (1, 2)),
    ((5, 7), (4, 6)),
    ((14, 14), (10, 10)),
    ((7, 7), (5, 1)),
]

# ------------------------------------------------------------------------------------- slow oracles


def slow_scores(attention: Tensor, grid: Size, size: Size) -> Tensor:
    """Eq. 7's sum, one cell at a time."""
    (rows, columns), (h, w) = grid, size
    scores = torch.zeros(len(attention), rows - h + 1, columns - w + 1, dtype=torch.float64)
    for b in range(len(attention)):
        for i in range(rows - h + 1):
            for j in range(columns - w + 1):
                for p in range(h):
                    for q in range(w):
                        scores[b, i, j] += float(attention[b, (i + p) * columns + j + q])
    return scores


def slow_corner(scores: Tensor, largest: bool) -> tuple[int, int]:
    """The first best window in row-major order; a later one has to be strictly better."""
    best, where = None, (-1, -1)
    for i in range(scores.shape[0]):
        for j in range(scores.shape[1]):
            value = float(scores[i, j])
            if best is None or (value > best if largest else value < best):
                best, where = value, (i, j)
    return where


def slow_paste(
    images: Tensor, source: list[Size], target: list[Size], size: Size, patch: Size
) -> Tensor:
    """Eq. 8, patch by patch."""
    mixed = [image.clone() for image in images]
    for b, image in enumerate(mixed):
        partner = images[len(images) - 1 - b]
        for p in range(size[0]):
            for q in range(size[1]):
                y, x = (target[b][0] + p) * patch[0], (target[b][1] + q) * patch[1]
                sy, sx = (source[b][0] + p) * patch[0], (source[b][1] + q) * patch[1]
                image[:, y : y + patch[0], x : x + patch[1]] = partner[
                    :, sy : sy + patch[0], sx : sx + patch[1]
                ]
    return torch.stack(mixed)


def slow_labels(label: int, num_classes: int, smoothing: float) -> list[float]:
    return [(1 - smoothing) * (k == label) + smoothing / num_classes for k in range(num_classes)]


def slow_softmax(logits: Tensor) -> Tensor:
    powers = (logits.double() - logits.double().max()).exp()
    return powers / powers.sum()


def slow_mix(
    images: Tensor, labels: Tensor, guide: FakeGuide, grid: Size, size: Size, variant: Variant
) -> MixedBatch:
    """The whole of SMMix, image by image (smoothing 0.1)."""
    batch, patch = len(images), (images.shape[2] // grid[0], images.shape[3] // grid[1])
    scores = slow_scores(guide.attention(images), grid, size)
    lam = size[0] * size[1] / (grid[0] * grid[1])
    source, target, rows = [], [], []
    for b in range(batch):
        partner = batch - 1 - b
        source.append(slow_corner(scores[partner], largest=True))
        target.append(source[b] if partner == b else slow_corner(scores[b], largest=False))
        y_a = torch.tensor(
            slow_labels(int(labels[partner]), guide.num_classes, 0.1), dtype=torch.float64
        )
        y_b = torch.tensor(slow_labels(int(labels[b]), guide.num_classes, 0.1), dtype=torch.float64)
        z_a, z_b = guide.logits(images[partner][None])[0], guide.logits(images[b][None])[0]
        if variant.consistency == "probs":
            reference = lam * slow_softmax(z_a) + (1 - lam) * slow_softmax(z_b)
        else:
            reference = slow_softmax(lam * z_a.double() + (1 - lam) * z_b.double())
        mask = torch.zeros(grid, dtype=torch.bool)
        mask[target[b][0] : target[b][0] + size[0], target[b][1] : target[b][1] + size[1]] = True
        rows.append((lam * y_a + (1 - lam) * y_b, y_a, y_b, mask.flatten(), reference))
    mixed_labels, source_labels, target_labels, masks, references = (
        torch.stack(part) for part in zip(*rows, strict=True)
    )
    return MixedBatch(
        slow_paste(images, source, target, size, patch),
        mixed_labels,
        torch.full((batch,), lam, dtype=torch.float64),
        source_labels,
        target_labels,
        masks,
        references,
        guide.logits(images),
        guide.attention(images),
        Regions(torch.tensor(source), torch.tensor(target), torch.tensor([size] * batch)),
    )


def assert_same_batch(ours: MixedBatch, expected: MixedBatch, tolerance: float = 1e-6) -> None:
    """Every field: pixels, masks and regions exactly, numbers to `tolerance`."""
    for field in fields(MixedBatch):
        got, wanted = getattr(ours, field.name), getattr(expected, field.name)
        if field.name == "regions":
            assert all(map(torch.equal, got, wanted))
        elif field.name in ("images", "source_mask"):
            assert torch.equal(got, wanted), field.name
        else:
            torch.testing.assert_close(
                got, wanted, atol=tolerance, rtol=0, check_dtype=False, msg=field.name
            )


def batch_of(
    count: int, grid: Size, patch: Size = (2, 3), num_classes: int = 5, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, grid[0] * patch[0], grid[1] * patch[1], generator=generator)
    return images, torch.randint(num_classes, (count,), generator=generator)


# ------------------------------------------------------------------------------- size of the region

FLOOR_14 = {3: 0.5 / 7, **dict.fromkeys(range(4, 10), 1 / 7), 10: 0.5 / 7}
FLOOR_7 = {1: 0.25 / 3.5, 2: 1 / 3.5, 3: 1 / 3.5, 4: 1 / 3.5, 5: 0.25 / 3.5}


@pytest.mark.parametrize(
    ("side", "rule", "probabilities", "mean_share"),
    [
        (14, "floor", FLOOR_14, 0.237),
        (7, "floor", FLOOR_7, 0.207),
        (14, "integer", dict.fromkeys(range(3, 11), 1 / 8), 0.242),
        (7, "integer", dict.fromkeys(range(1, 6), 1 / 5), 0.224),
    ],
)
def test_sizes_have_the_stated_distribution(
    side: int, rule: Literal["floor", "integer"], probabilities: dict[int, float], mean_share: float
) -> None:
    count, generator = 20_000, keyed_generator("sizes")
    drawn = Counter(
        draw_region_size((side, side), (0.25, 0.75), rule, generator) for _ in range(count)
    )
    assert set(drawn) == {(r, r) for r in probabilities}
    for r, probability in probabilities.items():
        assert abs(drawn[r, r] / count - probability) < 4 * sqrt(
            probability * (1 - probability) / count
        ), r
    exact = sum(probability * r * r for r, probability in probabilities.items()) / side**2
    assert exact == pytest.approx(mean_share, abs=5e-4)
    assert sum(n * h * w for (h, w), n in drawn.items()) / count / side**2 == pytest.approx(
        exact, abs=0.005
    )


@pytest.mark.parametrize("rule", ["floor", "integer"])
@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (3, 5)])
def test_sizes_leave_tokens_to_both_regions(grid: Size, rule: Literal["floor", "integer"]) -> None:
    generator = keyed_generator("ends")
    drawn = {draw_region_size(grid, (0.0, 1.0), rule, generator) for _ in range(500)}
    for axis in (0, 1):
        assert {size[axis] for size in drawn} == set(range(1, grid[axis]))


@pytest.mark.parametrize("rule", ["floor", "integer"])
@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.5, (7, 3)), (0.0, (1, 1)), (1.0, (13, 6)), (0.3, (4, 2))]
)
def test_a_fixed_side_ratio_gives_one_size(
    ratio: float, expected: Size, rule: Literal["floor", "integer"]
) -> None:
    generator = keyed_generator("fixed")
    drawn = {draw_region_size((14, 7), (ratio, ratio), rule, generator) for _ in range(50)}
    assert drawn == {expected}


def test_one_delta_serves_both_sides() -> None:
    generator = keyed_generator("delta")
    for _ in range(300):  # floor(7 delta) follows from floor(14 delta)
        height, width = draw_region_size((14, 7), (0.25, 0.75), "floor", generator)
        assert width == floor(height / 2)


# -------------------------------------------------------------------------------------- Eq. 7 and 8


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize(("grid", "size"), GRIDS)
def test_window_sums_and_picks_follow_eq_7(grid: Size, size: Size, batch: int) -> None:
    attention = torch.rand(batch, grid[0] * grid[1], dtype=torch.float64) / (grid[0] * grid[1])
    expected = slow_scores(attention, grid, size)
    scores = region_scores(attention.float(), grid, size)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-5, check_dtype=False)
    for largest in (True, False):
        corners = pick_regions(scores, largest)
        assert corners.dtype == torch.int64
        assert corners.tolist() == [list(slow_corner(image, largest)) for image in expected]


@pytest.mark.parametrize(("grid", "size"), GRIDS)
@pytest.mark.parametrize("levels", [2, 3, 10])
def test_ties_go_to_the_first_window_in_row_major_order(
    grid: Size, size: Size, levels: int
) -> None:
    count = 40 if grid[0] * grid[1] < 100 else 4
    attention = torch.randint(
        levels, (count, grid[0] * grid[1])
    ).float()  # sums are exact, ties are frequent
    expected = slow_scores(attention, grid, size)
    scores = region_scores(attention, grid, size)
    for largest in (True, False):
        assert pick_regions(scores, largest).tolist() == [
            list(slow_corner(image, largest)) for image in expected
        ]


@pytest.mark.parametrize(("grid", "size"), GRIDS)
@pytest.mark.parametrize("value", [0.0, 1 / 3, 1e-30, 5e3])
def test_constant_attention_picks_the_top_left_window(grid: Size, size: Size, value: float) -> None:
    scores = region_scores(torch.full((3, grid[0] * grid[1]), value), grid, size)
    assert len(scores.unique()) == 1
    for largest in (True, False):
        assert pick_regions(scores, largest).tolist() == [[0, 0]] * 3


def test_equal_copies_of_a_window_tie_although_their_cells_are_fractions() -> None:
    patch = torch.rand(2, 3) + 5
    grid = torch.rand(8, 9)
    for top, left in ((5, 6), (1, 4), (1, 0), (5, 1)):
        grid[top : top + 2, left : left + 3] = patch
    scores = region_scores(grid.flatten()[None], (8, 9), (2, 3))
    assert pick_regions(scores, largest=True).tolist() == [[1, 0]]
    assert pick_regions(
        region_scores(-grid.flatten()[None], (8, 9), (2, 3)), largest=False
    ).tolist() == [[1, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_attention_is_summed_in_float32(dtype: torch.dtype) -> None:
    attention = torch.rand(4, 196).to(dtype)
    torch.testing.assert_close(
        region_scores(attention, (14, 14), (10, 10)),
        slow_scores(attention, (14, 14), (10, 10)),
        atol=0,
        rtol=1e-6,
        check_dtype=False,
    )


def test_attention_that_is_not_a_number_gives_windows_inside_the_grid() -> None:
    """The loss of such a batch must be able to say so; a failing index would hide it."""
    scores = region_scores(torch.full((2, 24), float("nan")), (4, 6), (2, 3))
    for largest in (True, False):
        corners = pick_regions(scores, largest)
        assert (corners >= 0).all()
        assert (corners <= torch.tensor([2, 3])).all()


@pytest.mark.parametrize(("grid", "size"), GRIDS)
def test_region_mask_is_the_window(grid: Size, size: Size) -> None:
    corners = torch.tensor(
        [(i, j) for i in range(grid[0] - size[0] + 1) for j in range(grid[1] - size[1] + 1)]
    )
    mask = region_mask(corners, torch.tensor([size] * len(corners)), grid)
    assert mask.dtype == torch.bool
    for (top, left), row in zip(corners.tolist(), mask, strict=True):
        cells = [
            top <= n // grid[1] < top + size[0] and left <= n % grid[1] < left + size[1]
            for n in range(len(row))
        ]
        assert row.tolist() == cells


DTYPES = [
    torch.uint8,
    torch.int64,
    torch.bool,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda images: images.contiguous(),
    "channels_last": lambda images: images.contiguous(memory_format=torch.channels_last),
    "flipped_view": lambda images: images.flip(3).transpose(2, 3).contiguous().transpose(2, 3),
    "every_second": lambda images: images.repeat_interleave(2, 0)[::2],
    "one_image_expanded": lambda images: images[:1].expand_as(images),
}


def corners_in(grid: Size, size: Size, count: int) -> Tensor:
    return torch.stack(
        [torch.randint(g - s + 1, (count,)) for g, s in zip(grid, size, strict=True)], dim=1
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_pasting_follows_eq_8_and_leaves_its_input(
    batch: int, layout: str, dtype: torch.dtype
) -> None:
    grid, size, patch = (4, 5), (2, 3), (3, 2)
    images = LAYOUTS[layout](
        torch.randint(0, 2 if dtype == torch.bool else 256, (batch, 3, 12, 10)).to(dtype)
    )
    before = images.clone()
    source, target = corners_in(grid, size, batch), corners_in(grid, size, batch)
    regions = Regions(source, target, torch.tensor([size] * batch))
    mixed = paste_regions(images, regions, patch)
    from_source, to_target = (
        [(int(i), int(j)) for i, j in corners] for corners in (source, target)
    )
    assert torch.equal(mixed, slow_paste(images, from_source, to_target, size, patch))
    assert mixed.dtype == dtype
    assert torch.equal(images, before)
    assert mixed.data_ptr() != images.data_ptr()
    if layout == "channels_last" and batch > 1:
        assert mixed.is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------ reference of Eq. 14


@pytest.mark.parametrize(("mix", "consistency"), [(mix_probs, "probs"), (mix_logits, "logits")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_reference_is_mixed_pair_by_pair(
    mix: Any, consistency: str, dtype: torch.dtype, batch: int
) -> None:
    logits, lam = (torch.randn(batch, 9) * 4).to(dtype), torch.rand(batch)
    mixed = mix(logits, lam)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed.sum(dim=1), torch.ones(batch))
    for b in range(batch):
        z_a, z_b, share = logits[batch - 1 - b], logits[b], float(lam[b])
        if consistency == "probs":
            expected = share * slow_softmax(z_a) + (1 - share) * slow_softmax(z_b)
        else:
            expected = slow_softmax(share * z_a.double() + (1 - share) * z_b.double())
        torch.testing.assert_close(mixed[b].double(), expected, atol=1e-6, rtol=0)


def test_the_two_references_differ_as_the_worked_example_says() -> None:
    """Two confident images of a thousand classes, 0.8 each, lam 1/2: (.40, .40) against (.056,
    .056)."""
    probs = torch.full((2, 1000), 0.2 / 999)
    probs[0, 0] = probs[1, 1] = 0.8
    half = torch.full((2,), 0.5)
    assert mix_probs(probs.log(), half)[0, :2].tolist() == pytest.approx([0.4, 0.4], abs=1e-3)
    assert mix_logits(probs.log(), half)[0, :2].tolist() == pytest.approx([0.056, 0.056], abs=1e-3)


# ------------------------------------------------------------------------------------ the whole mix


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize(("grid", "size"), GRIDS)
def test_the_whole_mix_is_that_of_a_loop_over_pairs(
    grid: Size, size: Size, batch: int, variant: str
) -> None:
    images, labels = batch_of(batch, grid)
    guide = FakeGuide(grid, 5)
    mixer = SMMix(5, grid, variant=VARIANTS[variant])
    ours = mixer.apply(images, labels, Drawn([size] * batch), guide)
    assert_same_batch(ours, slow_mix(images, labels, guide, grid, size, VARIANTS[variant]))


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_the_middle_image_of_an_odd_batch_stays_plain(batch: int) -> None:
    images, labels = batch_of(batch, (4, 6))
    mixed = SMMix(5, (4, 6)).apply(images, labels, Drawn([(3, 3)] * batch), FakeGuide((4, 6), 5))
    middle = batch // 2
    assert torch.equal(mixed.images[middle], images[middle])
    own = torch.tensor(slow_labels(int(labels[middle]), 5, 0.1))
    torch.testing.assert_close(mixed.labels[middle], own)
    clean = slow_softmax(FakeGuide((4, 6), 5).logits(images[middle][None])[0])
    assert mixed.reference_probs is not None
    torch.testing.assert_close(mixed.reference_probs[middle].double(), clean, atol=1e-6, rtol=0)


def test_a_grid_without_room_for_two_regions_is_refused() -> None:
    for grid in ((1, 8), (8, 1), (1, 1)):
        with pytest.raises(ValueError, match=f"{grid[0]} x {grid[1]}"):
            SMMix(5, grid)


sides = st.integers(2, 6)


@st.composite
def mixes(draw: st.DrawFn) -> tuple[Tensor, Tensor, Size, Size, Variant, int]:
    grid, patch = (
        draw(st.tuples(sides, sides)),
        draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
    )
    seed = draw(st.integers(0, 10_000))
    images, labels = batch_of(draw(st.integers(1, 5)), grid, patch, seed=seed)
    variant = Variant(
        consistency=draw(st.sampled_from(["probs", "logits"])),
        region_size=draw(st.sampled_from(["floor", "integer"])),
    )
    return images, labels, grid, patch, variant, seed


@given(mixes())
def test_properties_of_every_mix(case: tuple[Tensor, Tensor, Size, Size, Variant, int]) -> None:
    images, labels, grid, patch, variant, seed = case
    kept_images, kept_labels = images.clone(), labels.clone()
    mixer, guide = SMMix(5, grid, 0.1, (0.0, 1.0), variant), FakeGuide(grid, 5)

    def mix(images: Tensor, labels: Tensor) -> MixedBatch:
        return mixer(
            images,
            labels,
            guide,
            StepRandom(keyed_generator("shared", seed), keyed_generator("own", seed)),
        )

    mixed = mix(images, labels)
    assert torch.equal(images, kept_images)
    assert torch.equal(labels, kept_labels)
    assert len(guide.calls) == 1
    assert torch.equal(guide.calls[0], images)
    assert_same_batch(mix(images, labels), mixed, tolerance=0)  # the same key

    assert mixed.regions is not None
    assert mixed.lam is not None
    assert mixed.source_mask is not None
    area = mixed.source_mask.sum(dim=1).numpy().astype(np.float32) / np.float32(grid[0] * grid[1])
    assert np.array_equal(mixed.lam.numpy(), area)
    assert 0 < float(mixed.lam[0]) < 1
    torch.testing.assert_close(mixed.labels.sum(dim=1), torch.ones(len(images)))

    pixels = mixed.source_mask.unflatten(1, grid)[:, None]
    pixels = pixels.repeat_interleave(patch[0], 2).repeat_interleave(patch[1], 3).expand_as(images)
    assert torch.equal(mixed.images[~pixels], images[~pixels])
    height, width = (mixed.regions.sizes[0] * torch.tensor(patch)).tolist()
    for b, (top, left) in enumerate((mixed.regions.source_corners * torch.tensor(patch)).tolist()):
        source = images[len(images) - 1 - b][:, top : top + height, left : left + width]
        assert torch.equal(mixed.images[b][pixels[b]], source.reshape(-1))

    flipped = mix(
        images.flip(0), labels.flip(0)
    )  # roles belong to images, not to places in the batch
    for field in fields(MixedBatch):
        one, other = getattr(mixed, field.name), getattr(flipped, field.name)
        if field.name == "regions":
            assert torch.equal(one.source_corners.flip(0), other.source_corners)
            assert torch.equal(one.target_corners.flip(0), other.target_corners)
        elif isinstance(one, torch.Tensor):
            assert torch.equal(one.flip(0), other), field.name
        else:
            assert one == other, field.name


def test_another_key_gives_another_mix() -> None:
    images, labels = batch_of(4, (6, 6))
    mixer = SMMix(5, (6, 6), side_ratio=(0.0, 1.0))
    shared = keyed_generator("shared")
    sizes = set()
    for key in range(30):
        mixed = mixer(
            images, labels, FakeGuide((6, 6), 5), StepRandom(shared, keyed_generator(key))
        )
        assert mixed.regions is not None
        sizes.add(tuple(mixed.regions.sizes[0].tolist()))
    assert len(sizes) > 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_images_keep_full_precision_labels(dtype: torch.dtype) -> None:
    images, labels = batch_of(4, (4, 6))
    mixed = SMMix(5, (4, 6)).apply(
        images.to(dtype), labels, Drawn([(2, 3)] * 4), FakeGuide((4, 6), 5)
    )
    assert mixed.images.dtype == dtype
    for name in ("labels", "lam", "source_labels", "target_labels", "reference_probs"):
        assert getattr(mixed, name).dtype == torch.float32, name


# ------------------------------------------------------------------------------------ torch.compile


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_the_whole_mix_is_traced_as_one_graph(variant: str) -> None:
    torch.compiler.reset()
    mixer = SMMix(5, (4, 6), variant=VARIANTS[variant])

    def apply(images: Tensor, labels: Tensor, clean: ModelOutput) -> MixedBatch:
        return mixer.apply(images, labels, Drawn([(2, 3)] * 3), lambda _: clean)

    images, labels = batch_of(3, (4, 6))
    values = (images, labels, FakeGuide((4, 6), 5)(images))
    traced = torch.compile(apply, backend="eager", fullgraph=True)
    assert_same_batch(traced(*values), apply(*values))
