"""Second networks that are only looked through: teachers to distil from, AttentiveMix's classifier. All timm's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import downloads
from checkpoints import load_checkpoint, load_strictly, pick_weights
from models.build import near_misses, restore_model
from utils import InputError


def build_teacher(name: str, path: str, num_classes: int, input_size: tuple[int, int]) -> nn.Module:
    """A timm network with the weights of a file, to distil from images of `input_size` (height, width).

    Raises:
        InputError: unknown name, unreadable file, weights of another network, or one that refuses such images.
    """
    _check_name("--teacher-model", name)
    teacher = timm.create_model(name, num_classes=num_classes)
    load_strictly(teacher, pick_weights(load_checkpoint(path)), source=f"--teacher-path {path}")
    _try(f"--teacher-model {name}", teacher, input_size)
    return teacher


class FeatureMap(nn.Module):
    """The last feature map of a timm network: images (B, 3, height, width) -> (B, D, rows, columns)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        features = self.network.forward_features(images)  # type: ignore[operator]
        width = self.network.num_features
        last = features.ndim == 4 and features.shape[1] != width == features.shape[3]
        return features.permute(0, 3, 1, 2) if last else features


def build_feature_map(choice: str, input_size: tuple[int, int]) -> FeatureMap:
    """AttentiveMix's classifier, for images of `input_size` (height, width).

    Args:
        choice: NAME (timm's; timm downloads its weights), NAME=CHECKPOINT, or a CHECKPOINT of this project's main.py.

    Raises:
        InputError: unknown name, weights that cannot be had or belong to another network, or no feature map.
    """
    name, equals, path = choice.partition("=")
    flag = f"--attentive-teacher {choice}"
    if not equals and Path(choice).is_file():
        network = restore_model(load_checkpoint(choice)).network
    else:
        _check_name("--attentive-teacher", name)
        network = _from_file(name, path, flag) if equals else _download(name, flag)
    features = FeatureMap(network)
    shape = _try(flag, features, input_size).shape
    if len(shape) != 4 or shape[1] != network.num_features:
        raise InputError(f"{flag}: gives no map of features (its last ones are {list(shape[1:])}): take a ConvNet")
    return features


def _from_file(name: str, path: str, flag: str) -> nn.Module:
    weights = pick_weights(load_checkpoint(path))
    head = getattr(timm.create_model(name, num_classes=1), "default_cfg", {}).get("classifier", "head")
    classifier = weights.get(f"{head}.weight", torch.empty(0))
    classes = len(classifier) if classifier.numel() and classifier.ndim else 0  # its own: none is asked for
    network = timm.create_model(name, num_classes=classes)
    load_strictly(network, weights, source=flag)
    return network


def _download(name: str, flag: str) -> nn.Module:
    """timm's network with the weights that timm names for it, fetched by us: timm would not check them."""
    source = timm.get_pretrained_cfg(name)
    try:
        if source is None or not source.has_weights:
            raise InputError("timm knows none")
        weights: dict[str, Any]
        if source.hf_hub_id:
            file = downloads.from_hub(source.hf_hub_id, source.hf_hub_filename)
            weights = load_file(file) if file.suffix == ".safetensors" else load_checkpoint(file)
        else:
            weights = load_checkpoint(str(source.url))
        network: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": weights})
    except Exception as error:  # the hub's client passes on errors of its HTTP library
        reason = error.text if isinstance(error, InputError) else error
        raise InputError(
            f"{flag}: timm could not get its weights ({reason}); give a file: {name}=CHECKPOINT"
        ) from error
    network.pretrained_cfg.pop("state_dict", None)  # else a second copy stays in memory
    return network


def _check_name(flag: str, name: str) -> None:
    if not timm.is_model(name):
        raise InputError(f"{flag} {name}: no such model; {near_misses(name)}")


def _try(flag: str, network: nn.Module, input_size: tuple[int, int]) -> Tensor:
    """What a network makes of one black image."""
    try:
        with torch.no_grad():
            return network.eval()(torch.zeros(1, 3, *input_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        size = f"{input_size[0]} x {input_size[1]}"
        raise InputError(f"{flag} cannot take the student's images of {size} pixels: {error}") from error
