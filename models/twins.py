"""Twins of timm (PCPVT and SVT): four stages, position encodings from convolutions.

The last block is the last one of the last stage. In all published networks it attends to all tokens
and does not reduce its keys, so its map is that of Eq. 5.

Paper: Twins (arXiv 2104.13840).
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.twins import GlobalSubSampleAttn, Twins
from torch import Tensor
from torch.nn.functional import linear

from models.blocks import require_mean_pooling
from models.float32_attention import in_layer_precision
from models.interface import AttentionOf, ImageModel, image_attention_score


class TwinsModel(ImageModel):
    """Any timm `Twins` whose last block attends to all tokens, and that predicts from their mean.

    Raises:
        ValueError: its last block attends in windows or to reduced keys, or the network predicts
            from something other than the mean.
    """

    network: Twins

    def __init__(self, network: Twins, separate_region_head: bool = False) -> None:
        blocks: Any = network.blocks[-1]
        attention = blocks[-1].attn
        if not isinstance(attention, GlobalSubSampleAttn):
            raise ValueError(
                f"the attention of its last block, {type(attention).__name__}, is not over all "
                "tokens"
            )
        if attention.sr is not None:
            raise ValueError(
                "its last block reduces its keys, so it gives no score to each single token"
            )
        require_mean_pooling(network)
        super().__init__(network, network.num_features, network.num_classes, separate_region_head)

    @property
    def grid_size(self) -> tuple[int, int]:
        last: Any = self.network.patch_embeds[-1]
        return last.H, last.W

    @property
    def patch_size(self) -> tuple[int, int]:
        embeds: Any = self.network.patch_embeds
        height = width = 1
        for embed in embeds:  # each divides the grid of the stage before
            height, width = height * embed.patch_size[0], width * embed.patch_size[1]
        return height, width

    def features(
        self, images: Tensor, need_attention: AttentionOf | None
    ) -> tuple[Tensor, Tensor | None]:
        network: Any = self.network
        if need_attention is None:
            return network.forward_features(images), None  # (B, N, D)
        stages = zip(
            network.patch_embeds, network.pos_drops, network.blocks, network.pos_block, strict=True
        )
        maps = block_input = images
        for embed, drop, blocks, encode in stages:
            tokens, grid = embed(maps)
            tokens = drop(tokens)
            for index, block in enumerate(blocks):
                block_input = tokens
                tokens = block(tokens, grid)
                if index == 0:  # the position encoding follows the first block of a stage
                    tokens = encode(tokens, grid)
            maps = tokens.transpose(1, 2).unflatten(2, grid).contiguous()  # (B, D, R, C)
        features, last = network.norm(tokens), network.blocks[-1][-1]
        with torch.no_grad():
            return features, global_score(last.attn, last.norm1(block_input))

    def image_tokens(self, features: Tensor) -> Tensor:
        return features

    def head(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.network.forward_head(features), None

    def classify(self, pooled: Tensor) -> Tensor:
        return self.network.head(self.network.head_drop(pooled))


@in_layer_precision
def global_score(attention: Any, tokens: Tensor) -> Tensor:
    """Eq. 6 for a layer that attends to all tokens, in float32 and without gradient.

    Queries and keys are computed a second time here, but not values.

    Args:
        tokens: (B, N, D), the input of the layer.

    Returns:
        (B, N).
    """
    width, heads = attention.q.out_features, attention.num_heads
    with torch.no_grad():
        queries = attention.q(tokens).unflatten(2, (heads, -1)).transpose(1, 2)  # (B, H, N, D / H)
        keys = linear(tokens, attention.kv.weight[:width], attention.kv.bias[:width])
        keys = keys.unflatten(2, (heads, -1)).transpose(1, 2)
        with torch.autocast(tokens.device.type, enabled=False):
            queries = queries.float() * attention.scale
            similarity = queries @ keys.float().transpose(-2, -1)  # (B, H, N, N)
            return image_attention_score(similarity.softmax(dim=-1), num_prefix_tokens=0)
