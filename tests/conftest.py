"""What several test files share: seeds, one thread, tiny models and a guide without a network."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from models.build import build_model
from models.interface import ImageModel, ModelOutput

torch.set_num_threads(1)
settings.register_profile(
    "project", deadline=None, derandomize=True
)  # shared machines are slow now and then
settings.load_profile("project")

TINY: dict[str, Any] = {
    "input_size": (32, 48),
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
}

MakeModel = Callable[..., ImageModel]


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def randomise(module: nn.Module) -> None:
    """Every parameter far from its initial value, so that zero biases and uniform attention hide
    nothing."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = parameter.new_empty(parameter.shape).normal_(std=0.3)
            is_gain = parameter.ndim == 1 and not name.endswith("bias")
            parameter.copy_(1 + scale if is_gain else scale)


@pytest.fixture
def make_model() -> MakeModel:
    """name, overrides -> a tiny model of 7 classes in evaluation mode, weights drawn anew: 4 x 6
    tokens of 24.

    An override of None leaves a setting to the model itself.
    """

    def make(
        name: str = "deit_tiny_patch16_224", num_classes: int = 7, **overrides: Any
    ) -> ImageModel:
        torch.manual_seed(1)
        settings = {key: value for key, value in {**TINY, **overrides}.items() if value is not None}
        model = build_model(name, num_classes, **settings)
        randomise(model)
        return model.eval()

    return make


@pytest.fixture
def tiny_model(make_model: MakeModel) -> ImageModel:
    """DeiT with a class token."""
    return make_model()


@pytest.fixture
def tiny_mean_model(make_model: MakeModel) -> ImageModel:
    """No class token: final norm, then the mean over tokens, then the classifier (Eq. 3, second
    case)."""
    return make_model("vit_tiny_patch16_224", class_token=False, global_pool="avg", fc_norm=False)


@pytest.fixture
def images() -> Tensor:
    """Four images that the tiny models take."""
    return torch.randn(4, 3, 32, 48, generator=torch.Generator().manual_seed(5))


class FakeGuide:
    """A guide made of arithmetic: whatever it says of an image depends on that image alone.
    Remembers its calls.

    Args:
        levels: attention takes this many values, so that windows tie often.
    """

    def __init__(self, grid_size: tuple[int, int], num_classes: int, levels: int = 5) -> None:
        self.grid_size, self.num_classes, self.levels = grid_size, num_classes, levels
        self.calls: list[Tensor] = []

    def attention(self, images: Tensor) -> Tensor:
        cells = torch.nn.functional.adaptive_avg_pool2d(
            images.float()[:, :1], self.grid_size
        )  # (B, 1, rows, columns)
        return (
            (cells.flatten(1) * 97).round().remainder(self.levels)
        )  # (B, N), whole numbers: sums are exact

    def logits(self, images: Tensor) -> Tensor:
        ramp = torch.linspace(-3, 3, self.num_classes, device=images.device)
        return torch.sin(images.float().mean(dim=(1, 2, 3))[:, None] * 11 + ramp) * 2  # (B, K)

    def __call__(self, images: Tensor) -> ModelOutput:
        self.calls.append(images.clone())
        tokens = images.new_zeros(len(images), self.grid_size[0] * self.grid_size[1], 1)
        return ModelOutput(self.logits(images), tokens, self.attention(images))


@pytest.fixture
def fake_guide() -> type[FakeGuide]:
    return FakeGuide
