"""Plain vision transformers through timm's own classes: DeiT, DeiT distilled, DeiT III, ViT; and
two small ones.

"Last block" is `blocks[-1]`; its score is read over image tokens only (paper Sec. 3.2; class,
distillation and register tokens are cut). The class token, where there is one, is the first. Knows
no mixer and no loss.

Papers: DeiT (arXiv 2012.12877), ViT (arXiv 2010.11929).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import PatchEmbed, resample_patch_embed
from timm.models import register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import pad

from models.blocks import (
    PlainTransformer,
    attention_map,
    queries_keys_values,
    resize_positions,
    softmax_map,
)
from models.float32_attention import like_its_layer
from models.prefix_tokens import attend_from_first


class PlainViT(PlainTransformer):
    """Any timm `VisionTransformer` whose last block computes attention from a joint qkv projection.

    Raises:
        ValueError: that block is of another kind, so there is no map to read.
    """

    network: VisionTransformer

    def __init__(self, network: VisionTransformer, separate_region_head: bool = False) -> None:
        last = network.blocks[-1]
        if not (isinstance(last, (Block, ResPostBlock)) and isinstance(last.attn, Attention)):
            kind = type(getattr(last, "attn", last)).__name__
            raise ValueError(
                f"its last block computes attention in {kind}, whose map cannot be read"
            )
        super().__init__(network, network.embed_dim, network.num_classes, separate_region_head)

    def embed(self, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        network = self.network
        tokens = network._pos_embed(network.patch_embed(images))  # (B, T, D)
        return network.norm_pre(network.patch_drop(tokens)), [{}] * len(network.blocks)

    @property
    def accepts_other_sizes(self) -> bool:
        """Where patches are embedded by one convolution, positions are learned, and none belong to
        the pooling."""
        network = self.network
        plain = type(network) in (VisionTransformer, VisionTransformerDistilled)
        pooled = getattr(network.attn_pool, "pos_embed", None) is None
        return plain and type(network.patch_embed) is PatchEmbed and pooled

    def embed_resized(self, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """The position embedding is resampled each time: it changes from step to step."""
        network, patches = self.network, self.network.patch_embed.proj(images)  # (B, D, r, c)
        tokens = network.patch_embed.norm(patches.flatten(2).transpose(1, 2))  # (B, n, D)
        prefix = (getattr(network, name, None) for name in ("cls_token", "dist_token", "reg_token"))
        tokens = torch.cat(
            (*(one.expand(len(tokens), -1, -1) for one in prefix if one is not None), tokens), dim=1
        )
        if network.pos_embed is not None:
            placed = network.pos_embed.shape[1] - math.prod(
                self.grid_size
            )  # prefix tokens that have a position
            positions = resize_positions(
                network.pos_embed, tuple(patches.shape[2:]), placed, self.grid_size
            )
            tokens = tokens + pad(positions, (0, 0, tokens.shape[1] - positions.shape[1], 0))
        return network.norm_pre(tokens), [{}] * len(network.blocks)

    def map_of(
        self, block: Any, tokens: Tensor, beside: dict[str, Any], class_only: bool
    ) -> Tensor:
        seen = (
            block.norm1(tokens) if isinstance(block, Block) else tokens
        )  # a post-norm block attends to its raw input
        return attention_map(block.attn, seen, class_only)

    def attend(
        self, block: Any, tokens: Tensor, beside: dict[str, Any], count: int
    ) -> tuple[Tensor, Tensor] | None:
        return (
            attend_and_map(block.attn, block.norm1(tokens), count) if type(block) is Block else None
        )

    def head(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = self.network.forward_head(features)
        return logits if isinstance(logits, tuple) else (logits, None)

    def classify(self, pooled: Tensor) -> Tensor:
        network = self.network
        pooled = network.head_drop(
            network.fc_norm(pooled)
        )  # attention pooling, where there is some, has no part in F
        if isinstance(network, VisionTransformerDistilled) and not network.distilled_training:
            return (network.head(pooled) + network.head_dist(pooled)) / 2  # as its own prediction
        return network.head(pooled)

    def resize_weights(
        self, weights: Mapping[str, Tensor], old_grid: tuple[int, int] | None
    ) -> tuple[dict[str, Tensor], list[str]]:
        own, notes = self.network.state_dict(), []
        new = {
            key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): v
            for key, v in weights.items()
        }
        position, kernel = new.get("pos_embed"), new.get("patch_embed.proj.weight")
        if position is not None and "pos_embed" in own:
            prefix = own["pos_embed"].shape[1] - math.prod(self.grid_size)
            new["pos_embed"] = resize_positions(position, self.grid_size, prefix, old_grid)
            if new["pos_embed"] is not position:
                notes.append(
                    f"pos_embed resized from {tuple(position.shape)} to "
                    f"{tuple(new['pos_embed'].shape)}"
                )
        if kernel is not None and kernel.ndim == 4 and kernel.shape[2:] != self.patch_size:
            new["patch_embed.proj.weight"] = resample_patch_embed(kernel, list(self.patch_size))
            notes.append(
                f"patch_embed.proj.weight resized from {tuple(kernel.shape[2:])} to "
                f"{tuple(self.patch_size)}"
            )
        return new, notes


@like_its_layer
def attend_and_map(attention: Any, tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What a timm attention layer gives the first of `tokens` (B, T, D), (B, count, D), and its map
    (B, H, T, T)."""
    queries, keys, values = queries_keys_values(attention, tokens)
    queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    attended = attend_from_first(attention, tokens, (queries, keys, values), count)
    return attended, softmax_map(queries, keys, attention.scale)


def init_like_deit(network: VisionTransformer) -> None:
    """DeiT starts its class token from a truncated normal of deviation 0.02; timm 1.x starts it at
    zero (1e-6)."""
    assert network.cls_token is not None
    nn.init.trunc_normal_(network.cls_token, std=0.02)


# For small inputs (28 or 32 pixels) on a laptop. Registered with timm, so that `timm.create_model`
# finds them too.


def _small_vit(settings: dict[str, Any], kwargs: dict[str, Any]) -> VisionTransformer:
    weights = (
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "cache_dir",
    )  # timm passes these; there are none
    given = {name: value for name, value in kwargs.items() if name not in weights}
    return VisionTransformer(**{"img_size": 32, "patch_size": 4, **settings, **given})


@register_model
def vit_nano_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """64 wide, 4 deep: what the quickstart trains."""
    return _small_vit({"embed_dim": 64, "depth": 4, "num_heads": 4}, kwargs)


@register_model
def vit_mini_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """96 wide, 6 deep: for CIFAR-10 in an afternoon."""
    return _small_vit({"embed_dim": 96, "depth": 6, "num_heads": 3}, kwargs)
