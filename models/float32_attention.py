"""Attention layers that compute in float32 under autocast (`--attn-fp32`), whatever their class.

Holds no sizes, no names and no registry.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

ATTENTION = ("attn", "attn_pool")  # what timm's networks and ours call their attention layers


class InFloat32:
    """Comes before an attention layer's class and computes the whole layer in float32 under
    autocast too.

    The layer keeps its parameters and their names. What it gives is cast to autocast's type at the
    end, so that the rest of the network stays as it was. Without autocast nothing changes.
    """

    plain: type[nn.Module]  # the layer's own class

    def forward(self, tokens: Tensor, *given: Any, **named: Any) -> Tensor:
        plain, device = cast(Any, super()).forward, tokens.device.type
        if not torch.is_autocast_enabled(device):
            return plain(tokens, *given, **named)
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            given, named = (
                tuple(map(_widened, given)),
                {name: _widened(value) for name, value in named.items()},
            )
            return plain(_widened(tokens), *given, **named).to(dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled by the plain class: this one is made while running, and has no place
        to be found at."""
        return _blank_in_float32, (self.plain,), vars(self)


def _widened(value: Any) -> Any:
    return (
        value.float()
        if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
        else value
    )


_made: dict[
    type[nn.Module], type[nn.Module]
] = {}  # so that copies are of one class with what they are copied from


def _in_float32(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _made:
        _made[kind] = type(f"{kind.__name__}InFloat32", (InFloat32, kind), {"plain": kind})
    return _made[kind]


def _blank_in_float32(kind: type[nn.Module]) -> nn.Module:
    made = _in_float32(kind)
    return made.__new__(made)


def attention_in_float32(network: nn.Module) -> int:
    """Makes every attention layer of a network compute in float32 under autocast; returns how many
    there are."""
    layers = [
        layer for name, layer in network.named_modules() if name.rpartition(".")[2] in ATTENTION
    ]
    for layer in layers:
        if not isinstance(layer, InFloat32):
            layer.__class__ = _in_float32(type(layer))
    return len(layers)


Reading = TypeVar("Reading", bound=Callable[..., Any])


def like_its_layer(read: Reading) -> Reading:
    """For a second reading of an attention layer, `read(layer, tokens, ...)`: in float32 if the
    layer computes so."""

    @wraps(read)
    def reading(attention: Any, tokens: Tensor, *given: Any, **named: Any) -> Any:
        if not isinstance(attention, InFloat32):
            return read(attention, tokens, *given, **named)
        with torch.autocast(tokens.device.type, enabled=False):
            return read(attention, tokens.float(), *given, **named)

    return cast(Reading, reading)
