"""Skips updates whose gradient is NaN or inf, and stops the run after too many in a row.

Only `NonFiniteGuard.check` reads the device, on logging steps. Writes no files.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errors import StopRun
from utils import Processes

REMEDIES = "Try, in this order: --amp bf16, --clip-grad 1.0, --attn-fp32, a lower --lr."


class NonFiniteLoss(StopRun):
    """Too many steps in a row were skipped.

    Attributes:
        evidence: on each rank with such a loss in the last step: its last such micro-batch as the
            loader gave it, the mixed images and labels if it was the last of its step, and a
            `report` on it. None on other ranks.
    """

    exit_code = 3
    evidence: dict[str, Any] | None = None


class StepRecord(NamedTuple):
    """What a report on a micro-batch needs: device values that are not read yet."""

    step: int
    indices: Tensor  # (B,), of its images
    replaced: Tensor | None  # (B,) bool: another image was trained on in the place of this one
    values: dict[str, Tensor]  # the loss terms


class KeptBatch(NamedTuple):
    """A micro-batch that is kept in case its report is needed."""

    record: StepRecord
    loaded: dict[str, Tensor]  # as the loader gave it, on the host
    mixed: dict[str, Tensor]  # mixed images and labels, on the device


class NonFiniteGuard:
    """Counts the steps whose gradient is not finite, with the same result on all ranks.

    A loss that is NaN or inf turns every gradient of its rank into NaN, DDP's sum carries NaN to
    all ranks, and the gradient scaler skips their updates on the device. This needs no read and no
    message between ranks: the gradient's norm is the same everywhere, and so are the counters.

    Args:
        limit: this many such steps in a row end the run.
    """

    def __init__(self, processes: Processes, limit: int = 20) -> None:
        def zero() -> Tensor:
            return torch.zeros((), device=processes.device)

        self.processes, self.limit = processes, limit
        self.poison = zero()  # NaN after a loss of this step that is not finite, else 0
        self.in_a_row = zero()  # skipped steps up to now
        self.longest_run = zero()  # of skipped steps, since the last resume
        self.skipped = zero()  # all skipped steps since the run began
        self.reported = 0.0  # how many of `skipped` were reported
        self.records: deque[StepRecord] = deque()  # since the last check, or since the run of skips
        self.kept: list[KeptBatch] = []  # of the last step

    def release(self) -> None:
        """Frees the device memory of mixed images that were kept for a report."""
        self.kept = [kept._replace(mixed={}) for kept in self.kept]

    def guard(self, terms: Mapping[str, Tensor], step: int, batch: Any, mixed: Any) -> Tensor:
        """The loss to minimise: `terms["total"]`, or NaN if a loss of this step is not finite.

        Args:
            terms: named loss terms (scalars) of this micro-batch.
            step: its number since the beginning of the run.
            batch: what the loader gave (`pipeline.samples.Batch`).
            mixed: what the mixer made of it (`mixers.interface.MixedBatch`).
        """
        values = {name: term.detach() for name, term in terms.items()}
        record = StepRecord(step, batch.indices, batch.replaced, values)
        self.records.append(record)
        loaded = {name: part for name, part in batch._asdict().items() if part is not None}
        images = {"mixed_images": mixed.images, "mixed_labels": mixed.labels}
        same_step = [kept for kept in self.kept if kept.record.step == step]
        self.kept = [*same_step, KeptBatch(record, loaded, images)]
        self.poison = self.poison + 0.0 * values["total"]
        return terms["total"] * (1.0 + self.poison)

    def count(self, norm: Tensor) -> Tensor:
        """Ends a step with this gradient norm. Returns 1 or 0, on the device: was it finite?"""
        is_finite = norm.isfinite().float()
        self.records[-1].values["grad_norm"] = norm.detach()
        self.in_a_row = (self.in_a_row + 1) * (1 - is_finite)
        self.longest_run = torch.maximum(self.longest_run, self.in_a_row)
        self.skipped = self.skipped + (1 - is_finite)
        self.poison = torch.zeros_like(self.poison)
        return is_finite

    def check(self) -> str | None:
        """Reads the counters; all ranks call it together.

        Returns:
            A warning about the steps that were skipped since the last call, or None.

        Raises:
            NonFiniteLoss: `limit` steps in a row were skipped, up to now or before.
        """
        counters = torch.stack((self.skipped, self.longest_run, self.in_a_row))
        skipped, longest_run, in_a_row = counters.tolist()
        new, self.reported = int(skipped - self.reported), skipped
        if not new:
            self.records.clear()
            return None
        bad = [record for record in self.records if not _is_finite(record.values)]
        # A gradient that overflowed, or another rank's loss, shows in the norm alone.
        own = [
            record
            for record in bad
            if not _is_finite({n: v for n, v in record.values.items() if n != "grad_norm"})
        ]
        reports = self.processes.gather(_describe(own[0]) if own else None)
        lines = [f"rank {rank}: {report}" for rank, report in enumerate(reports) if report]
        lines = lines or [f"all losses were finite, the gradient was not: {_describe(bad[0])}"]
        run_began = self.records[-1].step - int(in_a_row) + 1
        while self.records and self.records[0].step < run_began:
            self.records.popleft()
        if longest_run < self.limit:
            updates = f"{new} update{'s' if new > 1 else ''}"
            return "\n  ".join([f"left out {updates}, not finite:", *lines])
        failure = NonFiniteLoss(
            f"{int(longest_run)} steps in a row were not finite; nothing was updated in them.\n  "
            + "\n  ".join(lines)
            + f"\n  {REMEDIES}"
        )
        failure.evidence = self._evidence(own)
        raise failure

    def _evidence(self, bad: list[StepRecord]) -> dict[str, Any] | None:
        for record, loaded, mixed in reversed(self.kept):
            if any(record is one for one in bad):
                return {**loaded, **mixed, "report": _describe(record)}
        return None


def _is_finite(values: Mapping[str, Tensor]) -> bool:
    return all(bool(value.isfinite()) for value in values.values())


def _describe(record: StepRecord) -> str:
    values = ", ".join(f"{name} {float(value):g}" for name, value in record.values.items())
    indices = record.indices.tolist()
    replaced = [False] * len(indices) if record.replaced is None else record.replaced.tolist()
    images = [
        f"{index} (replaced)" if was_replaced else str(index)
        for index, was_replaced in zip(indices, replaced, strict=True)
    ]
    return f"step {record.step}, {values}; images [{', '.join(images)}]"
