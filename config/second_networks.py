"""Second networks that are only looked through: teachers to distil from, AttentiveMix's classifier,
motivators.

Each is shown the student's images as it knows images itself: where its mean and std are not the
student's, they are normalised anew on the device. A checkpoint of main.py says its own; for other
files timm does, under the name that is given with them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.build import build_model, near_misses
from models.interface import GuideOutput, ImageModel
from models.weights import adapt_weights, load_foreign, load_strictly, pick_weights, restore_model
from pipeline.spec import ImageSpec
from storage import downloads
from storage.checkpoints import FORMAT, ReadCheckpoint, load_checkpoint
from utils import InputError

MotivatingPass = Callable[..., GuideOutput]  # takes what `ImageModel.motivating_pass` takes
NEEDED = (  # of a motivator
    "L_con uses its predictions: give one that was trained for these classes in this order, or "
    "with --mixer smmix "
    "leave L_con out (--con-weight 0), and its score alone guides"
)


class Renormalise(nn.Module):
    """Images (B, 3, height, width) that are normalised for one network -> as another knows them."""

    scale: Tensor  # (1, 3, 1, 1)
    shift: Tensor  # (1, 3, 1, 1)

    def __init__(self, shown: ImageSpec, own: ImageSpec) -> None:
        super().__init__()
        mean, std, own_mean, own_std = (
            torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1)
            for values in (shown.mean, shown.std, own.mean, own.std)
        )
        self.register_buffer("scale", (std / own_std).float(), persistent=False)
        self.register_buffer("shift", ((mean - own_mean) / own_std).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images, self.scale)  # (B, 3, height, width)


def renormaliser(shown: ImageSpec, own: ImageSpec) -> nn.Module:
    """From images as `shown` normalises them to those that `own` does; nothing is done where the
    two agree."""
    return (
        nn.Identity() if (shown.mean, shown.std) == (own.mean, own.std) else Renormalise(shown, own)
    )


def build_teacher(
    name: str,
    path: str,
    num_classes: int,
    input_size: tuple[int, int],
    shown: ImageSpec | None = None,
    read: ReadCheckpoint = load_checkpoint,
) -> nn.Module:
    """A timm network with the weights of a file, to distil from images of `input_size` (height,
    width).

    Args:
        shown: how the student's images are normalised; default: with ImageNet's mean and std.

    Raises:
        InputError: unknown name, unreadable file, weights of another network, or one that refuses
            such images.
    """
    flag = f"--teacher-model {name}"
    _check_name("--teacher-model", name)
    checkpoint = read(path)
    teacher = timm.create_model(name, num_classes=num_classes)
    load_strictly(teacher, pick_weights(checkpoint), source=f"--teacher-path {path}")
    _try(flag, teacher, input_size)
    shown = shown or ImageSpec(input_size)
    return nn.Sequential(
        renormaliser(shown, _spec_of(_description_in(checkpoint), name, teacher, shown, flag)),
        teacher,
    )


class FeatureMap(nn.Module):
    """The last feature map of a timm network: images (B, 3, height, width) -> (B, D, rows,
    columns).

    Args:
        renormalise: makes of the images those that the network knows; default: it is shown them as
            they are.
    """

    def __init__(self, network: nn.Module, renormalise: nn.Module | None = None) -> None:
        super().__init__()
        self.network, self.renormalise = network, renormalise or nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        features = self.network.forward_features(self.renormalise(images))  # type: ignore[operator]
        width = self.network.num_features
        last = features.ndim == 4 and features.shape[1] != width == features.shape[3]
        return features.permute(0, 3, 1, 2) if last else features


def build_feature_map(
    choice: str,
    input_size: tuple[int, int],
    shown: ImageSpec | None = None,
    read: ReadCheckpoint = load_checkpoint,
) -> FeatureMap:
    """AttentiveMix's classifier, for images of `input_size` (height, width).

    Args:
        choice: NAME (timm's; timm downloads its weights), NAME=CHECKPOINT, or a CHECKPOINT of this
            project's main.py.
        shown: how the student's images are normalised; default: with ImageNet's mean and std.

    Raises:
        InputError: unknown name, weights that cannot be had or belong to another network, or no
            feature map.
    """
    flag, shown = f"--attentive-teacher {choice}", shown or ImageSpec(input_size)
    name, path = _name_and_file(choice, flag)
    if name:
        _check_name("--attentive-teacher", name)
    checkpoint = read(path) if path else {}
    said = _description_in(checkpoint)
    if name:
        network = _from_weights(name, checkpoint, flag) if path else _download(name, flag)
    else:
        network = restore_model(checkpoint).network
    features = FeatureMap(network, renormaliser(shown, _spec_of(said, name, network, shown, flag)))
    shape = _try(flag, features, input_size).shape
    if len(shape) != 4 or shape[1] != network.num_features:
        raise InputError(
            f"{flag}: gives no map of features (its last ones are {list(shape[1:])}): take a "
            "ConvNet"
        )
    return features


def check_motivator_classes(
    choice: str, class_names: Sequence[str], read: ReadCheckpoint = load_checkpoint
) -> None:
    """Whether a checkpoint of main.py, given as `--motivator`, predicts the student's classes in
    the same order.

    Weights without names of their classes (timm's, other projects') pass: `build_motivator`
    compares the number.

    Raises:
        InputError: it predicts others, of which a few are named, or cannot be read.
    """
    flag = f"--motivator {choice}"
    path = _name_and_file(choice, flag)[1]
    own = _description_in(read(path))["data"].get("class_names") if path else None
    if own is None or list(own) == list(class_names):
        return
    parts = []
    for where, names, others in (
        ("the motivator", own, class_names),
        ("the data", class_names, own),
    ):
        if only := sorted(set(names) - set(others)):
            parts.append(
                f"{len(only)} only in {where}: "
                f"{', '.join(only[:5])}{', ...' if len(only) > 5 else ''}"
            )
    raise InputError(
        f"{flag}: predicts other classes than the data has; "
        f"{'; '.join(parts) or 'their order differs'}. {NEEDED}"
    )


def build_motivator(
    choice: str,
    num_classes: int,
    shown: ImageSpec,
    predict: bool = True,
    device: torch.device | str = "cpu",
    read: ReadCheckpoint = load_checkpoint,
) -> tuple[ImageModel, MotivatingPass]:
    """A frozen network to guide a student by (Table 9): any family, any grid, the student's images.

    What it learned for its own image size is resampled as `--finetune` does.

    Args:
        choice: NAME (timm's; timm downloads its weights), NAME=CHECKPOINT, or a CHECKPOINT of this
            project's main.py.
        num_classes: the student's.
        shown: size and normalisation of the student's images.
        predict: its predictions are used, so that it needs the student's classes; else a head of
            others starts anew.

    Returns:
        The network on `device`, and its motivating pass for the student's images.

    Raises:
        InputError: unknown name, weights that cannot be had or belong to another network, another
            number of classes, or images that it cannot take.
    """
    flag = f"--motivator {choice}"
    name, path = _name_and_file(choice, flag)
    if name and not timm.is_model(name):
        raise InputError(
            f"{flag}: neither self nor ema, nor a file, nor a model's name; {near_misses(name)}"
        )
    checkpoint = read(path) if path else {}
    said = _description_in(checkpoint)
    config = _config_in(said, name, path, flag) if path else {"name": name}
    downloaded = None if path else _download(name, flag)
    classes = config.get("num_classes", getattr(downloaded, "num_classes", num_classes))
    if predict and classes != num_classes:
        raise InputError(
            f"{flag}: predicts {classes} classes, the data has {num_classes}. {NEEDED}"
        )
    config = {**config, "num_classes": num_classes, "input_size": shown.input_size}
    weights = checkpoint if downloaded is None else downloaded
    model = _fitted(config, weights, path, not predict, flag).requires_grad_(False).to(device)
    own = _spec_of(said, name, model.network, shown, flag)
    return model, _renormalised_pass(renormaliser(shown, own).to(device), model)


def _fitted(
    config: dict[str, Any],
    weights: nn.Module | Mapping[str, Any],
    path: str,
    fresh_heads: bool,
    flag: str,
) -> ImageModel:
    """The model of this `config` with the weights of a network or a checkpoint (read from `path`),
    resized to the images of `config`."""
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
            f"{flag} cannot guide a student on {height} x {width} pixels: {error}"
        ) from error
    _try(flag, model.network, (height, width))
    return model


def _renormalised_pass(renormalise: nn.Module, model: ImageModel) -> MotivatingPass:
    """The model's motivating pass, on images that are first normalised as it knows them."""
    if isinstance(renormalise, nn.Identity):
        return model.motivating_pass

    def motivating_pass(images: Tensor, *how: Any) -> GuideOutput:
        return model.motivating_pass(renormalise(images), *how)

    return motivating_pass


def _name_and_file(choice: str, flag: str) -> tuple[str, str]:
    """NAME, NAME=CHECKPOINT or CHECKPOINT; what is not there is empty."""
    name, equals, path = choice.partition("=")
    if equals and not path:
        raise InputError(f"{flag}: names no file behind the =")
    return ("", choice) if not equals and os.path.isfile(choice) else (name, path)


def _description_in(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a checkpoint of ours says of its model and its data, without the weights; of any other
    file nothing.

    Raises:
        InputError: it is ours, but of another version.
    """
    config, data = (checkpoint.get(name) for name in ("model_config", "data"))
    if not isinstance(config, dict):
        return {"model_config": {}, "data": {}}
    if (format_ := checkpoint.get("format", FORMAT)) != FORMAT:
        raise InputError(f"the checkpoint has format {format_}, this version reads format {FORMAT}")
    return {"model_config": config, "data": data if isinstance(data, dict) else {}}


def _spec_of(
    said: Mapping[str, Mapping[str, Any]],
    name: str,
    network: nn.Module,
    shown: ImageSpec,
    flag: str,
) -> ImageSpec:
    """How the images are normalised that a network knows: by its checkpoint if that is ours, else
    by timm's `name`.

    Where neither says it, as those that it is `shown`.
    """
    if said["model_config"]:
        plain = said["data"].get("image_spec")
        return ImageSpec.from_plain(plain) if plain else shown
    known = _known_to_timm(name, flag)  # by its tag, which not every network is built with
    source = known.to_dict() if known else getattr(network, "pretrained_cfg", None) or {}
    own: dict[str, Any] = {
        part: tuple(source[part]) for part in ("mean", "std") if source.get(part)
    }
    return replace(shown, **own)


def _config_in(
    said: Mapping[str, dict[str, Any]], name: str, path: str, flag: str
) -> dict[str, Any]:
    """Keywords of `build_model` for the weights in a file; only a checkpoint of ours says them
    itself."""
    config = said["model_config"]
    if not config:
        if not name:
            raise InputError(
                f"{flag}: was not written by this project's main.py; say whose weights these are: "
                f"NAME={path}"
            )
        return {"name": name}
    if name not in ("", config.get("name")):
        raise InputError(f"{flag}: the file holds a {config.get('name')}; give the file alone")
    return config


def _from_weights(name: str, checkpoint: Mapping[str, Any], flag: str) -> nn.Module:
    weights = pick_weights(checkpoint)
    head = getattr(timm.create_model(name, num_classes=1), "default_cfg", {}).get(
        "classifier", "head"
    )
    classifier = weights.get(f"{head}.weight", torch.empty(0))
    classes = (
        len(classifier) if classifier.numel() and classifier.ndim else 0
    )  # its own: none is asked for
    network = timm.create_model(name, num_classes=classes)
    load_strictly(network, weights, source=flag)
    return network


def _download(name: str, flag: str) -> nn.Module:
    """timm's network with the weights that timm names for it, fetched by us: timm would not check
    them."""
    source = _known_to_timm(name, flag)
    try:
        if source is None or not source.has_weights:
            raise InputError("timm knows none")
        weights: dict[str, Any]
        if source.hf_hub_id:
            file = downloads.from_hub(source.hf_hub_id, source.hf_hub_filename)
            weights = load_file(file) if file.suffix == ".safetensors" else load_checkpoint(file)
        else:
            weights = load_checkpoint(str(source.url))
        network: Any = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay={"state_dict": weights}
        )
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
    _known_to_timm(name, f"{flag} {name}")


def _known_to_timm(name: str, flag: str) -> Any:
    """What timm says of the weights of this name and tag: where they are, how their images are
    normalised; or None."""
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # of a tag that it does not have
        tags = ", ".join(timm.list_pretrained(f"{name.partition('.')[0]}.*"))
        raise InputError(f"{flag}: {error} It has {tags or 'none'}") from error


def _try(flag: str, network: nn.Module, input_size: tuple[int, int]) -> Tensor:
    """What a network makes of one black image."""
    try:
        with torch.no_grad():
            return network.eval()(torch.zeros(1, 3, *input_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        size = f"{input_size[0]} x {input_size[1]}"
        raise InputError(
            f"{flag} cannot take the student's images of {size} pixels: {error}"
        ) from error
