"""Two methods in each batch: the same pairs, each part as its method makes it, terms that weigh as
they should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import main
from errors import InputError
from losses import SMMixLoss
from mixers.interface import MixedBatch, StepRandom
from mixers.mixup import Mixup
from mixers.registry import METHODS
from mixers.split import Split
from models.interface import GuideOutput, ModelOutput
from smmix import SMMix
from tests.conftest import FakeGuide
from tests.mixing import make_switch
from tests.test_mixers import GRID, SIZE, K, batch_of, no_guide
from utils import keyed_generator

N = GRID[0] * GRID[1]


def output_for(batch: MixedBatch, rows: slice | list[int]) -> ModelOutput:
    """Made-up logits of some of the images of a batch of eight."""
    generator = torch.Generator().manual_seed(3)
    logits, regions = (torch.randn(8, *shape, generator=generator) for shape in ((K,), (2, K)))
    region_logits = None if batch.source_mask is None else regions[rows]
    return ModelOutput(logits[rows], torch.zeros(0), None, region_logits)


@pytest.mark.parametrize(
    ("share", "ends"), [(0.5, [0, 1, 6, 7]), (0.75, [0, 7]), (0.2, [0, 1, 2, 5, 6, 7])]
)
def test_each_part_is_what_its_method_makes_of_it(share: float, ends: list[int]) -> None:
    images, labels = batch_of(8)
    inside = [row for row in range(8) if row not in ends]
    split, guide = Split(SMMix(K, GRID), Mixup(K), share), FakeGuide(GRID, K)
    drawn = split.draw(8, SIZE, keyed_generator("split"))
    seen: list[Tensor] = []

    def watched(shown: Tensor) -> Any:
        seen.append(shown)
        return guide(shown)

    batch = split.apply(images, labels, drawn, watched)
    assert [shown.shape[0] for shown in seen] == [len(inside)]  # the pass is shown the middle alone
    torch.testing.assert_close(seen[0], images[inside], rtol=0, atol=0)
    smmix = split.first.apply(images[inside], labels[inside], drawn[0], guide)
    mixup = split.second.apply(images[ends], labels[ends], drawn[1], no_guide)
    for name in ("images", "labels", "lam"):
        whole = getattr(batch, name)
        torch.testing.assert_close(whole[inside], getattr(smmix, name), rtol=0, atol=0)
        torch.testing.assert_close(whole[ends], getattr(mixup, name), rtol=0, atol=0)
    for name in ("source_mask", "source_labels", "target_labels", "reference_probs"):
        whole = getattr(batch, name)
        torch.testing.assert_close(whole[inside], getattr(smmix, name), rtol=0, atol=0)
        assert not whole[ends].any()
    assert batch.clean_logits is None


def test_partners_are_those_of_an_undivided_batch() -> None:
    """An image's pixels come from itself and from image B - 1 - i, in both parts."""
    images = torch.arange(8.0)[:, None, None, None].expand(8, 3, *SIZE)
    batch = Split(SMMix(K, GRID), Mixup(K))(
        images, torch.arange(8) % K, FakeGuide(GRID, K), both_random()
    )
    for row, mixed in enumerate(batch.images):
        low, high = sorted((row, 7 - row))
        assert mixed.min() >= low
        assert mixed.max() <= high
        assert 0 < float(mixed.mean()) - low < high - low


def both_random() -> StepRandom:
    return StepRandom(keyed_generator("shared"), keyed_generator("own"))


def test_terms_are_means_over_the_whole_batch() -> None:
    """Half of each term's own mean, as over many steps of which half are SMMix's."""
    images, labels = batch_of(8)
    guide, split = FakeGuide(GRID, K), Split(SMMix(K, GRID), Mixup(K))
    drawn = split.draw(8, SIZE, keyed_generator("terms"))
    batch = split.apply(images, labels, drawn, guide)
    smmix = split.first.apply(images[2:6], labels[2:6], drawn[0], guide)
    mixup = split.second.apply(images[[0, 1, 6, 7]], labels[[0, 1, 6, 7]], drawn[1], no_guide)
    loss = SMMixLoss()
    terms = loss(output_for(batch, slice(0, 8)), batch)
    inner = loss(output_for(smmix, slice(2, 6)), smmix)
    outer = loss(output_for(mixup, [0, 1, 6, 7]), mixup)
    assert set(outer) == {"total", "cls"}
    torch.testing.assert_close(terms["cls"], (inner["cls"] + outer["cls"]) / 2)
    for name in ("fine", "con"):
        assert inner[name] > 0
        torch.testing.assert_close(terms[name], inner[name] / 2)


@pytest.mark.parametrize(("share", "kind"), [(1.0, "first"), (0.0, "second")])
def test_all_of_one_kind(share: float, kind: str) -> None:
    images, labels = batch_of(6)
    split, guide = Split(SMMix(K, GRID), Mixup(K), share), FakeGuide(GRID, K)
    drawn = split.draw(6, SIZE, keyed_generator("one"))
    batch = split.apply(images, labels, drawn, guide if kind == "first" else no_guide)
    alone = getattr(split, kind).apply(images, labels, drawn[0 if kind == "first" else 1], guide)
    torch.testing.assert_close(batch.images, alone.images, rtol=0, atol=0)
    assert (batch.source_mask is None) == (kind == "second")


def test_an_odd_batch_keeps_its_pairs() -> None:
    images, labels = batch_of(7)
    batch = Split(SMMix(K, GRID), Mixup(K))(images, labels, FakeGuide(GRID, K), both_random())
    assert batch.images.shape == images.shape
    assert batch.source_mask is not None
    assert batch.source_mask.any(dim=1).tolist() == [False, False, True, True, True, False, False]


@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in ("mixup", "none", "transmix", "attentivemix")]
)
def test_every_method_shares_a_batch(name: str) -> None:
    images, labels = batch_of(8)
    switch = make_switch(K, GRID, mixer=name, mix_protocol="split", mixup_switch_prob=0.5)
    assert isinstance(switch.first, Split)
    assert switch.second is None
    batch = switch(
        images,
        labels,
        lambda shown: GuideOutput(torch.zeros(len(shown), K), torch.rand(len(shown), N)),
        both_random(),
    )
    assert batch.images.shape == images.shape
    torch.testing.assert_close(batch.labels.sum(dim=1), torch.ones(8))
    assert (batch.source_mask is not None) == (name == "smmix")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--mixer mixup", "give a --mixer other than"),
        ("--mixer none", "give a --mixer other than"),
        ("--mixup 0", "--mixup above 0"),
        ("--relabel transmix", "cannot have --relabel transmix"),
        ("--mixer transmix", "cannot have --mixer transmix"),
        ("--bce-loss --smoothing 0", "cannot have --bce-loss"),
    ],
)
def test_what_cannot_share_a_batch_is_refused(words: str, said: str) -> None:
    with pytest.raises(InputError, match="--mix-protocol split") as refused:
        main.read_args(["--mix-protocol", "split", *words.split()])
    assert said in str(refused.value)
