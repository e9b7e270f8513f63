"""The last block computed for the prefix tokens only, for the motivating pass.

Where the class token (and the distillation token) alone decide the logits, the other tokens only
need to give queries, for the score, and keys and values. Works on the blocks of timm and on those
of PVT, through the attribute names that they share.

Letters: B batch, T all tokens, P the first of them, D width, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attend_prefix(
    attention: Any,
    tokens: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    count: int,
    bias: Tensor | None = None,
) -> Tensor:
    """The output of a timm attention layer for its first `count` tokens.

    Args:
        tokens: (B, T, D), the input of the layer.
        parts: its queries, keys and values (B, H, T, D / H), after norms and rotation.
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
    if getattr(attention, "gate", None) is not None:  # absent in older releases of timm
        mixed = mixed * attention.gate(tokens[:, :count]).sigmoid()
    return attention.proj_drop(attention.proj(mixed))


def finish_block(block: Any, tokens: Tensor, attended: Tensor) -> Tensor:
    """The rest of a pre-norm block after its attention, for some of its tokens.

    Args:
        tokens: (B, P, D), the input of the block.
        attended: (B, P, D), the output of its attention for these tokens.

    Returns:
        (B, P, D), the output of the block.
    """
    device = tokens.device.type
    if torch.is_autocast_enabled(device):
        # A layer that computes in float32 (`--attn-fp32`) casts its output in the same way.
        attended = attended.to(torch.get_autocast_dtype(device))
    tokens = tokens + _scale_and_drop(block, 1, attended)
    return tokens + _scale_and_drop(block, 2, block.mlp(block.norm2(tokens)))


def _scale_and_drop(block: Any, number: int, output: Tensor) -> Tensor:
    """Layer scale and drop path of a residual branch: 1 for attention, 2 for the MLP.

    The attribute names differ between the blocks of timm and those of PVT.
    """
    if getattr(block, f"ls{number}", None) is not None:
        output = getattr(block, f"ls{number}")(output)
    if getattr(block, f"gamma_{number}", None) is not None:
        output = getattr(block, f"gamma_{number}") * output
    drop_path = f"drop_path{number}" if hasattr(block, f"drop_path{number}") else "drop_path"
    return getattr(block, drop_path)(output)
