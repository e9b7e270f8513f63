"""BEiT and BEiT v2 of timm: plain vision transformers with relative position biases.

The last block is `blocks[-1]`. Its map includes its position biases and those that all blocks
share. For the score of the image tokens, the row and column of the class token are removed.
Networks that predict from the mean token have no norm before the mean. Their final tokens are the
output of the last block, and `fc_norm` is a part of the classifier F.

Papers: BEiT (arXiv 2106.08254), BEiT v2 (arXiv 2208.06366).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import resample_patch_embed, resize_rel_pos_bias_table
from timm.models.beit import Beit, Block
from torch import Tensor

from models.blocks import (
    PlainTransformer,
    queries_and_keys,
    queries_keys_values,
    resize_positions,
    softmax_map,
)
from models.float32_attention import in_layer_precision
from models.prefix_tokens import attend_prefix

TABLE = "relative_position_bias_table"
INDEX = "relative_position_index"  # a buffer that timm computes; official files contain it

# Entries at the end of a table: class token to image token, image to class, class to class.
EXTRA = 3


class BEiT(PlainTransformer):
    """Any timm `Beit`.

    Raises:
        ValueError: it does not pool its tokens, so it has no logits for an image.
    """

    network: Beit

    def __init__(self, network: Beit, separate_region_head: bool = False) -> None:
        if not network.global_pool:
            raise ValueError("it has no pooling (global_pool is empty)")
        super().__init__(network, network.embed_dim, network.num_classes, separate_region_head)

    def embed(self, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        network = self.network
        tokens = network.patch_embed(images)  # (B, N, D)
        tokens = torch.cat((network.cls_token.expand(len(tokens), -1, -1), tokens), dim=1)
        if network.pos_embed is not None:
            tokens = tokens + network.pos_embed
        # The position bias that all blocks share: (H, 1 + N, 1 + N).
        shared = None if network.rel_pos_bias is None else network.rel_pos_bias()
        return network.pos_drop(tokens), [{"shared_rel_pos_bias": shared}] * len(network.blocks)

    def block_attention_map(
        self, block: Any, tokens: Tensor, block_args: dict[str, Any], class_only: bool
    ) -> Tensor:
        shared_bias = block_args["shared_rel_pos_bias"]
        return biased_attention_map(block.attn, block.norm1(tokens), shared_bias, class_only)

    def attend_and_map(
        self, block: Any, tokens: Tensor, block_args: dict[str, Any], count: int
    ) -> tuple[Tensor, Tensor] | None:
        if type(block) is not Block:
            return None
        shared_bias = block_args["shared_rel_pos_bias"]
        return attend_and_map(block.attn, block.norm1(tokens), shared_bias, count)

    def classify(self, pooled: Tensor) -> Tensor:
        network = self.network
        return network.head(network.head_drop(network.fc_norm(pooled)))

    def resize_weights(
        self, weights: Mapping[str, Tensor], old_grid: tuple[int, int] | None
    ) -> tuple[dict[str, Tensor], list[str]]:
        own = self.network.state_dict()
        new = {key: value for key, value in weights.items() if not key.endswith(INDEX)}
        # In older releases of timm the index is a part of the state dict.
        new.update({key: value for key, value in own.items() if key.endswith(INDEX)})
        notes = [f"{key} dropped: the network computes it" for key in weights if key not in new]
        kernel = "patch_embed.proj.weight"
        for key, value in new.items():
            if key == "pos_embed":
                new[key] = resize_positions(
                    value, self.grid_size, self.network.num_prefix_tokens, old_grid
                )
            elif key == kernel and value.ndim == 4 and value.shape[2:] != self.patch_size:
                new[key] = resample_patch_embed(value, list(self.patch_size))
            elif key.endswith(TABLE) and value.ndim == 2:
                new[key] = resize_table(value, self.grid_size, old_grid)
            if new[key] is not value:
                notes.append(f"{key} resized from {tuple(value.shape)} to {tuple(new[key].shape)}")
        return new, notes


@in_layer_precision
def biased_attention_map(
    attention: Any, tokens: Tensor, shared_bias: Tensor | None, class_only: bool
) -> Tensor:
    """Eq. 5: the map A of a BEiT attention layer, in float32 and without gradient.

    Queries and keys are computed a second time here, but not values.

    Args:
        attention: timm's `Attention` of this family.
        tokens: (B, T, D), the input of the layer.
        shared_bias: (H, T, T), the bias that all layers add before the softmax.
        class_only: compute the row of the first token only (Q = 1), else all rows (Q = T).

    Returns:
        (B, H, Q, T). Rows (queries) sum to one.
    """
    with torch.no_grad():
        queries, keys = queries_and_keys(attention, tokens, class_only)
        bias = position_bias(attention, shared_bias, queries.shape[2])
        return softmax_map(queries, keys, attention.scale, bias)


@in_layer_precision
def attend_and_map(
    attention: Any, tokens: Tensor, shared_bias: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    """The output of a BEiT layer for its first `count` tokens, and its complete map.

    Args:
        tokens: (B, T, D), the input of the layer.
        shared_bias: (H, T, T), the bias that all layers add before the softmax.

    Returns:
        (B, count, D) and (B, H, T, T) float32.
    """
    queries, keys, values = queries_keys_values(attention, tokens)
    bias = position_bias(attention, shared_bias, tokens.shape[1])
    rows = None if bias is None else bias[:, :, :count]
    attended = attend_prefix(attention, tokens, (queries, keys, values), count, rows)
    return attended, softmax_map(queries, keys, attention.scale, bias)


def position_bias(attention: Any, shared_bias: Tensor | None, count: int) -> Tensor | None:
    """The sum of a layer's position bias and the shared one, for the first `count` queries.

    Returns:
        (1, H, count, T), or None if the network has neither.
    """
    has_table = attention.relative_position_bias_table is not None
    own = attention._get_rel_pos_bias() if has_table else None  # (1, H, T, T)
    if own is None or shared_bias is None:
        bias = own if shared_bias is None else shared_bias[None]
    else:
        bias = own + shared_bias
    return None if bias is None else bias[:, :, :count]


def resize_table(table: Tensor, grid: tuple[int, int], old_grid: tuple[int, int] | None) -> Tensor:
    """Resamples a table of relative position biases (entries, H) to another grid, by timm's rule.

    Args:
        old_grid: the grid it belongs to. None: `grid` if the number of entries agrees, else a
            square grid.

    Returns:
        The new table, or `table` itself if nothing has to change.
    """
    near, extra = table[:-EXTRA], table[-EXTRA:]
    size = 2 * grid[0] - 1, 2 * grid[1] - 1
    if old_grid is None:
        side = (math.isqrt(len(near)) + 1) // 2
        old_grid = grid if len(near) == math.prod(size) else (side, side)
    old_size = 2 * old_grid[0] - 1, 2 * old_grid[1] - 1
    if old_grid == grid or len(near) != math.prod(old_size):
        return table
    heads = table.shape[1]
    # All supported releases of timm resample a table of this shape, also if it is not square.
    maps = near.T.reshape(heads, *old_size)
    resized = resize_rel_pos_bias_table(maps, new_window_size=grid, new_bias_shape=(heads, *size))
    return torch.cat((resized.reshape(heads, -1).T, extra))
