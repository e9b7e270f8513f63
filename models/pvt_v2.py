"""PVT v2 of timm: four stages without position embeddings; early stages reduce their keys.

The last block is the last one of the last stage. Its keys are all tokens (`sr_ratios` end in 1),
and its map is that of Eq. 5. There are two exceptions: the linear variants (`..._li`) attend to a
pooled grid of 7 x 7 keys, and an override of `sr_ratios` can reduce the keys of the last stage. The
attention that a key receives is then divided equally among the cells from which it was made, so the
scores still sum to one. Cells that belong to no key receive nothing.

Paper: PVT v2 (arXiv 2106.13797). Letters: B batch, R x C the final grid, N = R * C, M keys, H
heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.pvt_v2 import PyramidVisionTransformerV2, checkpoint_filter_fn
from torch import Tensor
from torch.nn.functional import avg_pool2d, linear

from models.blocks import require_mean_pooling, run_block
from models.float32_attention import in_layer_precision
from models.interface import AttentionOf, ImageModel


class PVTv2(ImageModel):
    """Any timm `PyramidVisionTransformerV2` that predicts from the mean of its tokens.

    Args:
        input_size: (height, width) in pixels. timm's class accepts any size and stores none. None:
            224 x 224, the size of the published weights.

    Raises:
        ValueError: it predicts from something other than the mean.
    """

    network: PyramidVisionTransformerV2

    def __init__(
        self,
        network: PyramidVisionTransformerV2,
        separate_region_head: bool = False,
        input_size: tuple[int, int] | None = None,
    ) -> None:
        require_mean_pooling(network)
        super().__init__(network, network.num_features, network.num_classes, separate_region_head)
        self.image_size = input_size or (224, 224)

    @property
    def grid_size(self) -> tuple[int, int]:
        """The grid of the last stage.

        For an input size that timm would pad, it has fewer rows or columns than timm's grid.
        """
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def patch_size(self) -> tuple[int, int]:
        # The first stage has patches of 4 x 4 pixels; each later one halves the grid.
        stride = 4 * 2 ** (len(self.network.stages) - 1)
        return stride, stride

    def features(
        self, images: Tensor, need_attention: AttentionOf | None
    ) -> tuple[Tensor, Tensor | None]:
        network = self.network
        if need_attention is None:
            return network.forward_features(images), None  # (B, D, R, C)
        maps = network.patch_embed(images)
        for stage in network.stages[:-1]:
            maps = stage(maps)
        final: Any = network.stages[-1]
        if final.downsample is not None:
            maps = final.downsample(maps)  # (B, R, C, D)
        grid = maps.shape[1:3]
        tokens = maps.flatten(1, 2)  # (B, N, D)
        for block in final.blocks[:-1]:
            tokens = run_block(final, block, tokens, grid)
        last = final.blocks[-1]
        normed = final.norm(run_block(final, last, tokens, grid))  # (B, N, D)
        features = normed.transpose(1, 2).unflatten(2, grid).contiguous()  # (B, D, R, C)
        with torch.no_grad():
            return features, reduced_score(last.attn, last.norm1(tokens), grid)

    def image_tokens(self, features: Tensor) -> Tensor:
        return features.flatten(2).transpose(1, 2)

    def head(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.network.forward_head(features), None

    def classify(self, pooled: Tensor) -> Tensor:
        return self.network.head(self.network.head_drop(pooled))

    def resize_weights(
        self, weights: Mapping[str, Tensor], old_grid: tuple[int, int] | None
    ) -> tuple[dict[str, Tensor], list[str]]:
        # No weight depends on the input size; timm's function renames those of official files.
        new = dict(checkpoint_filter_fn(dict(weights), self.network))
        return new, [f"{key} renamed or dropped" for key in weights if key not in new]


@in_layer_precision
def reduced_score(attention: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Eq. 6 for a layer that may reduce its keys, in float32 and without gradient.

    Queries and keys are computed a second time here, but not values.

    Args:
        attention: timm's `Attention` of this family.
        tokens: (B, N, D), the input of the layer.
        grid: R and C.

    Returns:
        (B, N), row-major over the grid.
    """
    width, heads = attention.q.out_features, attention.num_heads
    with torch.no_grad():
        maps = tokens.transpose(1, 2).unflatten(2, grid)  # (B, D, R, C)
        one_hot = torch.eye(tokens.shape[1], device=tokens.device)  # (N, N)
        cells = one_hot.unflatten(1, grid)[:, None]  # (N, 1, R, C)

        # The tokens (B, M, D) that become keys, and the share of each cell in each key: the same
        # pooling of one-hot maps.
        if attention.pool is not None:
            reduced = attention.sr(attention.pool(maps)).flatten(2).transpose(1, 2)
            key_tokens, shares = attention.act(attention.norm(reduced)), attention.pool(cells)
        elif attention.sr is not None:
            key_tokens = attention.norm(attention.sr(maps).flatten(2).transpose(1, 2))
            shares = avg_pool2d(cells, attention.sr.kernel_size, attention.sr.stride)
        else:
            key_tokens, shares = tokens, cells

        bias = None if attention.kv.bias is None else attention.kv.bias[:width]
        keys = linear(key_tokens, attention.kv.weight[:width], bias)
        keys = keys.unflatten(2, (heads, -1)).transpose(1, 2)  # (B, H, M, D / H)
        queries = attention.q(tokens).unflatten(2, (heads, -1)).transpose(1, 2)  # (B, H, N, D / H)
        with torch.autocast(tokens.device.type, enabled=False):
            queries = queries.float() * attention.scale
            similarity = queries @ keys.float().transpose(-2, -1)  # (B, H, N, M)
            received = similarity.softmax(dim=-1).mean(dim=(1, 2))  # (B, M)
            return received @ shares.flatten(1).float().T  # (B, M) @ (M, N)
