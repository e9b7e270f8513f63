"""A block computed for its first tokens alone: what the motivating pass needs of the last one where
the class token, or the class token and the distillation token, decide.

All other tokens still give their queries (to the score), keys and values; their output is not
computed. Works on the parts of timm's layers and ours by the names they share. Holds no sizes and
no registry.

Letters: B batch, T all tokens, P the first of them, D width, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attend_from_first(
    attention: Any,
    tokens: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    count: int,
    bias: Tensor | None = None,
) -> Tensor:
    """What an attention layer of timm's gives its first tokens.

    Args:
        tokens: (B, T, D), what the layer itself receives.
        parts: its queries, keys and values (B, H, T, D / H), as they are compared and mixed.
        count: P.
        bias: (1, H, P, T), added before the softmax.

    Returns:
        (B, P, D).
    """
    queries, keys, values = parts
    mixed = scaled_dot_product_attention(
        queries[:, :, :count], keys, values, attn_mask=bias, scale=attention.scale
    )
    mixed = mixed.transpose(1, 2).flatten(2)  # (B, P, D)
    if getattr(attention, "norm", None) is not None:
        mixed = attention.norm(mixed)
    if getattr(attention, "gate", None) is not None:  # not in timm's older releases
        mixed = mixed * attention.gate(tokens[:, :count]).sigmoid()
    return attention.proj_drop(attention.proj(mixed))


def finish_block(block: Any, tokens: Tensor, attended: Tensor) -> Tensor:
    """A pre-norm block's residual branches, for some of its tokens.

    Args:
        tokens: (B, P, D), what the block receives.
        attended: (B, P, D), what its attention gives them.

    Returns:
        (B, P, D), what the block gives them.
    """
    device = tokens.device.type
    if torch.is_autocast_enabled(
        device
    ):  # a layer that computes in float32 casts what it gives, too
        attended = attended.to(torch.get_autocast_dtype(device))
    tokens = tokens + _branch(block, 1, attended)
    return tokens + _branch(block, 2, block.mlp(block.norm2(tokens)))


def _branch(block: Any, number: int, made: Tensor) -> Tensor:
    """A branch with its layer scale and drop path, under the names they have in timm's blocks and
    in ours."""
    if getattr(block, f"ls{number}", None) is not None:
        made = getattr(block, f"ls{number}")(made)
    if getattr(block, f"gamma_{number}", None) is not None:
        made = getattr(block, f"gamma_{number}") * made
    return getattr(
        block, f"drop_path{number}" if hasattr(block, f"drop_path{number}") else "drop_path"
    )(made)
