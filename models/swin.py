"""Swin (version 1) through timm's own class: attention inside windows, tokens merged from stage to
stage.

"Last block" is the last one of the last stage. Where one window covers its grid, as at 224 pixels,
its map is Eq. 5's. Elsewhere there is no map over all tokens: each token's score is then read in
its own window, from the queries of that window. Windows are comparable: where attention is equal,
it scores 1 / (tokens per window) in each of them. So, where nothing is padded, the scores sum to
the number of windows, not to one; a common factor does not change which region is picked. Knows no
mixer and no loss.

Paper: Swin Transformer (arXiv 2103.14030).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from timm.layers import resize_rel_pos_bias_table
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
)
from torch import Tensor
from torch.nn.functional import linear

from models.blocks import WindowedTransformer, windowed_score
from models.float32_attention import like_its_layer

TABLE = "relative_position_bias_table"
BUFFERS = (
    "relative_position_index",
    "attn_mask",
)  # in official files; timm computes them and does not save them


class Swin(WindowedTransformer):
    """Any timm `SwinTransformer` that predicts from the mean of its tokens.

    Raises:
        ValueError: it predicts from something else.
    """

    network: SwinTransformer

    def score(self, block: SwinTransformerBlock, tokens: Tensor) -> Tensor:
        return windowed_score(block, block.norm1(tokens), window_attention_map)

    def resize_weights(
        self, weights: Mapping[str, Tensor], old_grid: tuple[int, int] | None
    ) -> tuple[dict[str, Tensor], list[str]]:
        new, notes = from_official_names(weights)
        for name, layer in self.network.named_modules():
            table = new.get(f"{name}.{TABLE}")
            if not isinstance(layer, WindowAttention) or table is None or table.ndim != 2:
                continue
            window = layer.window_size
            if len(table) == (2 * window[0] - 1) * (2 * window[1] - 1) and old_grid in (
                None,
                self.grid_size,
            ):
                continue
            merged = 2 ** (
                len(self.network.layers) - 1 - int(name.split(".")[1])
            )  # name: layers.<stage>.blocks. ...
            old_window = window_of(
                len(table), old_grid and (old_grid[0] * merged, old_grid[1] * merged)
            )
            if old_window is not None and old_window != window:
                new[f"{name}.{TABLE}"] = resize_table(table, old_window, window)
                notes.append(f"{name}.{TABLE} resized from window {old_window} to {window}")
        return new, notes


@like_its_layer
def window_attention_map(
    attention: WindowAttention, windows: Tensor, mask: Tensor | None
) -> Tensor:
    """The map that a window attention layer would use, in float32 and without gradient.

    Args:
        windows: (B W, A, D), what the layer itself receives: W windows of A tokens from each image.
        mask: (W, A, A), added before the softmax: keeps apart what only the shift made neighbours.

    Returns:
        (B W, H, A, A), rows (queries) sum to one.
    """
    width = attention.qkv.out_features // 3 * 2  # of queries and keys
    weight, bias = attention.qkv.weight[:width], attention.qkv.bias
    with torch.no_grad():
        queries_keys = linear(windows, weight, None if bias is None else bias[:width])
        queries_keys = queries_keys.unflatten(
            2, (2, attention.num_heads, -1)
        )  # (B W, A, 2, H, D / H)
        queries, keys = queries_keys.permute(2, 0, 3, 1, 4)  # (B W, H, A, D / H)
        with torch.autocast(windows.device.type, enabled=False):
            similarity = (queries.float() * attention.scale) @ keys.float().transpose(
                -2, -1
            )  # (B W, H, A, A)
            similarity = similarity + attention._get_rel_pos_bias().float()
            if mask is not None:
                masks = mask.float().repeat(len(windows) // len(mask), 1, 1)  # (B W, A, A)
                similarity = similarity + masks[:, None]
            return similarity.softmax(dim=-1)


# ------------------------------------------------------------------------------------------ weights


def from_official_names(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under timm's names, and a note for each rule that was applied. timm's own come back
    as they are.

    Microsoft's files merge tokens at the end of a stage, timm at the start of the next one.
    """
    new = {key: value for key, value in weights.items() if not key.endswith(BUFFERS)}
    notes = []
    for buffer in BUFFERS:
        count = sum(key.endswith(buffer) for key in weights)
        if count:
            notes.append(f"{buffer} dropped from {count} places: the network computes it")
    if "layers.0.downsample.reduction.weight" in new:  # timm's first stage has nothing to merge
        new = {
            re.sub(r"^layers\.(\d+)\.downsample\.", _next_stage, key): value
            for key, value in new.items()
        }
        new = {
            re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key): value
            for key, value in new.items()
        }
        notes.append(
            "layers.<i>.downsample renamed to layers.<i + 1>.downsample, head to head.fc: timm's "
            "names"
        )
    return new, notes


def _next_stage(found: re.Match[str]) -> str:
    return f"layers.{int(found[1]) + 1}.downsample."


def window_of(entries: int, grid: tuple[int, int] | None) -> tuple[int, int] | None:
    """The window behind a table of relative positions: a square one, cut to its stage's grid if
    that is known."""
    rows, columns = grid or (0, 0)
    for side in range(1, max(rows, columns) + 1):
        window = min(side, rows), min(side, columns)
        if (2 * window[0] - 1) * (2 * window[1] - 1) == entries:
            return window
    side = (math.isqrt(entries) + 1) // 2
    return (side, side) if (2 * side - 1) ** 2 == entries else None


def resize_table(table: Tensor, old_window: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """A table of relative positions (entries, H) for another window, by timm's rule: near offsets
    keep their values."""
    heads = table.shape[1]
    old_size, size = ((2 * side[0] - 1, 2 * side[1] - 1) for side in (old_window, window))
    grid = table.T.reshape(
        heads, *old_size
    )  # a flat table, older releases of timm take for that of a square window
    resized = resize_rel_pos_bias_table(grid, new_window_size=window, new_bias_shape=(heads, *size))
    return resized.reshape(heads, -1).T.contiguous()
