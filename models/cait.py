"""CaiT through timm's own class: self-attention with talking heads over image tokens, then class
attention.

"Last block" is the last self-attention block, `blocks[-1]`: the class-attention blocks after it
have a single query, the class token, and do not change the image tokens. Its score is read from the
map after the softmax and before the second mix of the heads, because only there rows are positive
and sum to one. The class token's own score comes from the last class-attention block,
`blocks_token_only[-1]`. Knows no mixer and no loss.

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
from models.float32_attention import like_its_layer
from models.interface import (
    AttentionOf,
    Depth,
    GuideOutput,
    ImageModel,
    class_attention_score,
    image_attention_score,
)


class CaiT(ImageModel):
    """Any timm `Cait` that predicts from its class token.

    Raises:
        ValueError: its last block has no talking heads, or its prediction leaves the class token
            out.
    """

    network: Cait

    def __init__(self, network: Cait, separate_region_head: bool = False) -> None:
        last = network.blocks[-1]
        if not (isinstance(last, LayerScaleBlock) and isinstance(last.attn, TalkingHeadAttn)):
            kind = type(getattr(last, "attn", last)).__name__
            raise ValueError(
                f"its last block computes attention in {kind}, whose map cannot be read"
            )
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
        received, last = (
            self._run(self._embed(images), 0, len(network.blocks) - 1),
            network.blocks[-1],
        )
        tokens = run_block(network, last, received)
        features, class_token = self._class_attention(tokens)
        with torch.no_grad():
            if need_attention == "image":
                return features, score_in(last, received)
            last_of_class = network.blocks_token_only[-1]
            seen = last_of_class.norm1(torch.cat((class_token, tokens), dim=1))
            return features, class_attention_score(
                class_token_map(last_of_class.attn, seen), num_prefix_tokens=1
            )

    def _embed(self, images: Tensor) -> Tensor:
        network: Any = self.network
        return network.pos_drop(network.patch_embed(images) + network.pos_embed)  # (B, N, D)

    def _run(self, tokens: Tensor, begin: int, end: int) -> Tensor:
        """Some of the blocks of image tokens."""
        for block in self.network.blocks[begin:end]:
            tokens = run_block(self.network, block, tokens)
        return tokens

    def _class_attention(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Final image tokens -> features (B, 1 + N, D), and what the last of its blocks takes for
        class token."""
        network: Any = self.network
        class_token = network.cls_token.expand(len(tokens), -1, -1)  # (B, 1, D)
        for block in network.blocks_token_only[:-1]:  # not checkpointed: timm does not either
            class_token = block(tokens, class_token)
        final = network.blocks_token_only[-1](tokens, class_token)
        return network.norm(torch.cat((final, tokens), dim=1)), class_token

    @property
    def score_blocks(self) -> int:
        """Those of the image tokens."""
        return len(self.network.blocks)

    def guide_output(
        self, images: Tensor, resized: bool, block: Depth, predict: bool
    ) -> GuideOutput:
        blocks = self.network.blocks
        number = block if isinstance(block, int) else len(blocks)
        tokens, before = self._embed(images), []
        for place in range(number - 1):
            before += [score_in(blocks[place], tokens)] if block == "rollout" else []
            tokens = self._run(tokens, place, place + 1)
        score = score_in(blocks[number - 1], tokens)
        if block == "rollout":
            score = torch.stack([*before, score]).mean(dim=0)
        if not predict:
            return GuideOutput(None, score)
        features, _ = self._class_attention(self._run(tokens, number - 1, len(blocks)))
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
            new["pos_embed"] = resize_positions(
                position, self.grid_size, 0, old_grid
            )  # no entry for the class token
            if new["pos_embed"] is not position:
                notes.append(
                    f"pos_embed resized from {tuple(position.shape)} to "
                    f"{tuple(new['pos_embed'].shape)}"
                )
        return new, notes


def score_in(block: Any, received: Tensor) -> Tensor:
    """Eq. 6 of a self-attention block, from the image tokens (B, N, D) that it receives: (B, N)."""
    return image_attention_score(
        talking_heads_map(block.attn, block.norm1(received)), num_prefix_tokens=0
    )


@like_its_layer
def talking_heads_map(attention: TalkingHeadAttn, tokens: Tensor) -> Tensor:
    """The map that a talking-heads layer gets from its softmax on `tokens`, in float32 and without
    gradient.

    The first mix of the heads, before the softmax, is part of it. The second, after the softmax, is
    not. The layer
    itself keeps its map: queries and keys are computed a second time here (values are not).

    Args:
        tokens: (B, N, D), what the layer itself receives.

    Returns:
        (B, H, N, N), rows (queries) sum to one.
    """
    width = 2 * attention.qkv.in_features  # of queries and keys
    weight, bias = attention.qkv.weight[:width], attention.qkv.bias
    with torch.no_grad():
        queries_keys = linear(tokens, weight, None if bias is None else bias[:width])
        queries_keys = queries_keys.unflatten(
            2, (2, attention.num_heads, -1)
        )  # (B, N, 2, H, D / H)
        queries, keys = queries_keys.permute(2, 0, 3, 1, 4)  # (B, H, N, D / H)
        with torch.autocast(tokens.device.type, enabled=False):
            similarity = (queries.float() * attention.scale) @ keys.float().transpose(
                -2, -1
            )  # (B, H, N, N)
            mix = attention.proj_l
            mixed = linear(
                similarity.permute(0, 2, 3, 1), mix.weight.float(), mix.bias.float()
            )  # (B, N, N, H)
            return mixed.permute(0, 3, 1, 2).softmax(dim=-1)


@like_its_layer
def class_token_map(attention: ClassAttn, tokens: Tensor) -> Tensor:
    """The map that a class-attention layer would use on `tokens`, in float32 and without gradient.

    Args:
        tokens: (B, 1 + N, D), what the layer itself receives; only the first of them asks.

    Returns:
        (B, H, 1, 1 + N), rows sum to one.
    """
    with torch.no_grad():
        queries = split_heads(attention.q(tokens[:, :1]), attention.num_heads)  # (B, H, 1, D / H)
        keys = split_heads(attention.k(tokens), attention.num_heads)
        return softmax_map(queries, keys, attention.scale)
