"""The order of images against a slow loop, and the promises about ranks, steps and partners."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import chain, pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from samplers import LAYOUTS, EpochBatches, EvalShard, Place, view_group
from utils import keyed_generator


def deal(
    num_images: int, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0, **more
) -> EpochBatches:
    return EpochBatches(
        num_images=num_images,
        batch_size=batch_size,
        make_generator=partial(keyed_generator, seed, "order"),
        rank=rank,
        world_size=world_size,
        **more,
    )


def all_ranks(num_images: int, batch_size: int, world_size: int, **more) -> list[list[list[Place]]]:
    return [
        list(deal(num_images, batch_size, rank, world_size, **more)) for rank in range(world_size)
    ]


def dealt_by_hand(
    n: int, b: int, w: int, a: int, repeats: int, seed: int, epoch: int, layout: str
) -> list[list[list[Place]]]:
    """Card by card: lay the whole order out, give one card to each rank in turn, drop what fills no
    whole step.

    In blocks, a rank gets all its cards of a micro-batch at once, in any order within the batch.
    """
    order = torch.randperm(n, generator=keyed_generator(seed, "order", epoch)).tolist()
    laid_out: list[Place] = []
    for image in order:
        for _ in range(repeats):
            if len(laid_out) < n:
                laid_out.append((epoch, image, len(laid_out)))
    hands: list[list[list[Place]]] = [[] for _ in range(w)]
    while len(laid_out) >= w * b * a:
        for _ in range(a):
            micro: list[list[Place]] = [[] for _ in range(w)]
            turns = [(card, rank) for card in range(b) for rank in range(w)]
            if layout == "blocks" and repeats > 1:
                turns.sort(key=lambda turn: turn[1])
            for _, rank in turns:
                micro[rank].append(laid_out.pop(0))
            for rank in range(w):
                half = b - b // 2
                first, second = micro[rank][:half], micro[rank][half:]
                if repeats > 1:
                    second.reverse()
                hands[rank].append(first + second)
    return hands


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 70),
    b=st.integers(1, 9),
    w=st.integers(1, 4),
    a=st.integers(1, 3),
    repeats=st.integers(1, 4),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
    layout=st.sampled_from(LAYOUTS),
)
def test_batches_equal_dealing_by_hand(
    n: int, b: int, w: int, a: int, repeats: int, seed: int, epoch: int, layout: str
) -> None:
    expected = dealt_by_hand(n, b, w, a, repeats, seed, epoch, layout)
    for rank in range(w):
        sampler = deal(n, b, rank, w, seed, repeats=repeats, accum_steps=a, layout=layout)
        sampler.set_epoch(epoch)
        batches, hands = list(sampler), expected[rank]
        if layout == "blocks" and repeats > 1:
            batches, hands = [sorted(one) for one in batches], [sorted(one) for one in hands]
        assert batches == hands
        assert len(sampler) == len(batches) == sampler.steps_per_epoch * a


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize(
    ("batch_size", "world_size", "accum_steps"), [(1024, 1, 1), (256, 4, 1), (64, 8, 2)]
)
def test_imagenet_at_batch_1024_makes_1251_steps(
    batch_size: int, world_size: int, accum_steps: int, repeats: int
) -> None:
    sampler = deal(1_281_167, batch_size, 0, world_size, repeats=repeats, accum_steps=accum_steps)
    assert sampler.steps_per_epoch == 1251
    assert len(sampler) == 1251 * accum_steps


def test_255_images_with_repeats_give_255_draws() -> None:
    draws = [place for batch in deal(255, 1, repeats=3) for place in batch]
    assert [position for _, _, position in draws] == list(range(255))
    counts = Counter(index for _, index, _ in draws)
    assert len(counts) == 85
    assert set(counts.values()) == {3}


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_partition_the_dealt_positions(world_size: int, repeats: int) -> None:
    ranks = all_ranks(100, 5, world_size, repeats=repeats)
    positions = sorted(position for rank in ranks for batch in rank for _, _, position in batch)
    assert positions == list(range(100 // (5 * world_size) * 5 * world_size))


def test_without_repeats_no_image_comes_twice() -> None:
    assert max(Counter(index for batch in deal(10, 2) for _, index, _ in batch).values()) == 1
    assert sorted(index for batch in deal(10, 2) for _, index, _ in batch) == list(range(10))


def deit_order(n: int, world_size: int, rank: int, order: list[int]) -> list[int]:
    """What DeiT's repeated augmentation keeps for one rank, from its published description, with
    our permutation."""
    per_rank = -(-n * 3 // world_size)
    tripled = [index for index in order for _ in range(3)]
    tripled += tripled[: per_rank * world_size - len(tripled)]
    return tripled[rank::world_size][: n // 256 * 256 // world_size]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_same_images_per_step_as_deit(world_size: int, layout: str) -> None:
    n, batch_size = 1000, 64 // world_size
    order = torch.randperm(n, generator=keyed_generator(0, "order", 0)).tolist()
    ours = all_ranks(n, batch_size, world_size, repeats=3, layout=layout)
    theirs = [deit_order(n, world_size, rank, order) for rank in range(world_size)]
    for step in range(768 // 64):  # DeiT's 1000 images are 768
        start = step * batch_size
        expected = Counter(index for rank in theirs for index in rank[start : start + batch_size])
        assert Counter(index for rank in ours for _, index, _ in rank[step]) == expected


def test_same_shards_as_torch_without_repeats() -> None:
    for rank in range(3):
        torchs: DistributedSampler = DistributedSampler(range(30), 3, rank, shuffle=False)  # type: ignore[arg-type]
        assert [i for batch in deal(30, 5, rank, 3, shuffle=False) for _, i, _ in batch] == list(
            torchs
        )


@pytest.mark.parametrize("batch_size", [5, 6, 7, 8, 16, 33])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("repeats", [2, 3])
def test_partners_are_never_two_views_of_one_image(
    batch_size: int, world_size: int, layout: str, repeats: int
) -> None:
    for rank in all_ranks(400, batch_size, world_size, repeats=repeats, layout=layout):
        for batch in rank:
            for place, (_, index, _) in enumerate(batch):
                partner = batch_size - 1 - place
                assert partner == place or batch[partner][1] != index


def test_the_plain_order_would_pair_views() -> None:
    """The negative control of the test above: without the reversal the middle of some batch pairs
    with itself."""
    plain = [position // 3 for position in range(16)]
    assert any(plain[i] == plain[15 - i] for i in range(8))


def test_seed_and_epoch_change_the_order_and_nothing_else_does() -> None:
    def indices(seed: int, epoch: int) -> list[int]:
        sampler = deal(40, 4, seed=seed)
        sampler.set_epoch(epoch)
        return [index for batch in sampler for _, index, _ in batch]

    orders = [indices(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(one != other for one, other in pairwise(sorted(orders)))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert indices(0, 0) == orders[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_world_size_and_layout_leave_the_places_of_a_step_as_they_are() -> None:
    alone = [sorted(batch) for batch in deal(60, 12, repeats=3)]
    for world_size, layout in product((1, 2, 3), LAYOUTS):
        ranks = all_ranks(60, 12 // world_size, world_size, repeats=3, layout=layout)
        assert [sorted(chain(*step)) for step in zip(*ranks, strict=True)] == alone


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_epoch_goes_on_where_it_stopped_also_with_other_ranks(layout: str) -> None:
    whole = [sorted(batch) for batch in deal(100, 12, repeats=3, layout=layout)]
    for world_size in (1, 2, 3):
        ranks = []
        for rank in range(world_size):
            sampler = deal(100, 12 // world_size, rank, world_size, repeats=3, layout=layout)
            sampler.set_epoch(0, 36)
            ranks.append(list(sampler))
        assert [sorted(chain(*step)) for step in zip(*ranks, strict=True)] == whole[3:]


@pytest.mark.parametrize(("batch_size", "most"), [(64, 22), (128, 44), (96, 32)])
def test_blocks_leave_the_views_of_an_image_on_one_rank(batch_size: int, most: int) -> None:
    for rank in all_ranks(4000, batch_size, 4, repeats=3):
        assert max(len({index for _, index, _ in batch}) for batch in rank) == most
    for rank in all_ranks(4000, batch_size, 4, repeats=3, layout="strided"):
        assert {len({index for _, index, _ in batch}) for batch in rank} == {batch_size}


def draws_per_image(batch_size: int, world_size: int, layout: str, groups: int) -> float:
    """The mean number of (rank, group of views) that an image meets in one step, counted on a
    thousand images or more."""
    met: dict[tuple[int, int], set[tuple[int, int]]] = {}
    num_images = 3072
    for rank, hand in enumerate(
        all_ranks(num_images, batch_size, world_size, repeats=3, layout=layout)
    ):
        for step, batch in enumerate(hand):
            for entry, (_, image, _) in enumerate(batch):
                group = view_group(entry, batch_size, groups)
                met.setdefault((step, image), set()).add((rank, group))
    return sum(map(len, met.values())) / len(met)


@pytest.mark.parametrize(("world_size", "draws"), [(1, 2.93), (2, 2.95), (3, 2.98), (4, 2.965)])
def test_each_view_of_an_image_meets_its_own_draw(world_size: int, draws: float) -> None:
    """As in DeiT on at least three ranks. An image at the edge of a step has fewer than 3 views."""
    assert draws_per_image(128, 4, "strided", 1) == pytest.approx(2.99, abs=0.005)
    assert draws_per_image(128, world_size, "blocks", 3) == pytest.approx(draws, abs=0.005)


@pytest.mark.parametrize(
    ("world_size", "layout", "draws"),
    [(1, "blocks", 1.0), (4, "blocks", 1.02), (1, "strided", 1.0), (2, "strided", 1.99)],
)
def test_without_groups_the_views_share_their_draws(
    world_size: int, layout: str, draws: float
) -> None:
    """The fault that the test above must find; and what DeiT's layout gives on one rank or two."""
    assert draws_per_image(128, world_size, layout, 1) == pytest.approx(draws, abs=0.015)


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 64, 129])
def test_groups_are_whole_pairs_of_nearly_equal_number(batch_size: int, groups: int) -> None:
    numbers = [view_group(entry, batch_size, groups) for entry in range(batch_size)]
    assert numbers == numbers[::-1]
    pairs = Counter(numbers[: (batch_size + 1) // 2])
    assert sorted(pairs) == list(range(min(groups, (batch_size + 1) // 2)))
    assert max(pairs.values()) - min(pairs.values()) <= 1


def test_too_few_images_deal_nothing() -> None:
    assert list(deal(5, 8)) == []
    assert len(deal(5, 8)) == 0


@pytest.mark.parametrize("num_images", [0, 1, 10, 11])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_shards_count_every_image_once(num_images: int, world_size: int) -> None:
    shards = [EvalShard(num_images, rank, world_size) for rank in range(world_size)]
    assert sorted(chain(*shards)) == list(range(num_images))
    assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards]
