"""Erased rectangles: timm's draws, timm's fill by a slow loop, and the step that applies them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from timm.data.random_erasing import RandomErasing

import engine
from pipeline import erasing
from pipeline.erasing import Box, Erasing, as_tensor, erase
from pipeline.samples import Batch
from pipeline.spec import ERASE_MODES, ImageSpec
from pipeline.transforms import normalise
from utils import Processes, key_seed, seed_globals

CPU = Processes(0, 1, torch.device("cpu"))


def boxes_of_timm(probability: float, count: int, size: tuple[int, int]) -> list[Box]:
    """Where timm's own class, in const mode, leaves zeros in an image of ones: one box per image in
    these tests."""
    image = RandomErasing(probability, mode="const", max_count=count, device="cpu")(
        torch.ones(1, *size)
    )[0]
    rows, columns = (image == 0).nonzero(as_tuple=True)
    if not len(rows):
        return [erasing.NOTHING]
    return [Box(int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1)]


@pytest.mark.parametrize("probability", [0.25, 1.0])
@pytest.mark.parametrize("size", [(32, 32), (224, 224), (16, 48), (8, 10)])
def test_boxes_are_timms_draw_by_draw(probability: float, size: tuple[int, int]) -> None:
    erased = 0
    for number in range(200):
        random.seed(number)
        ours, after = Erasing(probability).draw(size), random.random()
        random.seed(number)
        assert (ours, after) == (boxes_of_timm(probability, 1, size), random.random())
        assert Erasing(probability).draw(size, random.Random(number)) == ours
        erased += ours[0] != erasing.NOTHING
    assert erased == pytest.approx(200 * probability, abs=40)


def union(boxes: list[Box], size: tuple[int, int]) -> torch.Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    for top, bottom, left, right in boxes:
        mask[top:bottom, left:right] = True
    return mask


def test_several_boxes_are_timms_too_and_always_as_many_rows() -> None:
    seen = set()
    for number in range(100):
        random.seed(number)
        boxes = Erasing(0.7, 3).draw((40, 30))
        random.seed(number)
        image = RandomErasing(0.7, mode="const", max_count=3, device="cpu")(torch.ones(1, 40, 30))[
            0
        ]
        assert len(boxes) == 3
        assert torch.equal(union(boxes, (40, 30)), image == 0)
        seen.add(sum(box != erasing.NOTHING for box in boxes))
    assert seen == {0, 1, 2, 3}


def test_no_erasing_draws_nothing() -> None:
    random.seed(0)
    assert Erasing(0.0, 5).draw((8, 8)) == []
    assert random.random() == random.Random(0).random()
    assert as_tensor([[], []]).shape == (2, 0, 4)


def some_boxes(count: int) -> torch.Tensor:
    chance = random.Random(count)
    return as_tensor([Erasing(0.7, count).draw((20, 24), chance) for _ in range(12)])


@contextmanager
def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch, whole_batch: bool) -> Iterator[None]:
    with monkeypatch.context() as patched:
        if whole_batch:
            patched.setattr(erasing, "_fill_in_place", erasing._fill)
        yield


@pytest.mark.parametrize("whole_batch", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("mode", ERASE_MODES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_filling_equals_a_slow_loop(
    mode: str,
    count: int,
    whole_batch: bool,
    layout: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Noise stands where the boxes are and nowhere else; its law is looked at below."""
    torch.manual_seed(0)
    images = torch.full((12, 3, 20, 24), 50.0).contiguous(memory_format=layout)
    boxes = some_boxes(count)
    with as_on_an_accelerator(monkeypatch, whole_batch):
        erased = erase(images.clone(), boxes, mode)
    for image, before, edges in zip(erased, images, boxes.tolist(), strict=True):
        inside = union([Box(*box) for box in edges], (20, 24))
        assert torch.equal(image[:, ~inside], before[:, ~inside])
        assert bool((image[:, inside].abs() < 10).all())
        if mode == "const":
            assert bool((image[:, inside] == 0).all())
        if mode == "pixel" and inside.any():
            assert (
                len(image[:, inside].unique()) == 3 * inside.sum()
            )  # each pixel and channel for itself
        if mode == "rand" and edges[-1] != list(erasing.NOTHING):
            top, bottom, left, right = edges[-1]  # the last lies above the others
            assert all(len(channel.unique()) == 1 for channel in image[:, top:bottom, left:right])
        if mode == "rand" and inside.any():
            assert image[:, inside].unique().numel() <= 3 * count


@pytest.mark.parametrize("whole_batch", [False, True])
@pytest.mark.parametrize("mode", ["pixel", "rand"])
def test_noise_is_normal_and_independent(
    mode: str, whole_batch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    boxes = torch.tensor([0, 8, 0, 8]).expand(3000, 1, 4)
    with as_on_an_accelerator(monkeypatch, whole_batch):
        noise = erase(torch.full((3000, 3, 8, 8), 9.0), boxes, mode)
    assert abs(float(noise.mean())) < 0.04
    assert abs(float(noise.std()) - 1) < 0.03
    red, green = noise[:, 0].flatten(), noise[:, 1].flatten()
    assert abs(float(torch.corrcoef(torch.stack((red, green)))[0, 1])) < 0.04


def training_with(mode: str = "pixel", seed: int = 0, **settings: object) -> engine.Training:
    training = object.__new__(engine.Training)
    training.processes, training.seed, training.memory_format = CPU, seed, torch.contiguous_format
    spec = ImageSpec((20, 24))
    training.finish = lambda images, boxes, operations: erase(normalise(images, spec), boxes, mode)
    vars(training).update(settings)
    return training


def batch_of_pixels() -> Batch:
    torch.manual_seed(5)
    images = torch.randint(0, 256, (12, 3, 20, 24), dtype=torch.uint8).contiguous(
        memory_format=torch.channels_last
    )
    return Batch(images, torch.arange(12), torch.arange(12), boxes=some_boxes(2))


def test_the_step_finishes_pixels_with_noise_of_its_own_key() -> None:
    batch = batch_of_pixels()
    images, labels = engine.receive(training_with(), batch, 3, 1)
    assert (images.dtype, images.is_contiguous(), labels.tolist()) == (
        torch.float32,
        True,
        [*range(12)],
    )
    seed_globals("erase", 0, 3, 1, 0)
    assert batch.boxes is not None
    expected = erase(
        normalise(batch.images.contiguous(), ImageSpec((20, 24))), batch.boxes, "pixel"
    )
    assert torch.equal(images, expected)
    torch.manual_seed(77)
    assert torch.equal(engine.receive(training_with(), batch, 3, 1)[0], images)
    for other in ((training_with(), 4, 1), (training_with(), 3, 0), (training_with(seed=1), 3, 1)):
        assert not torch.equal(engine.receive(other[0], batch, *other[1:])[0], images)
    assert key_seed("erase", 0, 3, 1, 0) != key_seed("erase", 0, 3, 1, 1)


def test_the_step_takes_the_layout_of_the_model() -> None:
    training = training_with(memory_format=torch.channels_last)
    images, _ = engine.receive(training, batch_of_pixels(), 0, 0)
    assert images.is_contiguous(memory_format=torch.channels_last)
    plain, _ = engine.receive(training_with(), batch_of_pixels(), 0, 0)
    assert torch.equal(images, plain)


def test_images_that_are_float_are_taken_as_they_come() -> None:
    images, labels = torch.rand(2, 3, 4, 4), torch.tensor([1, 0])
    received = engine.receive(training_with(finish=None), Batch(images, labels, labels), 0, 0)
    assert torch.equal(received[0], images)
    assert torch.equal(received[1], labels)
