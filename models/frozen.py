"""Second networks that are only looked through: teachers to distil from, AttentiveMix's classifier, motivators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import downloads
from checkpoints import load_checkpoint, load_strictly, pick_weights
from models.build import adapt_weights, build_model, load_foreign, near_misses, restore_model
from models.interface import ImageModel
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


def build_motivator(choice: str, num_classes: int, input_size: tuple[int, int]) -> ImageModel:
    """A frozen network to guide a student by (Table 9): any family, any grid, the student's classes and images.

    What it learned for its own image size is resampled as `--finetune` does.

    Args:
        choice: NAME (timm's; timm downloads its weights), NAME=CHECKPOINT, or a CHECKPOINT of this project's main.py.
        input_size: height and width in pixels of the student's images.

    Raises:
        InputError: unknown name, weights that cannot be had or belong to another network, other classes, or images that
            it cannot take.
    """
    name, equals, path = choice.partition("=")
    flag = f"--motivator {choice}"
    if not equals and Path(choice).is_file():
        name, path = "", choice
    elif not timm.is_model(name):
        raise InputError(f"{flag}: neither self nor ema, nor a file, nor a model's name; {near_misses(name)}")
    config = _config_in(path, name, flag) if path else {"name": name}
    downloaded = None if path else _download(name, flag)
    classes = config.get("num_classes", getattr(downloaded, "num_classes", num_classes))
    if classes != num_classes:
        raise InputError(
            f"{flag}: predicts {classes} classes, the data has {num_classes}: it must be trained for these"
        )
    try:
        model = build_model(**{**config, "num_classes": num_classes, "input_size": input_size})
        if downloaded is None:
            load_foreign(model, path, fresh_heads=False)
        else:
            weights, _ = adapt_weights(model, downloaded.state_dict(), fresh_heads=False)
            load_strictly(model, weights, source=flag)
    except InputError as error:
        raise InputError(
            f"{flag} cannot guide a student on {input_size[0]} x {input_size[1]} pixels: {error}"
        ) from error
    _try(flag, model.network, input_size)
    return model.requires_grad_(False)


def _config_in(path: str, name: str, flag: str) -> dict[str, Any]:
    """Keywords of `build_model` for the weights in a file; only a checkpoint of ours says them itself."""
    config = load_checkpoint(path).get("model_config")
    if not isinstance(config, dict):
        if not name:
            raise InputError(
                f"{flag}: was not written by this project's main.py; say whose weights these are: NAME={path}"
            )
        return {"name": name}
    if name not in ("", config.get("name")):
        raise InputError(f"{flag}: the file holds a {config.get('name')}; give the file alone")
    return config


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
