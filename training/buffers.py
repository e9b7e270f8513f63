"""What training changes without a gradient: the running statistics of batch norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from utils import Processes


class Buffers:
    """The persistent buffers of a model: those that its checkpoints keep.

    Each process computes its own running statistics. Evaluation, the average, the motivating pass
    and checkpoints read them outside DDP's forward pass, so every step ends with those of rank 0 on
    all ranks. Nothing here reads the device, and a model without such buffers costs nothing.
    """

    def __init__(self, module: nn.Module, processes: Processes) -> None:
        self.processes, kept = processes, module.state_dict().keys()
        held = [buffer for name, buffer in module.named_buffers() if name in kept]
        dtypes = sorted({buffer.dtype for buffer in held}, key=str)  # one message for each
        self.before: list[Tensor] = []
        self.groups = [[one for one in held if one.dtype == dtype] for dtype in dtypes]

    def read(self) -> list[Tensor]:
        """Copies of all values, one flat tensor for each dtype."""
        return [torch.cat([one.flatten() for one in group]) for group in self.groups]

    @torch.no_grad()
    def write(self, values: list[Tensor]) -> None:
        """Puts back what `read` returned."""
        for group, flat in zip(self.groups, values, strict=True):
            parts = flat.split([one.numel() for one in group])
            shaped = [part.view(one.shape) for part, one in zip(parts, group, strict=True)]
            torch._foreach_copy_(group, shaped)

    def begin_step(self) -> None:
        """Remembers the values, in case the step is skipped."""
        self.before = self.read()

    def end_step(self, was_updated: Tensor) -> None:
        """Gives all ranks the values of rank 0, or those of before the step if it was skipped.

        Args:
            was_updated: 1, or 0 after a skipped step; on the device, and not read on the host.
        """
        after = [self.processes.broadcast(values) for values in self.read()]
        pairs = zip(after, self.before, strict=True)
        self.write([torch.where(was_updated > 0, new, old) for new, old in pairs])
