"""EVA, EVA-02 and other networks of timm's `Eva` class, most with rotary position embeddings.

The last block is `blocks[-1]`. Its map is computed from queries and keys after the rotary
embedding. Rows and columns of class and register tokens are removed from the score. A class token
is always the first token. If the network has `fc_norm` after the mean, that norm is a part of the
classifier F, and the final tokens are the output of the last block.

Papers: EVA (arXiv 2211.07636), EVA-02 (arXiv 2303.11331).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import apply_rot_embed_cat, resample_patch_embed
from timm.models.eva import Eva, EvaBlock
from torch import Tensor

from models.blocks import (
    PlainTransformer,
    queries_and_keys,
    queries_keys_values,
    resize_positions,
    softmax_map,
    split_heads,
)
from models.float32_attention import in_layer_precision
from models.prefix_tokens import attend_prefix


class EVA(PlainTransformer):
    """Any timm `Eva` that pools its tokens and keeps all of them.

    Raises:
        ValueError: it drops patches during training, or has no logits for an image.
    """

    network: Eva

    def __init__(self, network: Eva, separate_region_head: bool = False) -> None:
        if not network.global_pool:
            raise ValueError("it has no pooling (global_pool is empty)")
        if network.patch_drop is not None:
            raise ValueError(
                "it drops patches during training (patch_drop_rate), so regions lose their tokens"
            )
        super().__init__(network, network.embed_dim, network.num_classes, separate_region_head)

    def embed(self, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        network = self.network
        patches = network.patch_embed(images)
        tokens, rotation = network._pos_embed(patches)  # (B, T, D), (N, 2 D / H)
        if getattr(network, "norm_pre", None) is not None:  # absent in older releases of timm
            tokens = network.norm_pre(tokens)
        # With `rope_mixed` each block and head has its rotation, otherwise all share one.
        is_mixed = getattr(network, "rope_mixed", False) and rotation is not None
        rotations: Any = rotation if is_mixed else [rotation] * len(network.blocks)
        return tokens, [{"rope": block_rotation} for block_rotation in rotations]

    def block_attention_map(
        self, block: Any, tokens: Tensor, block_args: dict[str, Any], class_only: bool
    ) -> Tensor:
        # A post-norm block gives its attention the tokens without a norm.
        attention_input = block.norm1(tokens) if isinstance(block, EvaBlock) else tokens
        return rotated_attention_map(block.attn, attention_input, block_args["rope"], class_only)

    def attend_and_map(
        self, block: Any, tokens: Tensor, block_args: dict[str, Any], count: int
    ) -> tuple[Tensor, Tensor] | None:
        if type(block) is not EvaBlock:
            return None
        return attend_and_map(block.attn, block.norm1(tokens), block_args["rope"], count)

    def classify(self, pooled: Tensor) -> Tensor:
        network = self.network
        # Attention pooling, if the network has it, is not a part of F.
        return network.head(network.head_drop(network.fc_norm(pooled)))

    def resize_weights(
        self, weights: Mapping[str, Tensor], old_grid: tuple[int, int] | None
    ) -> tuple[dict[str, Tensor], list[str]]:
        new, notes = dict(weights), []
        own, kernel = self.network.pos_embed, "patch_embed.proj.weight"
        for key, value in weights.items():
            if key == "pos_embed" and own is not None:
                # In some networks the prefix tokens have no position.
                prefix = own.shape[1] - math.prod(self.grid_size)
                new[key] = resize_positions(value, self.grid_size, prefix, old_grid)
            elif key == kernel and value.ndim == 4 and value.shape[2:] != self.patch_size:
                new[key] = resample_patch_embed(value, list(self.patch_size))
            if new[key] is not value:
                notes.append(f"{key} resized from {tuple(value.shape)} to {tuple(new[key].shape)}")
        return new, notes


@in_layer_precision
def rotated_attention_map(
    attention: Any, tokens: Tensor, rotation: Tensor | None, class_only: bool
) -> Tensor:
    """Eq. 5: the map A of an EVA attention layer, in float32 and without gradient.

    Queries and keys are computed a second time here, but not values.

    Args:
        attention: timm's `EvaAttention` or `AttentionRope`, with one joint projection or three, and
            with keys for all heads or for fewer.
        tokens: (B, T, D), the input of the layer.
        rotation: sines and cosines for the N image tokens: (N, 2 D / H), or (H, N, 2 D / H) if
            heads differ.
        class_only: compute the row of the first token only (Q = 1), else all rows (Q = T).

    Returns:
        (B, H, Q, T). Rows (queries) sum to one.
    """
    heads, scale = attention.num_heads, attention.scale
    with torch.no_grad():
        if attention.qkv is None:
            query_tokens = tokens[:, :1] if class_only else tokens
            queries = split_heads(attention.q_proj(query_tokens), heads)  # (B, H, Q, D / H)
            keys = split_heads(attention.k_proj(tokens), getattr(attention, "num_kv_heads", heads))
        else:
            queries, keys = queries_and_keys(attention, tokens, class_only)
        # The class token is not rotated.
        query_rotation = None if class_only else rotation
        queries, keys = _norm_and_rotate(attention, queries, keys, query_rotation, rotation)
        return softmax_map(queries, keys, scale)


@in_layer_precision
def attend_and_map(
    attention: Any, tokens: Tensor, rotation: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    """The output of an EVA layer for its first `count` tokens, and its complete map.

    Args:
        tokens: (B, T, D), the input of the layer.
        rotation: as in `rotated_attention_map`.

    Returns:
        (B, count, D) and (B, H, T, T) float32.
    """
    if attention.qkv is None:
        heads = attention.num_heads
        kv_heads = getattr(attention, "num_kv_heads", heads)
        queries = split_heads(attention.q_proj(tokens), heads)
        keys = split_heads(attention.k_proj(tokens), kv_heads)
        values = split_heads(attention.v_proj(tokens), kv_heads)
        values = values.repeat_interleave(heads // kv_heads, dim=1)
    else:
        queries, keys, values = queries_keys_values(attention, tokens)
    queries, keys = _norm_and_rotate(attention, queries, keys, rotation, rotation)
    parts = queries.type_as(values), keys.type_as(values), values
    attended = attend_prefix(attention, tokens, parts, count)
    return attended, softmax_map(queries, keys, attention.scale)


def _norm_and_rotate(
    attention: Any,
    queries: Tensor,
    keys: Tensor,
    query_rotation: Tensor | None,
    key_rotation: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Applies norm and rotation in float32, and repeats keys until there is one for each head."""
    if getattr(attention, "q_norm", None) is not None:  # absent in older releases of timm
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    with torch.autocast(queries.device.type, enabled=False):
        queries = _rotate(attention, queries.float(), query_rotation)
        keys = _rotate(attention, keys.float(), key_rotation)
    return queries, keys.repeat_interleave(attention.num_heads // keys.shape[1], dim=1)


def _rotate(attention: Any, parts: Tensor, rotation: Tensor | None) -> Tensor:
    """Rotates the image tokens of queries or keys (B, H, T, D / H); prefix tokens stay."""
    if rotation is None:
        return parts
    prefix = attention.num_prefix_tokens
    # Older releases of timm have one layout and no argument for it.
    layout = {"half": True} if getattr(attention, "rotate_half", False) else {}
    rotated = apply_rot_embed_cat(parts[:, :, prefix:], rotation.float(), **layout)
    return torch.cat((parts[:, :, :prefix], rotated), dim=2)
