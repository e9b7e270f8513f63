"""One contract for every mixer, CutMix and Mixup against timm given the same draws, and the switch
between methods."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from math import sqrt
from typing import Any

import numpy as np
import pytest
import timm.data.mixup as timm_mixup
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from errors import InputError
from losses import SMMixLoss
from mixers.attentivemix import AttentiveMix
from mixers.boxes import draw_box, draw_box_between, sides_of
from mixers.consistent import Consistent
from mixers.cutmix import CutMix
from mixers.fmix import FMix
from mixers.interface import (
    MixedBatch,
    Mixer,
    NoMixing,
    Regions,
    StepRandom,
    mix_labels,
    soft_labels,
)
from mixers.mixup import Mixup
from mixers.registry import METHODS
from mixers.resizemix import ResizeMix
from mixers.saliencymix import SaliencyMix
from mixers.smmix_options import VARIANTS, Scheme
from mixers.switch import Choice, Switch
from mixers.transmix import TransMix
from models.interface import ModelOutput
from pipeline.boxes import Box
from smmix import SMMix, mix_predictions
from tests.conftest import FakeGuide
from tests.mixing import fake_teacher, make_switch, to_bytes
from utils import keyed_generator

K, GRID, SIZE = 5, (4, 6), (8, 18)  # classes, tokens, pixels: patches of 2 x 3

MAKERS: dict[str, Callable[[], Mixer[Any]]] = {
    "none": lambda: NoMixing(K),
    "mixup": lambda: Mixup(K),
    "mixup_pair": lambda: Mixup(K, mode="pair"),
    "mixup_elem": lambda: Mixup(K, mode="elem"),
    "cutmix": lambda: CutMix(K),
    "cutmix_pair": lambda: CutMix(K, mode="pair"),
    "cutmix_elem": lambda: CutMix(K, mode="elem"),
    "cutmix_minmax": lambda: CutMix(K, minmax=(0.3, 0.8), mode="elem"),
    "smmix": lambda: SMMix(K, GRID),
    "smmix_released": lambda: SMMix(K, GRID, variant=VARIANTS["released"]),
    "resizemix": lambda: ResizeMix(K),
    "resizemix_clipped": lambda: ResizeMix(K, placement="clipped", mode="elem"),
    "fmix": lambda: FMix(K),
    "fmix_pair": lambda: FMix(K, alpha=0.2, mode="pair"),
    "fmix_elem": lambda: FMix(K, mode="elem"),
    "attentivemix": lambda: AttentiveMix(K, fake_teacher),
    "attentivemix_original": lambda: AttentiveMix(K, fake_teacher, cells=2),
    "attentivemix_elem": lambda: AttentiveMix(K, fake_teacher, alpha=2, beta=2, mode="elem"),
    "saliencymix": lambda: SaliencyMix(K, to_bytes),
    "saliencymix_elem": lambda: SaliencyMix(K, to_bytes, alpha=0.2, mode="elem"),
    "transmix": lambda: TransMix(CutMix(K), GRID),
    "transmix_on_smmix": lambda: TransMix(SMMix(K, GRID), GRID),
    "smmix_random_corr": lambda: SMMix(K, GRID, scheme=Scheme("random", "corr")),
    "smmix_random_min": lambda: SMMix(K, GRID, scheme=Scheme("random", "min")),
    "smmix_max_max": lambda: SMMix(K, GRID, scheme=Scheme("max", "max")),
    "smmix_random_score": lambda: SMMix(K, GRID, scheme=Scheme(score="random")),
    "cutmix_with_con": lambda: Consistent(CutMix(K), partial(mix_predictions, rule="probs")),
    "transmix_with_con": lambda: Consistent(
        TransMix(CutMix(K), GRID), partial(mix_predictions, rule="logits")
    ),
}
MIXING = [name for name in MAKERS if name != "none"]
DRAWS_NOTHING = {"attentivemix_original"}  # its number of cells is fixed
IN_PLACE = [
    name
    for name in MIXING
    if not name.startswith(("mixup", "smmix", "resizemix")) and "smmix" not in name
]


def batch_of(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return (
        torch.randn(count, 3, *SIZE, generator=generator).to(dtype),
        torch.randint(K, (count,), generator=generator),
    )


def no_guide(images: Tensor) -> ModelOutput:
    raise AssertionError("this method needs no motivating pass")


def mix(mixer: Mixer[Any], images: Tensor, labels: Tensor, key: int = 0) -> MixedBatch:
    inner = mixer.mixer if isinstance(mixer, TransMix) else mixer
    guide = FakeGuide(GRID, K) if isinstance(inner, (SMMix, Consistent)) else no_guide
    return mixer(
        images,
        labels,
        guide,
        StepRandom(keyed_generator("shared", key), keyed_generator("own", key)),
    )


def assert_equal(one: MixedBatch, other: MixedBatch) -> None:
    for field in fields(MixedBatch):
        got, wanted = getattr(one, field.name), getattr(other, field.name)
        if isinstance(wanted, Regions):
            assert all(map(torch.equal, got, wanted))
        elif callable(wanted):  # a partial of one function and plain values
            assert got.func is wanted.func
            assert torch.equal(got.keywords["tokens"], wanted.keywords["tokens"])
        elif not isinstance(wanted, Tensor):
            assert got == wanted, field.name
        else:
            assert got is wanted or torch.equal(got, wanted), field.name


def global_state() -> tuple[Any, ...]:
    numpy_state: Any = np.random.get_state()
    return (
        random.getstate(),
        numpy_state[1].tobytes(),
        numpy_state[2],
        torch.get_rng_state().numpy().tobytes(),
    )


# ------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", MAKERS)
def test_every_mixer_keeps_the_contract(name: str, count: int, dtype: torch.dtype) -> None:
    mixer, (images, labels) = MAKERS[name](), batch_of(count, dtype)
    kept_images, kept_labels, before = images.clone(), labels.clone(), global_state()
    mixed = mix(mixer, images, labels)
    assert torch.equal(images, kept_images)
    assert torch.equal(labels, kept_labels)
    assert global_state() == before

    assert mixed.images.shape == images.shape
    assert mixed.images.dtype == dtype
    assert mixed.labels.shape == (count, K)
    assert mixed.labels.dtype == torch.float32
    assert (mixed.labels >= 0).all()
    torch.testing.assert_close(mixed.labels.sum(dim=1), torch.ones(count))
    if name == "none":
        assert mixed.lam is None
    else:
        assert mixed.lam is not None
        assert mixed.lam.shape == (count,)
        assert mixed.lam.dtype == torch.float32
        assert ((mixed.lam >= 0) & (mixed.lam <= 1)).all()

    assert_equal(mix(mixer, images, labels), mixed)  # the same generators
    hot = torch.nn.functional.one_hot(labels, K).float()
    assert_equal(mix(mixer, images, hot), mixed)  # labels as distributions


@pytest.mark.parametrize("name", MIXING)
def test_mixed_labels_follow_the_source_share(name: str) -> None:
    """y_M = lam y_A + (1 - lam) y_B, lam being the share of the partner's image."""
    images, labels = batch_of(8)
    mixed = mix(MAKERS[name](), images, labels)
    assert mixed.lam is not None
    for b, lam in enumerate(mixed.lam.tolist()):
        expected = [0.1 / K] * K
        expected[int(labels[7 - b])] += 0.9 * lam
        expected[int(labels[b])] += 0.9 * (1 - lam)
        assert mixed.labels[b].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", MIXING)
def test_another_key_gives_another_mix(name: str) -> None:
    images, labels = batch_of(4)
    shares = {float(mix(MAKERS[name](), images, labels, key).lam[0]) for key in range(40)}  # type: ignore[index]
    assert len(shares) == 1 if name in DRAWS_NOTHING else len(shares) > 2


@pytest.mark.parametrize(
    "name", [name for name in MIXING if not name.startswith("mixup") and "smmix" not in name]
)
@pytest.mark.parametrize("count", [2, 5])
def test_lam_is_the_share_of_the_mask_and_nothing_outside_it_changes(name: str, count: int) -> None:
    images, labels = batch_of(count)
    for key in range(10):
        mixed = mix(MAKERS[name](), images, labels, key)
        assert mixed.mask is not None
        assert mixed.mask.shape == (count, 1, *SIZE)
        assert mixed.mask.dtype == torch.bool
        assert mixed.lam is not None
        expected = [float(np.float32(int(one.sum()) / (SIZE[0] * SIZE[1]))) for one in mixed.mask]
        assert mixed.lam.tolist() == expected
        assert torch.equal(
            torch.where(mixed.mask, 0, mixed.images), torch.where(mixed.mask, 0, images)
        )
        if name in IN_PLACE:
            assert torch.equal(mixed.images, torch.where(mixed.mask, images.flip(0), images))


@pytest.mark.parametrize("name", MAKERS)
def test_flat_and_black_images_give_finite_results(name: str) -> None:
    images, labels = torch.zeros(4, 3, *SIZE), torch.arange(4)
    mixed = mix(MAKERS[name](), images, labels)
    assert torch.equal(mixed.images, images)
    assert mixed.labels.isfinite().all()


@pytest.mark.parametrize("name", [name for name in MAKERS if not name.startswith("saliencymix")])
def test_images_may_have_any_number_of_channels(name: str) -> None:
    images, labels = torch.rand(4, 5, *SIZE), torch.arange(4)
    assert mix(MAKERS[name](), images, labels).images.shape == images.shape


def test_shares_stay_with_their_samples_in_the_loss() -> None:
    """Two samples, lam = (1, 0): a loss that averages lam and cross entropy apart would give
    another number."""
    logits = torch.tensor([[9.0, 0.0], [0.0, 0.0]])
    labels = mix_labels(torch.eye(2), torch.eye(2).flip(0), torch.tensor([1.0, 0.0]))
    terms = SMMixLoss()(
        ModelOutput(logits, torch.zeros(2, 1, 1)), MixedBatch(torch.zeros(2, 3, 1, 1), labels)
    )
    each = -logits.log_softmax(dim=1)
    averaged = 0.5 * (each[0, 0] + each[1, 1]).div(2) + 0.5 * (each[0, 1] + each[1, 0]).div(2)
    assert float(terms["total"]) == pytest.approx(float((each[0, 0] + each[1, 0]) / 2))
    assert float(terms["total"]) != pytest.approx(float(averaged), abs=0.1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_soft_labels_are_timms(smoothing: float) -> None:
    labels = torch.randint(K, (9,))
    ours = soft_labels(labels, K, smoothing)
    torch.testing.assert_close(ours, timm_mixup.mixup_target(labels, K, 1.0, smoothing))


EVEN = [[1 / K] * K] * 3
WRONG_LABELS = {
    "too large": (torch.tensor([0, K, 1]), rf"labels\[1\] is {K}: must be 0 to {K - 1}"),
    "negative": (torch.tensor([0, 1, -1]), r"labels\[2\] is -1: must be 0 to"),
    "no integers": (torch.tensor([0.0, 1.0, 2.0]), "must be integers, not torch.float32"),
    "too small a sum": (torch.tensor(EVEN) * torch.tensor([[1], [1], [0.1]]), r"labels\[2\].* sum"),
    "negative share": (torch.eye(K)[:3] * 2 - torch.tensor(EVEN), r"labels\[0\] .*no negative"),
    "not finite": (torch.tensor(EVEN) * float("nan"), r"labels\[0\] is \[nan"),
    "other classes": (torch.eye(K + 1)[:3], rf"shape \(3, {K + 1}\): 3 images of {K} classes"),
    "another number": (torch.tensor([0, 1]), r"shape \(2,\): 3 images"),
}


@pytest.mark.parametrize("case", WRONG_LABELS)
@pytest.mark.parametrize("name", ["smmix", "none"])
def test_wrong_labels_are_refused_in_ones_own_loop(name: str, case: str) -> None:
    labels, message = WRONG_LABELS[case]
    with pytest.raises(InputError, match=message):
        mix(MAKERS[name](), batch_of(3)[0], labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_right_labels_of_any_precision_are_accepted(dtype: torch.dtype) -> None:
    labels = torch.eye(K)[:3]
    if dtype.is_floating_point:
        labels = labels * 0.9 + 0.1 / K
    mix(NoMixing(K), batch_of(3)[0], labels.to(dtype))
    mix(NoMixing(K), batch_of(3)[0], torch.tensor([0, K - 1, 1], dtype=torch.uint8))


def test_no_mixing_passes_the_images_on() -> None:
    images, labels = batch_of(3)
    mixed = mix(NoMixing(K, 0.2), images, labels)
    assert mixed.images is images
    torch.testing.assert_close(mixed.labels, timm_mixup.mixup_target(labels, K, 1.0, 0.2))


# ------------------------------------------------------------------------------- CutMix and its box


@pytest.mark.parametrize("name", [name for name in MAKERS if name.startswith("cutmix")])
@given(key=st.integers(0, 10_000), count=st.integers(1, 6))
def test_cutmix_takes_each_pixel_from_one_of_two_images(name: str, key: int, count: int) -> None:
    generator = torch.Generator().manual_seed(key)
    images = torch.rand(count, 3, *SIZE, generator=generator)  # all pixels differ
    mixed = mix(MAKERS[name](), images, torch.zeros(count, dtype=torch.int64), key)
    from_source, from_target = mixed.images == images.flip(0), mixed.images == images
    assert (from_source | from_target).all()
    assert mixed.lam is not None
    for b in range(count):
        if b == count - 1 - b:
            assert from_target[b].all()
            continue
        inside = from_source[b].all(dim=0)
        assert torch.equal(inside, from_source[b].any(dim=0))  # all channels alike
        assert float(mixed.lam[b]) == float(np.float32(int(inside.sum()) / (SIZE[0] * SIZE[1])))
        rows, columns = inside.any(dim=1), inside.any(dim=0)
        assert torch.equal(inside, rows[:, None] & columns)  # a rectangle
        assert all(not (side.int().diff() == 1).sum() > 1 for side in (rows, columns))


def test_cutmix_pastes_the_drawn_boxes() -> None:
    images, labels = batch_of(4)
    boxes = [Box(0, 3, 2, 9), Box(4, 8, 0, 18), Box(5, 5, 1, 7), Box(0, 8, 0, 18)]
    mixed = CutMix(K).apply(images, labels, boxes, no_guide)
    expected = images.clone()
    for b, (top, bottom, left, right) in enumerate(boxes):
        expected[b, :, top:bottom, left:right] = images[3 - b, :, top:bottom, left:right]
    assert torch.equal(mixed.images, expected)
    assert mixed.lam is not None
    assert mixed.lam.tolist() == pytest.approx([21 / 144, 72 / 144, 0, 1])


def timm_boxes(
    size: tuple[int, int], share: float, monkeypatch: pytest.MonkeyPatch
) -> Counter[tuple[Box, float]]:
    """timm's box and source share for every centre it can draw."""
    found: Counter[tuple[Box, float]] = Counter()
    for centre in ((y, x) for y in range(size[0]) for x in range(size[1])):
        draws = iter(centre)
        monkeypatch.setattr(np.random, "randint", lambda *_, draws=draws, **__: next(draws))
        (top, bottom, left, right), lam = timm_mixup.cutmix_bbox_and_lam((1, 3, *size), 1 - share)
        found[Box(int(top), int(bottom), int(left), int(right)), round(1 - float(lam), 9)] += 1
    return found


@pytest.mark.parametrize("share", [0.0, 0.03, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("size", [(4, 5), (6, 3)])
def test_boxes_are_timms_for_every_centre(
    size: tuple[int, int], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = timm_boxes(size, share, monkeypatch)
    generator, count = keyed_generator("boxes"), 3000
    drawn = Counter(draw_box(size, sides_of(size, share), generator) for _ in range(count))
    assert {(box, round(box.share(size), 9)) for box in drawn} == set(expected)
    for (box, _), centres in expected.items():  # each centre as often as another
        probability = centres / (size[0] * size[1])
        deviation = sqrt(probability * (1 - probability) / count)
        assert abs(drawn[box] / count - probability) <= 4.5 * deviation


@pytest.mark.parametrize(
    ("size", "ratios"), [((6, 9), (0.3, 0.8)), ((5, 4), (0.25, 1.0)), ((4, 4), (0.5, 0.5))]
)
def test_boxes_between_two_ratios_are_timms(
    size: tuple[int, int], ratios: tuple[float, float]
) -> None:
    expected = set()
    sides = [
        range(int(n * ratios[0]), max(int(n * ratios[1]), int(n * ratios[0]) + 1)) for n in size
    ]
    for height in sides[0]:
        for width in sides[1]:
            for top in range(size[0] - height + 1):
                expected |= {
                    Box(top, top + height, left, left + width)
                    for left in range(size[1] - width + 1)
                }
    generator = keyed_generator("between")
    assert {draw_box_between(size, ratios, generator) for _ in range(5000)} == expected
    if ratios[0] < ratios[1]:
        timms = (timm_mixup.rand_bbox_minmax((1, 3, *size), ratios) for _ in range(5000))
        assert {Box(*map(int, box)) for box in timms} == expected


def test_cutmix_pastes_a_third_on_average() -> None:
    boxes = CutMix(K, mode="elem").draw(20_000, (224, 224), keyed_generator("share"))
    shares = [box.share((224, 224)) for box in boxes]
    assert np.mean(shares) == pytest.approx(0.3176, abs=4 * float(np.std(shares)) / sqrt(20_000))


# ----------------------------------------------------------- the same draws give timm's own results


def timms_own(
    mode: str,
    count: int,
    target_shares: list[float],
    cutmix: list[Box] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """timm's `Mixup` whose draws are given: the TARGET's shares, and the boxes."""
    mixup = timm_mixup.Mixup(mode=mode, label_smoothing=0.1, num_classes=K)
    drawn = count // 2 if mode == "pair" else count
    per_element = np.array(target_shares[:drawn], dtype=np.float32)
    monkeypatch.setattr(mixup, "_params_per_batch", lambda: (target_shares[0], cutmix is not None))
    monkeypatch.setattr(
        mixup, "_params_per_elem", lambda size: (per_element, np.full(size, cutmix is not None))
    )
    if cutmix is not None:
        given_boxes = iter(
            [((b.top, b.bottom, b.left, b.right), 1 - b.share(SIZE)) for b in cutmix]
        )
        monkeypatch.setattr(timm_mixup, "cutmix_bbox_and_lam", lambda *_, **__: next(given_boxes))
    return mixup


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("method", [Mixup, CutMix])
@pytest.mark.parametrize("key", range(3))
def test_the_same_draws_give_timms_result(
    method: type[Mixup] | type[CutMix], mode: str, key: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = batch_of(6)
    mixer = method(K, mode=mode)
    drawn = mixer.draw(6, SIZE, keyed_generator(key))
    ours = mixer.apply(images, labels, drawn, no_guide)  # type: ignore[arg-type]
    boxes = drawn if method is CutMix else None
    shares = [0.5 if isinstance(value, Box) else 1 - value for value in drawn]
    timms = timms_own(mode, 6, shares, boxes, monkeypatch)  # type: ignore[arg-type]
    their_images, their_labels = timms(images.clone(), labels)
    torch.testing.assert_close(ours.images, their_images, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.labels, their_labels, atol=1e-6, rtol=0)
    if method is CutMix:
        assert torch.equal(ours.images, their_images)


@pytest.mark.parametrize(
    "maker", [lambda mode: Mixup(K, mode=mode), lambda mode: CutMix(K, mode=mode)]
)
@pytest.mark.parametrize("count", [1, 5, 6])
def test_modes_draw_once_per_batch_pair_or_image(
    maker: Callable[[str], Mixer[list[Any]]], count: int
) -> None:
    draws = {
        mode: maker(mode).draw(count, (64, 64), keyed_generator("modes"))
        for mode in ("batch", "pair", "elem")
    }
    assert [len(drawn) for drawn in draws.values()] == [count] * 3
    assert len(set(draws["batch"])) == 1
    assert len(set(draws["pair"])) == (count + 1) // 2
    assert draws["pair"] == draws["pair"][::-1]
    assert len(set(draws["elem"])) == count


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_mixups_shares_are_beta_distributed(alpha: float) -> None:
    shares = np.array(
        Mixup(K, alpha=alpha, mode="elem").draw(20_000, SIZE, keyed_generator("beta", str(alpha)))
    )
    assert shares.mean() == pytest.approx(0.5, abs=0.015)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


# --------------------------------------------------------------------------------------- the switch


def share_of(switch: Switch, count: int = 2000) -> tuple[float, float]:
    """Shares of the steps that are mixed at all and that the first method mixes."""
    picks = Counter(
        id(switch.pick(switch.draw(keyed_generator("shared", 0, step, 0)))) for step in range(count)
    )
    return 1 - picks[id(switch.plain)] / count, picks[id(switch.first)] / count


@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("first_prob", [0.0, 0.5, 0.8, 1.0])
def test_methods_get_their_share_of_steps(prob: float, first_prob: float) -> None:
    mixed, first = share_of(Switch(SMMix(K, GRID), Mixup(K), prob, first_prob))
    for seen, expected in ((mixed, prob), (first, prob * first_prob)):
        assert abs(seen - expected) <= 4 * sqrt(expected * (1 - expected) / 2000)


def test_one_method_alone_gets_every_mixed_step() -> None:
    assert share_of(Switch(CutMix(K), None, 1.0, 0.5)) == (1.0, 1.0)


def test_a_step_that_is_not_mixed_is_plain_and_smoothed_alike() -> None:
    images, labels = batch_of(4)
    switch = Switch(SMMix(K, GRID, smoothing=0.3), Mixup(K, smoothing=0.3), prob=0.0)
    mixed = switch(images, labels, no_guide, StepRandom(keyed_generator(1), keyed_generator(2)))
    assert mixed.images is images
    torch.testing.assert_close(mixed.labels, soft_labels(labels, K, 0.3))


def test_picking_follows_the_choice() -> None:
    switch = Switch(CutMix(K), Mixup(K))
    assert switch.pick(Choice(mix=True, first=True)) is switch.first
    assert switch.pick(Choice(mix=True, first=False)) is switch.second
    assert switch.pick(Choice(mix=False, first=True)) is switch.plain


def test_ranks_choose_alike_but_draw_their_own_sizes() -> None:
    images, labels = batch_of(4)
    switch = Switch(SMMix(K, GRID, side_ratio=(0.0, 1.0)), Mixup(K))
    methods, sizes = [], []
    for step in range(60):
        ranks = [
            StepRandom(keyed_generator("shared", step), keyed_generator("own", step, rank))
            for rank in range(2)
        ]
        of_rank = [switch(images, labels, FakeGuide(GRID, K), rank).regions for rank in ranks]
        methods.append([regions is not None for regions in of_rank])
        sizes.append([regions.sizes.tolist() for regions in of_rank if regions is not None])
    assert all(one == other for one, other in methods)
    assert {one for one, _ in methods} == {True, False}
    assert any(len(pair) == 2 and pair[0] != pair[1] for pair in sizes)


# ----------------------------------------------------------------------------------- mixers by name

SETTINGS: dict[str, Any] = {
    "smoothing": 0.2,
    "side_ratio": [0.3, 0.6],
    "mixup": 0.7,
    "cutmix": 0.9,
    "mixup_prob": 0.6,
    "mixup_switch_prob": 0.4,
    "mixup_mode": "pair",
    "mix_off_epoch": 7,
}
CLASSES = {
    "smmix": SMMix,
    "cutmix": CutMix,
    "mixup": Mixup,
    "none": NoMixing,
    "resizemix": ResizeMix,
    "fmix": FMix,
    "attentivemix": AttentiveMix,
    "saliencymix": SaliencyMix,
    "transmix": TransMix,
}


def test_every_method_has_a_class_and_is_tested() -> None:
    assert set(METHODS) == set(CLASSES) == {name.split("_")[0] for name in MAKERS}


@pytest.mark.parametrize("protocol", ["switch", "single"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_a_name_gives_its_method_beside_mixup(name: str, protocol: str, alpha: float) -> None:
    flags = {**SETTINGS, "mixer": name, "mix_protocol": protocol, "mixup": alpha}
    switch = make_switch(K, GRID, fake_teacher, **flags)
    assert type(switch.first) is CLASSES[name]
    shares = name not in ("mixup", "none") and alpha > 0 and protocol == "switch"
    assert (type(switch.second) is Mixup) == shares
    assert (switch.prob, switch.off_epoch) == (0.6, 7)
    assert switch.first_prob == (0.4 if switch.second is not None else 1.0)
    assert {
        mixer.smoothing
        for mixer in (switch.first, switch.second, switch.plain)
        if mixer is not None
    } == {0.2}
    if isinstance(switch.second, Mixup):
        assert (switch.second.alpha, switch.second.mode) == (0.7, "pair")
    assert getattr(switch.first, "mode", "pair") == "pair"


def test_methods_get_their_own_flags() -> None:
    def first(name: str, **flags: Any) -> Any:
        return make_switch(K, GRID, fake_teacher, mixer=name, **flags).first

    smmix = first("smmix", variant="released", side_ratio=[0.3, 0.6])
    assert (smmix.grid_size, smmix.side_ratio, smmix.variant) == (
        GRID,
        (0.3, 0.6),
        VARIANTS["released"],
    )
    assert first("smmix", variant="released", region_head="shared").variant.region_head == "shared"
    cutmix = first("cutmix", cutmix=0.9, cutmix_minmax=[0.2, 0.4])
    assert (cutmix.alpha, cutmix.minmax) == (0.9, (0.2, 0.4))
    resizemix = first("resizemix", resize_scope=[0.2, 0.3], resize_placement="clipped")
    assert (resizemix.scope, resizemix.placement) == ((0.2, 0.3), "clipped")
    assert (
        first("fmix").alpha,
        first("fmix", mix_alpha=[0.2]).alpha,
        first("fmix", fmix_decay=2).decay,
    ) == (1, 0.2, 2)
    assert (first("saliencymix").alpha, first("saliencymix", mix_alpha=[0.2]).alpha) == (1, 0.2)
    laws = [first("attentivemix", mix_alpha=alpha) for alpha in (None, [2.0], [3.0, 4.0])]
    assert [(mixer.alpha, mixer.beta) for mixer in laws] == [(2, 8), (2, 2), (3, 4)]
    assert (first("attentivemix").cells, first("attentivemix", attentive_cells=6).cells) == (
        None,
        6,
    )


@pytest.mark.parametrize("name", ["smmix", "resizemix"])
def test_labels_may_be_set_anew_on_any_mask(name: str) -> None:
    first: Any = make_switch(K, GRID, mixer=name, relabel="transmix", relabel_ratio=0.3).first
    assert (type(first), type(first.mixer)) == (TransMix, CLASSES[name])
    assert (first.grid_size, first.ratio) == (GRID, 0.3)
    transmix: Any = make_switch(K, GRID, mixer="transmix", cutmix=0.6).first
    assert (type(transmix.mixer), transmix.mixer.alpha, transmix.ratio) == (CutMix, 0.6, 0.5)


def test_mixing_ends_at_its_epoch() -> None:
    switch = Switch(CutMix(K), Mixup(K), off_epoch=3)
    picked = []
    for epoch in range(5):
        switch.set_epoch(epoch)
        picked.append(switch.pick(Choice(mix=True, first=True)))
    assert picked == [switch.first] * 3 + [switch.plain] * 2
    endless = Switch(CutMix(K))
    endless.set_epoch(10_000)
    assert endless.pick(Choice(mix=True, first=True)) is endless.first


def test_a_grid_without_regions_is_refused_with_the_flags_that_help() -> None:
    with pytest.raises(InputError, match=r"--mixer smmix.*1 x 6.*--input-size.*--patch-size"):
        make_switch(K, (1, 6))


def test_mix_labels_is_linear_per_row() -> None:
    source, target = torch.rand(3, K), torch.rand(3, K)
    lam = torch.tensor([0.0, 0.25, 1.0])
    expected = torch.stack((target[0], 0.25 * source[1] + 0.75 * target[1], source[2]))
    torch.testing.assert_close(mix_labels(source, target, lam), expected)
