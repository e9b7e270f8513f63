"""What mixing asks of a model, whatever its family: logits, final image tokens, attention scores,
region logits.

Knows "classify the mean token inside and outside a mask" but not what SMMix is. Imports nothing
from the project, no family and no timm.

Letters: B batch, N image tokens (row-major over the grid), D width, K classes, H heads, T all
tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

Depth = (
    int | Literal["rollout"] | None
)  # of the score: a block, counted from 1; the mean of all; or the last
AttentionOf = Literal[
    "image", "class"
]  # whose: that of the image tokens (Eq. 6), or of the class token (TransMix)


class ModelOutput(NamedTuple):
    """Everything one forward pass gives; what was not asked for is `None`."""

    logits: Tensor  # (B, K)
    # (B, N, D): final image tokens X of Eq. 2, row-major, without class, distillation or register
    # tokens
    tokens: Tensor
    image_attention: Tensor | None = None  # (B, N) float32, no gradient: alpha of Eq. 6
    region_logits: Tensor | None = (
        None  # (B, 2, K): the source region's, then the target region's (Eq. 12)
    )
    distillation_logits: Tensor | None = (
        None  # (B, K): the distillation token's own, while it is trained by a teacher
    )
    class_attention: Tensor | None = (
        None  # (B, N) float32, no gradient: what the class token attends to, mean over heads
    )


class GuideOutput(NamedTuple):
    """What the motivating pass gives: all that mixing needs to know of clean images."""

    logits: Tensor | None  # (B, K), if the prediction was asked for
    image_attention: Tensor  # (B, N) float32: alpha of Eq. 6, on the model's own grid


def image_attention_score(attention: Tensor, num_prefix_tokens: int) -> Tensor:
    """Eq. 6: how much attention each image token receives, averaged over heads and image-token
    queries.

    Rows and columns of class, distillation and register tokens are left out without renormalising.

    Args:
        attention: (B, H, T, T) map after the softmax; rows are queries.
        num_prefix_tokens: how many of the T tokens come before the image tokens.

    Returns:
        (B, N) float32 with N = T - num_prefix_tokens.
    """
    image_part = attention[:, :, num_prefix_tokens:, num_prefix_tokens:]  # (B, H, N, N)
    return image_part.float().mean(dim=(1, 2))  # (B, N)


def class_attention_score(attention: Tensor, num_prefix_tokens: int) -> Tensor:
    """TransMix (arXiv 2111.09833): how much the class token attends to each image token, averaged
    over heads.

    Columns of class, distillation and register tokens are left out without renormalising.

    Args:
        attention: (B, H, Q, T) map after the softmax; rows are queries, and the first is the class
            token's.
        num_prefix_tokens: how many of the T tokens come before the image tokens.

    Returns:
        (B, N) float32 with N = T - num_prefix_tokens.
    """
    return attention[:, :, 0, num_prefix_tokens:].float().mean(dim=1)  # (B, N)


def resize_score(score: Tensor, old_grid: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """A score of a coarser grid on a finer one, bilinear: each of its cells is shared by those it
    covers.

    Args:
        score: (B, n) float32, row-major over `old_grid`.

    Returns:
        (B, N), row-major over `grid`; its sum is about the same.
    """
    maps = interpolate(score.unflatten(1, old_grid)[:, None], grid, mode="bilinear")  # (B, 1, R, C)
    return maps.flatten(1) * (score.shape[1] / (grid[0] * grid[1]))


def resample_score(score: Tensor, old_grid: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """A score of another model's grid on this one: `resize_score` along a side that gets finer;
    along one that gets coarser each new cell receives what lies within it, cells on its border in
    proportion to their area.

    Args:
        score: (B, n) float32, row-major over `old_grid`.

    Returns:
        (B, N), row-major over `grid`; its sum is about the same, and the same where no side gets
        finer.
    """
    between = max(old_grid[0], grid[0]), max(old_grid[1], grid[1])
    if between != old_grid:
        score = resize_score(score, old_grid, between)
    if grid == between:
        return score
    rows, columns = (
        overlaps(old, new, score.device) for old, new in zip(between, grid, strict=True)
    )
    with torch.autocast(score.device.type, enabled=False):
        return (rows @ score.float().unflatten(1, between) @ columns.T).flatten(1)


def overlaps(old: int, new: int, device: torch.device) -> Tensor:
    """(new, old) float32: how much of each of `old` equal parts of a line lies in each of `new`
    ones; columns sum to one."""
    ends, cells = (
        torch.arange(new + 1, device=device) * (old / new),
        torch.arange(old, device=device),
    )
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


class ImageModel(nn.Module, ABC):
    """A plain network together with the reading of it that SMMix needs.

    `network` is the family's own module: it maps images to logits, its state dict has its own keys,
    and it is what exports and plain evaluators get. Families implement the four methods below.

    Args:
        network: the plain network.
        width: D, the width of its final tokens.
        separate_region_head: classify the regions with a second linear layer, as the released code
            does, instead of the classifier F of Eq. 12.
    """

    def __init__(
        self, network: nn.Module, width: int, num_classes: int, separate_region_head: bool = False
    ) -> None:
        super().__init__()
        self.network = network
        self.num_classes = num_classes
        self.token_head = nn.Linear(width, num_classes) if separate_region_head else None
        if self.token_head is not None:
            nn.init.trunc_normal_(self.token_head.weight, std=0.02)
            nn.init.zeros_(self.token_head.bias)

    @property
    @abstractmethod
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the final token grid."""

    @property
    @abstractmethod
    def patch_size(self) -> tuple[int, int]:
        """Height and width in pixels of the image patch behind one final token."""

    @property
    def has_class_token(self) -> bool:
        """Whether a class token attends to the final image tokens.

        Where none does, the image tokens' score stands in for its own. That substitute is ours:
        TransMix defines none.
        """
        return False

    @property
    def accepts_other_sizes(self) -> bool:
        """Whether the motivating pass can take images of another size: position embeddings and the
        like are then resampled."""
        return False

    @property
    def score_blocks(self) -> int:
        """How many blocks the motivating pass can read its score in; 0: the last one only."""
        return 0

    @abstractmethod
    def features(
        self, images: Tensor, need_attention: AttentionOf | None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, C, height, width) images -> the network's final features, and the score (B, N) that
        is asked for.

        The score is read without gradient, from the tokens that the last block receives in this
        pass, and after that
        block has run: under autocast, older torch keeps a weight's first cast for the whole pass,
        so a weight first cast for the score would get no gradient.
        """

    @abstractmethod
    def image_tokens(self, features: Tensor) -> Tensor:
        """The network's final features -> (B, N, D) image tokens."""

    @abstractmethod
    def head(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's final features -> (B, K) logits, and the distillation token's own while it
        is trained."""

    @abstractmethod
    def classify(self, pooled: Tensor) -> Tensor:
        """The classifier F of Eq. 3 on pooled tokens (..., D) -> (..., K)."""

    def resize_weights(
        self, weights: Mapping[str, Tensor], old_grid: tuple[int, int] | None
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Weights of the same architecture, under the network's own keys, made to fit this input
        and patch size.

        Args:
            old_grid: the grid they were trained on; a square one is assumed if absent.

        Returns:
            New weights, and a note for each tensor that was changed. What cannot be made to fit
            stays as it is: the strict loading that follows says so.
        """
        return dict(weights), []

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the network exempts from weight decay, as seen from here."""
        names: set[str] = getattr(self.network, "no_weight_decay", set)()
        return {f"network.{name}" for name in names}

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images this model takes."""
        return self.grid_size[0] * self.patch_size[0], self.grid_size[1] * self.patch_size[1]

    def motivating_pass(
        self,
        images: Tensor,
        size: tuple[int, int] | None = None,
        block: Depth = None,
        predict: bool = True,
    ) -> GuideOutput:
        """The motivating pass: prediction and score of clean images, in evaluation mode, and
        nothing that costs more.

        Args:
            images: (B, C, height, width), of the model's own size.
            size: height and width in pixels to show them at, multiples of `patch_size`, if the
                model `accepts_other_sizes`.
            block: read the score in this block, counted from 1, of the model's `score_blocks`;
                `rollout`: the mean of all their scores; default: that of the last.
            predict: false ends the pass where the score is read, if the family can; then there are
                no logits.
        """
        assert not self.training, "the motivating pass is for evaluation mode"
        known = (
            self.score_blocks > 0
            if block == "rollout"
            else block is None or 0 < block <= self.score_blocks
        )
        assert known, f"no block {block} of {self.score_blocks} to read"
        if size is None:
            return self.guide_output(images, False, block, predict)
        assert self.accepts_other_sizes, f"{type(self).__name__} takes images of one size"
        smaller = interpolate(images, size, mode="bilinear", antialias=True)
        seen = self.guide_output(smaller, True, block, predict)
        grid = size[0] // self.patch_size[0], size[1] // self.patch_size[1]
        return GuideOutput(seen.logits, resize_score(seen.image_attention, grid, self.grid_size))

    def guide_output(
        self, images: Tensor, resized: bool, block: Depth, predict: bool
    ) -> GuideOutput:
        """The motivating pass without resizing. Families whose prediction does not need the final
        image tokens leave them out.

        Args:
            resized: they are not of the model's own size; then the score is on their grid. Only if
                it `accepts_other_sizes`.
            block, predict: see there.
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
        """One pass.

        Args:
            images: (B, C, height, width).
            source_mask: (B, N) bool; with it the regions inside and outside are classified too (Eq.
                10 to 12).
            need_attention: also return the score of the image tokens (Eq. 6) or of the class token,
                see `has_class_token`. Only then does one block compute its attention map
                explicitly. The prediction and its gradient stay as they are.
        """
        features, score = self.features(images, need_attention)
        logits, distillation_logits = self.head(features)
        tokens = self.image_tokens(features)
        region_logits = None
        if source_mask is not None:
            classify = self.classify if self.token_head is None else self.token_head
            region_logits = classify(pool_regions(tokens, source_mask))  # (B, 2, K)
        elif self.token_head is not None and self.training:
            # A step without regions leaves this head idle. Zero gradients instead of none keep DDP
            # from having to search for unused parameters on every step.
            logits = logits + 0.0 * (self.token_head.weight.sum() + self.token_head.bias.sum())
        image_attention = score if need_attention == "image" else None
        class_attention = score if need_attention == "class" else None
        return ModelOutput(
            logits, tokens, image_attention, region_logits, distillation_logits, class_attention
        )
