"""Convolutional networks of timm, ConvNeXt and ResNet: an extension beyond the paper.

A convolutional network has no attention, so Eq. 5 and 6 are not defined for it; the paper names
this as its limitation. Here the energy of the final feature map replaces the score: the L2 norm of
each cell over its channels, divided by the sum of the norms over the map. Like Eq. 6 without a
class token, it is one number per cell, not negative, and sums to one, so the method after it does
not change. The paper has no result for it.

The tokens are the cells of the feature map at the end of the last stage. ConvNeXt has its norm
after pooling, so its tokens come before that norm, and the norm is a part of the classifier F.

Letters: B batch, R x C cells, N = R * C, D channels, K classes.

Papers: ConvNeXt (arXiv 2201.03545), ResNet (arXiv 1512.03385).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet
from torch import Tensor

from models.interface import AttentionOf, ImageModel


def energy_score(features: Tensor) -> Tensor:
    """Replaces Eq. 6: the share of each cell in the energy of the map, without gradient.

    Args:
        features: (B, D, R, C).

    Returns:
        (B, N) float32, row-major; rows sum to one. A map of zeros gives a uniform score.
    """
    energy = features.detach().float().flatten(2).norm(dim=1)  # (B, N)
    total = energy.sum(dim=1, keepdim=True)  # (B, 1)
    uniform = torch.full_like(energy, 1 / energy.shape[1])
    smallest = torch.finfo(torch.float32).tiny
    return torch.where(total > 0, energy / total.clamp(min=smallest), uniform)


class ConvNet(ImageModel):
    """Any timm `ConvNeXt` or `ResNet`.

    timm's networks accept images of any size. This wrapper needs one size, because the grid of
    tokens follows from it.

    Args:
        input_size: (height, width) in pixels. None: that of timm's published weights.
        patch_size: must be None; a convolutional network has no patches.

    Raises:
        ValueError: `patch_size` is set, the network has no pooling before the classifier, or
            `input_size` is not a multiple of the stride.
    """

    network: ConvNeXt | ResNet

    def __init__(
        self,
        network: ConvNeXt | ResNet,
        separate_region_head: bool = False,
        input_size: tuple[int, int] | None = None,
        patch_size: int | None = None,
    ) -> None:
        if patch_size is not None:
            raise ValueError(
                f"--patch-size {patch_size}: a convolutional network has no patches; leave the "
                "flag out"
            )
        pool = network.head.global_pool if isinstance(network, ConvNeXt) else network.global_pool
        if cast(Any, pool).is_identity():
            raise ValueError(
                "it has no pooling before its classifier, so there is no F of Eq. 3; set "
                "global_pool"
            )
        super().__init__(network, network.num_features, network.num_classes, separate_region_head)
        self._stride = int(cast(Any, network).feature_info[-1]["reduction"])
        if input_size is None:
            input_size = cast(Any, network).pretrained_cfg["input_size"][1:]
        height, width = cast(tuple[int, int], input_size)
        if min(height, width) < self._stride or height % self._stride or width % self._stride:
            lower = [max(side // self._stride, 1) * self._stride for side in (height, width)]
            raise ValueError(
                f"--input-size {height} {width}: each side must be a multiple of its stride of "
                f"{self._stride} pixels, such as {lower[0]} {lower[1]}"
            )
        self._grid_size = height // self._stride, width // self._stride

    @property
    def grid_size(self) -> tuple[int, int]:
        return self._grid_size

    @property
    def patch_size(self) -> tuple[int, int]:
        return self._stride, self._stride

    def features(
        self, images: Tensor, need_attention: AttentionOf | None
    ) -> tuple[Tensor, Tensor | None]:
        if images.shape[-2:] != self.input_size:
            raise ValueError(
                f"images of {tuple(images.shape[-2:])} pixels do not fit a model built for "
                f"{self.input_size}"
            )
        features = self.network.forward_features(images)  # (B, D, R, C)
        return features, None if need_attention is None else energy_score(features)

    def image_tokens(self, features: Tensor) -> Tensor:
        return features.flatten(2).transpose(1, 2)  # (B, N, D)

    def head(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.network.forward_head(features), None

    def classify(self, pooled: Tensor) -> Tensor:
        # One token becomes a map of one cell, which pooling by mean or maximum does not change.
        maps = pooled.reshape(-1, pooled.shape[-1], 1, 1)
        return self.network.forward_head(maps).unflatten(0, pooled.shape[:-1])  # (..., K)
