"""Every loss term against a loop over samples in float64, and what must stay out of the
gradient."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from losses import (
    DistillationLoss,
    SMMixLoss,
    binary_cross_entropy,
    consistency,
    fine_grained,
    soft_cross_entropy,
)
from mixers.interface import MixedBatch, mix_labels, soft_labels
from models.interface import ModelOutput

B, K = 5, 7


def rows(count: int = B) -> Tensor:
    """Logits (count, K) of some spread."""
    return torch.randn(count, K) * 3


def distributions(count: int = B) -> Tensor:
    return rows(count).softmax(dim=-1)


def log_probs(logits: Tensor) -> list[float]:
    values = logits.double().tolist()
    top = max(values)
    total = math.log(sum(math.exp(v - top) for v in values)) + top
    return [v - total for v in values]


def loop_ce(logits: Tensor, labels: Tensor) -> float:
    total = 0.0
    for z, label in zip(logits, labels, strict=True):
        total -= sum(y * p for y, p in zip(label.tolist(), log_probs(z), strict=True))
    return total / len(logits)


def loop_bce(logits: Tensor, labels: Tensor) -> float:
    """A class is present if it has any share in the label."""
    total = 0.0
    for z, share in zip(
        logits.double().flatten().tolist(), labels.double().flatten().tolist(), strict=True
    ):
        y = 1.0 if share > 0 else 0.0
        total -= y * -math.log1p(math.exp(-z)) + (1 - y) * (-z - math.log1p(math.exp(-z)))
    return total / logits.numel()


def loop_kl(reference: Tensor, logits: Tensor) -> float:
    """KL(reference || prediction), mean over the batch."""
    total = 0.0
    for p, z in zip(reference.double(), logits, strict=True):
        total += sum(
            a * (math.log(a) - b) for a, b in zip(p.tolist(), log_probs(z), strict=True) if a > 0
        )
    return total / len(reference)


def mixed_batch(**given: Any) -> MixedBatch:
    lam, source, target = torch.rand(B), distributions(), distributions()
    parts: dict[str, Any] = {
        "images": torch.randn(B, 3, 4, 4),
        "labels": mix_labels(source, target, lam),
        "lam": lam,
        "source_labels": source,
        "target_labels": target,
        "reference_probs": distributions(),
    }
    return MixedBatch(**{**parts, **given})


def output(**given: Any) -> ModelOutput:
    parts: dict[str, Any] = {
        "logits": rows(),
        "tokens": torch.zeros(B, 1, 1),
        "region_logits": torch.randn(B, 2, K),
    }
    return ModelOutput(**{**parts, **given})


# -------------------------------------------------------------------------------------------- terms


@pytest.mark.parametrize(
    ("term", "loop"), [(soft_cross_entropy, loop_ce), (binary_cross_entropy, loop_bce)]
)
@pytest.mark.parametrize("count", [1, 2, B])
def test_classification_terms(term: Any, loop: Any, count: int) -> None:
    logits, labels = rows(count), distributions(count)
    assert float(term(logits, labels)) == pytest.approx(loop(logits, labels), abs=1e-5)


@pytest.mark.parametrize(
    ("cross_entropy", "loop"), [(soft_cross_entropy, loop_ce), (binary_cross_entropy, loop_bce)]
)
def test_fine_grained_is_half_of_both_regions(cross_entropy: Any, loop: Any) -> None:
    region_logits, source, target = torch.randn(B, 2, K), distributions(), distributions()
    expected = 0.5 * (loop(region_logits[:, 0], source) + loop(region_logits[:, 1], target))
    assert float(fine_grained(region_logits, source, target, cross_entropy)) == pytest.approx(
        expected, abs=1e-5
    )


def test_consistency_is_kl_of_the_reference_from_the_prediction() -> None:
    logits, reference = rows(), distributions()
    ours = float(consistency(logits, reference))
    assert ours == pytest.approx(loop_kl(reference, logits), abs=1e-5)
    assert ours != pytest.approx(
        loop_kl(logits.softmax(-1), reference.log()), abs=1e-3
    )  # the other direction


def test_consistency_by_hand() -> None:
    """Reference (1/2, 1/2), prediction (3/4, 1/4): log 2 / sqrt 3."""
    logits = torch.tensor([[0.75, 0.25]]).log()
    assert float(consistency(logits, torch.tensor([[0.5, 0.5]]))) == pytest.approx(
        math.log(2 / math.sqrt(3))
    )


def test_consistency_vanishes_for_equal_inputs_with_its_gradient() -> None:
    logits = rows().requires_grad_()
    value = consistency(logits, logits.softmax(dim=-1))
    value.backward()
    assert float(value.detach()) == pytest.approx(0, abs=1e-6)
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-6


def test_a_class_without_reference_probability_adds_nothing() -> None:
    reference = torch.tensor([[0.0, 1.0, 0.0]])
    logits = torch.tensor([[9.0, 0.0, -9.0]])
    assert float(consistency(logits, reference)) == pytest.approx(loop_kl(reference, logits))


def test_no_gradient_reaches_the_reference() -> None:
    logits, clean = rows().requires_grad_(), rows().requires_grad_()
    consistency(logits, clean.softmax(dim=-1)).backward()
    assert clean.grad is None
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits_are_promoted(dtype: torch.dtype) -> None:
    logits, labels = (rows() * 10).to(dtype), distributions()
    for term, loop in ((soft_cross_entropy, loop_ce), (binary_cross_entropy, loop_bce)):
        value = term(logits, labels)
        assert value.dtype == torch.float32
        assert float(value) == pytest.approx(loop(logits, labels), rel=1e-5)
    value = consistency(logits, labels)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(loop_kl(labels, logits), rel=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert consistency(logits, labels).dtype == torch.float32


def test_binary_cross_entropy_asks_which_classes_are_present() -> None:
    """DeiT III: a label mixed from two classes asks for both of them, whatever their shares."""
    logits = rows()
    labels = mix_labels(torch.eye(K)[:B], torch.eye(K)[1 : B + 1], torch.full((B,), 0.2))
    both = ((torch.eye(K)[:B] + torch.eye(K)[1 : B + 1]) > 0).float()
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(logits, both)
    assert torch.equal(binary_cross_entropy(logits, labels), wanted)


def test_mixed_labels_give_the_mixed_loss() -> None:
    """CE is linear in its labels: CE(Y, lam y_A + (1 - lam) y_B) = lam CE(Y, y_A) + (1 - lam) CE(Y,
    y_B)."""
    source, target = (soft_labels(torch.randint(K, (B,)), K, 0.1) for _ in range(2))
    logits, lam = rows(), 0.3
    mixed = soft_cross_entropy(logits, mix_labels(source, target, torch.full((B,), lam)))
    apart = lam * soft_cross_entropy(logits, source) + (1 - lam) * soft_cross_entropy(
        logits, target
    )
    assert float(mixed) == pytest.approx(float(apart), abs=1e-5)


# ---------------------------------------------------------------------------------------- their sum


@pytest.mark.parametrize("bce", [False, True])
@pytest.mark.parametrize("with_fine", [False, True])
@pytest.mark.parametrize("with_con", [False, True])
def test_the_total_is_the_sum_of_what_there_is(bce: bool, with_fine: bool, with_con: bool) -> None:
    batch = mixed_batch() if with_con else mixed_batch(reference_probs=None)
    given = output() if with_fine else output(region_logits=None)
    terms = SMMixLoss(bce)(given, batch)
    loop = loop_bce if bce else loop_ce
    expected = {"cls": loop(given.logits, batch.labels)}
    if given.region_logits is not None:
        assert batch.source_labels is not None
        assert batch.target_labels is not None
        halves = [loop(given.region_logits[:, 0], batch.source_labels)]
        halves.append(loop(given.region_logits[:, 1], batch.target_labels))
        expected["fine"] = sum(halves) / 2
    if batch.reference_probs is not None:
        expected["con"] = loop_kl(batch.reference_probs, given.logits)
    expected["total"] = sum(expected.values())
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(expected, abs=1e-5)


def test_the_weight_of_consistency_rises_over_the_warm_up() -> None:
    """Only the total changes, with distillation around it too; without warm-up nothing does."""
    given, batch = output(distillation_logits=rows()), mixed_batch()
    usual, ramped = SMMixLoss(con_weight=0.7), SMMixLoss(con_weight=0.7, con_warmup=6)
    distilled = DistillationLoss(ramped, lambda _: rows(), "soft", 0.5)
    constant = usual(given, batch)
    for step in (0, 1, 5, 6, 7, 40, 3):  # in any order: nothing is carried along
        usual.set_step(step)
        ramped.set_step(step)
        terms, share = ramped(given, batch), step / 6 if step < 6 else 1.0
        total = float(terms["cls"] + terms["fine"]) + 0.7 * share * float(terms["con"])
        assert float(terms["total"]) == pytest.approx(total, rel=1e-6)
        around = distilled(given, batch)
        assert float(around["total"]) == pytest.approx(
            0.5 * total + 0.5 * float(around["distill"]), rel=1e-6
        )
        for name in constant:
            assert torch.equal(usual(given, batch)[name], constant[name])
            same = name != "total" or step >= 6
            assert torch.equal(terms[name], constant[name]) == same


@pytest.mark.parametrize("culprit", ["cls", "fine", "con"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_number_that_is_not_finite_shows_in_its_term_and_the_total(
    culprit: str, value: float
) -> None:
    given, batch = output(), mixed_batch()
    planted = {"cls": batch.labels, "fine": batch.source_labels, "con": batch.reference_probs}[
        culprit
    ]
    assert planted is not None
    planted[1, 2] = value
    terms = SMMixLoss()(given, batch)
    assert {name for name, term in terms.items() if not term.isfinite()} == {culprit, "total"}


def test_gradients_reach_logits_and_region_logits_only() -> None:
    logits, region_logits = rows().requires_grad_(), torch.randn(B, 2, K).requires_grad_()
    batch = mixed_batch(reference_probs=distributions().requires_grad_())
    SMMixLoss()(output(logits=logits, region_logits=region_logits), batch)["total"].backward()
    assert batch.reference_probs is not None
    assert batch.reference_probs.grad is None
    assert batch.source_labels is not None
    for given in (logits, region_logits):
        assert given.grad is not None
    expected = (region_logits.detach()[:, 0].softmax(-1) - batch.source_labels) / (2 * B)
    torch.testing.assert_close(region_logits.grad[:, 0], expected)  # type: ignore[index]
    assert batch.labels is not None
    assert batch.reference_probs is not None
    expected = (2 * logits.detach().softmax(-1) - batch.labels - batch.reference_probs.detach()) / B
    torch.testing.assert_close(logits.grad, expected)


# ------------------------------------------------------------------------------------- distillation


def loop_soft(student: Tensor, teacher: Tensor, tau: float) -> float:
    total = 0.0
    for z, t in zip(student, teacher, strict=True):
        student_log, teacher_log = log_probs(z.double() / tau), log_probs(t.double() / tau)
        total += sum(math.exp(q) * (q - p) for p, q in zip(student_log, teacher_log, strict=True))
    return total * tau**2 / student.numel()


def loop_hard(student: Tensor, teacher: Tensor, tau: float) -> float:
    decisions = [max(range(K), key=row.__getitem__) for row in teacher.tolist()]
    return sum(-log_probs(z)[k] for z, k in zip(student, decisions, strict=True)) / len(student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tau", [1.0, 3.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("kind", "loop"), [("soft", loop_soft), ("hard", loop_hard)])
def test_distillation_as_in_deit(
    kind: Literal["soft", "hard"], loop: Any, alpha: float, tau: float, dtype: torch.dtype
) -> None:
    student, teacher, batch = rows().to(dtype), rows().to(dtype), mixed_batch()
    given, seen = output(distillation_logits=student), []

    def asked(images: Tensor) -> Tensor:
        seen.append(images)
        return teacher

    terms = DistillationLoss(SMMixLoss(), asked, kind, alpha, tau)(given, batch)
    base, distillation = SMMixLoss()(given, batch), loop(student, teacher, tau)
    assert float(terms["distill"]) == pytest.approx(distillation, rel=1e-5, abs=1e-6)
    assert float(terms["total"]) == pytest.approx(
        (1 - alpha) * float(base["total"]) + alpha * distillation, rel=1e-5
    )
    assert {name: terms[name] for name in ("cls", "fine", "con")} == {
        n: v for n, v in base.items() if n != "total"
    }
    assert len(seen) == 1
    assert seen[0] is batch.images  # the teacher sees the mixed images


def test_soft_distillation_vanishes_for_equal_logits() -> None:
    student = rows()
    terms = DistillationLoss(SMMixLoss(), lambda _: student, "soft", 0.5, 2.0)(
        output(distillation_logits=student), mixed_batch()
    )
    assert float(terms["distill"]) == pytest.approx(0, abs=1e-6)


def test_distillation_needs_the_distillation_tokens_logits() -> None:
    with pytest.raises(ValueError, match="distillation token"):
        DistillationLoss(SMMixLoss(), lambda _: rows(), "hard")(output(), mixed_batch())
