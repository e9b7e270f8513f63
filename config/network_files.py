"""Finds and loads second networks: checkpoints of main.py, files of others, timm's weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from errors import InputError
from models.build import build_model, near_misses, takes_input_size
from models.interface import ImageModel
from models.weights import (
    adapt_weights,
    load_foreign,
    load_strictly,
    pick_weights,
    restore_model,
)
from pipeline.spec import ImageSpec
from storage import downloads
from storage.checkpoints import FORMAT, load_checkpoint


def name_and_file(choice: str, flag: str) -> tuple[str, str]:
    """NAME, NAME=CHECKPOINT or CHECKPOINT -> (name, file); an absent part is empty."""
    name, equals, path = choice.partition("=")
    if equals and not path:
        raise InputError(f"{flag}: names no file after the =")
    return ("", choice) if not equals and os.path.isfile(choice) else (name, path)


def description_in(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`model_config` and `data` of a checkpoint of main.py; two empty dicts for any other file.

    Raises:
        InputError: the checkpoint has another format.
    """
    config, data = (checkpoint.get(name) for name in ("model_config", "data"))
    if not isinstance(config, dict):
        return {"model_config": {}, "data": {}}
    if (format_ := checkpoint.get("format", FORMAT)) != FORMAT:
        raise InputError(f"the checkpoint has format {format_}, this version reads format {FORMAT}")
    return {"model_config": config, "data": data if isinstance(data, dict) else {}}


def spec_of(
    description: Mapping[str, Mapping[str, Any]],
    name: str,
    network: nn.Module,
    student_spec: ImageSpec,
    flag: str,
) -> ImageSpec:
    """The normalisation with which a network was trained.

    A checkpoint of main.py contains it; for other weights it is timm's for `name`, or else the
    student's.
    """
    if description["model_config"]:
        plain = description["data"].get("image_spec")
        return ImageSpec.from_plain(plain) if plain else student_spec
    # By the name and its tag: a network that was built without the tag may have another config.
    pretrained = timm_config(name, flag)
    source = pretrained.to_dict() if pretrained else getattr(network, "pretrained_cfg", None) or {}
    own: dict[str, Any] = {
        part: tuple(source[part]) for part in ("mean", "std") if source.get(part)
    }
    return replace(student_spec, **own)


def config_in(
    description: Mapping[str, dict[str, Any]],
    name: str,
    path: str,
    flag: str,
    advice: str = "give the file alone",
) -> dict[str, Any]:
    """The arguments of `build_model` for the weights in a file.

    A checkpoint of main.py contains them; any other file needs a name, which is then the only one.
    `advice` says what to do if the file holds another network than `name`.
    """
    config = description["model_config"]
    if not config:
        if not name:
            raise InputError(
                f"{flag}: was not written by this project's main.py; add the name of the model: "
                f"NAME={path}"
            )
        return {"name": name}
    held = config.get("name")
    if name not in ("", held):
        raise InputError(f"{flag}: the file holds a {held}; {advice.format(name=held)}")
    return config


def load_network(
    config: dict[str, Any],
    checkpoint: Mapping[str, Any],
    path: str,
    input_size: tuple[int, int],
    flag: str,
) -> nn.Module:
    """The plain network of a checkpoint, for images of this size, with the file's classes.

    Args:
        config: what `config_in` returns.
        path: the file, for messages.
    """
    name, is_ours = config["name"], "num_classes" in config
    if not is_ours:
        config = {**config, "num_classes": classes_in(pick_weights(checkpoint), name)}
    if is_ours and not takes_input_size(name):
        return restore_model(checkpoint).network  # a ConvNet takes images of any size
    if takes_input_size(name):
        fitted = {**config, "input_size": input_size}
        try:
            return build_fitted(fitted, checkpoint, path, False, flag).network
        except InputError:
            if is_ours:
                raise
    # Other ConvNets, and networks that cannot be trained here.
    network = timm.create_model(name, num_classes=config["num_classes"])
    load_strictly(network, pick_weights(checkpoint), source=flag)
    return network


def build_fitted(
    config: dict[str, Any],
    weights: nn.Module | Mapping[str, Any],
    path: str,
    fresh_heads: bool,
    flag: str,
) -> ImageModel:
    """The model of `config` with weights of a network or of a checkpoint, resized to its images.

    `path` names the file in messages. With `fresh_heads`, heads of another size start anew.
    """
    height, width = config["input_size"]
    try:
        model = build_model(**config)
        if isinstance(weights, Mapping):
            load_foreign(model, weights, path, fresh_heads)
        else:
            adapted, _ = adapt_weights(model, weights.state_dict(), fresh_heads=fresh_heads)
            load_strictly(model, adapted, source=flag)
    except InputError as error:
        raise InputError(
            f"{flag} cannot serve a student on {height} x {width} pixels: {error}"
        ) from error
    run_once(flag, model.network, (height, width))
    return model


def classes_in(weights: Mapping[str, Tensor], name: str) -> int:
    """The number of classes of the weights of timm's network `name`; 0 without a classifier."""
    timm_config = getattr(timm.create_model(name, num_classes=1), "default_cfg", {})
    heads = timm_config.get("classifier", "head")  # a distilled network has two
    head = heads if isinstance(heads, str) else heads[0]
    classifier = weights.get(f"{head}.weight", torch.empty(0))
    return len(classifier) if classifier.numel() and classifier.ndim else 0


def download(name: str, flag: str) -> nn.Module:
    """timm's network with its published weights.

    They are downloaded by `storage/downloads.py`, as timm does not check what it downloads.
    """
    source = timm_config(name, flag)
    try:
        if source is None or not source.has_weights:
            raise InputError("timm has none")
        weights: dict[str, Any]
        if source.hf_hub_id:
            file = downloads.from_hub(source.hf_hub_id, source.hf_hub_filename)
            weights = load_file(file) if file.suffix == ".safetensors" else load_checkpoint(file)
        else:
            weights = load_checkpoint(str(source.url))
        network: Any = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay={"state_dict": weights}
        )
    except Exception as error:  # the client of the hub also raises errors of its HTTP library
        reason = error.text if isinstance(error, InputError) else error
        raise InputError(
            f"{flag}: timm could not get its weights ({reason}); give a file: {name}=CHECKPOINT"
        ) from error
    network.pretrained_cfg.pop("state_dict", None)  # frees a second copy of the weights
    return network


def check_name(flag: str, name: str) -> None:
    if not timm.is_model(name):
        raise InputError(f"{flag} {name}: no such model; {near_misses(name)}")
    timm_config(name, f"{flag} {name}")


def timm_config(name: str, flag: str) -> Any:
    """timm's config of the weights of this name and tag, with address, mean and std; or None.

    Raises:
        InputError: timm has no such tag.
    """
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{name.partition('.')[0]}.*"))
        raise InputError(f"{flag}: {error} It has {tags or 'none'}") from error


def run_once(flag: str, network: nn.Module, input_size: tuple[int, int]) -> Tensor:
    """The output of a network for one black image.

    Raises:
        InputError: it does not take images of this size.
    """
    try:
        with torch.no_grad():
            return network.eval()(torch.zeros(1, 3, *input_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        size = f"{input_size[0]} x {input_size[1]}"
        raise InputError(
            f"{flag} cannot take the student's images of {size} pixels: {error}"
        ) from error
