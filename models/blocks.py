"""Parts that more than one family uses. Holds no sizes, no names and no registry."""

from __future__ import annotations

import math

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Attention  # also in releases where timm.layers has none
from torch import Tensor


def attention_map(attention: Attention, tokens: Tensor) -> Tensor:
    """The map A of Eq. 5 that a timm attention layer would use on `tokens`, in float32 and without gradient.

    The layer itself may go on with its fused kernel, which gives no map: queries and keys are computed a second time
    here (values are not), which costs about a sixth of one block.

    Args:
        attention: a timm self-attention layer with a joint `qkv` projection.
        tokens: (B, T, D), what the layer itself receives.

    Returns:
        (B, H, T, T), rows (queries) sum to one.
    """
    batch, count, _ = tokens.shape
    width = attention.num_heads * attention.head_dim
    weight, bias = attention.qkv.weight[: 2 * width], attention.qkv.bias
    with torch.no_grad():
        queries_keys = torch.nn.functional.linear(tokens, weight, None if bias is None else bias[: 2 * width])
        queries, keys = queries_keys.reshape(batch, count, 2, attention.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)  # (B, H, T, D / H)
        with torch.autocast(tokens.device.type, enabled=False):
            similarity = (queries.float() * attention.scale) @ keys.float().transpose(-2, -1)  # (B, H, T, T)
            return similarity.softmax(dim=-1)


def resize_positions(
    positions: Tensor, grid_size: tuple[int, int], num_prefix_tokens: int, old_grid: tuple[int, int] | None
) -> Tensor:
    """Position embeddings (1, prefix + N_old, D) resampled (bicubic) to a grid; the same tensor if nothing is to do.

    Args:
        old_grid: the grid they belong to. If absent: this one if the count fits, else a square.
    """
    count = positions.shape[1] - num_prefix_tokens
    if old_grid is None:
        side = math.isqrt(max(count, 0))
        old_grid = grid_size if count == math.prod(grid_size) else (side, side)
    if old_grid == grid_size or count != math.prod(old_grid):
        return positions
    with torch.no_grad():
        return resample_abs_pos_embed(
            positions, new_size=list(grid_size), old_size=list(old_grid), num_prefix_tokens=num_prefix_tokens
        )
