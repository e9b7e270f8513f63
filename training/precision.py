"""Autocast and the gradient scaler behind `--amp`, and evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

Autocast = Callable[[], AbstractContextManager[Any]]
AMP_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def make_autocast(device: torch.device, amp: str) -> Autocast:
    """A factory of autocast contexts for `--amp`: `fp16`, `bf16` or `none`."""
    return partial(torch.autocast, device.type, dtype=AMP_DTYPES.get(amp), enabled=amp != "none")


def make_scaler(device: torch.device, amp: str) -> torch.amp.GradScaler:
    """fp16 needs its loss scaled. Elsewhere the scale stays one and only the scaler's other duty is
    left: skipping, on the device and without a read, an update whose gradient is not finite."""
    if amp == "fp16":
        return torch.amp.GradScaler(device.type)
    never = 2**31 - 1
    return torch.amp.GradScaler(
        device.type, init_scale=1.0, growth_interval=never, enabled=device.type != "mps"
    )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module's own training flag is what it was."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
