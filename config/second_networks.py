"""Frozen second networks: distillation's teacher, AttentiveMix's classifier, and motivators.

Each gets the images of the student, the model being trained. If it was trained with another mean
and std, the images are normalised for it on the device. A checkpoint of main.py contains its mean
and std; for other weights they are timm's, by the name of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from config.network_files import (
    build_fitted,
    check_name,
    config_in,
    description_in,
    download,
    load_network,
    name_and_file,
    run_once,
    spec_of,
)
from errors import InputError, as_written, flag_name
from models.build import near_misses
from models.interface import GuideOutput, ImageModel
from models.weights import (
    choice_of_weights,
)
from pipeline.spec import ImageSpec
from storage.checkpoints import ReadCheckpoint, load_checkpoint

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
    check_name("--teacher-model", name)
    checkpoint = read(path)
    description = description_in(checkpoint)
    config = config_in(description, name, path, flag, "give --teacher-model {name}")
    source = f"{flag} --teacher-path {path}"
    teacher: Any = load_network(config, checkpoint, path, input_size, source)
    if teacher.num_classes != num_classes:
        raise InputError(
            f"{source}: predicts {teacher.num_classes} classes, the data has {num_classes}: give a "
            "teacher that was trained for these classes in this order"
        )
    run_once(flag, teacher, input_size)
    own = spec_of(description, name, teacher, student_spec, flag)
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
    name, path = name_and_file(choice, flag)
    if name:
        check_name("--attentive-teacher", name)
    checkpoint = read(path) if path else {}
    description = description_in(checkpoint)
    if path:
        config = config_in(description, name, path, flag)
        network = load_network(config, checkpoint, path, input_size, flag)
    else:
        network = download(name, flag)
    own = spec_of(description, name, network, student_spec, flag)
    features = FeatureMap(network, renormaliser(student_spec, own))
    shape = run_once(flag, features, input_size).shape
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
    path = name_and_file(choice, flag)[1]
    own = description_in(read(path))["data"].get("class_names") if path else None
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
    name, path = name_and_file(choice, flag)
    if name and not timm.is_model(name):
        raise InputError(
            f"{flag}: neither self nor ema, nor a file, nor a model's name; {near_misses(name)}"
        )
    checkpoint = read(path) if path else {}
    description = description_in(checkpoint)
    config = config_in(description, name, path, flag) if path else {"name": name}
    downloaded = None if path else download(name, flag)
    classes = config.get("num_classes", getattr(downloaded, "num_classes", num_classes))
    if predict and classes != num_classes:
        raise InputError(
            f"{flag}: predicts {classes} classes, the data has {num_classes}. {_CLASSES_NEEDED}"
        )
    config = {**config, "num_classes": num_classes, "input_size": student_spec.input_size}
    weights = checkpoint if downloaded is None else downloaded
    model = build_fitted(config, weights, path, not predict, flag).requires_grad_(False).to(device)
    own = spec_of(description, name, model.network, student_spec, flag)
    return model, _renormalised_pass(renormaliser(student_spec, own).to(device), model)


def _renormalised_pass(renormalise: nn.Module, model: ImageModel) -> MotivatingPass:
    """The motivating pass on images that are normalised for the model first."""
    if isinstance(renormalise, nn.Identity):
        return model.motivating_pass

    def motivating_pass(images: Tensor, *settings: Any) -> GuideOutput:
        return model.motivating_pass(renormalise(images), *settings)

    return motivating_pass


def describe_files(flags: Mapping[str, Any], read: ReadCheckpoint) -> Iterator[str]:
    """Says which weights are taken from the files of second networks that have several sets."""
    for name in ("motivator", "attentive_teacher", "teacher_path"):
        choice = flags[name] or ""
        path = choice if name == "teacher_path" else name_and_file(choice, flag_name(name))[1]
        for note in choice_of_weights(read(path)) if path else ():
            yield f"weights from {as_written(name, choice)}: {note}"
