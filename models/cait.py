"""CaiT of timm: self-attention with talking heads over image tokens, then class attention.

The last block is the last self-attention block, `blocks[-1]`. The class-attention blocks after it
have a single query, the class token, and do not change the image tokens. The score is computed from
the map after the softmax and before the second mix of the heads, because only that map has positive
rows that sum to one. The score of the class token comes from the last class-attention block,
`blocks_token_only[-1]`.

Paper: Going deeper with Image Transformers (arXiv 2103.17239).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from timm.layers import PatchEmbed
from timm.models.cait import Cait, ClassAttn, LayerScaleBlock, TalkingHeadAttn
from torch import Tensor
from torch.nn.functional import linear

from models.blocks import resize_positions, run_block, softmax_map, split_heads
from models.float32_attention import in_layer_precision
from models.interface import (
    AttentionOf,
    GuideOutput,
    ImageModel,
    ScoreBlock,
    class_attention_score,
    image_attention_score,
)


class CaiT(ImageModel):
    """Any timm `Cait` that predicts from its class token.

    Raises:
        ValueError: its last block has no talking heads, or its logits do not use the class token.
    """

    network: Cait

    def __init__(self, network: Cait, separate_region_head: bool = False) -> None:
        last = network.blocks[-1]
        if not (isinstance(last, LayerScaleBlock) and isinstance(last.attn, TalkingHeadAttn)):
            kind = type(getattr(last, "attn", last)).__name__
            raise ValueError(f"the attention map of its last block ({kind}) cannot be computed")
        if network.global_pool != "token":
            raise ValueError(
                f"with global_pool {network.global_pool!r} nothing would train its class attention"
            )
        super().__init__(network, network.embed_dim, network.num_classes, separate_region_head)

    @property
    def grid_size(self) -> tuple[int, int]:
        return cast(PatchEmbed, self.network.patch_embed).grid_size

    @property
    def patch_size(self) -> tuple[int, int]:
        return cast(PatchEmbed, self.network.patch_embed).patch_size

    @property
    def has_class_token(self) -> bool:
        return True

    def features(
        self, images: Tensor, need_attention: AttentionOf | None
    ) -> tuple[Tensor, Tensor | None]:
        network: Any = self.network
        if need_attention is None:
            return network.forward_features(images), None  # (B, 1 + N, D)
        last = network.blocks[-1]
        last_input = self._run_blocks(self._embed(images), 0, len(network.blocks) - 1)
        tokens = run_block(network, last, last_input)  # (B, N, D)
        features, class_token = self._class_attention(tokens)
        with torch.no_grad():
            if need_attention == "image":
                return features, block_score(last, last_input)
            class_block = network.blocks_token_only[-1]
            class_input = class_block.norm1(torch.cat((class_token, tokens), dim=1))
            attention = class_token_map(class_block.attn, class_input)  # (B, H, 1, 1 + N)
            return features, class_attention_score(attention, num_prefix_tokens=1)

    def _embed(self, images: Tensor) -> Tensor:
        network: Any = self.network
        return network.pos_drop(network.patch_embed(images) + network.pos_embed)  # (B, N, D)

    def _run_blocks(self, tokens: Tensor, begin: int, end: int) -> Tensor:
        """Applies the self-attention blocks from `begin` up to, but not including, `end`."""
        for block in self.network.blocks[begin:end]:
            tokens = run_block(self.network, block, tokens)
        return tokens

    def _class_attention(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The class-attention blocks: final image tokens (B, N, D) -> features (B, 1 + N, D).

        Returns:
            The features, and the class token (B, 1, D) that the last of these blocks receives.
        """
        network: Any = self.network
        class_token = network.cls_token.expand(len(tokens), -1, -1)  # (B, 1, D)
        # No gradient checkpointing here, as in timm.
        for block in network.blocks_token_only[:-1]:
            class_token = block(tokens, class_token)
        final = network.blocks_token_only[-1](tokens, class_token)
        return network.norm(torch.cat((final, tokens), dim=1)), class_token

    @property
    def score_blocks(self) -> int:
        """The self-attention blocks; the class-attention blocks give no score of Eq. 6."""
        return len(self.network.blocks)

    def guide_output(
        self, images: Tensor, resized: bool, block: ScoreBlock, predict: bool
    ) -> GuideOutput:
        """The motivating pass; the score is computed before the block runs, so it can end there."""
        blocks = self.network.blocks
        number = block if isinstance(block, int) else len(blocks)
        tokens, earlier_scores = self._embed(images), []
        for index in range(number - 1):
            if block == "rollout":
                earlier_scores.append(block_score(blocks[index], tokens))
            tokens = self._run_blocks(tokens, index, index + 1)
        score = block_score(blocks[number - 1], tokens)
        if block == "rollout":
            score = torch.stack([*earlier_scores, score]).mean(dim=0)
        if not predict:
            return GuideOutput(None, score)
        features, _ = self._class_attention(self._run_blocks(tokens, number - 1, len(blocks)))
        return GuideOutput(self.head(features)[0], score)

    def image_tokens(self, features: Tensor) -> Tensor:
        return features[:, 1:]

    def head(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.network.forward_head(features), None

    def classify(self, pooled: Tensor) -> Tensor:
        return self.network.head(self.network.head_drop(pooled))

    def resize_weights(
        self, weights: Mapping[str, Tensor], old_grid: tuple[int, int] | None
    ) -> tuple[dict[str, Tensor], list[str]]:
        new, notes = dict(weights), []
        position = new.get("pos_embed")
        if position is not None:
            # The class token has no position: 0 prefix tokens.
            new["pos_embed"] = resize_positions(position, self.grid_size, 0, old_grid)
            if new["pos_embed"] is not position:
                shapes = tuple(position.shape), tuple(new["pos_embed"].shape)
                notes.append(f"pos_embed resized from {shapes[0]} to {shapes[1]}")
        return new, notes


def block_score(block: Any, tokens: Tensor) -> Tensor:
    """Eq. 6 for a self-attention block and its input, image tokens (B, N, D): (B, N)."""
    attention = talking_heads_map(block.attn, block.norm1(tokens))
    return image_attention_score(attention, num_prefix_tokens=0)


@in_layer_precision
def talking_heads_map(attention: TalkingHeadAttn, tokens: Tensor) -> Tensor:
    """The map of a talking-heads layer after its softmax, in float32 and without gradient.

    It includes the first mix of the heads, before the softmax, but not the second one, after it.
    The layer does not return its map, so queries and keys are computed a second time here, but not
    values.

    Args:
        tokens: (B, N, D), the input of the layer.

    Returns:
        (B, H, N, N). Rows (queries) sum to one.
    """
    width = 2 * attention.qkv.in_features  # width of queries and keys
    weight, bias = attention.qkv.weight[:width], attention.qkv.bias
    with torch.no_grad():
        queries_keys = linear(tokens, weight, None if bias is None else bias[:width])
        # (B, N, 2, H, D / H)
        queries_keys = queries_keys.unflatten(2, (2, attention.num_heads, -1))
        queries, keys = queries_keys.permute(2, 0, 3, 1, 4)  # (B, H, N, D / H)
        with torch.autocast(tokens.device.type, enabled=False):
            queries = queries.float() * attention.scale
            similarity = queries @ keys.float().transpose(-2, -1)  # (B, H, N, N)
            heads_last = similarity.permute(0, 2, 3, 1)  # (B, N, N, H)
            mix = attention.proj_l
            mixed = linear(heads_last, mix.weight.float(), mix.bias.float())
            return mixed.permute(0, 3, 1, 2).softmax(dim=-1)


@in_layer_precision
def class_token_map(attention: ClassAttn, tokens: Tensor) -> Tensor:
    """The map of a class-attention layer, in float32 and without gradient.

    Args:
        tokens: (B, 1 + N, D), the input of the layer. Its only query is the first token.

    Returns:
        (B, H, 1, 1 + N). Rows sum to one.
    """
    with torch.no_grad():
        queries = split_heads(attention.q(tokens[:, :1]), attention.num_heads)  # (B, H, 1, D / H)
        keys = split_heads(attention.k(tokens), attention.num_heads)
        return softmax_map(queries, keys, attention.scale)
