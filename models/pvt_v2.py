"""PVT v2 through timm's own class: four stages without position embeddings, keys from a shrunk grid
in the early ones.

"Last block" is the last one of the last stage. There its keys are its own tokens (`sr_ratios` end
in 1) and the map is Eq. 5's. The linear members (`..._li`) attend to a pooled grid of 7 x 7, and an
override can shrink the keys of the last stage too: what a key receives is then shared equally by
the cells it was made from, so the scores still sum to one; cells that no key covers receive
nothing. Knows no mixer and no loss.

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

from models.blocks import run_block
from models.float32_attention import like_its_layer
from models.interface import AttentionOf, ImageModel


class PVTv2(ImageModel):
    """Any timm `PyramidVisionTransformerV2` that predicts from the mean of its tokens.

    Args:
        input_size: (height, width) in pixels. timm's class takes any size and knows none; its
            default is the one its published weights were trained on.

    Raises:
        ValueError: it predicts from something else.
    """

    network: PyramidVisionTransformerV2

    def __init__(
        self,
        network: PyramidVisionTransformerV2,
        separate_region_head: bool = False,
        input_size: tuple[int, int] | None = None,
    ) -> None:
        if network.global_pool != "avg":
            raise ValueError(
                f"global_pool is {network.global_pool!r}, and regions are classified by their mean "
                "token"
            )
        super().__init__(network, network.num_features, network.num_classes, separate_region_head)
        self.image_size = input_size or (224, 224)

    @property
    def grid_size(self) -> tuple[int, int]:
        """That of the last stage. A size which timm would pad on the way there gives fewer rows
        than timm's."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def patch_size(self) -> tuple[int, int]:
        stride = 4 * 2 ** (
            len(self.network.stages) - 1
        )  # each stage after the first halves the grid
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
        features = (
            final.norm(run_block(final, last, tokens, grid))
            .transpose(1, 2)
            .unflatten(2, grid)
            .contiguous()
        )
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
        new = dict(
            checkpoint_filter_fn(dict(weights), self.network)
        )  # nothing depends on the size: only other names
        return new, [f"{key} renamed or dropped" for key in weights if key not in new]


@like_its_layer
def reduced_score(attention: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Eq. 6 for a layer whose keys may come from a shrunk grid, in float32 and without gradient.

    Queries and keys are computed a second time here (values are not).

    Args:
        attention: timm's `Attention` of this family.
        tokens: (B, N, D), what the layer itself receives.
        grid: R and C.

    Returns:
        (B, N), row-major over the grid.
    """
    width, heads = attention.q.out_features, attention.num_heads
    with torch.no_grad():
        maps = tokens.transpose(1, 2).unflatten(2, grid)  # (B, D, R, C)
        cells = torch.eye(tokens.shape[1], device=tokens.device).unflatten(1, grid)[
            :, None
        ]  # (N, 1, R, C), one hot
        if attention.pool is not None:
            shrunk = attention.sr(attention.pool(maps)).flatten(2).transpose(1, 2)
            sources, shares = attention.act(attention.norm(shrunk)), attention.pool(cells)
        elif attention.sr is not None:
            sources = attention.norm(attention.sr(maps).flatten(2).transpose(1, 2))  # (B, M, D)
            shares = avg_pool2d(cells, attention.sr.kernel_size, attention.sr.stride)
        else:
            sources, shares = tokens, cells
        bias = None if attention.kv.bias is None else attention.kv.bias[:width]
        keys = (
            linear(sources, attention.kv.weight[:width], bias)
            .unflatten(2, (heads, -1))
            .transpose(1, 2)
        )
        queries = attention.q(tokens).unflatten(2, (heads, -1)).transpose(1, 2)  # (B, H, N, D / H)
        with torch.autocast(tokens.device.type, enabled=False):
            similarity = (queries.float() * attention.scale) @ keys.float().transpose(
                -2, -1
            )  # (B, H, N, M)
            received = similarity.softmax(dim=-1).mean(dim=(1, 2))  # (B, M)
            return received @ shares.flatten(1).float().T  # (B, M) @ (M, N)
