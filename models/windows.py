"""Swin, versions 1 and 2: the parts that both share, and the score of attention in windows.

Letters: B batch, R x C grid, N = R * C tokens, D width, H heads, W windows of A tokens each.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor
from torch.nn.functional import pad

from models.blocks import require_mean_pooling, run_block
from models.interface import AttentionOf, GuideOutput, ImageModel, ScoreBlock


class WindowedTransformer(ImageModel):
    """A family with attention in windows, tokens merged between stages, and logits from their mean.

    A family implements `block_score`.

    Raises:
        ValueError: the network predicts from something other than the mean.
    """

    network: Any  # timm's SwinTransformer, version 1 or 2, whose parts have the same names

    def __init__(self, network: Any, separate_region_head: bool = False) -> None:
        require_mean_pooling(network)
        super().__init__(network, network.num_features, network.num_classes, separate_region_head)

    @property
    def grid_size(self) -> tuple[int, int]:
        """The grid of the last stage.

        For an input size that timm would pad, it has fewer rows or columns than timm's grid.
        """
        height, width = self.network.patch_embed.img_size
        return height // self.patch_size[0], width // self.patch_size[1]

    @property
    def patch_size(self) -> tuple[int, int]:
        height, width = self.network.patch_embed.patch_size
        merged = 2 ** (len(self.network.layers) - 1)  # each stage after the first halves the grid
        return height * merged, width * merged

    @abstractmethod
    def block_score(self, block: Any, tokens: Tensor) -> Tensor:
        """The score (B, N) of a block, from its input (B, R, C, D)."""

    def features(
        self, images: Tensor, need_attention: AttentionOf | None
    ) -> tuple[Tensor, Tensor | None]:
        network = self.network
        if need_attention is None:
            return network.forward_features(images), None  # (B, R, C, D)
        final, last = network.layers[-1], network.layers[-1].blocks[-1]
        tokens = self._last_block_input(images)
        features = network.norm(run_block(final, last, tokens))
        with torch.no_grad():
            return features, self.block_score(last, tokens)

    def _last_block_input(self, images: Tensor) -> Tensor:
        """The tokens (B, R, C, D) that the last block receives."""
        network = self.network
        tokens = network.patch_embed(images)
        for stage in network.layers[:-1]:
            tokens = stage(tokens)
        final = network.layers[-1]
        tokens = final.downsample(tokens)  # (B, R, C, D)
        for block in final.blocks[:-1]:
            tokens = run_block(final, block, tokens)
        return tokens

    def guide_output(
        self, images: Tensor, resized: bool, block: ScoreBlock, predict: bool
    ) -> GuideOutput:
        """The motivating pass; without `predict` the last block computes only its score."""
        if predict:
            return super().guide_output(images, resized, block, predict)
        last = self.network.layers[-1].blocks[-1]
        return GuideOutput(None, self.block_score(last, self._last_block_input(images)))

    def image_tokens(self, features: Tensor) -> Tensor:
        return features.flatten(1, 2)

    def head(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.network.forward_head(features), None

    def classify(self, pooled: Tensor) -> Tensor:
        head = self.network.head
        return head.fc(head.drop(pooled))


def windowed_score(
    block: Any, tokens: Tensor, attention_of: Callable[[Any, Tensor, Tensor | None], Tensor]
) -> Tensor:
    """Eq. 6 for attention in windows: averaged over heads and the queries of the same window.

    Tokens that timm adds as padding are not counted as queries. The attention that they receive is
    removed, and the rest is not normalised again. Scores sum to the number of windows, minus the
    attention that padding receives.

    Args:
        block: a block of timm's Swin, version 1 or 2, with W windows of A tokens each.
        tokens: (B, R, C, D), the input of the block's attention.
        attention_of: layer, windows (B W, A, D) and mask (W, A, A) -> map (B W, H, A, A) in float32
            without gradient.

    Returns:
        (B, N) float32, row-major over the grid, without gradient.
    """
    batch, rows, columns, _ = tokens.shape
    size, (down, right) = block.window_size, block.shift_size

    # Shift, then pad, then cut into windows: the order of timm's block.
    padding = (0, 0, 0, -columns % size[1], 0, -rows % size[0])
    shifted = pad(torch.roll(tokens, (-down, -right), dims=(1, 2)), padding)
    padded_rows, padded_columns = shifted.shape[1:3]
    windows = window_partition(shifted, size).flatten(1, 2)  # (B W, A, D)
    mask = block.get_attn_mask(shifted) if block.dynamic_mask else block.attn_mask  # (W, A, A)
    attention = attention_of(block.attn, windows, mask)  # (B W, H, A, A)

    # The weights of a mean over the queries of each window, 0 for padding.
    is_image = pad(attention.new_ones(1, rows, columns, 1), padding)
    is_query = window_partition(is_image, size).flatten(1)  # (W, A)
    weights = (is_query / is_query.sum(dim=1, keepdim=True)).repeat(batch, 1)  # (B W, A)
    # Not a matrix product: autocast would compute it in lower precision.
    received = (attention.mean(dim=1) * weights[:, :, None]).sum(dim=1)  # (B W, A)

    # Back to the grid: windows joined, padding cut off, the shift undone.
    maps = received.unflatten(1, size).unsqueeze(3)
    score = window_reverse(maps, size, padded_rows, padded_columns)[:, :rows, :columns]
    return torch.roll(score, (down, right), dims=(1, 2)).flatten(1)  # (B, N)
