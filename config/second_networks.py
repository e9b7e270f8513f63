"""Frozen second networks: distillation's teacher, AttentiveMix's classifier, and motivators.

Each gets the images of the student, the model being trained. If it was trained with another mean
and std, the images are normalised for it on the device. A checkpoint of main.py contains its mean
and std; for other weights they are timm's, by the name of the network.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from errors import InputError, as_written, flag_name
from models.build import build_model, near_misses, takes_input_size
from models.interface import GuideOutput, ImageModel
from models.weights import (
    adapt_weights,
    choice_of_weights,
    load_foreign,
    load_strictly,
    pick_weights,
    restore_model,
)
from pipeline.spec import ImageSpec
from storage import downloads
from storage.checkpoints import FORMAT, ReadCheckpoint, load_checkpoint

MotivatingPass = Callable[..., GuideOutput]  # called as `ImageModel.motivating_pass`
# How to mend a motivator with other classes.
_CLASSES_NEEDED = (
    "L_con uses its predictions: give one that was trained for these classes in this order, or "
    "with --mixer smmix leave L_con out (--con-weight 0), so that only its score is used"
)


class Renormalise(nn.Module):
    """Images normalised with one mean and std -> the same images with another mean and std."""

    scale: Tensor  # (1, 3, 1, 1)
    shift: Tensor  # (1, 3, 1, 1)

    def __init__(self, student_spec: ImageSpec, own: ImageSpec) -> None:
        super().__init__()
        mean, std, own_mean, own_std = (
            torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1)
            for values in (student_spec.mean, student_spec.std, own.mean, own.std)
        )
        self.register_buffer("scale", (std / own_std).float(), persistent=False)
        self.register_buffer("shift", ((mean - own_mean) / own_std).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images, self.scale)  # (B, 3, height, width)


def renormaliser(student_spec: ImageSpec, own: ImageSpec) -> nn.Module:
    """From the student's normalisation to the network's own; the identity if both agree."""
    if (student_spec.mean, student_spec.std) == (own.mean, own.std):
        return nn.Identity()
    return Renormalise(student_spec, own)


def build_teacher(
    name: str,
    path: str,
    num_classes: int,
    input_size: tuple[int, int],
    student_spec: ImageSpec | None = None,
    read: ReadCheckpoint = load_checkpoint,
) -> nn.Module:
    """Distillation's teacher: a timm network with the weights of a file.

    Weights that depend on the image size are resampled to the student's, as with `--finetune`.

    Args:
        name: timm's.
        path: the file; a checkpoint of main.py may be of another patch or input size.
        input_size: height and width of the student's images.
        student_spec: normalisation of these images; default: ImageNet's mean and std.
        read: reads the file.

    Raises:
        InputError: the name is unknown, the file cannot be read or holds weights of another
            network or other number of classes, or the network does not take images of this size.
    """
    flag, student_spec = f"--teacher-model {name}", student_spec or ImageSpec(input_size)
    _check_name("--teacher-model", name)
    checkpoint = read(path)
    description = _description_in(checkpoint)
    config = _config_in(description, name, path, flag, "give --teacher-model {name}")
    source = f"{flag} --teacher-path {path}"
    teacher: Any = _load_network(config, checkpoint, path, input_size, source)
    if teacher.num_classes != num_classes:
        raise InputError(
            f"{flag}: predicts {teacher.num_classes} classes, the data has {num_classes}: give a "
            "teacher that was trained for these classes in this order"
        )
    _run_once(flag, teacher, input_size)
    own = _spec_of(description, name, teacher, student_spec, flag)
    return nn.Sequential(renormaliser(student_spec, own), teacher)


class FeatureMap(nn.Module):
    """The last feature map of a timm network, as a module.

    Images (B, 3, height, width) -> features (B, D, rows, columns).

    Args:
        renormalise: normalises the images for the network; default: the identity.
    """

    def __init__(self, network: nn.Module, renormalise: nn.Module | None = None) -> None:
        super().__init__()
        self.network, self.renormalise = network, renormalise or nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        features = self.network.forward_features(self.renormalise(images))  # type: ignore[operator]
        width = self.network.num_features
        is_last = features.ndim == 4 and features.shape[1] != width == features.shape[3]
        return features.permute(0, 3, 1, 2) if is_last else features


def build_feature_map(
    choice: str,
    input_size: tuple[int, int],
    student_spec: ImageSpec | None = None,
    read: ReadCheckpoint = load_checkpoint,
) -> FeatureMap:
    """AttentiveMix's classifier, as a function to its last feature map.

    Args:
        choice, read: as in `build_motivator`.
        input_size, student_spec: as in `build_teacher`.

    Raises:
        InputError: as in `build_teacher`, or the network has no feature map.
    """
    flag, student_spec = f"--attentive-teacher {choice}", student_spec or ImageSpec(input_size)
    name, path = _name_and_file(choice, flag)
    if name:
        _check_name("--attentive-teacher", name)
    checkpoint = read(path) if path else {}
    description = _description_in(checkpoint)
    if path:
        config = _config_in(description, name, path, flag)
        network = _load_network(config, checkpoint, path, input_size, flag)
    else:
        network = _download(name, flag)
    own = _spec_of(description, name, network, student_spec, flag)
    features = FeatureMap(network, renormaliser(student_spec, own))
    shape = _run_once(flag, features, input_size).shape
    if len(shape) != 4 or shape[1] != network.num_features:
        raise InputError(
            f"{flag}: has no feature map (its last features have the shape {list(shape[1:])}): "
            "use a ConvNet"
        )
    return features


def check_motivator_classes(
    choice: str, class_names: Sequence[str], read: ReadCheckpoint = load_checkpoint
) -> None:
    """Checks that a checkpoint given as `--motivator` predicts the classes of the data, in order.

    Weights without class names (timm's, other projects') pass; `build_motivator` compares their
    number.

    Raises:
        InputError: the classes differ (the message names some), or the file cannot be read.
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
        f"{'; '.join(parts) or 'their order differs'}. {_CLASSES_NEEDED}"
    )


def build_motivator(
    choice: str,
    num_classes: int,
    student_spec: ImageSpec,
    predict: bool = True,
    device: torch.device | str = "cpu",
    read: ReadCheckpoint = load_checkpoint,
) -> tuple[ImageModel, MotivatingPass]:
    """A frozen motivator (Table 9), of any family and with any grid, for the student's images.

    Weights that depend on the image size are resampled to the student's, as with `--finetune`.

    Args:
        choice: NAME (timm's; timm downloads its weights), NAME=CHECKPOINT, or a CHECKPOINT of this
            project's main.py.
        num_classes: the student's.
        student_spec: size and normalisation of the student's images.
        predict: its predictions are used, so it must have the student's number of classes; else a
            head with another number is initialised anew.
        read: reads the checkpoint.

    Returns:
        The network on `device`, and its motivating pass for the student's images.

    Raises:
        InputError: the name is unknown, its weights cannot be read or belong to another network,
            the number of classes differs, or the network does not take such images.
    """
    flag = f"--motivator {choice}"
    name, path = _name_and_file(choice, flag)
    if name and not timm.is_model(name):
        raise InputError(
            f"{flag}: neither self nor ema, nor a file, nor a model's name; {near_misses(name)}"
        )
    checkpoint = read(path) if path else {}
    description = _description_in(checkpoint)
    config = _config_in(description, name, path, flag) if path else {"name": name}
    downloaded = None if path else _download(name, flag)
    classes = config.get("num_classes", getattr(downloaded, "num_classes", num_classes))
    if predict and classes != num_classes:
        raise InputError(
            f"{flag}: predicts {classes} classes, the data has {num_classes}. {_CLASSES_NEEDED}"
        )
    config = {**config, "num_classes": num_classes, "input_size": student_spec.input_size}
    weights = checkpoint if downloaded is None else downloaded
    model = _build_fitted(config, weights, path, not predict, flag).requires_grad_(False).to(device)
    own = _spec_of(description, name, model.network, student_spec, flag)
    return model, _renormalised_pass(renormaliser(student_spec, own).to(device), model)


def _build_fitted(
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
    _run_once(flag, model.network, (height, width))
    return model


def _renormalised_pass(renormalise: nn.Module, model: ImageModel) -> MotivatingPass:
    """The motivating pass on images that are normalised for the model first."""
    if isinstance(renormalise, nn.Identity):
        return model.motivating_pass

    def motivating_pass(images: Tensor, *settings: Any) -> GuideOutput:
        return model.motivating_pass(renormalise(images), *settings)

    return motivating_pass


def _name_and_file(choice: str, flag: str) -> tuple[str, str]:
    """NAME, NAME=CHECKPOINT or CHECKPOINT -> (name, file); an absent part is empty."""
    name, equals, path = choice.partition("=")
    if equals and not path:
        raise InputError(f"{flag}: names no file after the =")
    return ("", choice) if not equals and os.path.isfile(choice) else (name, path)


def describe_files(flags: Mapping[str, Any], read: ReadCheckpoint) -> Iterator[str]:
    """Says which weights are taken from the files of second networks that have several sets."""
    for name in ("motivator", "attentive_teacher", "teacher_path"):
        choice = flags[name] or ""
        path = choice if name == "teacher_path" else _name_and_file(choice, flag_name(name))[1]
        for note in choice_of_weights(read(path)) if path else ():
            yield f"weights from {as_written(name, choice)}: {note}"


def _description_in(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
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


def _spec_of(
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
    pretrained = _timm_config(name, flag)
    source = pretrained.to_dict() if pretrained else getattr(network, "pretrained_cfg", None) or {}
    own: dict[str, Any] = {
        part: tuple(source[part]) for part in ("mean", "std") if source.get(part)
    }
    return replace(student_spec, **own)


def _config_in(
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


def _load_network(
    config: dict[str, Any],
    checkpoint: Mapping[str, Any],
    path: str,
    input_size: tuple[int, int],
    flag: str,
) -> nn.Module:
    """The plain network of a checkpoint, for images of this size, with the file's classes.

    Args:
        config: what `_config_in` returns.
        path: the file, for messages.
    """
    name, is_ours = config["name"], "num_classes" in config
    if not is_ours:
        config = {**config, "num_classes": _classes_in(pick_weights(checkpoint), name)}
    if is_ours and not takes_input_size(name):
        return restore_model(checkpoint).network  # a ConvNet takes images of any size
    if takes_input_size(name):
        fitted = {**config, "input_size": input_size}
        try:
            return _build_fitted(fitted, checkpoint, path, False, flag).network
        except InputError:
            if is_ours:
                raise
    # Other ConvNets, and networks that cannot be trained here.
    network = timm.create_model(name, num_classes=config["num_classes"])
    load_strictly(network, pick_weights(checkpoint), source=flag)
    return network


def _classes_in(weights: Mapping[str, Tensor], name: str) -> int:
    """The number of classes of the weights of timm's network `name`; 0 without a classifier."""
    timm_config = getattr(timm.create_model(name, num_classes=1), "default_cfg", {})
    heads = timm_config.get("classifier", "head")  # a distilled network has two
    head = heads if isinstance(heads, str) else heads[0]
    classifier = weights.get(f"{head}.weight", torch.empty(0))
    return len(classifier) if classifier.numel() and classifier.ndim else 0


def _download(name: str, flag: str) -> nn.Module:
    """timm's network with its published weights.

    They are downloaded by `storage/downloads.py`, as timm does not check what it downloads.
    """
    source = _timm_config(name, flag)
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


def _check_name(flag: str, name: str) -> None:
    if not timm.is_model(name):
        raise InputError(f"{flag} {name}: no such model; {near_misses(name)}")
    _timm_config(name, f"{flag} {name}")


def _timm_config(name: str, flag: str) -> Any:
    """timm's config of the weights of this name and tag, with address, mean and std; or None.

    Raises:
        InputError: timm has no such tag.
    """
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{name.partition('.')[0]}.*"))
        raise InputError(f"{flag}: {error} It has {tags or 'none'}") from error


def _run_once(flag: str, network: nn.Module, input_size: tuple[int, int]) -> Tensor:
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
