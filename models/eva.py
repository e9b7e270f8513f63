"""EVA, EVA-02 and further plain transformers of timm's `Eva` class, most of them with rotary
position embeddings.

"Last block" is `blocks[-1]`; queries and keys are turned by its rotary embedding before they are
compared. Rows and columns of class and register tokens are cut. The class token, where there is
one, is the first. Where `fc_norm` comes after the mean it belongs to the classifier, and the tokens
are the last block's. Knows no mixer and no loss.

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
from models.float32_attention import like_its_layer
from models.prefix_tokens import attend_from_first


class EVA(PlainTransformer):
    """Any timm `Eva` that pools its tokens and keeps all of them.

    Raises:
        ValueError: it drops patches while training, or gives no prediction for an image.
    """

    network: Eva

    def __init__(self, network: Eva, separate_region_head: bool = False) -> None:
        if not network.global_pool:
            raise ValueError("it has no pooling (global_pool is empty)")
        if network.patch_drop is not None:
            raise ValueError(
                "it drops patches while training (patch_drop_rate), so regions lose their tokens"
            )
        super().__init__(network, network.embed_dim, network.num_classes, separate_region_head)

    def embed(self, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        network = self.network
        tokens, rotation = network._pos_embed(
            network.patch_embed(images)
        )  # (B, T, D), (N, 2 D / H)
        if getattr(network, "norm_pre", None) is not None:  # not in timm's older releases
            tokens = network.norm_pre(tokens)
        own = (
            getattr(network, "rope_mixed", False) and rotation is not None
        )  # a rotation for each block and head
        rotations: Any = rotation if own else [rotation] * len(network.blocks)
        return tokens, [{"rope": turn} for turn in rotations]

    def map_of(
        self, block: Any, tokens: Tensor, beside: dict[str, Any], class_only: bool
    ) -> Tensor:
        seen = (
            block.norm1(tokens) if isinstance(block, EvaBlock) else tokens
        )  # a post-norm block sees its raw input
        return rotated_attention_map(block.attn, seen, beside["rope"], class_only)

    def attend(
        self, block: Any, tokens: Tensor, beside: dict[str, Any], count: int
    ) -> tuple[Tensor, Tensor] | None:
        if type(block) is not EvaBlock:
            return None
        return attend_and_map(block.attn, block.norm1(tokens), beside["rope"], count)

    def classify(self, pooled: Tensor) -> Tensor:
        network = self.network
        return network.head(
            network.head_drop(network.fc_norm(pooled))
        )  # attention pooling has no part in F

    def resize_weights(
        self, weights: Mapping[str, Tensor], old_grid: tuple[int, int] | None
    ) -> tuple[dict[str, Tensor], list[str]]:
        new, notes = dict(weights), []
        own = self.network.pos_embed
        for key, value in weights.items():
            if key == "pos_embed" and own is not None:
                prefix = own.shape[1] - math.prod(
                    self.grid_size
                )  # some give prefix tokens no position
                new[key] = resize_positions(value, self.grid_size, prefix, old_grid)
            elif (
                key == "patch_embed.proj.weight"
                and value.ndim == 4
                and value.shape[2:] != self.patch_size
            ):
                new[key] = resample_patch_embed(value, list(self.patch_size))
            if new[key] is not value:
                notes.append(f"{key} resized from {tuple(value.shape)} to {tuple(new[key].shape)}")
        return new, notes


@like_its_layer
def rotated_attention_map(
    attention: Any, tokens: Tensor, rotation: Tensor | None, class_only: bool
) -> Tensor:
    """The map A of Eq. 5 that an EVA layer would use on `tokens`, in float32 and without gradient.

    Queries and keys are computed a second time here (values are not).

    Args:
        attention: timm's `EvaAttention` or `AttentionRope`: one joint projection or three, keys for
            fewer heads or all.
        tokens: (B, T, D), what the layer itself receives.
        rotation: sines and cosines for the N image tokens: (N, 2 D / H), or (H, N, 2 D / H) where
            heads differ.
        class_only: compute the first token's row alone (Q = 1), else all (Q = T).

    Returns:
        (B, H, Q, T), rows (queries) sum to one.
    """
    heads, scale = attention.num_heads, attention.scale
    with torch.no_grad():
        if attention.qkv is None:
            queries = split_heads(
                attention.q_proj(tokens[:, :1] if class_only else tokens), heads
            )  # (B, H, Q, D / H)
            keys = split_heads(attention.k_proj(tokens), getattr(attention, "num_kv_heads", heads))
        else:
            queries, keys = queries_and_keys(attention, tokens, class_only)
        return softmax_map(
            *_comparable(attention, queries, keys, None if class_only else rotation, rotation),
            scale,
        )


@like_its_layer
def attend_and_map(
    attention: Any, tokens: Tensor, rotation: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    """What an EVA layer gives the first of `tokens` (B, T, D), (B, count, D), and its map (B, H, T,
    T)."""
    if attention.qkv is None:
        heads, fewer = attention.num_heads, getattr(attention, "num_kv_heads", attention.num_heads)
        queries = split_heads(attention.q_proj(tokens), heads)
        keys, values = (
            split_heads(project(tokens), fewer) for project in (attention.k_proj, attention.v_proj)
        )
        values = values.repeat_interleave(heads // fewer, dim=1)
    else:
        queries, keys, values = queries_keys_values(attention, tokens)
    queries, keys = _comparable(attention, queries, keys, rotation, rotation)
    parts = queries.type_as(values), keys.type_as(values), values
    return attend_from_first(attention, tokens, parts, count), softmax_map(
        queries, keys, attention.scale
    )


def _comparable(
    attention: Any,
    queries: Tensor,
    keys: Tensor,
    turn_queries: Tensor | None,
    turn_keys: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys as they are compared: normed, turned, with as many heads; in float32."""
    if getattr(attention, "q_norm", None) is not None:  # not in timm's older releases
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = (
            _turn(attention, queries.float(), turn_queries),
            _turn(attention, keys.float(), turn_keys),
        )
    return queries, keys.repeat_interleave(attention.num_heads // keys.shape[1], dim=1)


def _turn(attention: Any, parts: Tensor, rotation: Tensor | None) -> Tensor:
    """Queries or keys (B, H, T, D / H) with their image tokens turned; class and register tokens
    stay."""
    if rotation is None:
        return parts
    prefix = attention.num_prefix_tokens
    layout = (
        {"half": True} if getattr(attention, "rotate_half", False) else {}
    )  # older releases know one layout
    turned = apply_rot_embed_cat(parts[:, :, prefix:], rotation.float(), **layout)
    return torch.cat((parts[:, :, :prefix], turned), dim=2)
