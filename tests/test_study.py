"""The switches of the paper's study change what they should and nothing else: schemes, scores,
terms, temperatures."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from config.checks import check_args
from config.flags import get_args_parser
from errors import InputError
from losses import SMMixLoss
from mixers.interface import MixedBatch, StepRandom
from mixers.options import PastingOptions
from mixers.registry import METHODS
from mixers.smmix_options import Scheme
from models.interface import GuideOutput, ModelOutput, resample_score, upsample_score
from smmix import Drawn, SMMix, mix_logits, mix_probs
from tests.conftest import FakeGuide
from tests.mixing import fake_teacher, make_switch
from tests.test_guide import CASES, make, prediction
from tests.test_mixers import GRID, SIZE, K, assert_equal, batch_of, no_guide
from tests.test_smmix import slow_corner, slow_paste, slow_scores
from utils import keyed_generator

SCHEMES = [(source, target) for source in ("random", "max") for target in ("corr", "max", "min")]
PASTING = [
    name
    for name, method in METHODS.items()
    if issubclass(method.options, PastingOptions) and name != "smmix"
]
schemes = pytest.mark.parametrize(("source", "target"), SCHEMES)


def random_of(key: int) -> StepRandom:
    return StepRandom(keyed_generator("shared", key), keyed_generator("own", key))


def scheme_of(source: Any, target: Any, score: Any = "guide") -> Scheme:
    return Scheme(source, target, score)


# ------------------------------------------------------------------------- Table A4: mixing schemes


def slow_regions(scheme: Scheme, drawn: Drawn, score: Tensor) -> tuple[list[Any], list[Any]]:
    """Corners in the source and in the target of each pair, one image after the other."""
    scores, count = slow_scores(score, GRID, drawn.sizes[0]), len(score)
    sources, targets = [], []
    for image in range(count):
        partner = count - 1 - image
        if scheme.source == "random":
            assert drawn.source_corners is not None
            source = tuple(drawn.source_corners[image].tolist())
        else:
            source = slow_corner(scores[partner], largest=True)
        target = source
        if scheme.target != "corr" and partner != image:
            target = slow_corner(scores[image], largest=scheme.target == "max")
        sources.append(source)
        targets.append(target)
    return sources, targets


@pytest.mark.parametrize("score", ["guide", "random"])
@pytest.mark.parametrize("count", [1, 4, 5])
@schemes
def test_a_scheme_is_that_of_a_loop_over_pairs(
    source: str, target: str, count: int, score: str
) -> None:
    images, labels = batch_of(count)
    guide, scheme = FakeGuide(GRID, K), scheme_of(source, target, score)
    mixer = SMMix(K, GRID, side_ratio=(0.2, 0.9), scheme=scheme)
    drawn = mixer.draw(count, SIZE, keyed_generator(source, target))
    batch, plain = (
        mixer.apply(images, labels, drawn, guide),
        SMMix(K, GRID).apply(images, labels, drawn, guide),
    )
    used = guide.attention(images) if drawn.score is None else drawn.score
    sources, targets = slow_regions(scheme, drawn, used)
    assert batch.regions is not None
    assert batch.regions.source_corners.tolist() == [list(corner) for corner in sources]
    assert batch.regions.target_corners.tolist() == [list(corner) for corner in targets]
    expected = slow_paste(
        images, sources, targets, drawn.sizes[0], (SIZE[0] // GRID[0], SIZE[1] // GRID[1])
    )
    assert torch.equal(batch.images, expected)
    for name in (
        "labels",
        "lam",
        "source_labels",
        "target_labels",
        "reference_probs",
        "clean_logits",
    ):
        assert torch.equal(getattr(batch, name), getattr(plain, name)), name  # all but the places
    assert batch.source_mask is not None
    assert batch.lam is not None
    assert torch.equal(batch.source_mask.float().mean(dim=1), batch.lam)


@schemes
def test_a_scheme_leaves_the_draw_of_the_size_alone(source: str, target: str) -> None:
    plain, other = SMMix(K, GRID), SMMix(K, GRID, scheme=scheme_of(source, target, "random"))
    for key in range(20):
        assert (
            plain.draw(6, SIZE, keyed_generator(key)).sizes
            == other.draw(6, SIZE, keyed_generator(key)).sizes
        )
    drawn = plain.draw(6, SIZE, keyed_generator(0))
    assert (drawn.source_corners, drawn.score) == (None, None)


def test_random_regions_are_uniform_over_the_windows_inside_the_grid() -> None:
    mixer = SMMix(K, GRID, side_ratio=(0.5, 0.5), scheme=scheme_of("random", "corr"))
    corners = mixer.draw(6000, SIZE, keyed_generator("uniform")).source_corners
    assert corners is not None
    places, counts = corners.unique(dim=0, return_counts=True)
    assert places.tolist() == [[row, column] for row in range(3) for column in range(4)]
    assert counts.min() > 400
    assert counts.max() < 600


@pytest.mark.parametrize("score", ["guide", "random"])
@pytest.mark.parametrize("con", [True, False])
@schemes
def test_the_pass_is_run_only_if_something_needs_it(
    source: str, target: str, con: bool, score: str
) -> None:
    images, labels = batch_of(4)
    guide = FakeGuide(GRID, K)
    scheme = scheme_of(source, target, score)
    batch = SMMix(K, GRID, con=con, scheme=scheme)(images, labels, guide, random_of(1))
    by_score = score == "guide" and (source, target) != ("random", "corr")
    assert len(guide.calls) == (1 if con or by_score else 0)
    assert (batch.reference_probs is None) == (not con)
    again = SMMix(K, GRID, con=con, scheme=scheme)(images, labels, guide, random_of(1))
    assert_equal(again, batch)
    if score == "random" and (source, target) != ("random", "corr"):
        other = SMMix(K, GRID, con=con, scheme=scheme)(images, labels, guide, random_of(2))
        assert not torch.equal(other.images, batch.images)


def test_flags_name_the_schemes() -> None:
    for source, target in SCHEMES:
        mixer = make_switch(K, GRID, source_region=source, target_region=target).first
        assert isinstance(mixer, SMMix)
        assert mixer.scheme == scheme_of(source, target)
    random = make_switch(K, GRID, score="random").first
    assert isinstance(random, SMMix)
    assert random.scheme == scheme_of("max", "min", "random")
    assert make_switch(K, GRID).first.scheme == Scheme()  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------ Table A5: the score

WITH_BLOCKS = [case for case in CASES if make(case).score_blocks]


@pytest.mark.parametrize("case", WITH_BLOCKS)
def test_rollout_is_the_mean_of_all_blocks(case: str) -> None:
    model, images = (
        make(case),
        torch.randn(2, 3, *make(case).input_size, generator=torch.Generator().manual_seed(1)),
    )
    with torch.no_grad():
        each = [
            model.motivating_pass(images, block=number + 1).image_attention
            for number in range(model.score_blocks)
        ]
        seen, early = (
            model.motivating_pass(images, block="rollout"),
            model.motivating_pass(images, block="rollout", predict=False),
        )
    expected = torch.stack(each).mean(dim=0)
    torch.testing.assert_close(seen.image_attention, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(early.image_attention, expected, atol=1e-6, rtol=1e-5)
    assert early.logits is None
    torch.testing.assert_close(seen.logits, prediction(model, images), atol=1e-5, rtol=1e-5)
    assert len(each) > 1
    assert not torch.allclose(expected, each[-1])


def overlap(old: int, new: int, cell: int, wanted: int) -> float:
    """How much of one of `old` equal cells of a line lies in one of `new`."""
    low, high = max(cell / old, wanted / new), min((cell + 1) / old, (wanted + 1) / new)
    return max(high - low, 0.0) * old


@pytest.mark.parametrize(
    ("old", "new"),
    [((6, 6), (4, 4)), ((7, 5), (2, 5)), ((3, 8), (3, 3)), ((14, 14), (8, 8)), ((4, 4), (2, 2))],
)
def test_a_score_of_a_finer_grid_is_shared_by_area(
    old: tuple[int, int], new: tuple[int, int]
) -> None:
    score = torch.rand(3, old[0] * old[1], generator=torch.Generator().manual_seed(2))
    ours = resample_score(score, old, new).unflatten(1, new)
    grid = score.unflatten(1, old)
    for row in range(new[0]):
        for column in range(new[1]):
            expected = torch.zeros(3)
            for i in range(old[0]):
                for j in range(old[1]):
                    expected += (
                        grid[:, i, j]
                        * overlap(old[0], new[0], i, row)
                        * overlap(old[1], new[1], j, column)
                    )
            torch.testing.assert_close(ours[:, row, column], expected)
    torch.testing.assert_close(ours.sum(dim=(1, 2)), score.sum(dim=1))


def test_a_score_of_a_coarser_grid_is_the_bilinear_one() -> None:
    score = torch.rand(2, 6, generator=torch.Generator().manual_seed(3))
    assert torch.equal(resample_score(score, (2, 3), (5, 4)), upsample_score(score, (2, 3), (5, 4)))
    assert torch.equal(resample_score(score, (2, 3), (2, 3)), score)
    mixed = resample_score(score, (2, 3), (4, 2))  # finer rows, coarser columns
    torch.testing.assert_close(
        mixed, resample_score(upsample_score(score, (2, 3), (4, 3)), (4, 3), (4, 2))
    )
    uniform = resample_score(torch.full((1, 35), 1 / 35), (7, 5), (4, 8))
    torch.testing.assert_close(uniform, torch.full((1, 32), 1 / 32))


# ----------------------------------------------------------- Table 7: consistency with other mixing


@pytest.mark.parametrize("rule", ["probs", "logits"])
@pytest.mark.parametrize("method", PASTING)
def test_consistency_alone_adds_a_reference_and_nothing_else(method: str, rule: str) -> None:
    images, labels = batch_of(5)
    plain = make_switch(K, GRID, fake_teacher, mixer=method).first
    with_con = make_switch(
        K, GRID, fake_teacher, mixer=method, con_weight=0.5, consistency=rule
    ).first
    guide, drawn = FakeGuide(GRID, K), plain.draw(5, SIZE, keyed_generator(method))
    batch, before = (
        with_con.apply(images, labels, drawn, guide),
        plain.apply(images, labels, drawn, no_guide),
    )
    assert len(guide.calls) == 1
    assert torch.equal(guide.calls[0], images)
    assert_equal(replace(batch, reference_probs=None, clean_logits=None), before)
    assert before.lam is not None
    assert batch.reference_probs is not None
    logits = guide.logits(images)
    for image in range(5):
        lam, target, source = float(before.lam[image]), logits[image], logits[4 - image]
        if rule == "probs":
            expected = lam * source.softmax(0) + (1 - lam) * target.softmax(0)
        else:
            expected = (lam * source + (1 - lam) * target).softmax(0)
        torch.testing.assert_close(batch.reference_probs[image], expected)


def test_without_a_weight_only_smmix_has_the_term() -> None:
    images, labels = batch_of(4)
    for method in METHODS:
        mixer = make_switch(K, GRID, fake_teacher, mixer=method).first
        guide = FakeGuide(GRID, K) if method == "smmix" else no_guide
        assert (mixer(images, labels, guide, random_of(0)).reference_probs is not None) == (
            method == "smmix"
        )


def test_consistency_alone_shares_a_batch_with_mixup() -> None:
    images, labels = batch_of(8)
    guide = FakeGuide(GRID, K)
    mixer = make_switch(K, GRID, mixer="cutmix", con_weight=1.0, mix_protocol="split").first
    batch = mixer(images, labels, guide, random_of(0))
    assert [len(shown) for shown in guide.calls] == [4]
    assert batch.reference_probs is not None
    assert batch.reference_probs.sum(dim=1).tolist() == pytest.approx([0, 0, 1, 1, 1, 1, 0, 0])
    terms = SMMixLoss()(ModelOutput(torch.randn(8, K), torch.zeros(0)), batch)
    assert set(terms) == {"total", "cls", "con"}


# ------------------------------------------------------------------------------------- temperatures


def a_batch(
    temperature: float = 1.0, rule: str = "probs"
) -> tuple[MixedBatch, ModelOutput, Tensor]:
    images, labels = batch_of(4)
    generator, clean = (
        torch.Generator().manual_seed(5),
        torch.randn(4, K, generator=torch.Generator().manual_seed(6)),
    )
    mixer = make_switch(K, GRID, con_temperature=temperature, consistency=rule).first
    guide = FakeGuide(GRID, K)
    batch = mixer(
        images, labels, lambda shown: GuideOutput(clean, guide.attention(shown)), random_of(0)
    )
    output = ModelOutput(
        torch.randn(4, K, generator=generator),
        torch.zeros(0),
        None,
        torch.randn(4, 2, K, generator=generator),
    )
    return batch, output, clean


@pytest.mark.parametrize("rule", ["probs", "logits"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_consistency_is_on_both_sides(temperature: float, rule: str) -> None:
    batch, output, clean = a_batch(temperature, rule)
    terms = SMMixLoss(con_temperature=temperature)(output, batch)
    assert batch.lam is not None
    total = 0.0
    for image in range(4):
        lam = float(batch.lam[image])
        target, source = (
            clean[image].double() / temperature,
            clean[3 - image].double() / temperature,
        )
        mixed = lam * source.softmax(0) + (1 - lam) * target.softmax(0)
        wanted = mixed if rule == "probs" else (lam * source + (1 - lam) * target).softmax(0)
        predicted = (output.logits[image].double() / temperature).softmax(0)
        total += sum(
            float(p) * (math.log(float(p)) - math.log(float(q)))
            for p, q in zip(wanted, predicted, strict=True)
        )
    assert float(terms["con"]) == pytest.approx(temperature**2 * total / 4, rel=1e-5)
    usual = SMMixLoss()(output, a_batch()[0])
    for name in ("cls", "fine"):
        assert torch.equal(terms[name], usual[name])


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_temperature_of_the_fine_term_is_of_its_predictions_alone(temperature: float) -> None:
    batch, output, _ = a_batch()
    terms, usual = (
        SMMixLoss(fine_temperature=temperature)(output, batch),
        SMMixLoss()(output, batch),
    )
    assert output.region_logits is not None
    assert batch.source_labels is not None
    assert batch.target_labels is not None
    total = 0.0
    for image in range(4):
        for side, label in enumerate((batch.source_labels[image], batch.target_labels[image])):
            predicted = (output.region_logits[image, side].double() / temperature).softmax(0)
            total -= 0.5 * sum(
                float(y) * math.log(float(p)) for y, p in zip(label, predicted, strict=True)
            )
    assert float(terms["fine"]) == pytest.approx(total / 4, rel=1e-5)
    for name in ("cls", "con"):
        assert torch.equal(terms[name], usual[name])


def test_a_temperature_of_one_changes_no_bit() -> None:
    batch, output, clean = a_batch()
    assert batch.lam is not None
    assert torch.equal(batch.reference_probs, mix_probs(clean, batch.lam))  # type: ignore[arg-type]
    logits_rule = a_batch(rule="logits")[0]
    assert torch.equal(logits_rule.reference_probs, mix_logits(clean, batch.lam))  # type: ignore[arg-type]
    one, other = (
        SMMixLoss()(output, batch),
        SMMixLoss(fine_temperature=1.0, con_temperature=1.0)(output, batch),
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--mixer cutmix --score rollout",
            r"--score rollout \(for smmix\): --mixer cutmix has no use for it",
        ),
        ("--mixer cutmix --source-region random", r"--source-region random \(for smmix\)"),
        ("--mixer cutmix --fine-weight 0", r"--fine-weight 0.0 \(for smmix\)"),
        ("--mixer mixup --con-weight 1", r"--con-weight 1.0 \(for smmix or cutmix or"),
        (
            "--mixer none --motivator ema",
            r"--motivator ema \(for smmix, or with --con-weight above 0\)",
        ),
        (
            "--mixer fmix --con-temperature 2",
            r"--con-temperature 2.0 \(for smmix, or with --con-weight above 0\)",
        ),
        (
            "--mixer cutmix --con-weight 0 --consistency logits",
            r"--consistency logits \(for smmix, or with --con",
        ),
        ("--mixer cutmix --con-weight 1 --variant released", r"--variant released \(for smmix\)"),
        ("--mixer cutmix --con-weight 1 --score-block 2", r"--score-block 2 \(for smmix\)"),
        (
            "--score random --score-block 3",
            "--score random does not use one block alone: leave out --score-block, or",
        ),
        ("--score rollout --score-block 3", "--score rollout does not use one block alone"),
        (
            "--source-region random --target-region corr --score rollout",
            "uses no score: leave out --score$",
        ),
        (
            "--source-region random --target-region corr --score-block 1",
            "uses no score: leave out --score-block$",
        ),
        (
            "--score random --con-weight 0 --guide-size 16",
            "--guide-size 16: no motivating pass is run",
        ),
        (
            "--score random --con-weight 0 --motivator ema",
            "--motivator ema: no motivating pass is run",
        ),
        (
            "--source-region random --target-region corr --con-weight 0 --guide-amp bf16",
            "--guide-amp bf16: no motivating pass",
        ),
        (
            "--con-temperature 2 --con-weight 0",
            "--con-temperature 2.0 is for L_con, which --con-weight 0 removes",
        ),
        (
            "--con-warmup-epochs 2 --con-weight 0",
            "--con-warmup-epochs 2 is for L_con, which --con-weight 0 removes",
        ),
        (
            "--mixer fmix --con-warmup-epochs 2",
            r"--con-warmup-epochs 2 \(for smmix, or with --con-weight above 0\)",
        ),
        ("--con-warmup-epochs -1", "--con-warmup-epochs -1: must not be negative"),
        (
            "--con-warmup-epochs 3 --epochs 2",
            "--con-warmup-epochs 3: must be at most --epochs 2",
        ),
        (
            "--fine-temperature 2 --fine-weight 0",
            "--fine-temperature 2.0 is for L_fine, which --fine-weight 0",
        ),
        (
            "--fine-temperature 2 --bce-loss --smoothing 0",
            "--fine-temperature 2.0 is for a softmax, and --bce-loss",
        ),
        ("--con-temperature 0", "--con-temperature 0.0: must be above 0"),
        ("--fine-temperature -1", "--fine-temperature -1.0: must be above 0"),
        ("--con-weight -1", "--con-weight -1.0: must not be negative"),
        (
            "--motivator ema --no-model-ema",
            "--motivator ema runs the average on the device in each step: add",
        ),
        ("--motivator ema --model-ema-force-cpu", "leave out --model-ema-force-cpu"),
        ("--subset 0", "--subset 0: must be above 0"),
        ("--max-steps 0", "--max-steps 0: must be above 0"),
    ],
)
def test_what_contradicts_itself_is_refused(words: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_args(get_args_parser().parse_args(words.split()))


@pytest.mark.parametrize("words", ["--source-region tail", "--target-region mean", "--score last"])
def test_what_is_no_choice_is_refused(words: str) -> None:
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(words.split())


@pytest.mark.parametrize(
    "words",
    [
        "--mixer cutmix --con-weight 0",
        "--mixer cutmix --con-weight 1 --motivator ema --guide-amp bf16 --consistency logits "
        "--con-temperature 2",
        "--mixer transmix --con-weight 1 --con-warmup-epochs 2",
        "--con-warmup-epochs 1 --epochs 1",
        "--source-region random --target-region corr --con-weight 0",
        "--source-region random --target-region min --score rollout",
        "--score random --con-weight 1 --motivator ema",
    ],
)
def test_what_goes_together_is_taken(words: str) -> None:
    check_args(get_args_parser().parse_args(words.split()))
