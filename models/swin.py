"""Swin (version 1) of timm: attention inside windows, tokens merged from stage to stage.

The last block is the last one of the last stage. At 224 pixels one window covers its grid, and its
map is that of Eq. 5. At sizes with several windows no map over all tokens exists: the score of a
token is then averaged over the queries of its window. Scores of different windows are comparable,
because uniform attention gives 1 / (tokens per window) in each of them. Without padding, the scores
therefore sum to the number of windows, not to one. A common factor does not change which region is
picked.

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

from models.float32_attention import in_layer_precision
from models.windows import WindowedTransformer, windowed_score

TABLE = "relative_position_bias_table"
# Official files contain these buffers; timm computes them and does not save them.
BUFFERS = ("relative_position_index", "attn_mask")


class Swin(WindowedTransformer):
    """Any timm `SwinTransformer` that predicts from the mean of its tokens.

    Raises:
        ValueError: it predicts from something other than the mean.
    """

    network: SwinTransformer

    def block_score(self, block: SwinTransformerBlock, tokens: Tensor) -> Tensor:
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
            fits = len(table) == (2 * window[0] - 1) * (2 * window[1] - 1)
            if fits and old_grid in (None, self.grid_size):
                continue
            # The name is layers.<stage>.blocks. ...; each later stage halves the grid once more.
            stage = int(name.split(".")[1])
            merged = 2 ** (len(self.network.layers) - 1 - stage)
            stage_grid = old_grid and (old_grid[0] * merged, old_grid[1] * merged)
            old_window = window_of_table(len(table), stage_grid)
            if old_window is not None and old_window != window:
                new[f"{name}.{TABLE}"] = resize_table(table, old_window, window)
                notes.append(f"{name}.{TABLE} resized from window {old_window} to {window}")
        return new, notes


@in_layer_precision
def window_attention_map(
    attention: WindowAttention, windows: Tensor, mask: Tensor | None
) -> Tensor:
    """The map of a window attention layer, in float32 and without gradient.

    Args:
        windows: (B W, A, D), the input of the layer: W windows of A tokens from each image.
        mask: (W, A, A), added before the softmax. It prevents attention between tokens that are in
            one window only because of the shift.

    Returns:
        (B W, H, A, A). Rows (queries) sum to one.
    """
    width = attention.qkv.out_features // 3 * 2  # width of queries and keys
    weight, bias = attention.qkv.weight[:width], attention.qkv.bias
    with torch.no_grad():
        queries_keys = linear(windows, weight, None if bias is None else bias[:width])
        # (B W, A, 2, H, D / H)
        queries_keys = queries_keys.unflatten(2, (2, attention.num_heads, -1))
        queries, keys = queries_keys.permute(2, 0, 3, 1, 4)  # (B W, H, A, D / H)
        with torch.autocast(windows.device.type, enabled=False):
            queries = queries.float() * attention.scale
            similarity = queries @ keys.float().transpose(-2, -1)  # (B W, H, A, A)
            similarity = similarity + attention._get_rel_pos_bias().float()
            if mask is not None:
                masks = mask.float().repeat(len(windows) // len(mask), 1, 1)  # (B W, A, A)
                similarity = similarity + masks[:, None]
            return similarity.softmax(dim=-1)


# ------------------------------------------------------------------------------------------ weights


def from_official_names(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Renames the weights of Microsoft's files to timm's names; timm's weights are not changed.

    In Microsoft's files tokens are merged at the end of a stage, in timm at the start of the next.

    Returns:
        The weights under timm's names, and a note for each rule that was applied.
    """
    new = {key: value for key, value in weights.items() if not key.endswith(BUFFERS)}
    notes = []
    for buffer in BUFFERS:
        count = sum(key.endswith(buffer) for key in weights)
        if count:
            notes.append(f"{buffer} dropped from {count} places: the network computes it")
    # In timm's files the first stage merges nothing, so this key marks an official file.
    if "layers.0.downsample.reduction.weight" in new:
        new = {_timm_name(key): value for key, value in new.items()}
        notes.append(
            "layers.<i>.downsample renamed to layers.<i + 1>.downsample, head to head.fc: timm's "
            "names"
        )
    return new, notes


def _timm_name(key: str) -> str:
    def next_stage(found: re.Match[str]) -> str:
        return f"layers.{int(found[1]) + 1}.downsample."

    key = re.sub(r"^layers\.(\d+)\.downsample\.", next_stage, key)
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)


def window_of_table(entries: int, grid: tuple[int, int] | None) -> tuple[int, int] | None:
    """The window size of a table of relative position biases with this number of entries.

    Args:
        grid: the grid of the stage, if known. A window is square, but never larger than the grid.

    Returns:
        Rows and columns of the window, or None if no window has this number of entries.
    """
    rows, columns = grid or (0, 0)
    for side in range(1, max(rows, columns) + 1):
        window = min(side, rows), min(side, columns)
        if (2 * window[0] - 1) * (2 * window[1] - 1) == entries:
            return window
    side = (math.isqrt(entries) + 1) // 2
    return (side, side) if (2 * side - 1) ** 2 == entries else None


def resize_table(table: Tensor, old_window: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """Resamples a table of relative position biases (entries, H) to another window.

    It follows timm's rule, which keeps the values of near offsets.
    """
    heads = table.shape[1]
    old_size, size = ((2 * side[0] - 1, 2 * side[1] - 1) for side in (old_window, window))
    # Older releases of timm would assume a square window if the table were flat.
    maps = table.T.reshape(heads, *old_size)
    resized = resize_rel_pos_bias_table(maps, new_window_size=window, new_bias_shape=(heads, *size))
    return resized.reshape(heads, -1).T.contiguous()
