"""Parts that more than one family uses. Holds no sizes, no names and no registry."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.swin_transformer import window_partition, window_reverse
from timm.models.vision_transformer import Attention  # also in releases where timm.layers has none
from torch import Tensor
from torch.nn.functional import linear, pad
from torch.utils.checkpoint import checkpoint

from models.float32_attention import like_its_layer
from models.interface import (
    AttentionOf,
    Depth,
    GuideOutput,
    ImageModel,
    class_attention_score,
    image_attention_score,
)
from models.prefix_tokens import finish_block


def run_block(stage: Any, block: Any, *given: Any, **named: Any) -> Tensor:
    """`block(...)`, with gradient checkpointing where that is on: one turn of the loop over blocks
    in timm's networks.

    Args:
        stage: what keeps `grad_checkpointing`: the network, or its stage.
    """
    if stage.grad_checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *given, use_reentrant=False, **named)
    return block(*given, **named)


class PlainTransformer(ImageModel):
    """A family that embeds its patches once and keeps all tokens to the end, prefix tokens
    first."""

    network: Any  # timm's VisionTransformer, Beit, Eva: they name these parts alike

    @property
    def grid_size(self) -> tuple[int, int]:
        return self.network.patch_embed.grid_size

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.network.patch_embed.patch_size

    @property
    def has_class_token(self) -> bool:
        return self.network.cls_token is not None

    @abstractmethod
    def embed(self, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """(B, C, height, width) images -> tokens (B, T, D) for the first block, and what each block
        takes besides."""

    def embed_resized(self, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """`embed` for images of another size, if the model `accepts_other_sizes`."""
        raise NotImplementedError

    @abstractmethod
    def map_of(
        self, block: Any, tokens: Tensor, beside: dict[str, Any], class_only: bool
    ) -> Tensor:
        """The attention map of a block on what it receives: (B, H, T, T), or the class token's row
        (B, H, 1, T)."""

    @abstractmethod
    def attend(
        self, block: Any, tokens: Tensor, beside: dict[str, Any], count: int
    ) -> tuple[Tensor, Tensor] | None:
        """What a block's attention gives its first tokens (B, count, D), and its map (B, H, T, T).

        `None` if `finish_block` does not know this kind of block.
        """

    def features(
        self, images: Tensor, need_attention: AttentionOf | None
    ) -> tuple[Tensor, Tensor | None]:
        if need_attention is None:
            return self.network.forward_features(images), None  # (B, T, D)
        return self._last_block(*self._before_last_block(*self.embed(images)), need_attention)

    @property
    def score_blocks(self) -> int:
        """All those that are like the last."""
        kinds = [(type(block), type(block.attn)) for block in self.network.blocks]
        return len(kinds) if len(set(kinds)) == 1 else 0

    def _before_last_block(
        self, tokens: Tensor, beside: list[dict[str, Any]]
    ) -> tuple[Tensor, dict[str, Any]]:
        """From what `embed` gives to the tokens that the last block receives, and what it takes
        besides."""
        return self._run(tokens, beside, 0, len(beside) - 1), beside[-1]

    def _run(self, tokens: Tensor, beside: list[dict[str, Any]], begin: int, end: int) -> Tensor:
        """Some of the blocks."""
        for block, more in zip(self.network.blocks[begin:end], beside[begin:end], strict=True):
            tokens = run_block(self.network, block, tokens, **more)
        return tokens

    def _last_block(
        self, tokens: Tensor, beside: dict[str, Any], asked: AttentionOf
    ) -> tuple[Tensor, Tensor]:
        network, last = self.network, self.network.blocks[-1]
        features = network.norm(run_block(network, last, tokens, **beside))
        class_only = asked == "class" and self.has_class_token
        score_of = class_attention_score if class_only else image_attention_score
        with torch.no_grad():
            return features, score_of(
                self.map_of(last, tokens, beside, class_only), network.num_prefix_tokens
            )

    def guide_output(
        self, images: Tensor, resized: bool, block: Depth, predict: bool
    ) -> GuideOutput:
        """Where prefix tokens decide alone, the last block makes nothing of the image tokens but
        their score."""
        network, prefix = self.network, self.network.num_prefix_tokens
        tokens, each = (self.embed_resized if resized else self.embed)(images)
        early, number = None, block if isinstance(block, int) else len(each)
        if block == "rollout":
            tokens, early = self._rollout(tokens, each)
            if not predict:
                return GuideOutput(None, early)
        elif not predict or number < len(each):
            tokens = self._run(tokens, each, 0, number - 1)
            early = self._score(tokens, each, number - 1)
            if not predict:
                return GuideOutput(None, early)
        tokens = self._run(tokens, each, 0 if early is None else number - 1, len(each) - 1)
        last, beside = network.blocks[-1], each[-1]
        from_prefix = network.global_pool == "token" and getattr(network, "attn_pool", None) is None
        attended = self.attend(last, tokens, beside, prefix) if from_prefix else None
        if attended is None:
            features, score = self._last_block(tokens, beside, "image")
        else:
            features = network.norm(
                finish_block(last, tokens[:, :prefix], attended[0])
            )  # (B, prefix, D)
            score = image_attention_score(attended[1], prefix)
        return GuideOutput(self.head(features)[0], score if early is None else early)

    def _score(self, tokens: Tensor, beside: list[dict[str, Any]], place: int) -> Tensor:
        """Eq. 6 of a block, counted from 0, from the tokens that it receives: (B, N)."""
        attention = self.map_of(self.network.blocks[place], tokens, beside[place], False)
        return image_attention_score(attention, self.network.num_prefix_tokens)

    def _rollout(self, tokens: Tensor, beside: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """What the last block receives, and the mean of all blocks' scores (B, N): the paper's
        "Rollout" (Table A5)."""
        total, last = self._score(tokens, beside, 0), len(beside) - 1
        for place in range(last):
            tokens = self._run(tokens, beside, place, place + 1)
            total = total + self._score(tokens, beside, place + 1)
        return tokens, total / (last + 1)

    def image_tokens(self, features: Tensor) -> Tensor:
        return features[:, self.network.num_prefix_tokens :]

    def head(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.network.forward_head(features), None


class WindowedTransformer(ImageModel):
    """A family that attends in windows, merges its tokens from stage to stage, and predicts from
    their mean.

    Raises:
        ValueError: it predicts from something else.
    """

    network: Any  # timm's SwinTransformer, version 1 or 2: they name these parts alike

    def __init__(self, network: Any, separate_region_head: bool = False) -> None:
        if network.global_pool != "avg":
            raise ValueError(
                f"global_pool is {network.global_pool!r}, and regions are classified by their mean "
                "token"
            )
        super().__init__(network, network.num_features, network.num_classes, separate_region_head)

    @property
    def grid_size(self) -> tuple[int, int]:
        """That of the last stage. A size which timm would pad on the way there gives fewer rows
        than timm's."""
        height, width = self.network.patch_embed.img_size
        return height // self.patch_size[0], width // self.patch_size[1]

    @property
    def patch_size(self) -> tuple[int, int]:
        height, width = self.network.patch_embed.patch_size
        merged = 2 ** (len(self.network.layers) - 1)  # each stage after the first halves the grid
        return height * merged, width * merged

    @abstractmethod
    def score(self, block: Any, tokens: Tensor) -> Tensor:
        """The score (B, N) that the last block gives the tokens (B, R, C, D) it receives."""

    def features(
        self, images: Tensor, need_attention: AttentionOf | None
    ) -> tuple[Tensor, Tensor | None]:
        network = self.network
        if need_attention is None:
            return network.forward_features(images), None  # (B, R, C, D)
        final, last = network.layers[-1], network.layers[-1].blocks[-1]
        tokens = self._before_last_block(images)
        features = network.norm(run_block(final, last, tokens))
        with torch.no_grad():
            return features, self.score(last, tokens)

    def _before_last_block(self, images: Tensor) -> Tensor:
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
        self, images: Tensor, resized: bool, block: Depth, predict: bool
    ) -> GuideOutput:
        if predict:
            return super().guide_output(images, resized, block, predict)
        return GuideOutput(
            None, self.score(self.network.layers[-1].blocks[-1], self._before_last_block(images))
        )

    def image_tokens(self, features: Tensor) -> Tensor:
        return features.flatten(1, 2)

    def head(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.network.forward_head(features), None

    def classify(self, pooled: Tensor) -> Tensor:
        head = self.network.head
        return head.fc(head.drop(pooled))


# ----------------------------------------------------------------------------------- attention maps


def queries_and_keys(attention: Any, tokens: Tensor, class_only: bool) -> tuple[Tensor, Tensor]:
    """Queries (B, H, Q, D / H) and keys (B, H, T, D / H) of a layer's joint projection; its values
    are not computed.

    Args:
        tokens: (B, T, D), what the layer itself receives.
        class_only: only the first token asks (Q = 1), else all do (Q = T).
    """
    weight, bias, heads = attention.qkv.weight, _joint_bias(attention), attention.num_heads
    width = len(weight) // 3
    first, second = slice(width), slice(width, 2 * width)
    asking = tokens[:, :1] if class_only else tokens
    queries = linear(asking, weight[first], None if bias is None else bias[first])
    keys = linear(tokens, weight[second], None if bias is None else bias[second])
    return split_heads(queries, heads), split_heads(keys, heads)


def queries_keys_values(attention: Any, tokens: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values (B, H, T, D / H) of a layer's joint projection, for `tokens` (B, T,
    D)."""
    joint = linear(tokens, attention.qkv.weight, _joint_bias(attention)).unflatten(
        2, (3, attention.num_heads, -1)
    )
    return joint.permute(2, 0, 3, 1, 4).unbind(0)


def _joint_bias(attention: Any) -> Tensor | None:
    """Some of timm's layers keep it in parts, because that of the keys is fixed."""
    if getattr(attention, "q_bias", None) is None:
        return attention.qkv.bias
    return torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """(B, T, D) -> (B, H, T, D / H)."""
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)


def softmax_map(queries: Tensor, keys: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """(B, H, Q, D / H) and (B, H, T, D / H) -> (B, H, Q, T) in float32, under autocast too; rows
    sum to one.

    Args:
        bias: (1, H, Q, T), added before the softmax.
    """
    with torch.autocast(queries.device.type, enabled=False):
        similarity = (queries.float() * scale) @ keys.float().transpose(-2, -1)
        return (similarity if bias is None else similarity + bias.float()).softmax(dim=-1)


@like_its_layer
def attention_map(attention: Attention, tokens: Tensor, class_only: bool = False) -> Tensor:
    """The map A of Eq. 5 that a timm attention layer would use on `tokens`, in float32 and without
    gradient.

    The layer itself may go on with its fused kernel, which gives no map: queries and keys are
    computed a second time here (values are not), which costs about a sixth of one block.

    Args:
        attention: a timm self-attention layer with a joint `qkv` projection.
        tokens: (B, T, D), what the layer itself receives.
        class_only: compute the first token's row alone, for half of that cost.

    Returns:
        (B, H, T, T), or (B, H, 1, T); rows (queries) sum to one.
    """
    with torch.no_grad():
        queries, keys = queries_and_keys(attention, tokens, class_only)
        return softmax_map(attention.q_norm(queries), attention.k_norm(keys), attention.scale)


def resize_positions(
    positions: Tensor,
    grid_size: tuple[int, int],
    num_prefix_tokens: int,
    old_grid: tuple[int, int] | None,
    **how: Any,
) -> Tensor:
    """Position embeddings (1, prefix + N_old, D) resampled (bicubic) to a grid; the same tensor if
    nothing is to do.

    Args:
        old_grid: the grid they belong to. If absent: this one if the count fits, else a square.
        how: of timm's `resample_abs_pos_embed`, for another rule.
    """
    if positions.ndim != 3:  # of a damaged file: loading refuses its shape
        return positions
    count = positions.shape[1] - num_prefix_tokens
    if old_grid is None:
        side = math.isqrt(max(count, 0))
        old_grid = grid_size if count == math.prod(grid_size) else (side, side)
    if old_grid == grid_size or count != math.prod(old_grid):
        return positions
    with torch.no_grad():
        return resample_abs_pos_embed(
            positions, list(grid_size), list(old_grid), num_prefix_tokens, **how
        )


def windowed_score(
    block: Any, tokens: Tensor, attention_of: Callable[[Any, Tensor, Tensor | None], Tensor]
) -> Tensor:
    """How much attention each token receives, averaged over heads and the queries of its own window
    (Eq. 6).

    Tokens that timm pads with are no queries; what they receive is left out without renormalising.
    Scores sum to the number of windows, less what padding receives.

    Args:
        block: a block of timm's Swin, version 1 or 2; W windows of A tokens each.
        tokens: (B, R, C, D), what the attention of the block receives.
        attention_of: layer, windows (B W, A, D) and mask (W, A, A) -> map (B W, H, A, A) in float32
            without gradient.

    Returns:
        (B, N) float32, row-major over the grid, no gradient.
    """
    batch, rows, columns, _ = tokens.shape
    size, (down, right) = block.window_size, block.shift_size
    padding = (0, 0, 0, -columns % size[1], 0, -rows % size[0])
    shifted = pad(
        torch.roll(tokens, (-down, -right), dims=(1, 2)), padding
    )  # first shifted, then padded: as timm does
    mask = block.get_attn_mask(shifted) if block.dynamic_mask else block.attn_mask  # (W, A, A)
    attention = attention_of(
        block.attn, window_partition(shifted, size).flatten(1, 2), mask
    )  # (B W, H, A, A)

    grid = shifted.shape[1:3]
    is_query = window_partition(
        pad(attention.new_ones(1, rows, columns, 1), padding), size
    ).flatten(1)  # (W, A)
    weights = (is_query / is_query.sum(dim=1, keepdim=True)).repeat(
        batch, 1
    )  # (B W, A): of a mean over queries
    received = (attention.mean(dim=1) * weights[:, :, None]).sum(
        dim=1
    )  # (B W, A); a product would be autocast
    score = window_reverse(received.unflatten(1, size).unsqueeze(3), size, *grid)[
        :, :rows, :columns
    ]  # (B, R, C, 1)
    return torch.roll(score, (down, right), dims=(1, 2)).flatten(1)
