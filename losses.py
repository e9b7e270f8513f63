"""The loss terms of the paper, one function each, and their sum; DeiT's distillation around them.

All arithmetic is in float32, whatever the forward pass ran in. Mixes nothing and draws nothing.

Letters: B batch, K classes. A loss returns named terms; the one called `total` is what is
minimised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div, log_softmax

from mixers.interface import MixedBatch
from models.interface import ModelOutput

Terms = dict[str, Tensor]
Criterion = Callable[[ModelOutput, MixedBatch], Terms]


def soft_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Eq. 4 and 9: CE(Y, y) for soft labels, averaged over the batch. Both (B, K); returns a
    scalar."""
    return -(labels * log_softmax(logits.float(), dim=-1)).sum(dim=-1).mean()


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """One yes-or-no question per class, averaged over batch and classes (`--bce-loss`, as in DeiT
    III).

    Every class that has a share in a mixed label counts as present, whatever its share.
    """
    return binary_cross_entropy_with_logits(logits.float(), (labels > 0).float())


CrossEntropy = Callable[[Tensor, Tensor], Tensor]


def fine_grained(
    region_logits: Tensor,
    source_labels: Tensor,
    target_labels: Tensor,
    cross_entropy: CrossEntropy = soft_cross_entropy,
) -> Tensor:
    """Eq. 13: half of CE(Y_A, y_A) + CE(Y_B, y_B).

    Args:
        region_logits: (B, 2, K), source region then target region (Eq. 12).
        source_labels, target_labels: (B, K).
    """
    of_source = cross_entropy(region_logits[:, 0], source_labels)
    return 0.5 * (of_source + cross_entropy(region_logits[:, 1], target_labels))


def consistency(logits: Tensor, reference_probs: Tensor, temperature: float = 1.0) -> Tensor:
    """Eq. 14: KL(reference || prediction), averaged over the batch.

    The reference is the mixture of the clean images' predictions and carries no gradient. With a
    temperature T, T^2 * KL(reference || softmax(logits / T)), as in distillation (Hinton et al.
    2015): the factor keeps the size of the gradient. The reference comes with the same temperature
    already in it.

    Args:
        logits: (B, K) of the mixed images.
        reference_probs: (B, K), rows sum to one.
    """
    predicted = log_softmax(logits.float() / temperature, dim=-1)
    return temperature**2 * kl_div(predicted, reference_probs.detach(), reduction="batchmean")


class SMMixLoss:
    """Eq. 15: L_total = L_cls + L_fine + L_con. A term whose inputs the batch or the model left out
    is left out.

    Terms that the mixing method itself brings (`MixedBatch.terms`) are added. Named terms are given
    without weights.

    Args:
        bce: use `binary_cross_entropy` for L_cls and L_fine.
        fine_weight, con_weight: of L_fine and L_con in the total; the paper's are 1.
        fine_temperature: T of L_fine's predictions, softmax(logits / T).
        con_temperature: T of both sides of L_con; see `consistency`.
    """

    def __init__(
        self,
        bce: bool = False,
        fine_weight: float = 1.0,
        con_weight: float = 1.0,
        *,
        fine_temperature: float = 1.0,
        con_temperature: float = 1.0,
    ) -> None:
        self.weights = {"fine": fine_weight, "con": con_weight}
        self.fine_temperature, self.con_temperature = fine_temperature, con_temperature
        self.cross_entropy = binary_cross_entropy if bce else soft_cross_entropy

    def __call__(self, output: ModelOutput, batch: MixedBatch) -> Terms:
        terms = {"cls": self.cross_entropy(output.logits, batch.labels)}
        if output.region_logits is not None:
            assert batch.source_labels is not None
            assert batch.target_labels is not None
            predicted = output.region_logits.float() / self.fine_temperature
            terms["fine"] = fine_grained(
                predicted, batch.source_labels, batch.target_labels, self.cross_entropy
            )
        if batch.reference_probs is not None:
            terms["con"] = consistency(output.logits, batch.reference_probs, self.con_temperature)
        terms.update(batch.terms)
        weighted = [self.weights.get(name, 1.0) * term for name, term in terms.items()]
        return {"total": torch.stack(weighted).sum(), **terms}


class DistillationLoss:
    """DeiT's distillation (arXiv 2012.12877, Eq. 2 and 3) around another loss.

    total = (1 - alpha) * base + alpha * distillation, the distillation token being compared with a
    teacher that sees the same mixed images. `soft`: tau^2 * KL(teacher || student) of the tempered
    distributions, averaged over batch and classes as DeiT does. `hard`: cross entropy with the
    teacher's decision.

    Args:
        base: the loss on labels.
        teacher: images (B, C, height, width) -> logits (B, K), without gradient.
    """

    def __init__(
        self,
        base: Criterion,
        teacher: Callable[[Tensor], Tensor],
        kind: Literal["soft", "hard"],
        alpha: float = 0.5,
        tau: float = 1.0,
    ) -> None:
        self.base, self.teacher, self.kind, self.alpha, self.tau = base, teacher, kind, alpha, tau

    def __call__(self, output: ModelOutput, batch: MixedBatch) -> Terms:
        if output.distillation_logits is None:
            raise ValueError(
                "distillation needs a model that gives its distillation token's logits while "
                "training"
            )
        terms = self.base(output, batch)
        student, teacher = output.distillation_logits.float(), self.teacher(batch.images).float()
        if self.kind == "hard":
            distillation = nn.functional.cross_entropy(student, teacher.argmax(dim=-1))
        else:
            tempered, wanted = (
                log_softmax(student / self.tau, -1),
                log_softmax(teacher / self.tau, -1),
            )
            distillation = (
                kl_div(tempered, wanted, reduction="sum", log_target=True)
                * self.tau**2
                / student.numel()
            )
        total = (1 - self.alpha) * terms["total"] + self.alpha * distillation
        return {**terms, "total": total, "distill": distillation}
