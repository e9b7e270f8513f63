"""Swin (version 2) through timm's own class: cosine attention inside windows, tokens merged from
stage to stage.

"Last block" is the last one of the last stage; its learned scale and its continuous position bias
are part of the map. Where one window covers its grid, as at the published sizes, that map is Eq.
5's. Elsewhere each token's score is read in its own window, from the queries of that window, put
back in place (the shift undone) and divided by the number of windows, so that the scores have one
scale and sum to one, less what the tokens that timm pads with receive. Knows no mixer and no loss.

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

from models.blocks import WindowedTransformer, windowed_score
from models.float32_attention import like_its_layer


class SwinV2(WindowedTransformer):
    """Any timm `SwinTransformerV2` that predicts from the mean of its tokens.

    Raises:
        ValueError: it predicts from something else.
    """

    network: SwinTransformerV2

    def score(self, block: SwinTransformerV2Block, tokens: Tensor) -> Tensor:
        windows = math.prod(
            [
                math.ceil(n / side)
                for n, side in zip(tokens.shape[1:3], block.window_size, strict=True)
            ]
        )
        return (
            windowed_score(block, tokens, cosine_attention_map) / windows
        )  # attention receives the raw tokens

    def resize_weights(
        self, weights: Mapping[str, Tensor], old_grid: tuple[int, int] | None
    ) -> tuple[dict[str, Tensor], list[str]]:
        new = checkpoint_filter_fn(
            dict(weights), self.network
        )  # the position bias is a network of its own: no tables
        notes = [
            f"{key} renamed, or dropped: the network computes it"
            for key in weights
            if key not in new
        ]
        for key, value in weights.items():
            if key in new and new[key].shape != value.shape:
                notes.append(f"{key} resized from {tuple(value.shape)} to {tuple(new[key].shape)}")
        return new, notes


@like_its_layer
def cosine_attention_map(attention: Any, windows: Tensor, mask: Tensor | None) -> Tensor:
    """The map that a window attention layer would use, in float32 and without gradient.

    Args:
        attention: timm's `WindowAttention` of this family.
        windows: (B W, A, D), what the layer itself receives: W windows of A tokens from each image.
        mask: (W, A, A), added before the softmax: keeps apart what only the shift made neighbours.

    Returns:
        (B W, H, A, A), rows (queries) sum to one.
    """
    width, heads = (
        attention.qkv.out_features // 3 * 2,
        attention.num_heads,
    )  # width of queries and keys
    with torch.no_grad():
        bias = None if attention.q_bias is None else torch.cat((attention.q_bias, attention.k_bias))
        queries_keys = linear(windows, attention.qkv.weight[:width], bias)
        queries, keys = queries_keys.unflatten(2, (2, heads, -1)).permute(
            2, 0, 3, 1, 4
        )  # (B W, H, A, D / H)
        with torch.autocast(windows.device.type, enabled=False):
            cosine = normalize(queries.float(), dim=-1) @ normalize(keys.float(), dim=-1).transpose(
                -2, -1
            )
            similarity = (
                cosine * attention.logit_scale.float().clamp(max=math.log(100)).exp()
            )  # (B W, H, A, A)
            table = attention.cpb_mlp(attention.relative_coords_table).view(-1, heads)
            positions = table[attention.relative_position_index].permute(2, 0, 1)  # (H, A, A)
            similarity = similarity + 16 * positions.float().sigmoid()
            if mask is not None:
                similarity = (
                    similarity + mask.float().repeat(len(windows) // len(mask), 1, 1)[:, None]
                )
            return similarity.softmax(dim=-1)
