"""The picture of a mix says what was done: right panels, right windows, right words, for every
shape of batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from errors import InputError
from mixers.cutmix import CutMix
from mixers.interface import Guide, MixedBatch, NoMixing, Regions, StepRandom
from mixers.mixup import Mixup
from models.interface import ModelOutput
from pipeline.spec import ImageSpec
from run import pictures
from run.pictures import OUTLINE_EDGE, SOURCE_COLOR, TARGET_COLOR, Layout, Page, Pair
from smmix import Drawn, SMMix
from utils import keyed_generator

NAMES = ["ant", "bee", "cat", "dog"]


def plain_spec(size: tuple[int, int]) -> ImageSpec:
    """Images already in 0..1, so that a pixel's colour is known."""
    return ImageSpec(size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def flat_images(count: int, size: tuple[int, int]) -> Tensor:
    """Image i is grey of level i + 1 out of 8."""
    return ((torch.arange(count) + 1) / 8)[:, None, None, None].expand(count, 3, *size).clone()


def planted_guide(attention: Tensor) -> Guide:
    """A guide that answers with attention (B, rows, columns) written by hand."""

    def guide(images: Tensor) -> ModelOutput:
        count = len(images)
        return ModelOutput(
            torch.zeros(count, len(NAMES)), torch.zeros(count, 1, 1), attention[:count].flatten(1)
        )

    return guide


def color_at(picture: Tensor, x: int, y: int) -> tuple[int, ...]:
    return tuple(picture[:, y, x].tolist())


def has_frame(
    picture: Tensor, window: tuple[int, int, int, int], color: tuple[int, int, int]
) -> bool:
    """Whether a frame of `color`, with its dark line outside, runs along exactly this window's
    border."""
    x0, y0, x1, y1 = window
    places = [(x, y) for x in range(x0, x1 + 1) for y in (y0, y1)] + [
        (x, y) for y in range(y0, y1 + 1) for x in (x0, x1)
    ]
    inner = [(x, y) for x in range(x0 + 1, x1) for y in (y0 + 1, y1 - 1)]
    inner += [(x, y) for y in range(y0 + 1, y1) for x in (x0 + 1, x1 - 1)]
    return all(color_at(picture, *place) == OUTLINE_EDGE for place in places) and all(
        color_at(picture, *place) == color for place in inner
    )


def smmix_picture(
    count: int, size: tuple[int, int], grid_size: tuple[int, int], region: tuple[int, int]
) -> tuple[Tensor, MixedBatch, Layout]:
    """SMMix of flat images; most attention of image i at cell (0, i % columns), least at the last
    cell."""
    attention = torch.full((count, *grid_size), 0.5)
    attention[torch.arange(count), 0, torch.arange(count) % grid_size[1]] = 1.0
    attention[:, -1, -1] = 0.0
    images, labels = flat_images(count, size), torch.arange(count) % len(NAMES)
    mixer = SMMix(len(NAMES), grid_size)
    batch = mixer.apply(images, labels, Drawn([region] * count), planted_guide(attention))
    picture = pictures.mixing_picture(
        images, batch, labels, spec=plain_spec(size), class_names=NAMES, grid_size=grid_size
    )
    return picture, batch, Layout(size, (count + 1) // 2, 4)


# ----------------------------------------------------------------------------------------- the page


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("size", "grid_size", "region"),
    [((32, 32), (4, 4), (2, 2)), ((32, 48), (4, 3), (2, 1)), ((224, 160), (7, 5), (3, 2))],
)
def test_windows_are_where_the_regions_are(
    count: int, size: tuple[int, int], grid_size: tuple[int, int], region: tuple[int, int]
) -> None:
    picture, batch, layout = smmix_picture(count, size, grid_size, region)
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, layout.page[1], layout.page[0])
    assert batch.regions is not None
    cell = layout.panel[0] // grid_size[0], layout.panel[1] // grid_size[1]
    for row in range(layout.rows):
        corners = [batch.regions.source_corners[row].tolist()] + [
            batch.regions.target_corners[row].tolist()
        ] * 2
        for column, (top, left), color in zip(
            (1, 2, 3), corners, (SOURCE_COLOR, TARGET_COLOR, SOURCE_COLOR), strict=True
        ):
            x, y = layout.corner(row, column)
            window = (  # from the definition, not from Layout.window
                x + left * cell[1],
                y + top * cell[0],
                x + (left + region[1]) * cell[1] - 1,
                y + (top + region[0]) * cell[0] - 1,
            )
            assert has_frame(picture, window, color)


def test_planted_attention_is_framed() -> None:
    """One hot cell and one cold cell, written by hand: their windows are known without any of the
    project's code."""
    attention = torch.full((2, 4, 4), 0.5)
    attention[1, 0, 0] = 1.0  # image 1 is the source of image 0: its window starts at cell (0, 0)
    attention[0, 3, 3] = 0.0  # the target's last window starts at cell (2, 2)
    images, labels = flat_images(2, (160, 160)), torch.tensor([0, 1])
    mixer = SMMix(2, (4, 4), side_ratio=(0.5, 0.5))
    random = StepRandom(keyed_generator(1), keyed_generator(2))
    batch = mixer(images, labels, planted_guide(attention), random)
    picture = pictures.mixing_picture(
        images, batch, labels, spec=plain_spec((160, 160)), class_names=NAMES, grid_size=(4, 4)
    )
    layout = Layout((160, 160), 1, 4)
    (x1, y1), (x2, y2), (x3, y3) = (layout.corner(0, column) for column in (1, 2, 3))
    assert has_frame(picture, (x1, y1, x1 + 79, y1 + 79), SOURCE_COLOR)
    assert has_frame(picture, (x2 + 80, y2 + 80, x2 + 159, y2 + 159), TARGET_COLOR)
    assert has_frame(picture, (x3 + 80, y3 + 80, x3 + 159, y3 + 159), SOURCE_COLOR)
    source, target = (64, 64, 64), (32, 32, 32)
    assert color_at(picture, *layout.corner(0, 0)) == source
    assert color_at(picture, x3 + 5, y3 + 5) == target
    assert color_at(picture, x3 + 120, y3 + 120) == source  # pasted


def test_heat_map_lies_over_its_own_image() -> None:
    picture, _, layout = smmix_picture(2, (32, 32), (4, 4), (1, 1))
    x, y = layout.corner(0, 1)
    cell = layout.panel[0] // 4

    def color(row: int, column: int) -> Tensor:
        return picture[:, y + row * cell + cell // 2, x + column * cell + cell // 2].float()

    grey = 64.0  # image 1, the source
    for place, heat in (
        ((0, 1), pictures.HEAT_COLORS[4]),
        ((1, 1), pictures.HEAT_COLORS[2]),
        ((3, 3), pictures.HEAT_COLORS[0]),
    ):
        expected = torch.tensor(heat) * pictures.HEAT_OPACITY + grey * (1 - pictures.HEAT_OPACITY)
        torch.testing.assert_close(color(*place), expected, atol=1.0, rtol=0)


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (32, 64), (161, 40), (224, 224)])
def test_panels_are_large_enough_and_keep_their_pixels(size: tuple[int, int]) -> None:
    layout = Layout(size, 1, 3)
    assert min(layout.panel) >= 160
    assert layout.panel == (size[0] * layout.scale, size[1] * layout.scale)
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    page = Page(layout)
    page.panel(0, 2, image)
    x, y = layout.corner(0, 2)
    shown = page.tensor()[:, y : y + layout.panel[0], x : x + layout.panel[1]]
    assert torch.equal(shown[:, :: layout.scale, :: layout.scale], image)
    assert torch.equal(
        shown[:, layout.scale - 1 :: layout.scale, layout.scale - 1 :: layout.scale], image
    )
    assert x + layout.panel[1] < layout.page[0]
    assert y + layout.panel[0] < layout.page[1]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "mixer", [CutMix(4), Mixup(4, mode="elem"), NoMixing(4)], ids=["cutmix", "mixup", "none"]
)
def test_without_regions_three_columns(mixer: CutMix | Mixup | NoMixing, count: int) -> None:
    images, labels = flat_images(count, (32, 48)), torch.arange(count)
    batch = mixer(
        images,
        labels,
        planted_guide(torch.zeros(0)),
        StepRandom(keyed_generator(1), keyed_generator(2)),
    )
    picture = pictures.mixing_picture(
        images, batch, labels, spec=plain_spec((32, 48)), class_names=NAMES, grid_size=(4, 6)
    )
    layout = Layout((32, 48), (count + 1) // 2, 3)
    assert picture.shape == (3, layout.page[1], layout.page[0])
    for row in range(layout.rows):
        for column, expected in enumerate((images[-1 - row], images[row], batch.images[row])):
            x, y = layout.corner(row, column)
            shown = picture[:, y : y + layout.panel[0], x : x + layout.panel[1]]
            pixels = expected.clamp(0, 1).mul(255).round().to(torch.uint8)
            assert torch.equal(shown[:, :: layout.scale, :: layout.scale], pixels)


def test_every_line_has_its_text() -> None:
    """Ink in the line of titles and below each panel, and nowhere in the margins between the
    columns."""
    picture, _, layout = smmix_picture(4, (32, 32), (4, 4), (2, 2))
    ink = (picture < 128).all(dim=0)
    for row in range(-1, layout.rows):
        for column in range(layout.columns):
            x, y = layout.corner(row + 1, column)
            line = ink[y - layout.line : y]
            assert line[:, x : x + layout.panel[1]].any()
            assert not line[:, x - pictures.GAP : x].any()


def test_constant_attention_gives_a_picture() -> None:
    """An untrained or broken model may attend to everything alike: no division by zero."""
    image = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    shown = pictures.overlay_heat(image, torch.full((2, 2), 0.25))
    assert (shown == shown[:, :1, :1]).all()


def test_attention_of_any_float_type_is_shown() -> None:
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    scores = torch.tensor([[0.0, 0.25], [0.5, 1.0]])
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(
            pictures.overlay_heat(image, scores.to(dtype)), pictures.overlay_heat(image, scores)
        )


def test_heat_colors_go_through_their_anchors_in_order_of_brightness() -> None:
    heat = torch.linspace(0, 1, 101)
    colors = pictures.heat_colors(heat)
    assert torch.equal(colors[::25].round(), torch.tensor(pictures.HEAT_COLORS).float())
    brightness = colors @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert (brightness.diff() > 0).all()
    assert torch.equal(pictures.heat_colors(torch.tensor([-1.0, 2.0])), colors[[0, -1]])


# -------------------------------------------------------------------------------------------- words


def test_captions_say_what_was_mixed() -> None:
    _, batch, _ = smmix_picture(4, (32, 48), (4, 6), (2, 3))
    pairs = pictures.describe_pairs(batch, torch.arange(4), NAMES, (4, 6))
    assert [str(pair) for pair in pairs] == [
        "source: dog, target: ant, lam = 0.25 (source share), region: 2 x 3 of 4 x 6 tokens",
        "source: cat, target: bee, lam = 0.25 (source share), region: 2 x 3 of 4 x 6 tokens",
    ]
    assert pairs[0].captions == ["dog", "2 x 3 of 4 x 6 tokens", "ant", "lam = 0.25 (source share)"]


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_every_pair_comes_once(count: int, expected: int) -> None:
    images = torch.zeros(count, 3, 8, 8)
    batch = MixedBatch(images, torch.zeros(count, 4), lam=torch.arange(count) / 10)
    pairs = pictures.describe_pairs(batch, torch.arange(count), NAMES, (2, 2))
    assert [(pair.source, pair.target, pair.share) for pair in pairs] == [
        (NAMES[count - 1 - i], NAMES[i], f"lam = 0.{i}0 (source share)") for i in range(expected)
    ]


def test_without_lam_the_caption_says_so() -> None:
    assert str(Pair("ant", "bee", None, None)) == "source: ant, target: bee, not mixed"
    assert Pair("ant", "bee", 0.125, None).captions == ["ant", "bee", "lam = 0.12 (source share)"]


def test_long_names_end_in_an_ellipsis() -> None:
    font = ImageFont.load_default(14)
    name = "a very long class name, with its synonyms, that no panel has room for"
    short = pictures.fit_text(name, font, 160)
    assert short.endswith("…")
    assert name.startswith(short[:-1])
    assert 120 < font.getlength(short) <= 160
    assert pictures.fit_text("ant", font, 160) == "ant"
    assert pictures.fit_text("ant", font, 1) == "…"


def test_fixed_texts_fit_the_smallest_panel() -> None:
    layout = Layout((32, 32), 1, 4)
    pair = Pair("ant", "bee", 0.88, "22 x 22 of 32 x 32 tokens")
    for text in (*pictures.TITLES_WITH_REGIONS, *pair.captions):
        assert pictures.fit_text(text, layout.font, layout.panel[1]) == text


# ------------------------------------------------------------------------------------------ samples


class Numbers(Dataset[tuple[Tensor, int]]):
    """Image i holds i; remembers what was read."""

    def __init__(self, labels: list[int]) -> None:
        self.labels = labels
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read.append(index)
        return torch.full((3, 2, 2), float(index)), self.labels[index]


class NumberStream(IterableDataset[tuple[Tensor, int]]):
    def __iter__(self):
        return ((torch.full((3, 2, 2), float(i)), i) for i in range(1000))


def test_samples_are_spread_over_a_sorted_set() -> None:
    samples = Numbers([i // 10 for i in range(100)])
    images, labels = pictures.spread_samples(samples, 4)
    assert labels.tolist() == [0, 2, 5, 7]
    assert images[:, 0, 0, 0].tolist() == [0, 25, 50, 75]
    assert samples.read == [0, 25, 50, 75]


def test_samples_differ_in_class_where_others_are_near() -> None:
    samples = Numbers([0, 0, 0, 1] * 10 + [0] * 40)
    images, labels = pictures.spread_samples(samples, 4)
    assert labels.tolist() == [0, 1, 0, 0]
    assert images[:, 0, 0, 0].tolist() == [0, 23, 40, 60]
    assert len(samples.read) <= 4 * (pictures.TRIES + 1)


@pytest.mark.parametrize(
    ("length", "count", "expected"), [(3, 8, 3), (1, 4, 1), (8, 8, 8), (5, 2, 2)]
)
def test_no_sample_comes_twice(length: int, count: int, expected: int) -> None:
    images, labels = pictures.spread_samples(Numbers(list(range(length))), count)
    assert len(images) == len(labels) == expected
    assert len(set(labels.tolist())) == expected


def test_a_stream_gives_its_first() -> None:
    images, labels = pictures.spread_samples(NumberStream(), 3)
    assert labels.tolist() == [0, 1, 2]
    assert images.shape == (3, 3, 2, 2)


# --------------------------------------------------------------------------------------------- file


def test_png_holds_the_picture(tmp_path: Path) -> None:
    picture = torch.randint(256, (3, 20, 30), dtype=torch.uint8)
    pictures.save_png(picture, tmp_path / "mixed.png")
    with Image.open(tmp_path / "mixed.png") as image:
        assert image.format == "PNG"
        assert np.array_equal(np.array(image), picture.permute(1, 2, 0).numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["mixed.png"]


def test_png_into_no_folder_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        pictures.save_png(
            torch.zeros(3, 2, 2, dtype=torch.uint8), tmp_path / "missing" / "mixed.png"
        )


def test_images_stay_as_they_are() -> None:
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    before = images.clone()
    regions = Regions(
        torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 2, dtype=torch.long), torch.ones(2, 2)
    )
    batch = MixedBatch(
        images, torch.zeros(2, 2), torch.full((2,), 0.25), regions=regions
    )  # no attention to overlay
    spec = plain_spec((32, 32))
    first, second = (
        pictures.mixing_picture(
            images, batch, labels, spec=spec, class_names=NAMES, grid_size=(2, 2)
        )
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(images, before)
