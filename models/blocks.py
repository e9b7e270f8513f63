"""Parts that more than one family uses. Holds no sizes, no names and no registry."""

from __future__ import annotations

import torch
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
