"""What mixing needs of a model: logits, final image tokens, attention scores and region logits.

`ImageModel` wraps the plain network of a family and computes these four. Mixers and losses receive
only its results, `GuideOutput` and `ModelOutput`.

Letters: B batch, C channels, N image tokens (row-major over the grid of R x C cells), D width,
K classes, H heads, T all tokens (class, distillation and register tokens, then the image tokens).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, cast

import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.functional import interpolate

# The block whose attention gives the score: its number, counted from 1; "rollout" for the mean of
# the scores of all blocks; None for the last block.
ScoreBlock = int | Literal["rollout"] | None

# The queries of the score: the image tokens (Eq. 6), or the class token (TransMix).
AttentionOf = Literal["image", "class"]


class ModelOutput(NamedTuple):
    """The result of one forward pass. Parts that the caller did not request are `None`."""

    # (B, K)
    logits: Tensor

    # (B, N, D): the final image tokens X of Eq. 2, row-major, without class, distillation and
    # register tokens
    tokens: Tensor

    # (B, N) float32 without gradient: alpha of Eq. 6
    image_attention: Tensor | None = None

    # (B, 2, K): logits of the source region, then of the target region (Eq. 12)
    region_logits: Tensor | None = None

    # (B, K): logits of the distillation token, only while a teacher trains it
    distillation_logits: Tensor | None = None

    # (B, N) float32 without gradient: attention of the class token to each image token, averaged
    # over heads
    class_attention: Tensor | None = None


class GuideOutput(NamedTuple):
    """The result of the motivating pass: what a mixer may use of the clean images."""

    logits: Tensor | None  # (B, K); None if the prediction was not requested
    image_attention: Tensor  # (B, N) float32: alpha of Eq. 6, on the model's grid


# --------------------------------------------------------------------------------------- the scores


def image_attention_score(attention: Tensor, num_prefix_tokens: int) -> Tensor:
    """Eq. 6: the attention that each image token receives, averaged over heads and queries.

    Only image tokens count as queries and as keys. Rows and columns of class, distillation and
    register tokens are removed, and the rest is not normalised again.

    Args:
        attention: (B, H, T, T), the attention map after the softmax. Rows are queries.
        num_prefix_tokens: how many of the T tokens come before the image tokens.

    Returns:
        (B, N) float32 with N = T - num_prefix_tokens.
    """
    image_part = attention[:, :, num_prefix_tokens:, num_prefix_tokens:]  # (B, H, N, N)
    return image_part.float().mean(dim=(1, 2))  # (B, N)


def class_attention_score(attention: Tensor, num_prefix_tokens: int) -> Tensor:
    """The class token's attention to each image token, averaged over heads (TransMix).

    Columns of class, distillation and register tokens are removed, and the rest is not normalised
    again. Paper: TransMix (arXiv 2111.09833).

    Args:
        attention: (B, H, Q, T), the attention map after the softmax. Rows are queries; the first is
            that of the class token.
        num_prefix_tokens: how many of the T tokens come before the image tokens.

    Returns:
        (B, N) float32 with N = T - num_prefix_tokens.
    """
    return attention[:, :, 0, num_prefix_tokens:].float().mean(dim=1)  # (B, N)


def upsample_score(score: Tensor, old_grid: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Resamples a score to a finer grid (bilinear) and keeps its sum approximately.

    The score of each coarse cell is divided among the fine cells that it covers.

    Args:
        score: (B, n) float32, row-major over `old_grid`.
        old_grid: rows and columns of the coarser grid.
        grid: rows and columns of the finer grid.

    Returns:
        (B, N), row-major over `grid`.
    """
    maps = interpolate(score.unflatten(1, old_grid)[:, None], grid, mode="bilinear")  # (B, 1, R, C)
    return maps.flatten(1) * (score.shape[1] / (grid[0] * grid[1]))


def resample_score(score: Tensor, old_grid: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Resamples a score from another model's grid to this one.

    Along a side that becomes finer this is `upsample_score`. Along a side that becomes coarser,
    each new cell receives the sum of the old cells inside it. An old cell that lies in two new ones
    is divided between them in proportion to the area.

    Args:
        score: (B, n) float32, row-major over `old_grid`.
        old_grid: rows and columns of the other model's grid.
        grid: rows and columns of the grid that is wanted.

    Returns:
        (B, N), row-major over `grid`. Its sum stays the same if no side becomes finer, and
        approximately the same otherwise.
    """
    finest = max(old_grid[0], grid[0]), max(old_grid[1], grid[1])
    if finest != old_grid:
        score = upsample_score(score, old_grid, finest)
    if grid == finest:
        return score
    rows = overlap_matrix(finest[0], grid[0], score.device)
    columns = overlap_matrix(finest[1], grid[1], score.device)
    with torch.autocast(score.device.type, enabled=False):
        return (rows @ score.float().unflatten(1, finest) @ columns.T).flatten(1)


def overlap_matrix(old: int, new: int, device: torch.device) -> Tensor:
    """(new, old) float32: the fraction of each old cell that lies in each new cell.

    Both divide the same line, into `old` and into `new` equal cells. Columns sum to one.
    """
    ends = torch.arange(new + 1, device=device) * (old / new)
    cells = torch.arange(old, device=device)
    begin, end = ends[:-1, None], ends[1:, None]
    return (torch.minimum(end, cells + 1) - torch.maximum(begin, cells)).clamp(min=0)


def pool_regions(tokens: Tensor, source_mask: Tensor) -> Tensor:
    """Eq. 10 and 11: the mean token of the source region and of the target region, in float32.

    Args:
        tokens: (B, N, D).
        source_mask: (B, N) bool, true where the token belongs to the source image.

    Returns:
        (B, 2, D): source, then target. An empty region gives zeros.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        members = torch.stack((source_mask, ~source_mask), dim=1).float()  # (B, 2, N)
        sums = members @ tokens.float()  # (B, 2, D)
        return sums / members.sum(dim=-1, keepdim=True).clamp(min=1)


# ---------------------------------------------------------------------------------------- the model


class ImageModel(nn.Module, ABC):
    """A plain network, and the methods that read tokens, scores and region logits from it.

    `network` is the family's plain network (timm's class, or ours for PVT). It maps images to
    logits, its state dict has the published keys, and exports contain it alone.

    A family implements `grid_size`, `patch_size`, `features`, `image_tokens`, `head` and
    `classify`. The other methods have defaults.

    Args:
        network: the plain network.
        width: D, the width of its final tokens.
        num_classes: K.
        separate_region_head: classify the regions with a second linear layer, as the released code
            does, instead of the classifier F of Eq. 12.

    Raises:
        ValueError: the network has no classifier.
    """

    def __init__(
        self, network: nn.Module, width: int, num_classes: int, separate_region_head: bool = False
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError("it has no classifier (num_classes is 0)")
        self.network = network
        self.num_classes = num_classes
        self.token_head = nn.Linear(width, num_classes) if separate_region_head else None
        if self.token_head is not None:
            nn.init.trunc_normal_(self.token_head.weight, std=0.02)
            nn.init.zeros_(self.token_head.bias)

    # What the model is: sizes and abilities.

    @property
    @abstractmethod
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the grid of final image tokens."""

    @property
    @abstractmethod
    def patch_size(self) -> tuple[int, int]:
        """Height and width in pixels of the image patch that belongs to one final token."""

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that this model takes."""
        return self.grid_size[0] * self.patch_size[0], self.grid_size[1] * self.patch_size[1]

    @property
    def has_class_token(self) -> bool:
        """Whether the model has a class token that attends to the final image tokens.

        If not, the score of the image tokens (Eq. 6) replaces the score of the class token. This
        replacement is the project's choice: TransMix defines none.
        """
        return False

    @property
    def accepts_other_sizes(self) -> bool:
        """Whether the motivating pass accepts images of another size than `input_size`.

        Such a model resamples its position embedding for that pass.
        """
        return False

    @property
    def score_blocks(self) -> int:
        """How many blocks can give the score of the motivating pass, or 0 if only the last can."""
        return 0

    # What a family implements: the parts of its forward pass.

    @abstractmethod
    def features(
        self, images: Tensor, need_attention: AttentionOf | None
    ) -> tuple[Tensor, Tensor | None]:
        """Images (B, C, height, width) -> the network's final features and the score (B, N).

        The score belongs to the last block. It is computed without gradient, from the same tokens
        that this block receives, and after the block has run. The order matters: under autocast,
        older releases of torch cache the first cast of a weight for the whole pass. A weight that
        is first cast for the score, without gradient, would then get no gradient.

        Args:
            need_attention: the queries of the score; None for no score.

        Returns:
            The final features, in the layout of the family, and the score or None.
        """

    @abstractmethod
    def image_tokens(self, features: Tensor) -> Tensor:
        """The network's final features -> image tokens (B, N, D), row-major."""

    @abstractmethod
    def head(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's final features -> logits (B, K), and those of the distillation token.

        The second is None, except in a model with a distillation token while a teacher trains it.
        """

    @abstractmethod
    def classify(self, pooled: Tensor) -> Tensor:
        """The classifier F of Eq. 3 on pooled tokens: (..., D) -> logits (..., K)."""

    # Weights.

    def resize_weights(
        self, weights: Mapping[str, Tensor], old_grid: tuple[int, int] | None
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Adapts weights of the same architecture to this model's input size and patch size.

        Args:
            weights: under the keys of `network`.
            old_grid: the grid they were trained on. None: a square one is assumed.

        Returns:
            New weights, and a note for each tensor that was changed. A tensor that cannot be
            adapted stays as it is, and the strict loading that follows reports it.
        """
        return dict(weights), []

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters, in this module, that the network exempts from weight decay."""
        names: set[str] = getattr(self.network, "no_weight_decay", set)()
        return {f"network.{name}" for name in names}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Gives the layer of each parameter in this module, for timm's layer-wise rate decay.

        The layers are those of the network's own `group_matcher`; `coarse` is passed to it. A
        second region head belongs to the last layer, which has the classifier.
        """
        matcher = cast(Any, self.network).group_matcher(coarse=coarse)
        layers = group_parameters(self.network, matcher, reverse=True)
        last = max(layers.values())
        return lambda name: layers.get(name.removeprefix("network."), last)

    # The two passes of a training step.

    def motivating_pass(
        self,
        images: Tensor,
        size: tuple[int, int] | None = None,
        block: ScoreBlock = None,
        predict: bool = True,
    ) -> GuideOutput:
        """The motivating pass: score (Eq. 6) and logits of clean images, in eval mode.

        The caller disables gradients and sets eval mode.

        Args:
            images: (B, C, height, width) of `input_size`.
            size: height and width in pixels to which the images are resized for this pass,
                multiples of `patch_size`. Only for a model that `accepts_other_sizes`.
            block: the block that gives the score, counted from 1 up to `score_blocks`; "rollout"
                for the mean of the scores of all blocks; None for the last block.
            predict: whether logits are needed. If not, the pass ends at the block that gives the
                score, in families that can stop early.

        Returns:
            The logits, or None without `predict`, and the score (B, N) on the model's grid.
        """
        assert not self.training, "the motivating pass needs eval mode"
        if block == "rollout":
            is_possible = self.score_blocks > 0
        else:
            is_possible = block is None or 0 < block <= self.score_blocks
        assert is_possible, f"block {block} cannot give the score, {self.score_blocks} blocks can"
        if size is None:
            return self.guide_output(images, False, block, predict)

        # A pass over smaller images is cheaper. Its score comes on a coarser grid and is resampled.
        assert self.accepts_other_sizes, f"{type(self).__name__} takes images of one size only"
        small_images = interpolate(images, size, mode="bilinear", antialias=True)
        output = self.guide_output(small_images, True, block, predict)
        small_grid = size[0] // self.patch_size[0], size[1] // self.patch_size[1]
        score = upsample_score(output.image_attention, small_grid, self.grid_size)
        return GuideOutput(output.logits, score)

    def guide_output(
        self, images: Tensor, resized: bool, block: ScoreBlock, predict: bool
    ) -> GuideOutput:
        """The motivating pass without the resizing; called by `motivating_pass` alone.

        This default is a complete forward pass. Families override it to skip work that neither the
        logits nor the score needs.

        Args:
            images: (B, C, height, width).
            resized: whether the images have another size than `input_size`. The score is then on
                the grid of these images.
            block: as in `motivating_pass`.
            predict: as in `motivating_pass`.
        """
        output = self(images, need_attention="image")
        assert output.image_attention is not None
        return GuideOutput(output.logits if predict else None, output.image_attention)

    def forward(
        self,
        images: Tensor,
        source_mask: Tensor | None = None,
        need_attention: AttentionOf | None = None,
    ) -> ModelOutput:
        """One forward pass: logits and image tokens, and on request region logits and a score.

        Args:
            images: (B, C, height, width).
            source_mask: (B, N) bool, true where the token belongs to the source image. If given,
                the regions inside and outside are classified as well (Eq. 10 to 12).
            need_attention: also return the score of the image tokens (Eq. 6) or that of the class
                token, see `has_class_token`. Only then does the last block compute its attention
                map explicitly. The logits and their gradients do not change.
        """
        # The backbone: final features, and the score of the last block if it was requested.
        features, score = self.features(images, need_attention)

        # The classifier F: logits of the whole image (Eq. 3).
        logits, distillation_logits = self.head(features)

        # The final image tokens X (Eq. 2), row-major, without prefix tokens.
        tokens = self.image_tokens(features)  # (B, N, D)

        region_logits = None
        if source_mask is not None:
            # Mean token of each region (Eq. 10, 11), classified by F, or by the second head of the
            # released code (Eq. 12).
            classify = self.classify if self.token_head is None else self.token_head
            region_logits = classify(pool_regions(tokens, source_mask))  # (B, 2, K)
        elif self.token_head is not None and torch.is_grad_enabled():
            # A step without regions does not use this head. Zero gradients instead of none: DDP
            # then never has to search for unused parameters.
            logits = logits + 0.0 * (self.token_head.weight.sum() + self.token_head.bias.sum())

        return ModelOutput(
            logits,
            tokens,
            image_attention=score if need_attention == "image" else None,
            region_logits=region_logits,
            distillation_logits=distillation_logits,
            class_attention=score if need_attention == "class" else None,
        )
