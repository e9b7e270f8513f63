"""Autocast and the gradient scaler for `--amp`, and a context for eval mode."""

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
    """The gradient scaler for `--amp`.

    Only fp16 needs a scaled loss. For the other precisions the scale stays 1, and the scaler is
    used because it skips an update whose gradient is not finite without a read from the device.
    """
    if amp == "fp16":
        return torch.amp.GradScaler(device.type)
    never = 2**31 - 1
    return torch.amp.GradScaler(
        device.type, init_scale=1.0, growth_interval=never, enabled=device.type != "mps"
    )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """A context in which `model` is in eval mode; each module's mode is restored afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
