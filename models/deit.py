"""Plain vision transformers of timm (DeiT, distilled DeiT, DeiT III, ViT) and two small ones.

The last block is `blocks[-1]`. Its score uses image tokens only (paper Sec. 3.2): rows and columns
of class, distillation and register tokens are removed. A class token is always the first token.

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
from models.float32_attention import in_layer_precision
from models.prefix_tokens import attend_prefix


class PlainViT(PlainTransformer):
    """Any timm `VisionTransformer` whose last block has attention with a joint `qkv` projection.

    Raises:
        ValueError: its last block is of another class, whose map cannot be computed; it drops
            patches during training, or has no logits for an image.
    """

    network: VisionTransformer

    def __init__(self, network: VisionTransformer, separate_region_head: bool = False) -> None:
        last = network.blocks[-1]
        if not (isinstance(last, (Block, ResPostBlock)) and isinstance(last.attn, Attention)):
            kind = type(getattr(last, "attn", last)).__name__
            raise ValueError(f"the attention map of its last block ({kind}) cannot be computed")
        if not network.global_pool:
            raise ValueError("it has no pooling (global_pool is empty)")
        if not isinstance(network.patch_drop, nn.Identity):
            raise ValueError(
                "it drops patches during training (patch_drop_rate), so regions lose their tokens"
            )
        super().__init__(network, network.embed_dim, network.num_classes, separate_region_head)

    def embed(self, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        network = self.network
        tokens = network._pos_embed(network.patch_embed(images))  # (B, T, D)
        return network.norm_pre(tokens), [{}] * len(network.blocks)

    @property
    def accepts_other_sizes(self) -> bool:
        """Whether `embed_resized` fits this network.

        It needs a patch embedding of one convolution, and attention pooling without positions.
        """
        network = self.network
        is_plain = type(network) in (VisionTransformer, VisionTransformerDistilled)
        is_patched = type(network.patch_embed) is PatchEmbed
        pools_anywhere = getattr(network.attn_pool, "pos_embed", None) is None
        return is_plain and is_patched and pools_anywhere

    def embed_resized(self, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """`embed` for images of another size, with the position embedding resampled to their grid.

        It is resampled in every pass, because training changes it in every step.
        """
        network = self.network
        patches = network.patch_embed.proj(images)  # (B, D, r, c)
        tokens = network.patch_embed.norm(patches.flatten(2).transpose(1, 2))  # (B, n, D)
        names = ("cls_token", "dist_token", "reg_token")
        present = [getattr(network, name, None) for name in names]
        prefix = [token.expand(len(tokens), -1, -1) for token in present if token is not None]
        tokens = torch.cat((*prefix, tokens), dim=1)
        if network.pos_embed is not None:
            # Prefix tokens without a position come first and get zeros.
            prefix_positions = network.pos_embed.shape[1] - math.prod(self.grid_size)
            grid = tuple(patches.shape[2:])
            positions = resize_positions(network.pos_embed, grid, prefix_positions, self.grid_size)
            tokens = tokens + pad(positions, (0, 0, tokens.shape[1] - positions.shape[1], 0))
        return network.norm_pre(tokens), [{}] * len(network.blocks)

    def block_attention_map(
        self, block: Any, tokens: Tensor, block_args: dict[str, Any], class_only: bool
    ) -> Tensor:
        # A post-norm block gives its attention the tokens without a norm.
        attention_input = block.norm1(tokens) if isinstance(block, Block) else tokens
        return attention_map(block.attn, attention_input, class_only)

    def attend_and_map(
        self, block: Any, tokens: Tensor, block_args: dict[str, Any], count: int
    ) -> tuple[Tensor, Tensor] | None:
        if type(block) is not Block:
            return None
        return attend_and_map(block.attn, block.norm1(tokens), count)

    def head(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = self.network.forward_head(features)
        return logits if isinstance(logits, tuple) else (logits, None)

    def classify(self, pooled: Tensor) -> Tensor:
        network = self.network
        # Attention pooling, if the network has it, is not a part of F.
        pooled = network.head_drop(network.fc_norm(pooled))
        if isinstance(network, VisionTransformerDistilled) and not network.distilled_training:
            # The mean of both heads, as in the prediction of the whole image.
            return (network.head(pooled) + network.head_dist(pooled)) / 2
        return network.head(pooled)

    def resize_weights(
        self, weights: Mapping[str, Tensor], old_grid: tuple[int, int] | None
    ) -> tuple[dict[str, Tensor], list[str]]:
        own, notes = self.network.state_dict(), []
        # DeiT III's published files have other names for layer scale.
        new = {
            key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): value
            for key, value in weights.items()
        }
        position, kernel = new.get("pos_embed"), new.get("patch_embed.proj.weight")
        if position is not None and "pos_embed" in own:
            prefix = own["pos_embed"].shape[1] - math.prod(self.grid_size)
            new["pos_embed"] = resize_positions(position, self.grid_size, prefix, old_grid)
            if new["pos_embed"] is not position:
                shapes = tuple(position.shape), tuple(new["pos_embed"].shape)
                notes.append(f"pos_embed resized from {shapes[0]} to {shapes[1]}")
        if kernel is not None and kernel.ndim == 4 and kernel.shape[2:] != self.patch_size:
            new["patch_embed.proj.weight"] = resample_patch_embed(kernel, list(self.patch_size))
            sizes = tuple(kernel.shape[2:]), tuple(self.patch_size)
            notes.append(f"patch_embed.proj.weight resized from {sizes[0]} to {sizes[1]}")
        return new, notes


@in_layer_precision
def attend_and_map(attention: Any, tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The output of a timm attention layer for its first `count` tokens, and its complete map.

    Args:
        tokens: (B, T, D), the input of the layer.

    Returns:
        (B, count, D) and (B, H, T, T) float32.
    """
    queries, keys, values = queries_keys_values(attention, tokens)
    queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    attended = attend_prefix(attention, tokens, (queries, keys, values), count)
    return attended, softmax_map(queries, keys, attention.scale)


def init_like_deit(network: VisionTransformer) -> None:
    """Initialises the class token as DeiT does: a truncated normal with deviation 0.02.

    timm 1.x initialises it close to zero (1e-6).
    """
    assert network.cls_token is not None
    nn.init.trunc_normal_(network.cls_token, std=0.02)


# Two networks for inputs of 28 or 32 pixels on a laptop. They are registered with timm, so
# `timm.create_model` builds them too.


def _small_vit(settings: dict[str, Any], kwargs: dict[str, Any]) -> VisionTransformer:
    # timm passes arguments about pretrained weights, which do not exist for these networks.
    unused = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    given = {name: value for name, value in kwargs.items() if name not in unused}
    return VisionTransformer(**{"img_size": 32, "patch_size": 4, **settings, **given})


@register_model
def vit_nano_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Width 64, depth 4: the network of the quickstart."""
    return _small_vit({"embed_dim": 64, "depth": 4, "num_heads": 4}, kwargs)


@register_model
def vit_mini_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Width 96, depth 6: trains on CIFAR-10 in an afternoon."""
    return _small_vit({"embed_dim": 96, "depth": 6, "num_heads": 3}, kwargs)
