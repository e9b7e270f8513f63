"""Forward passes, attention maps and resizing of position embeddings that several families share.

Letters as in `models/interface.py`: B batch, H heads, T all tokens, N image tokens, D width, R x C
grid.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Attention  # also in releases where timm.layers has none
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from models.float32_attention import in_layer_precision
from models.interface import (
    AttentionOf,
    GuideOutput,
    ImageModel,
    ScoreBlock,
    class_attention_score,
    image_attention_score,
)
from models.prefix_tokens import finish_block


def run_block(stage: Any, block: Any, *args: Any, **kwargs: Any) -> Tensor:
    """`block(...)`, as the loop over blocks in timm's networks calls it.

    With gradient checkpointing its activations are computed again in the backward pass.

    Args:
        stage: the object with the attribute `grad_checkpointing`: the network, or a stage of it.
    """
    if stage.grad_checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False, **kwargs)
    return block(*args, **kwargs)


class PlainTransformer(ImageModel):
    """A family with one patch embedding, whose tokens all stay to the end, prefix tokens first.

    A family implements `embed`, `block_attention_map`, `attend_and_map` and `classify`.
    """

    network: Any  # timm's VisionTransformer, Beit or Eva, whose parts have the same names

    @property
    def grid_size(self) -> tuple[int, int]:
        return self.network.patch_embed.grid_size

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.network.patch_embed.patch_size

    @property
    def has_class_token(self) -> bool:
        return self.network.cls_token is not None

    @property
    def score_blocks(self) -> int:
        """All blocks, if all are of the same class as the last; otherwise 0."""
        kinds = [(type(block), type(block.attn)) for block in self.network.blocks]
        return len(kinds) if len(set(kinds)) == 1 else 0

    @abstractmethod
    def embed(self, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Images (B, C, height, width) -> the tokens (B, T, D) that the first block receives.

        Returns:
            The tokens, and for each block its further keyword arguments, such as a position bias.
        """

    def embed_resized(self, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """`embed` for images of another size, if the model `accepts_other_sizes`."""
        raise NotImplementedError

    @abstractmethod
    def block_attention_map(
        self, block: Any, tokens: Tensor, block_args: dict[str, Any], class_only: bool
    ) -> Tensor:
        """The attention map of a block, without gradient.

        Args:
            tokens: (B, T, D), the input of the block.
            block_args: its further keyword arguments, see `embed`.
            class_only: compute the row of the class token only.

        Returns:
            (B, H, T, T), or (B, H, 1, T) with `class_only`.
        """

    @abstractmethod
    def attend_and_map(
        self, block: Any, tokens: Tensor, block_args: dict[str, Any], count: int
    ) -> tuple[Tensor, Tensor] | None:
        """The output of a block's attention for its first `count` tokens, and its complete map.

        Args:
            tokens: (B, T, D), the input of the block.
            block_args: its further keyword arguments, see `embed`.

        Returns:
            (B, count, D) and (B, H, T, T), or None if `finish_block` does not fit this class of
            block.
        """

    def features(
        self, images: Tensor, need_attention: AttentionOf | None
    ) -> tuple[Tensor, Tensor | None]:
        if need_attention is None:
            return self.network.forward_features(images), None  # (B, T, D)
        # The steps of `forward_features` one by one: the score needs the input of the last block.
        tokens, args = self.embed(images)
        tokens = self._run_blocks(tokens, args, 0, len(args) - 1)
        return self._last_block(tokens, args[-1], need_attention)

    def _run_blocks(
        self, tokens: Tensor, args: list[dict[str, Any]], begin: int, end: int
    ) -> Tensor:
        """Applies the blocks from `begin` up to, but not including, `end`, counted from 0."""
        for block, block_args in zip(self.network.blocks[begin:end], args[begin:end], strict=True):
            tokens = run_block(self.network, block, tokens, **block_args)
        return tokens

    def _last_block(
        self, tokens: Tensor, block_args: dict[str, Any], need_attention: AttentionOf
    ) -> tuple[Tensor, Tensor]:
        """The input of the last block -> final features (B, T, D) and score (B, N)."""
        network, last = self.network, self.network.blocks[-1]
        features = network.norm(run_block(network, last, tokens, **block_args))
        class_only = need_attention == "class" and self.has_class_token
        score_of = class_attention_score if class_only else image_attention_score
        with torch.no_grad():
            attention = self.block_attention_map(last, tokens, block_args, class_only)
            return features, score_of(attention, network.num_prefix_tokens)

    def guide_output(
        self, images: Tensor, resized: bool, block: ScoreBlock, predict: bool
    ) -> GuideOutput:
        """The motivating pass without the work that neither score nor logits need.

        If the logits depend on prefix tokens alone (class and distillation token), the last block
        computes its output for those tokens only. The image tokens give only their queries, keys
        and values.
        """
        network, prefix = self.network, self.network.num_prefix_tokens
        tokens, args = (self.embed_resized if resized else self.embed)(images)

        # The score of an earlier block, of all blocks, or of the last one without its output.
        depth, blocks_done, score = len(args), 0, None
        number = block if isinstance(block, int) else depth
        if block == "rollout":
            tokens, score = self._rollout(tokens, args)
            blocks_done = depth - 1
        elif not predict or number < depth:
            blocks_done = number - 1
            tokens = self._run_blocks(tokens, args, 0, blocks_done)
            score = self._block_score(tokens, args, blocks_done)
        if score is not None and not predict:
            return GuideOutput(None, score)

        # The remaining blocks, for the logits. The score of the last one is used if none was
        # computed above.
        tokens = self._run_blocks(tokens, args, blocks_done, depth - 1)
        last, last_args = network.blocks[-1], args[-1]
        from_prefix = network.global_pool == "token" and getattr(network, "attn_pool", None) is None
        result = self.attend_and_map(last, tokens, last_args, prefix) if from_prefix else None
        if result is None:
            features, last_score = self._last_block(tokens, last_args, "image")
        else:
            attended, attention = result
            prefix_output = finish_block(last, tokens[:, :prefix], attended)  # (B, prefix, D)
            features = network.norm(prefix_output)
            last_score = image_attention_score(attention, prefix)
        return GuideOutput(self.head(features)[0], last_score if score is None else score)

    def _block_score(self, tokens: Tensor, args: list[dict[str, Any]], index: int) -> Tensor:
        """Eq. 6 for the block `index`, counted from 0, and its input `tokens`: (B, N)."""
        block = self.network.blocks[index]
        attention = self.block_attention_map(block, tokens, args[index], False)
        return image_attention_score(attention, self.network.num_prefix_tokens)

    def _rollout(self, tokens: Tensor, args: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """The paper's "Rollout" (Table A5): the mean of the scores of all blocks.

        Returns:
            The input of the last block (B, T, D), and the mean score (B, N).
        """
        total, last = self._block_score(tokens, args, 0), len(args) - 1
        for index in range(last):
            tokens = self._run_blocks(tokens, args, index, index + 1)
            total = total + self._block_score(tokens, args, index + 1)
        return tokens, total / (last + 1)

    def image_tokens(self, features: Tensor) -> Tensor:
        return features[:, self.network.num_prefix_tokens :]

    def head(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.network.forward_head(features), None


def require_mean_pooling(network: Any) -> None:
    """Refuses a network that predicts from something other than its mean token.

    Raises:
        ValueError: its `global_pool` is not "avg".
    """
    if network.global_pool != "avg":
        raise ValueError(
            f"global_pool is {network.global_pool!r}, but regions are classified by their mean "
            "token, so it must be 'avg'"
        )


# ----------------------------------------------------------------------------------- attention maps


def queries_and_keys(attention: Any, tokens: Tensor, class_only: bool) -> tuple[Tensor, Tensor]:
    """Queries and keys of a layer with a joint projection `qkv`. Values are not computed.

    Args:
        tokens: (B, T, D), the input of the layer.
        class_only: compute the query of the first token only (Q = 1), else all (Q = T).

    Returns:
        Queries (B, H, Q, D / H) and keys (B, H, T, D / H).
    """
    weight, bias, heads = attention.qkv.weight, _joint_bias(attention), attention.num_heads
    width = len(weight) // 3
    first, second = slice(width), slice(width, 2 * width)
    query_tokens = tokens[:, :1] if class_only else tokens
    queries = linear(query_tokens, weight[first], None if bias is None else bias[first])
    keys = linear(tokens, weight[second], None if bias is None else bias[second])
    return split_heads(queries, heads), split_heads(keys, heads)


def queries_keys_values(attention: Any, tokens: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values (B, H, T, D / H) of a layer with a joint projection `qkv`.

    Args:
        tokens: (B, T, D), the input of the layer.
    """
    joint = linear(tokens, attention.qkv.weight, _joint_bias(attention))  # (B, T, 3 D)
    joint = joint.unflatten(2, (3, attention.num_heads, -1))  # (B, T, 3, H, D / H)
    return joint.permute(2, 0, 3, 1, 4).unbind(0)


def _joint_bias(attention: Any) -> Tensor | None:
    """The bias of `qkv`. Some layers of timm store it in parts, because that of keys is fixed."""
    if getattr(attention, "q_bias", None) is None:
        return attention.qkv.bias
    return torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """(B, T, D) -> (B, H, T, D / H)."""
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)


def softmax_map(queries: Tensor, keys: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """The attention map of these queries and keys, in float32 under autocast too.

    Args:
        queries: (B, H, Q, D / H).
        keys: (B, H, T, D / H).
        bias: (1, H, Q, T), added before the softmax.

    Returns:
        (B, H, Q, T). Rows sum to one.
    """
    with torch.autocast(queries.device.type, enabled=False):
        similarity = (queries.float() * scale) @ keys.float().transpose(-2, -1)
        return (similarity if bias is None else similarity + bias.float()).softmax(dim=-1)


@in_layer_precision
def attention_map(attention: Attention, tokens: Tensor, class_only: bool = False) -> Tensor:
    """Eq. 5: the map A of a timm attention layer, in float32 and without gradient.

    The layer itself may use a fused kernel, which does not return its map. Queries and keys are
    therefore computed a second time here, but not values. That costs about a sixth of one block.

    Args:
        attention: a timm self-attention layer with a joint `qkv` projection.
        tokens: (B, T, D), the input of the layer.
        class_only: compute the row of the first token only, for half of that cost.

    Returns:
        (B, H, T, T), or (B, H, 1, T) with `class_only`. Rows (queries) sum to one.
    """
    with torch.no_grad():
        queries, keys = queries_and_keys(attention, tokens, class_only)
        return softmax_map(attention.q_norm(queries), attention.k_norm(keys), attention.scale)


# ------------------------------------------------------------------------------ position embeddings


def resize_positions(
    positions: Tensor,
    grid_size: tuple[int, int],
    num_prefix_tokens: int,
    old_grid: tuple[int, int] | None,
    **resampling: Any,
) -> Tensor:
    """Resamples a position embedding (1, prefix + N_old, D) to another grid (bicubic).

    Args:
        old_grid: the grid it belongs to. None: `grid_size` if the number of tokens agrees, else a
            square grid.
        resampling: further arguments of timm's `resample_abs_pos_embed`, such as `interpolation`.

    Returns:
        (1, prefix + N, D), or `positions` itself if nothing has to change or its shape is wrong;
        strict loading then reports the shape.
    """
    if positions.ndim != 3:  # from a damaged file
        return positions
    count = positions.shape[1] - num_prefix_tokens
    if old_grid is None:
        side = math.isqrt(max(count, 0))
        old_grid = grid_size if count == math.prod(grid_size) else (side, side)
    if old_grid == grid_size or count != math.prod(old_grid):
        return positions
    with torch.no_grad():
        return resample_abs_pos_embed(
            positions, list(grid_size), list(old_grid), num_prefix_tokens, **resampling
        )
