"""Attention layers of any class that compute in float32 under autocast (`--attn-fp32`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

# The names of attention layers in timm's networks and in PVT.
ATTENTION = ("attn", "attn_pool")


class InFloat32:
    """Mixin before the class of an attention layer: the layer computes in float32 under autocast.

    The layer keeps its parameters and their names. Its output is cast to autocast's type, so that
    the rest of the network computes as before. Without autocast nothing changes.
    """

    plain: type[nn.Module]  # the layer's class without this mixin

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain_forward, device = cast(Any, super()).forward, tokens.device.type
        if not torch.is_autocast_enabled(device):
            return plain_forward(tokens, *args, **kwargs)
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            args = tuple(map(_to_float32, args))
            kwargs = {name: _to_float32(value) for name, value in kwargs.items()}
            return plain_forward(_to_float32(tokens), *args, **kwargs).to(dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles through the plain class.

        The class with the mixin is made at run time, so pickle cannot find it by its name.
        """
        return _empty_in_float32, (self.plain,), vars(self)


def _to_float32(value: Any) -> Any:
    """A tensor of half precision -> float32; everything else as it is."""
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value


# The class made for each plain class, so that a copy of a layer has the same class as the layer.
_made: dict[type[nn.Module], type[nn.Module]] = {}


def _in_float32(plain: type[nn.Module]) -> type[nn.Module]:
    if plain not in _made:
        _made[plain] = type(f"{plain.__name__}InFloat32", (InFloat32, plain), {"plain": plain})
    return _made[plain]


def _empty_in_float32(plain: type[nn.Module]) -> nn.Module:
    made = _in_float32(plain)
    return made.__new__(made)


def attention_in_float32(network: nn.Module) -> int:
    """Makes all attention layers of a network compute in float32 under autocast.

    Returns:
        The number of attention layers.
    """
    named = network.named_modules()
    layers = [layer for name, layer in named if name.rpartition(".")[2] in ATTENTION]
    for layer in layers:
        if not isinstance(layer, InFloat32):
            layer.__class__ = _in_float32(type(layer))
    return len(layers)


Function = TypeVar("Function", bound=Callable[..., Any])


def in_layer_precision(function: Function) -> Function:
    """Decorator: `function(layer, tokens, ...)` computes in float32 if the attention layer does.

    For functions that compute a layer's attention map a second time.
    """

    @wraps(function)
    def wrapper(attention: Any, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(attention, InFloat32):
            return function(attention, tokens, *args, **kwargs)
        with torch.autocast(tokens.device.type, enabled=False):
            return function(attention, tokens.float(), *args, **kwargs)

    return cast(Function, wrapper)
