"""Each mixing method against a slow loop written from its formula, and the laws of its draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

import engine
from errors import InputError
from losses import SMMixLoss
from mixers.attentivemix import AttentiveMix
from mixers.cutmix import CutMix
from mixers.fmix import Blobs, FMix, shape_noise
from mixers.interface import MixedBatch, StepRandom
from mixers.masks import first_argmax, to_cells, to_pixels, top_mask
from mixers.resizemix import ResizeMix
from mixers.saliency import fine_grained_saliency
from mixers.saliencymix import SaliencyMix
from mixers.transmix import TransMix, attention_share, relabel
from models.interface import ImageModel, ModelOutput
from pipeline.boxes import Box
from smmix import SMMix
from tests.conftest import FakeGuide
from tests.mixing import fake_teacher, to_bytes
from training import precision
from utils import keyed_generator

K, SIZE = 5, (12, 20)


def batch_of(count: int, size: tuple[int, int] = SIZE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, 3, *size, generator=generator), torch.randint(
        K, (count,), generator=generator
    )


def no_guide(images: Tensor) -> ModelOutput:
    raise AssertionError("this method needs no motivating pass")


def random_of(key: int) -> StepRandom:
    return StepRandom(keyed_generator("shared", key), keyed_generator("own", key))


# ------------------------------------------------------------------------------------- shared parts


def test_top_mask_takes_each_rows_own_count() -> None:
    scores = torch.randn(5, 9, generator=keyed_generator(0))
    counts = torch.tensor([0, 1, 4, 8, 9])
    chosen = top_mask(scores, counts)
    for row, count, mask in zip(scores.tolist(), counts.tolist(), chosen.tolist(), strict=True):
        best = sorted(range(9), key=[-value for value in row].__getitem__)[:count]
        assert [i for i in range(9) if mask[i]] == sorted(best)
    assert top_mask(torch.zeros(2, 6), torch.tensor([2, 5])).sum(dim=1).tolist() == [
        2,
        5,
    ]  # ties add none


def test_the_first_of_equal_maxima_is_picked() -> None:
    scores = torch.tensor([[[0, 2, 2], [2, 1, 0]], [[0, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 3]]])
    assert first_argmax(scores).tolist() == [[0, 1], [0, 0], [1, 2]]


@pytest.mark.parametrize(
    ("grid", "size"), [((2, 3), (8, 9)), ((7, 7), (224, 224)), ((3, 2), (7, 5))]
)
def test_cells_become_pixels_and_cells_again(grid: tuple[int, int], size: tuple[int, int]) -> None:
    cells = torch.rand(4, grid[0] * grid[1], generator=keyed_generator(1)) < 0.5
    pixels = to_pixels(cells, grid, size)
    for b in range(4):
        for row in range(size[0]):
            for column in range(size[1]):
                cell = (row * grid[0] // size[0]) * grid[1] + column * grid[1] // size[1]
                assert bool(pixels[b, 0, row, column]) == bool(cells[b, cell])
    if size[0] % grid[0] == 0 and size[1] % grid[1] == 0:
        assert torch.equal(to_cells(pixels, grid), cells)


# ---------------------------------------------------------------------------------------- ResizeMix


def squeeze(image: Tensor, box: Box, size: tuple[int, int]) -> dict[tuple[int, int], Tensor]:
    """The pasted pixels by place."""
    pasted = {}
    for row in range(box.top, box.bottom):
        for column in range(box.left, box.right):
            seen_row = (row - box.top) * size[0] // (box.bottom - box.top)
            seen_column = (column - box.left) * size[1] // (box.right - box.left)
            pasted[row, column] = image[:, seen_row, seen_column]
    return pasted


@pytest.mark.parametrize("placement", ["inside", "clipped"])
@pytest.mark.parametrize("count", [2, 4, 5])
def test_resizemix_is_its_slow_loop(placement: Any, count: int) -> None:
    images, labels = batch_of(count)
    mixer = ResizeMix(K, placement=placement, mode="elem")
    for key in range(5):
        boxes = mixer.draw(count, SIZE, keyed_generator(key))
        expected = images.clone()
        for b, box in enumerate(boxes):
            for (row, column), pixel in squeeze(images[count - 1 - b], box, SIZE).items():
                expected[b, :, row, column] = pixel
        mixed = mixer.apply(images, labels, boxes, no_guide)
        assert torch.equal(mixed.images, expected)
        assert mixed.lam is not None
        assert mixed.lam.tolist() == pytest.approx([box.share(SIZE) for box in boxes])


def test_resizemix_pastes_what_nearest_interpolation_gives() -> None:
    images, labels = batch_of(2, (32, 32))
    for box in (Box(3, 19, 8, 16), Box(0, 32, 0, 32), Box(30, 31, 0, 4)):
        mixed = ResizeMix(K).apply(images, labels, [box, Box(0, 0, 0, 0)], no_guide)
        small = interpolate(
            images[1:], (box.bottom - box.top, box.right - box.left), mode="nearest"
        )[0]
        assert torch.equal(mixed.images[0, :, box.top : box.bottom, box.left : box.right], small)
        assert torch.equal(mixed.images[1], images[1])


@pytest.mark.parametrize(("placement", "share"), [("inside", 0.240), ("clipped", 0.172)])
def test_resizemix_pastes_as_much_as_measured_elsewhere(placement: Any, share: float) -> None:
    """The two published placements differ in strength: mean shares of 0.240 and 0.172."""
    boxes = ResizeMix(K, placement=placement, mode="elem").draw(
        8000, (224, 224), keyed_generator("share")
    )
    shares = [box.share((224, 224)) for box in boxes]
    assert np.mean(shares) == pytest.approx(
        share, abs=0.004 + 4 * float(np.std(shares)) / math.sqrt(8000)
    )


def test_resizemix_draws_within_its_scope_and_inside_the_image() -> None:
    boxes = ResizeMix(K, scope=(0.2, 0.5), mode="elem").draw(
        500, (100, 60), keyed_generator("scope")
    )
    for box in boxes:
        assert 0 <= box.top < box.bottom <= 100
        assert 0 <= box.left < box.right <= 60
        assert 20 <= box.bottom - box.top <= 50
        assert 12 <= box.right - box.left <= 30
    shared = ResizeMix(K).draw(6, (100, 60), keyed_generator("one"))
    assert len({(box.bottom - box.top, box.right - box.left) for box in shared}) == 1
    assert len({(box.top, box.left) for box in shared}) > 1  # one size, places of their own
    assert (
        len(set(ResizeMix(K, placement="clipped").draw(6, (100, 60), keyed_generator("one")))) == 1
    )


def test_resizemix_keeps_a_pixel_of_images_smaller_than_its_scope() -> None:
    boxes = ResizeMix(K, scope=(0.0, 0.1)).draw(2, (4, 4), keyed_generator(0))
    assert {(box.bottom - box.top, box.right - box.left) for box in boxes} == {(1, 1)}


# --------------------------------------------------------------------------------------------- FMix


def slow_field(noise: Tensor, size: tuple[int, int], decay: float) -> np.ndarray:
    """The inverse real Fourier transform of the filtered noise, in numpy."""
    height, width = size
    filtered = noise.numpy().astype(np.complex128)
    for u in range(height):
        for v in range(width // 2 + 1):
            fu = (u if u < (height + 1) // 2 else u - height) / height
            frequency = max(math.hypot(fu, v / width), 1 / max(height, width))
            filtered[u, v] /= frequency**decay
    return np.fft.irfft2(filtered, s=size)


@pytest.mark.parametrize("size", [(8, 12), (9, 7)])
@pytest.mark.parametrize("decay", [0.0, 3.0])
def test_fmix_is_its_slow_loop(size: tuple[int, int], decay: float) -> None:
    images, labels = batch_of(4, size)
    mixer = FMix(K, decay=decay, mode="pair")
    drawn = mixer.draw(4, size, keyed_generator(2))
    assert drawn.used == [0, 1, 1, 0]
    mixed = mixer.apply(images, labels, drawn, no_guide)
    expected = images.clone()
    for b in range(4):
        field = slow_field(drawn.noise[drawn.used[b]], size, decay)
        places = sorted(np.ndindex(*size), key=(-field).__getitem__)
        for row, column in places[: drawn.pixels[drawn.used[b]]]:
            expected[b, :, row, column] = images[3 - b, :, row, column]
    assert torch.equal(mixed.images, expected)
    assert mixed.lam is not None
    assert mixed.lam.tolist() == pytest.approx(
        [drawn.pixels[i] / (size[0] * size[1]) for i in drawn.used]
    )


def test_fmix_masks_have_the_drawn_share_rounded_down_or_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mixers.fmix.draw_beta", lambda alpha, count, generator: [0.3] * count)
    drawn = FMix(K, mode="elem").draw(200, (5, 5), keyed_generator(3))
    assert set(drawn.pixels) == {7, 8}  # 7.5
    assert 0.35 < np.mean(np.array(drawn.pixels) == 8) < 0.65
    assert (
        len(FMix(K).draw(8, (5, 5), keyed_generator(3)).noise) == 1
    )  # a mask for the batch is drawn once


def components(mask: np.ndarray) -> int:
    left, count = {place for place in np.ndindex(*mask.shape) if mask[place]}, 0
    while left:
        count, edge = count + 1, [left.pop()]
        while edge:
            row, column = edge.pop()
            near = {
                (row + 1, column),
                (row - 1, column),
                (row, column + 1),
                (row, column - 1),
            } & left
            left -= near
            edge += near
    return count


def test_a_faster_decay_gives_fewer_blobs() -> None:
    counts = []
    for decay in (0.0, 1.0, 3.0):
        noise = torch.view_as_complex(torch.randn(6, 32, 17, 2, generator=keyed_generator(4)))
        fields = shape_noise(noise, (32, 32), decay).flatten(1)
        masks = top_mask(fields, torch.full((6,), 400)).view(-1, 32, 32).numpy()
        counts.append(sum(components(mask) for mask in masks))
    assert counts[0] > 2 * counts[1] > 4 * counts[2]


def test_the_spectrum_of_fmix_falls_by_twice_its_decay() -> None:
    noise = torch.view_as_complex(torch.randn(40, 64, 33, 2, generator=keyed_generator(5)))
    power = (
        torch.fft.rfft2(shape_noise(noise, (64, 64), 3.0)).abs().square().mean(dim=0)
    )  # (64, 33)
    frequency = torch.arange(2, 30)
    along = power[0, 2:30]
    slope = np.polyfit(np.log(frequency.numpy()), np.log(along.numpy()), 1)[0]
    assert slope == pytest.approx(-6, abs=0.4)


def test_fmix_takes_plain_values() -> None:
    images, labels = batch_of(2, (4, 4))
    noise = torch.zeros(1, 4, 3, dtype=torch.complex64)
    mixed = FMix(K).apply(images, labels, Blobs(noise, [16], [0, 0]), no_guide)
    assert torch.equal(mixed.images, images.flip(0))


# ------------------------------------------------------------------------------------- AttentiveMix


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_attentivemix_is_its_slow_loop(count: int, mode: str) -> None:
    images, labels = batch_of(count)
    mixer = AttentiveMix(K, fake_teacher, alpha=2, beta=2, mode=mode)
    shares = mixer.draw(count, SIZE, keyed_generator(1))
    mixed = mixer.apply(images, labels, shares, no_guide)
    expected, scores = images.clone(), fake_teacher(images).mean(dim=1)
    for b in range(count):
        source = count - 1 - b
        cells = max(int(6 * shares[b]), 1)
        best = sorted(range(6), key=(-scores[source].flatten()).tolist().__getitem__)[:cells]
        for row in range(SIZE[0]):
            for column in range(SIZE[1]):
                if (row * 2 // SIZE[0]) * 3 + column * 3 // SIZE[1] in best:
                    expected[b, :, row, column] = images[source, :, row, column]
    assert torch.equal(mixed.images, expected)


@pytest.mark.parametrize("cells", [1, 6, 49])
def test_attentivemix_pastes_whole_cells_of_32_pixels(cells: int) -> None:
    def teacher(images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, 32)

    images, labels = batch_of(4, (224, 224))
    mixed = AttentiveMix(K, teacher, cells=cells)(images, labels, no_guide, random_of(0))
    assert mixed.mask is not None
    assert mixed.lam is not None
    blocks = mixed.mask.float().unfold(2, 32, 32).unfold(3, 32, 32).mean(dim=(-1, -2))
    assert set(blocks.unique().tolist()) <= {0.0, 1.0}
    assert blocks.sum(dim=(1, 2, 3)).tolist() == [cells] * 4
    assert mixed.lam.tolist() == pytest.approx([cells / 49] * 4)


@pytest.mark.parametrize(("alphas", "mean"), [((2.0, 8.0), 9.4), ((2.0, 2.0), 23.9)])
def test_attentivemix_draws_as_many_cells_as_measured_elsewhere(
    alphas: tuple[float, float], mean: float
) -> None:
    mixer = AttentiveMix(K, fake_teacher, alpha=alphas[0], beta=alphas[1], mode="elem")
    counts = mixer.count(mixer.draw(20_000, SIZE, keyed_generator("cells")), 49)
    assert np.mean(counts) == pytest.approx(mean, abs=0.25)
    assert 1 <= min(counts) <= max(counts) <= 49


def test_attentivemix_refuses_more_cells_than_there_are() -> None:
    with pytest.raises(
        InputError, match=r"--attentive-cells 7: the teacher's feature map has only 6 cells"
    ):
        AttentiveMix(K, fake_teacher, cells=7)(*batch_of(2), no_guide, random_of(0))


def test_the_classifier_is_looked_through_without_a_trace() -> None:
    """In evaluation mode, whatever the run does: statistics, modes and gradients stay as they
    are."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.Dropout(0.9)).train()
    teacher = engine.make_teacher(network, precision.make_autocast(torch.device("cpu"), "none"))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images, labels = batch_of(2)
    one, other = (
        AttentiveMix(K, teacher, cells=2)(images, labels, no_guide, random_of(0)) for _ in range(2)
    )
    assert torch.equal(one.images, other.images)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module.training for module in network.modules())
    assert all(
        parameter.grad is None and not parameter.requires_grad for parameter in network.parameters()
    )
    assert not one.images.requires_grad


# -------------------------------------------------------------------------------------- SaliencyMix


@pytest.mark.parametrize("count", [2, 3])
def test_saliencymix_is_its_slow_loop(count: int) -> None:
    images, labels = batch_of(count)
    mixer = SaliencyMix(K, to_bytes, mode="elem")
    saliency = fine_grained_saliency(to_bytes(images))
    for key in range(20):
        sides = mixer.draw(count, SIZE, keyed_generator(key))
        expected = images.clone()
        for b, (rows, columns) in enumerate(sides):
            source = count - 1 - b
            place = int(saliency[source].flatten().argmax())
            best = [
                i
                for i, value in enumerate(saliency[source].flatten().tolist())
                if value == saliency[source].max()
            ]
            assert place in best
            row, column = divmod(best[0], SIZE[1])
            top, bottom = max(row - rows // 2, 0), min(row + (rows + 1) // 2, SIZE[0])
            left, right = max(column - columns // 2, 0), min(column + (columns + 1) // 2, SIZE[1])
            expected[b, :, top:bottom, left:right] = images[source, :, top:bottom, left:right]
        assert torch.equal(mixer.apply(images, labels, sides, no_guide).images, expected)


def test_saliencymix_finds_the_planted_spot() -> None:
    images = torch.full((2, 3, 64, 64), 0.2)
    images[1, :, 40:44, 20:24] = 1.0  # the source of image 0
    mixed = SaliencyMix(K, to_bytes).apply(
        images, torch.tensor([0, 1]), [(10, 10), (10, 10)], no_guide
    )
    assert mixed.mask is not None
    rows, columns = mixed.mask[0, 0].nonzero().unbind(1)
    assert 40 <= (rows.min() + rows.max() + 1) // 2 < 44
    assert 20 <= (columns.min() + columns.max() + 1) // 2 < 24
    corner = (
        mixed.mask[1, 0].nonzero().amax(dim=0).tolist()
    )  # a flat source: a box around its first pixel, clipped
    assert corner == [4, 4]


def test_saliencymix_shares_a_size_and_not_a_place() -> None:
    sides = SaliencyMix(K, to_bytes).draw(6, (64, 48), keyed_generator(0))
    assert len(set(sides)) == 1
    assert (
        len(set(SaliencyMix(K, to_bytes, mode="elem").draw(6, (64, 48), keyed_generator(0)))) == 6
    )


# ----------------------------------------------------------------------------------------- TransMix


def test_transmix_is_its_slow_loop() -> None:
    images, labels = batch_of(4)
    grid, ratio = (3, 5), 0.3
    mixer = TransMix(CutMix(K, mode="elem"), grid, ratio)
    boxes = mixer.draw(4, SIZE, keyed_generator(1))
    batch = mixer.apply(images, labels, boxes, no_guide)
    plain = CutMix(K, mode="elem").apply(images, labels, boxes, no_guide)
    assert torch.equal(batch.images, plain.images)
    assert batch.forward_inputs()["need_attention"] == "class"
    assert batch.forward_inputs()["source_mask"] is None  # regions are SMMix's affair

    attention = torch.rand(4, 15, generator=keyed_generator(2))
    output = ModelOutput(torch.zeros(4, K), torch.zeros(4, 15, 1), class_attention=attention)
    settled = batch.after_forward(output)
    assert settled.lam is not None
    for b, box in enumerate(boxes):
        inside = total = 0.0
        for row in range(3):
            for column in range(5):
                pixel = row * SIZE[0] // 3, column * SIZE[1] // 5  # nearest: the cell's first pixel
                pasted = box.top <= pixel[0] < box.bottom and box.left <= pixel[1] < box.right
                value = float(attention[b, row * 5 + column])
                inside, total = inside + value * pasted, total + value
        lam = ratio * box.share(SIZE) + (1 - ratio) * inside / total
        assert float(settled.lam[b]) == pytest.approx(lam, abs=1e-6)
        expected = [0.1 / K] * K
        expected[int(labels[3 - b])] += 0.9 * lam
        expected[int(labels[b])] += 0.9 * (1 - lam)
        assert settled.labels[b].tolist() == pytest.approx(expected, abs=1e-6)


def settled_with(mixer: TransMix[Any], attention: Tensor) -> tuple[MixedBatch, MixedBatch]:
    images, labels = batch_of(len(attention))
    guide = FakeGuide(mixer.grid_size, K)
    batch = mixer(images, labels, guide, random_of(3))
    tokens = torch.zeros(*attention.shape, 1)
    return batch, batch.after_forward(
        ModelOutput(torch.zeros(len(attention), K), tokens, class_attention=attention)
    )


def test_attention_shares_at_their_limits() -> None:
    tokens = torch.tensor([[True, False, False, True]] * 3)
    attention = torch.tensor([[1.0, 1, 1, 1], [3, 0, 0, 2], [0, 0, 0, 0]])
    assert attention_share(attention, tokens).tolist() == [0.5, 1.0, 0.0]


def test_even_attention_leaves_smmixs_share_alone() -> None:
    """SMMix's regions are whole tokens, so area and even attention agree."""
    batch, settled = settled_with(TransMix(SMMix(K, (3, 5)), (3, 5)), torch.full((4, 15), 0.01))
    assert settled.lam is not None
    torch.testing.assert_close(settled.lam, batch.lam)
    torch.testing.assert_close(settled.labels, batch.labels)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_the_ratio_goes_from_attention_alone_to_area_alone(ratio: float) -> None:
    attention = torch.rand(4, 15, generator=keyed_generator(6))
    batch, settled = settled_with(TransMix(SMMix(K, (3, 5)), (3, 5), ratio), attention)
    assert settled.lam is not None
    assert batch.source_mask is not None
    expected = (
        batch.lam if ratio else (attention * batch.source_mask).sum(dim=1) / attention.sum(dim=1)
    )
    torch.testing.assert_close(settled.lam, expected)


def test_smmixs_labels_follow_the_attention_without_fine_too() -> None:
    attention = torch.rand(4, 15, generator=keyed_generator(6))
    settled = [
        settled_with(TransMix(SMMix(K, (3, 5), fine=fine), (3, 5)), attention)[1]
        for fine in (True, False)
    ]
    assert torch.equal(settled[0].labels, settled[1].labels)
    assert settled[1].forward_inputs()["source_mask"] is None  # no region is classified


def test_attention_counts_where_the_region_went_not_where_it_came_from() -> None:
    batch, settled = settled_with(TransMix(SMMix(K, (3, 5)), (3, 5), 0.0), torch.rand(4, 15))
    assert batch.regions is not None
    assert batch.source_mask is not None
    moved = (batch.regions.source_corners != batch.regions.target_corners).any(dim=1)
    assert moved.any()
    hot = batch.source_mask.float()  # all attention on the pasted tokens
    assert settled.relabel is not None
    full = relabel(
        batch, ModelOutput(hot, hot[..., None], class_attention=hot), batch.source_mask, 0.0
    )
    assert full.lam is not None
    assert full.lam.tolist() == [1.0] * 4


def test_the_consistency_term_keeps_the_area() -> None:
    batch, settled = settled_with(TransMix(SMMix(K, (3, 5)), (3, 5)), torch.rand(4, 15))
    assert settled.reference_probs is batch.reference_probs
    assert settled.source_labels is batch.source_labels
    assert not torch.equal(settled.labels, batch.labels)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_tiny_patch16_224"])
def test_transmix_trains_a_real_model_without_gradient_through_its_labels(
    make_model: Any, name: str
) -> None:
    """With a class token, and (second) without one, where the image score takes its place."""
    extra = (
        {}
        if name.startswith("deit")
        else {"class_token": False, "global_pool": "avg", "fc_norm": False}
    )
    model: ImageModel = make_model(name, **extra)
    images = torch.randn(4, 3, 32, 48, generator=keyed_generator(8))
    mixer = TransMix(CutMix(7), model.grid_size)
    batch = mixer(images, torch.arange(4), no_guide, random_of(2))
    output = model.train()(**batch.forward_inputs())
    assert output.class_attention is not None
    assert output.class_attention.shape == (4, 24)
    settled = batch.after_forward(output)
    assert not settled.labels.requires_grad
    SMMixLoss()(output, settled)["total"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    looked = engine.settle_labels(
        model, batch, precision.make_autocast(torch.device("cpu"), "none")
    )
    assert looked.lam is not None
    assert model.training
