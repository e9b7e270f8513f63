"""Values that are not finite: no rank learns from them, and too many in a row end the run with a
report.

Nothing here reads the device but `Health.check`, on logging steps. Writes no files.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils import Processes, StopRun

REMEDIES = "Try, in this order: --amp bf16, --clip-grad 1.0, --attn-fp32, a lower --lr."


class NonFiniteLoss(StopRun):
    """Too many updates in a row had to be left out.

    Attributes:
        evidence: for each rank that met such a loss in the last step, what its last such
            micro-batch was: as the loader gave it, and mixed if it was the step's last; with a
            report on it. None elsewhere.
    """

    exit_code = 3
    evidence: dict[str, Any] | None = None


class Seen(NamedTuple):
    """What a report on a step will need; device values, not read yet."""

    step: int
    indices: Tensor  # (B,)
    values: dict[str, Tensor]


class Given(NamedTuple):
    """What one micro-batch was made of: as the loader gave it, on the host, and mixed, on the
    device."""

    seen: Seen
    loaded: dict[str, Tensor]
    mixed: dict[str, Tensor]


class Health:
    """Counts the steps whose gradient was not finite, alike on all ranks.

    A loss that is not finite turns every gradient of its rank into NaN, DDP's sum carries that to
    all ranks, and the
    scaler skips their updates on the device: no read, no message between ranks. So the gradient's
    norm tells all ranks the same, and the counters made of it agree.

    Args:
        limit: so many such steps in a row end the run.
    """

    def __init__(self, processes: Processes, limit: int = 20) -> None:
        self.processes, self.limit = processes, limit
        self.poison = torch.zeros(
            (), device=processes.device
        )  # NaN while a loss of this step was not finite
        self.in_a_row = torch.zeros((), device=processes.device)
        self.longest = torch.zeros(
            (), device=processes.device
        )  # of all rows, also those that ended
        self.skipped = torch.zeros((), device=processes.device)  # since the run began
        self.told = 0.0  # of `skipped`, how many were reported
        self.unchecked: deque[Seen] = (
            deque()
        )  # micro-batches since the last check, or since the row began
        self.given: list[Given] = []  # of the last step's micro-batches

    def let_go(self) -> None:
        """Frees the device of what is kept for a report, as the next micro-batch is about to need
        the room."""
        self.given = [given._replace(mixed={}) for given in self.given]

    def watch(self, seen: Seen, loaded: dict[str, Tensor], mixed: dict[str, Tensor]) -> Tensor:
        """The factor, 1 or NaN, of this micro-batch's loss; the rest as in `Given`."""
        self.unchecked.append(seen)
        self.given = [
            *(given for given in self.given if given.seen.step == seen.step),
            Given(seen, loaded, mixed),
        ]
        self.poison = self.poison + 0.0 * seen.values["total"]
        return 1.0 + self.poison

    def count(self, norm: Tensor) -> Tensor:
        """Ends a step whose gradient has this norm; returns 1 on the device if it was finite, else
        0."""
        good = norm.isfinite().float()
        self.unchecked[-1].values["grad_norm"] = norm.detach()
        self.in_a_row = (self.in_a_row + 1) * (1 - good)
        self.longest = torch.maximum(self.longest, self.in_a_row)
        self.skipped = self.skipped + (1 - good)
        self.poison = torch.zeros_like(self.poison)
        return good

    def check(self) -> str | None:
        """Reads the counters; all ranks call it together.

        Returns:
            What to say of the steps that were left out since the last call, or None.

        Raises:
            NonFiniteLoss: `limit` steps in a row were left out, up to now or before.
        """
        skipped, longest, in_a_row = torch.stack(
            (self.skipped, self.longest, self.in_a_row)
        ).tolist()
        new, self.told = int(skipped - self.told), skipped
        if not new:
            self.unchecked.clear()
            return None
        bad = [
            seen
            for seen in self.unchecked
            if not all(value.isfinite() for value in seen.values.values())
        ]
        # One that is not this rank's own shows in the norm alone, as does a gradient that
        # overflowed.
        own = [
            seen
            for seen in bad
            if not all(v.isfinite() for n, v in seen.values.items() if n != "grad_norm")
        ]
        reports = self.processes.gather(_describe(own[0]) if own else None)
        lines = [f"rank {rank}: {report}" for rank, report in enumerate(reports) if report]
        lines = lines or [f"all losses were finite, the gradient was not: {_describe(bad[0])}"]
        row_began = self.unchecked[-1].step - int(in_a_row) + 1
        while self.unchecked and self.unchecked[0].step < row_began:
            self.unchecked.popleft()
        if longest < self.limit:
            return "\n  ".join(
                [f"left out {new} update{'s' if new > 1 else ''}, not finite:", *lines]
            )
        failure = NonFiniteLoss(
            f"{int(longest)} steps in a row were not finite; nothing was updated in them.\n  "
            + "\n  ".join(lines)
            + f"\n  {REMEDIES}"
        )
        failure.evidence = self._evidence(own)
        raise failure

    def _evidence(self, bad: list[Seen]) -> dict[str, Any] | None:
        for seen, loaded, mixed in reversed(self.given):
            if any(seen is one for one in bad):
                return {**loaded, **mixed, "report": _describe(seen)}
        return None


def _describe(seen: Seen) -> str:
    values = ", ".join(f"{name} {float(value):g}" for name, value in seen.values.items())
    images = [
        f"{~index} (replaced)" if index < 0 else str(index) for index in seen.indices.tolist()
    ]
    return f"step {seen.step}, {values}; images [{', '.join(images)}]"
