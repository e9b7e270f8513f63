"""PVT v1, which timm does not contain, and its wrapper. The last block is that of stage 4.

Four stages work on grids of 1/4, 1/8, 1/16 and 1/32 of the image size. Keys and values come from a
grid reduced to that of stage 4. In stage 4 a class token is added. The state dict has the keys of
the published PVT files.

Paper: Pyramid Vision Transformer (arXiv 2102.12122). Letters: B batch, R x C a stage's grid,
N = R * C, T all tokens (N, and 1 + N in stage 4), M keys, D the stage's width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import DropPath, Mlp, to_2tuple
from timm.models import register_model
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

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
from models.prefix_tokens import finish_block

Grid = tuple[int, int]
STRIDES = (4, 2, 2, 2)  # the strides of the four patch embeddings

# Epsilon of LayerNorm in the blocks and at the end. After convolutions it is PyTorch's 1e-5.
BLOCK_EPS = 1e-6


def _to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """(B, N, D) -> (B, D, R, C)."""
    return tokens.transpose(1, 2).unflatten(2, grid)


class PatchEmbedding(nn.Module):
    """Patches of stride x stride cells -> normed tokens: (B, D_in, R_in, C_in) -> (B, N, D)."""

    def __init__(self, stride: int, width_in: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(width_in, width, stride, stride)
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.proj(images).flatten(2).transpose(1, 2))


class ReducedAttention(nn.Module):
    """Fused attention with keys and values from a grid reduced by `reduction` (PVT Sec. 3.3)."""

    def __init__(self, width: int, num_heads: int, reduction: int, drop: float) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a width of {width}")
        self.num_heads, self.reduction = num_heads, reduction
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(drop)
        if reduction > 1:
            self.sr = nn.Conv2d(width, width, reduction, reduction)
            self.norm = nn.LayerNorm(width)

    def _reduce(self, tokens: Tensor, grid: Grid) -> Tensor:
        """(B, T, D) -> (B, M, D), the tokens that become keys and values."""
        if self.reduction == 1:
            return tokens
        return self.norm(self.sr(_to_map(tokens, grid)).flatten(2).transpose(1, 2))

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        return self._attend(tokens, grid, tokens.shape[1])[0]

    def _attend(self, tokens: Tensor, grid: Grid, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The output for the first `count` tokens, with all queries and keys.

        Returns:
            (B, count, D), (B, H, T, D / H) and (B, H, M, D / H).
        """
        parts = self.q(tokens), *self.kv(self._reduce(tokens, grid)).chunk(2, dim=-1)
        queries, keys, values = (split_heads(part, self.num_heads) for part in parts)
        mixed = scaled_dot_product_attention(queries[:, :, :count], keys, values)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2))), queries, keys

    @in_layer_precision
    def attend_and_map(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """The output for the first token (B, 1, D), and the complete map (B, H, T, M)."""
        attended, queries, keys = self._attend(tokens, grid, 1)
        return attended, softmax_map(queries, keys, queries.shape[-1] ** -0.5)

    @in_layer_precision
    def attention_map(self, tokens: Tensor, grid: Grid, class_only: bool) -> Tensor:
        """Eq. 5: the map A of this layer, in float32 and without gradient.

        The fused kernel does not return its map, so queries and keys are computed a second time
        here, but not values.

        Args:
            tokens: (B, T, D), the input of the layer.
            class_only: compute the row of the first token only.

        Returns:
            (B, H, T, M), or (B, H, 1, M) with `class_only`.
        """
        width = self.q.in_features
        with torch.no_grad():
            queries = split_heads(self.q(tokens[:, :1] if class_only else tokens), self.num_heads)
            keys = linear(self._reduce(tokens, grid), self.kv.weight[:width], self.kv.bias[:width])
            keys = split_heads(keys, self.num_heads)
            return softmax_map(queries, keys, queries.shape[-1] ** -0.5)


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + MLP(norm(x)), with stochastic depth."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        reduction: int,
        drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=BLOCK_EPS)
        self.attn = ReducedAttention(width, num_heads, reduction, drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=BLOCK_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio), drop=drop)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), grid))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))  # (B, T, D)


class PyramidVisionTransformer(nn.Module):
    """PVT v1: (B, in_chans, height, width) images of one size -> (B, num_classes) logits.

    Args:
        img_size: side, or (height, width), in pixels. Position embeddings have this size and are
            never interpolated in a forward pass. Pixels beyond a multiple of 32 are cut off by the
            strided convolutions.
        patch_size: patch size of stage 1, which must be 4.
        drop_rate: dropout after position embeddings and attention, and in the MLPs.
        drop_path_rate: stochastic depth of the last block. It rises linearly from 0 over the blocks
            of all stages.
        embed_dims, num_heads, mlp_ratios, depths, sr_ratios: one value per stage. The reduction
            `sr_ratios` of stage 4 must be 1.

    Raises:
        ValueError: the settings do not describe a PVT.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = STRIDES[0],
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        depths: Sequence[int] = (2, 2, 2, 2),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
    ) -> None:
        super().__init__()
        height, width = to_2tuple(img_size)
        self.img_size: Grid = (height, width)
        per_stage = embed_dims, num_heads, mlp_ratios, depths, sr_ratios
        _check_settings(self.img_size, patch_size, per_stage)
        strides = [math.prod(STRIDES[: stage + 1]) for stage in range(4)]
        self.grid_sizes: list[Grid] = [
            (self.img_size[0] // s, self.img_size[1] // s) for s in strides
        ]
        self.num_classes, self.num_features = num_classes, embed_dims[-1]
        self.grad_checkpointing = False
        self.pos_drop = nn.Dropout(drop_rate)
        total = sum(depths)
        rates = iter(index * drop_path_rate / max(total - 1, 1) for index in range(total))
        dims_in = (in_chans, *embed_dims[:-1])
        for stage, (dim, heads, ratio, depth, reduction) in enumerate(zip(*per_stage, strict=True)):
            positions = math.prod(self.grid_sizes[stage]) + (stage == 3)  # + 1 for the class token
            blocks = [
                Block(dim, heads, ratio, reduction=reduction, drop=drop_rate, drop_path=next(rates))
                for _ in range(depth)
            ]
            embedding = PatchEmbedding(STRIDES[stage], dims_in[stage], dim)
            position = nn.Parameter(torch.zeros(1, positions, dim))
            # The published files have these names (patch_embed1, pos_embed1, block1, ...).
            self.add_module(f"patch_embed{stage + 1}", embedding)
            self.register_parameter(f"pos_embed{stage + 1}", position)
            self.add_module(f"block{stage + 1}", nn.ModuleList(blocks))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.num_features))
        self.norm = nn.LayerNorm(self.num_features, eps=BLOCK_EPS)
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        """Linear layers, position embeddings and class token: truncated normal, deviation 0.02.

        Convolutions keep PyTorch's initialisation.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters(recurse=False):
            assert name == "cls_token" or name.startswith("pos_embed")
            nn.init.trunc_normal_(parameter, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Only the class token: PVT applies weight decay to its position embeddings."""
        return {"cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The layers of the parameters, as timm's `group_parameters` reads them.

        Each block is a layer; `coarse` changes nothing, as in timm's ViT. Patch and position
        embeddings belong to the first block of their stage; those of stage 1 are the first layer.
        """
        return {
            "stem": r"(?:patch_embed|pos_embed)1",
            "blocks": [
                (r"block(\d+)\.(\d+)", None),
                (r"(?:patch_embed|pos_embed)(\d+)", (0,)),
                (r"cls_token", (4, 0)),
                (r"norm", (99999,)),  # with the last block
            ],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keeps only the inputs of the blocks and computes the rest again in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a new one for `num_classes` classes, or by none for 0."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        for name, parameter in self.head.named_parameters():
            if name == "bias":
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=0.02)

    def blocks_of(self, stage: int) -> Sequence[Block]:
        """The blocks of a stage, counted from 0 to 3."""
        return getattr(self, f"block{stage + 1}")

    def embed_stage(self, stage: int, maps: Tensor) -> Tensor:
        """The images or feature maps before a stage (0 to 3) -> tokens (B, T, D) for its blocks."""
        tokens = getattr(self, f"patch_embed{stage + 1}")(maps)  # (B, N, D)
        if stage == 3:
            class_tokens = self.cls_token.expand(tokens.shape[0], -1, -1)  # (B, 1, D)
            tokens = torch.cat((class_tokens, tokens), dim=1)  # (B, 1 + N, D)
        return self.pos_drop(tokens + getattr(self, f"pos_embed{stage + 1}"))

    def forward_to_last_block(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) -> the input of the last block (B, 1 + N, D)."""
        size = tuple(images.shape[-2:])
        torch._assert(
            size == self.img_size,
            f"images of {size} pixels do not fit a network built for {self.img_size}",
        )
        maps = images
        for stage, grid in enumerate(self.grid_sizes[:-1]):
            tokens = self.embed_stage(stage, maps)  # (B, N, D)
            for block in self.blocks_of(stage):
                tokens = run_block(self, block, tokens, grid)
            maps = _to_map(tokens, grid)  # (B, D, R, C)
        tokens = self.embed_stage(3, maps)  # (B, 1 + N, D)
        for block in self.blocks_of(3)[:-1]:
            tokens = run_block(self, block, tokens, self.grid_sizes[3])
        return tokens

    def forward_last_block(self, tokens: Tensor) -> Tensor:
        """The input of the last block -> final normed tokens (B, 1 + N, D)."""
        return self.norm(run_block(self, self.blocks_of(3)[-1], tokens, self.grid_sizes[3]))

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, in_chans, height, width) -> (B, 1 + N, D), class token first."""
        return self.forward_last_block(self.forward_to_last_block(images))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, 1 + N, D) -> (B, K) logits, or (B, D) class tokens."""
        return features[:, 0] if pre_logits else self.head(features[:, 0])

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def _check_settings(
    img_size: Grid, patch_size: Any, per_stage: tuple[Sequence[float], ...]
) -> None:
    if tuple(to_2tuple(patch_size)) != (STRIDES[0], STRIDES[0]):
        raise ValueError(
            f"PVT's patches are fixed (strides {STRIDES}): patch_size can only be {STRIDES[0]}"
        )
    if min(img_size) < math.prod(STRIDES):
        raise ValueError(
            f"images of {img_size} pixels are smaller than one final token of {math.prod(STRIDES)}"
        )
    if any(len(values) != 4 for values in per_stage):
        raise ValueError(
            "embed_dims, num_heads, mlp_ratios, depths and sr_ratios need one value for each of 4 "
            "stages"
        )
    *_, depths, reductions = per_stage
    if depths[3] < 1 or reductions[3] != 1:
        raise ValueError(
            "stage 4 needs at least one block and no reduction (1): it holds the class token"
        )


class PVT(ImageModel):
    """The wrapper of PVT v1: the score is that of the last block of stage 4."""

    network: PyramidVisionTransformer

    def __init__(
        self, network: PyramidVisionTransformer, separate_region_head: bool = False
    ) -> None:
        super().__init__(network, network.num_features, network.num_classes, separate_region_head)

    @property
    def grid_size(self) -> Grid:
        return self.network.grid_sizes[-1]

    @property
    def patch_size(self) -> Grid:
        return math.prod(STRIDES), math.prod(STRIDES)

    @property
    def has_class_token(self) -> bool:
        return True

    def features(
        self, images: Tensor, need_attention: AttentionOf | None
    ) -> tuple[Tensor, Tensor | None]:
        tokens = self.network.forward_to_last_block(images)  # (B, 1 + N, D)
        features = self.network.forward_last_block(tokens)
        if need_attention is None:
            return features, None
        return features, self._score(tokens, need_attention == "class")

    @torch.no_grad()
    def _score(self, tokens: Tensor, class_only: bool) -> Tensor:
        """The input of the last block (B, 1 + N, D) -> its score (B, N)."""
        last = self.network.blocks_of(3)[-1]
        score_of = class_attention_score if class_only else image_attention_score
        attention = last.attn.attention_map(last.norm1(tokens), self.grid_size, class_only)
        return score_of(attention, num_prefix_tokens=1)

    def guide_output(
        self, images: Tensor, resized: bool, block: ScoreBlock, predict: bool
    ) -> GuideOutput:
        """The motivating pass; the last block computes the output of the class token only.

        The logits depend on no other token.
        """
        tokens = self.network.forward_to_last_block(images)  # (B, 1 + N, D)
        last = self.network.blocks_of(3)[-1]
        if not predict:
            return GuideOutput(None, self._score(tokens, class_only=False))
        attended, attention = last.attn.attend_and_map(last.norm1(tokens), self.grid_size)
        features = self.network.norm(finish_block(last, tokens[:, :1], attended))  # (B, 1, D)
        score = image_attention_score(attention, num_prefix_tokens=1)
        return GuideOutput(self.head(features)[0], score)

    def image_tokens(self, features: Tensor) -> Tensor:
        return features[:, 1:]

    def head(self, features: Tensor) -> tuple[Tensor, None]:
        return self.network.forward_head(features), None

    def classify(self, pooled: Tensor) -> Tensor:
        return self.network.head(pooled)

    def resize_weights(
        self, weights: Mapping[str, Tensor], old_grid: Grid | None
    ) -> tuple[dict[str, Tensor], list[str]]:
        new, notes = dict(weights), []
        for stage, grid in enumerate(self.network.grid_sizes):
            key, scale = f"pos_embed{stage + 1}", 2 ** (3 - stage)
            if (value := new.get(key)) is None or value.ndim != 3:
                continue
            # Every stage needs its old grid: the number of tokens alone does not identify it, as
            # another shape can have the same number.
            old = None if old_grid is None else (old_grid[0] * scale, old_grid[1] * scale)
            new[key] = resize_positions(
                value, grid, int(stage == 3), old, interpolation="bilinear", antialias=False
            )
            if new[key] is not value:
                notes.append(f"{key} resized from {tuple(value.shape)} to {tuple(new[key].shape)}")
        return new, notes


# These networks are registered with timm, so `timm.create_model` builds them too.


def _pvt(
    depths: Sequence[int], pretrained: bool, kwargs: dict[str, Any]
) -> PyramidVisionTransformer:
    if pretrained:
        raise ValueError("timm has no weights of PVT v1 to download: load them from a file instead")
    # timm passes these arguments about pretrained weights.
    unused = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    given = {name: value for name, value in kwargs.items() if name not in unused}
    return PyramidVisionTransformer(**{"depths": depths, **given})


@register_model
def pvt_tiny(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    return _pvt((2, 2, 2, 2), pretrained, kwargs)


@register_model
def pvt_small(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    return _pvt((3, 4, 6, 3), pretrained, kwargs)


@register_model
def pvt_medium(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    return _pvt((3, 4, 18, 3), pretrained, kwargs)


@register_model
def pvt_large(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    return _pvt((3, 8, 27, 3), pretrained, kwargs)
