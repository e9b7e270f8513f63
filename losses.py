"""The loss terms of the paper, one function each, their sum (Eq. 15), and DeiT's distillation.

All arithmetic is in float32, whatever the precision of the forward pass. A criterion returns named
terms; the one named `total` is minimised.

Letters: B batch, C channels, K classes. In the paper A is the source, B the target, M the mixed
image, Y a prediction and y a label.
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
    """Eq. 4 and 9: CE(Y, y) with Y = softmax(logits), averaged over the batch.

    Args:
        logits: (B, K).
        labels: (B, K), soft labels y.
    """
    return -(labels * log_softmax(logits.float(), dim=-1)).sum(dim=-1).mean()


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy, averaged over batch and classes (`--bce-loss`, as in DeiT III).

    Every class that has a share in a mixed label counts as present, whatever its share.

    Args:
        logits, labels: (B, K).
    """
    return binary_cross_entropy_with_logits(logits.float(), (labels > 0).float())


CrossEntropy = Callable[[Tensor, Tensor], Tensor]


def fine_grained(
    region_logits: Tensor,
    source_labels: Tensor,
    target_labels: Tensor,
    cross_entropy: CrossEntropy = soft_cross_entropy,
) -> Tensor:
    """Eq. 13: L_fine = (CE(Y_A, y_A) + CE(Y_B, y_B)) / 2, the predictions being those of Eq. 12.

    Args:
        region_logits: (B, 2, K): inside the pasted region (A), then outside it (B).
        source_labels, target_labels: (B, K), y_A and y_B.
    """
    source_loss = cross_entropy(region_logits[:, 0], source_labels)
    target_loss = cross_entropy(region_logits[:, 1], target_labels)
    return 0.5 * (source_loss + target_loss)


def consistency(logits: Tensor, reference_probs: Tensor, temperature: float = 1.0) -> Tensor:
    """Eq. 14: L_con = KL(reference || Y_M), averaged over the batch.

    The reference is lam * Y_A + (1 - lam) * Y_B, the mixture of the predictions on the clean images
    (`smmix.py:mix_probs`). It gets no gradient. With a temperature T the loss is
    T^2 * KL(reference || softmax(logits / T)), as in distillation (Hinton et al. 2015): the factor
    T^2 keeps the size of the gradient.

    Args:
        logits: (B, K), of the mixed images: Y_M = softmax(logits).
        reference_probs: (B, K), each row sums to one; computed with the same temperature.
        temperature: T.
    """
    predicted = log_softmax(logits.float() / temperature, dim=-1)
    return temperature**2 * kl_div(predicted, reference_probs.detach(), reduction="batchmean")


class SMMixLoss:
    """Eq. 15: L_total = L_cls + L_fine + L_con.

    L_fine is a part of it if the model returns region logits, L_con if the batch has a reference.
    Losses of the mixing method (`MixedBatch.terms`) are added. A call returns each term without its
    weight, and `total` with the weights.

    Args:
        bce: use `binary_cross_entropy` for L_cls and L_fine.
        fine_weight, con_weight: weights of L_fine and L_con in the total; the paper's are 1.
        fine_temperature: T of the predictions in L_fine, softmax(logits / T).
        con_temperature: T of both sides of L_con; see `consistency`.
        con_warmup: the weight of L_con rises from 0 over this number of steps; see `set_step`.
    """

    def __init__(
        self,
        bce: bool = False,
        fine_weight: float = 1.0,
        con_weight: float = 1.0,
        *,
        fine_temperature: float = 1.0,
        con_temperature: float = 1.0,
        con_warmup: int = 0,
    ) -> None:
        self.weights = {"fine": fine_weight, "con": con_weight}
        self.con_weight, self.con_warmup = con_weight, con_warmup
        self.fine_temperature, self.con_temperature = fine_temperature, con_temperature
        self.cross_entropy = binary_cross_entropy if bce else soft_cross_entropy
        self.set_step(0)

    def set_step(self, step: int) -> None:
        """Sets the weight of L_con for a step: con_weight * min(1, step / con_warmup).

        The warm-up is an addition of ours; the paper's weight is constant.

        Args:
            step: its number since the beginning of the run, from 0.
        """
        if self.con_warmup > 0:
            self.weights["con"] = self.con_weight * min(1.0, step / self.con_warmup)

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
    """DeiT's distillation (arXiv 2012.12877, Eq. 2 and 3), added to another loss.

    total = (1 - alpha) * base + alpha * distillation. The logits of the distillation token (the
    student) are compared with the teacher's logits on the same mixed images. `soft`:
    tau^2 * KL(teacher || student) of softmax(logits / tau), averaged over batch and classes as DeiT
    does. `hard`: cross entropy with the teacher's arg max.

    Args:
        base: the loss on the labels.
        teacher: images (B, C, height, width) -> logits (B, K), without gradient.
        kind: see above.
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
            raise ValueError("the model returns no logits of a distillation token")
        terms = self.base(output, batch)
        student, teacher = output.distillation_logits.float(), self.teacher(batch.images).float()
        if self.kind == "hard":
            distillation = nn.functional.cross_entropy(student, teacher.argmax(dim=-1))
        else:
            student_log_probs = log_softmax(student / self.tau, -1)
            teacher_log_probs = log_softmax(teacher / self.tau, -1)
            divergence = kl_div(
                student_log_probs, teacher_log_probs, reduction="sum", log_target=True
            )
            distillation = divergence * self.tau**2 / student.numel()
        total = (1 - self.alpha) * terms["total"] + self.alpha * distillation
        return {**terms, "total": total, "distill": distillation}
