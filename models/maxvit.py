"""MaxViT and CoAtNet of timm (`MaxxVit`): convolutions first, attention in the last blocks.

The last block is the last one of the last stage. Its map is that of the grid attention in MaxViT,
which follows the window attention, and of the attention over all tokens in CoAtNet. At timm's
published sizes one grid covers the last stage, and its map is that of Eq. 5. At other sizes MaxViT
divides the tokens among several grids. The score of a token is then averaged over the queries of
its grid and divided by the number of grids, so the scores sum to one.

Papers: MaxViT (arXiv 2204.01697), CoAtNet (arXiv 2106.04803). Letters: W grids of A tokens each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import NormMlpClassifierHead
from timm.models.maxxvit import (
    MaxxVit,
    MaxxVitBlock,
    TransformerBlock2d,
    checkpoint_filter_fn,
    grid_partition,
    grid_reverse,
)
from torch import Tensor, nn
from torch.nn.functional import linear

from models.blocks import require_mean_pooling, run_block
from models.float32_attention import in_layer_precision
from models.interface import AttentionOf, ImageModel


class MaxViT(ImageModel):
    """Any timm `MaxxVit` that ends in one attention layer and predicts from the mean of its tokens.

    Raises:
        ValueError: its last block is of another class or has batch norm, or it predicts from
            something other than the mean.
    """

    network: MaxxVit

    def __init__(self, network: MaxxVit, separate_region_head: bool = False) -> None:
        blocks: Any = network.stages[-1].blocks
        last = blocks[-1]
        if not isinstance(last, (MaxxVitBlock, TransformerBlock2d)):
            raise ValueError(
                f"its last block is a {type(last).__name__}, which has no single attention map"
            )
        require_mean_pooling(network)
        first_norm = last.attn_grid.norm1 if isinstance(last, MaxxVitBlock) else last.norm1
        batch_norm = nn.modules.batchnorm._BatchNorm
        if any(isinstance(module, batch_norm) for module in first_norm.modules()):
            raise ValueError(
                "its last block has batch norm, whose statistics would change when the score is "
                "computed"
            )
        super().__init__(network, network.num_features, network.num_classes, separate_region_head)
        self.image_size = input_size_of(network)

    @property
    def grid_size(self) -> tuple[int, int]:
        """The grid of the last stage.

        For an input size that timm would round up, it has fewer rows or columns than timm's grid.
        """
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def patch_size(self) -> tuple[int, int]:
        stride = self.network.stem.stride * 2 ** len(self.network.stages)
        return stride, stride

    def features(
        self, images: Tensor, need_attention: AttentionOf | None
    ) -> tuple[Tensor, Tensor | None]:
        network = self.network
        if need_attention is None:
            return network.forward_features(images), None  # (B, D, R, C)
        maps = network.stem(images)
        for stage in network.stages[:-1]:
            maps = stage(maps)
        final: Any = network.stages[-1]
        for block in final.blocks[:-1]:
            maps = run_block(final, block, maps)
        last = final.blocks[-1]
        if isinstance(last, TransformerBlock2d):
            features = network.norm(run_block(final, last, maps))
            with torch.no_grad():
                # If the block halves the grid, `norm1` already does so.
                attention_input = last.norm1(maps).permute(0, 2, 3, 1)  # (B, R, C, D)
                size = tuple(attention_input.shape[1:3])
                return features, grid_score(last.attn, attention_input, size)
        maps = run_block(final, last.conv, maps)
        maps = maps if last.nchw_attn else maps.permute(0, 2, 3, 1)
        if last.attn_block is not None:
            maps = run_block(final, last.attn_block, maps)
        features = run_block(final, last.attn_grid, maps)
        features = network.norm(features if last.nchw_attn else features.permute(0, 3, 1, 2))
        with torch.no_grad():
            grid_block = last.attn_grid
            normed = grid_block.norm1(maps)
            # (B, R, C, D)
            attention_input = normed.permute(0, 2, 3, 1) if last.nchw_attn else normed
            size = grid_block.partition_size
            return features, grid_score(grid_block.attn, attention_input, size)

    def image_tokens(self, features: Tensor) -> Tensor:
        return features.flatten(2).transpose(1, 2)

    def head(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.network.forward_head(features), None

    def classify(self, pooled: Tensor) -> Tensor:
        head = self.network.head
        tokens = pooled.reshape(-1, pooled.shape[-1])
        if isinstance(head, NormMlpClassifierHead):  # a norm and a hidden layer after the mean
            tokens = head.pre_logits(head.flatten(head.norm(tokens[:, :, None, None])))
        return head.fc(head.drop(tokens)).reshape(*pooled.shape[:-1], -1)

    def resize_weights(
        self, weights: Mapping[str, Tensor], old_grid: tuple[int, int] | None
    ) -> tuple[dict[str, Tensor], list[str]]:
        own, new, notes = self.network.state_dict(), dict(weights), []
        for key, value in weights.items():
            if key in own and own[key].shape != value.shape:
                try:
                    new[key] = checkpoint_filter_fn({key: value}, self.network)[key]
                except (AssertionError, RuntimeError, ValueError):
                    continue  # the strict loading that follows reports it
            if new[key].shape != value.shape:
                notes.append(f"{key} resized from {tuple(value.shape)} to {tuple(new[key].shape)}")
        return new, notes


def input_size_of(network: MaxxVit) -> tuple[int, int]:
    """Height and width in pixels for which the network was built.

    Older releases of timm do not store them. One grid is then assumed to cover the last stage.
    """
    if hasattr(network, "img_size"):
        size: Any = network.img_size
        return size[0], size[1]
    blocks: Any = network.stages[-1].blocks
    last = blocks[-1]
    if isinstance(last, MaxxVitBlock):
        grid = last.attn_grid.partition_size
    else:
        grid = last.attn.rel_pos.window_size
    stride = network.stem.stride * 2 ** len(network.stages)
    return grid[0] * stride, grid[1] * stride


@in_layer_precision
def grid_score(attention: Any, tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Eq. 6 for grid attention: averaged over heads and the queries of the same grid, over W.

    The joint projection is computed a second time here, values included: some networks order it
    head by head, so the part of queries and keys cannot be cut out.

    Args:
        attention: timm's `Attention2d` or `AttentionCl`.
        tokens: (B, R, C, D), the input of the layer before it is divided into grids.
        size: rows and columns of one grid. Its tokens are spread evenly over all R x C tokens.

    Returns:
        (B, N) float32, row-major over R x C, without gradient.
    """
    batch, heads = len(tokens), attention.num_heads
    with torch.no_grad():
        grids = grid_partition(tokens, list(size)).flatten(1, 2)  # (B W, A, D)
        joint = linear(grids, attention.qkv.weight.flatten(1), attention.qkv.bias)
        order = (heads, 3, -1) if attention.head_first else (3, heads, -1)
        joint = joint.unflatten(2, order)
        joint = joint if attention.head_first else joint.transpose(2, 3)  # (B W, A, H, 3, D / H)
        queries, keys, _ = joint.transpose(1, 2).unbind(3)  # (B W, H, A, D / H)
        with torch.autocast(tokens.device.type, enabled=False):
            queries = queries.float() * attention.scale
            similarity = queries @ keys.float().transpose(-2, -1)  # (B W, H, A, A)
            if attention.rel_pos is not None:
                similarity = similarity + attention.rel_pos.get_bias().float()
            received = similarity.softmax(dim=-1).mean(dim=(1, 2)) * batch / len(grids)  # (B W, A)
            maps = received.unflatten(1, size).unsqueeze(3)
            return grid_reverse(maps, list(size), list(tokens.shape[1:3])).flatten(1)  # (B, N)
