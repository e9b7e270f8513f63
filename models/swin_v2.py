"""Swin (version 2) of timm: cosine attention inside windows, tokens merged from stage to stage.

The last block is the last one of the last stage. Its map includes its learned scale and its
continuous position bias. At the published sizes one window covers its grid, and the map is that of
Eq. 5. At other sizes the score of a token is averaged over the queries of its window and divided by
the number of windows. The scores then sum to one, minus the attention that padding receives.

Paper: Swin Transformer V2 (arXiv 2111.09883). Letters: W windows of A tokens each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.models.swin_transformer_v2 import (
    SwinTransformerV2,
    SwinTransformerV2Block,
    checkpoint_filter_fn,
)
from torch import Tensor
from torch.nn.functional import linear, normalize

from models.float32_attention import in_layer_precision
from models.windows import WindowedTransformer, windowed_score


class SwinV2(WindowedTransformer):
    """Any timm `SwinTransformerV2` that predicts from the mean of its tokens.

    Raises:
        ValueError: it predicts from something other than the mean.
    """

    network: SwinTransformerV2

    def block_score(self, block: SwinTransformerV2Block, tokens: Tensor) -> Tensor:
        sides = zip(tokens.shape[1:3], block.window_size, strict=True)
        num_windows = math.prod([math.ceil(length / side) for length, side in sides])
        # A post-norm block: its attention receives the tokens without a norm.
        return windowed_score(block, tokens, cosine_attention_map) / num_windows

    def resize_weights(
        self, weights: Mapping[str, Tensor], old_grid: tuple[int, int] | None
    ) -> tuple[dict[str, Tensor], list[str]]:
        # A small network computes the position bias, so no table has to be resampled.
        new = checkpoint_filter_fn(dict(weights), self.network)
        absent = [key for key in weights if key not in new]
        notes = [f"{key} renamed, or dropped: the network computes it" for key in absent]
        for key, value in weights.items():
            if key in new and new[key].shape != value.shape:
                notes.append(f"{key} resized from {tuple(value.shape)} to {tuple(new[key].shape)}")
        return new, notes


@in_layer_precision
def cosine_attention_map(attention: Any, windows: Tensor, mask: Tensor | None) -> Tensor:
    """The map of a window attention layer, in float32 and without gradient.

    Args:
        attention: timm's `WindowAttention` of this family.
        windows: (B W, A, D), the input of the layer: W windows of A tokens from each image.
        mask: (W, A, A), added before the softmax. It prevents attention between tokens that are in
            one window only because of the shift.

    Returns:
        (B W, H, A, A). Rows (queries) sum to one.
    """
    heads = attention.num_heads
    width = attention.qkv.out_features // 3 * 2  # width of queries and keys
    with torch.no_grad():
        bias = None if attention.q_bias is None else torch.cat((attention.q_bias, attention.k_bias))
        queries_keys = linear(windows, attention.qkv.weight[:width], bias)
        queries_keys = queries_keys.unflatten(2, (2, heads, -1))  # (B W, A, 2, H, D / H)
        queries, keys = queries_keys.permute(2, 0, 3, 1, 4)  # (B W, H, A, D / H)
        with torch.autocast(windows.device.type, enabled=False):
            queries, keys = normalize(queries.float(), dim=-1), normalize(keys.float(), dim=-1)
            cosine = queries @ keys.transpose(-2, -1)  # (B W, H, A, A)
            scale = attention.logit_scale.float().clamp(max=math.log(100)).exp()
            similarity = cosine * scale
            table = attention.cpb_mlp(attention.relative_coords_table).view(-1, heads)
            positions = table[attention.relative_position_index].permute(2, 0, 1)  # (H, A, A)
            similarity = similarity + 16 * positions.float().sigmoid()
            if mask is not None:
                masks = mask.float().repeat(len(windows) // len(mask), 1, 1)  # (B W, A, A)
                similarity = similarity + masks[:, None]
            return similarity.softmax(dim=-1)
