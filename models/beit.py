"""BEiT and BEiT v2 through timm's own class: a plain vision transformer with relative position
biases.

"Last block" is `blocks[-1]`; its biases, its own and those shared by all blocks, are part of the
map. The class token's row and column are cut, or its row alone is read. Members that predict from
the mean have no norm before it: their tokens are the last block's, and `fc_norm` belongs to the
classifier. Knows no mixer and no loss.

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
from models.float32_attention import like_its_layer
from models.prefix_tokens import attend_from_first

TABLE = "relative_position_bias_table"
INDEX = "relative_position_index"  # timm computes it; official files have it
EXTRA = 3  # entries at a table's end: class token to image token, image to class, class to class


class BEiT(PlainTransformer):
    """Any timm `Beit`.

    Raises:
        ValueError: it does not pool its tokens, so it gives no prediction for an image.
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
        shared = (
            network.rel_pos_bias() if network.rel_pos_bias is not None else None
        )  # (H, 1 + N, 1 + N)
        return network.pos_drop(tokens), [{"shared_rel_pos_bias": shared}] * len(network.blocks)

    def map_of(
        self, block: Any, tokens: Tensor, beside: dict[str, Any], class_only: bool
    ) -> Tensor:
        return biased_attention_map(
            block.attn, block.norm1(tokens), beside["shared_rel_pos_bias"], class_only
        )

    def attend(
        self, block: Any, tokens: Tensor, beside: dict[str, Any], count: int
    ) -> tuple[Tensor, Tensor] | None:
        if type(block) is not Block:
            return None
        return attend_and_map(block.attn, block.norm1(tokens), beside["shared_rel_pos_bias"], count)

    def classify(self, pooled: Tensor) -> Tensor:
        network = self.network
        return network.head(network.head_drop(network.fc_norm(pooled)))

    def resize_weights(
        self, weights: Mapping[str, Tensor], old_grid: tuple[int, int] | None
    ) -> tuple[dict[str, Tensor], list[str]]:
        own = self.network.state_dict()
        new = {key: value for key, value in weights.items() if not key.endswith(INDEX)}
        new.update(
            {key: value for key, value in own.items() if key.endswith(INDEX)}
        )  # older releases save them
        notes = [f"{key} dropped: the network computes it" for key in weights if key not in new]
        for key, value in new.items():
            if key == "pos_embed":
                new[key] = resize_positions(
                    value, self.grid_size, self.network.num_prefix_tokens, old_grid
                )
            elif (
                key == "patch_embed.proj.weight"
                and value.ndim == 4
                and value.shape[2:] != self.patch_size
            ):
                new[key] = resample_patch_embed(value, list(self.patch_size))
            elif key.endswith(TABLE) and value.ndim == 2:
                new[key] = resize_table(value, self.grid_size, old_grid)
            if new[key] is not value:
                notes.append(f"{key} resized from {tuple(value.shape)} to {tuple(new[key].shape)}")
        return new, notes


@like_its_layer
def biased_attention_map(
    attention: Any, tokens: Tensor, shared_bias: Tensor | None, class_only: bool
) -> Tensor:
    """The map A of Eq. 5 that a BEiT layer would use on `tokens`, in float32 and without gradient.

    Queries and keys are computed a second time here (values are not).

    Args:
        attention: timm's `Attention` of this family.
        tokens: (B, T, D), what the layer itself receives.
        shared_bias: (H, T, T), what all layers add before the softmax.
        class_only: compute the first token's row alone (Q = 1), else all (Q = T).

    Returns:
        (B, H, Q, T), rows (queries) sum to one.
    """
    with torch.no_grad():
        queries, keys = queries_and_keys(attention, tokens, class_only)
        bias = position_bias(attention, shared_bias, queries.shape[2])
        return softmax_map(queries, keys, attention.scale, bias)


@like_its_layer
def attend_and_map(
    attention: Any, tokens: Tensor, shared_bias: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    """What a BEiT layer gives the first of `tokens` (B, T, D), (B, count, D), and its map (B, H, T,
    T)."""
    queries, keys, values = queries_keys_values(attention, tokens)
    bias = position_bias(attention, shared_bias, tokens.shape[1])
    rows = None if bias is None else bias[:, :, :count]
    attended = attend_from_first(attention, tokens, (queries, keys, values), count, rows)
    return attended, softmax_map(queries, keys, attention.scale, bias)


def position_bias(attention: Any, shared_bias: Tensor | None, count: int) -> Tensor | None:
    """(1, H, count, T), what a layer adds before the softmax for its first queries: its own biases
    and the shared."""
    own = (
        None if attention.relative_position_bias_table is None else attention._get_rel_pos_bias()
    )  # (1, H, T, T)
    if own is None or shared_bias is None:
        bias = own if shared_bias is None else shared_bias[None]
    else:
        bias = own + shared_bias
    return None if bias is None else bias[:, :, :count]


def resize_table(table: Tensor, grid: tuple[int, int], old_grid: tuple[int, int] | None) -> Tensor:
    """A table of relative positions (entries, H) for another grid, by timm's rule; the same tensor
    if nothing is to do.

    Args:
        old_grid: the grid it belongs to. If absent: this one if the count fits, else a square.
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
    square = near.T.reshape(
        heads, *old_size
    )  # in this shape all supported releases take grids that are not square
    resized = resize_rel_pos_bias_table(square, new_window_size=grid, new_bias_shape=(heads, *size))
    return torch.cat((resized.reshape(heads, -1).T, extra))
