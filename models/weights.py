"""Finds the weights in the content of a checkpoint, adapts them to a model and loads them strictly.

Every adaptation follows a fixed rule and is reported in a note.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeGuard

from torch import Tensor, nn

from errors import InputError, as_pair, first_of
from models.build import build_model, build_on_meta
from models.interface import ImageModel
from utils import is_ordinary

# The names of classifiers in the families, and of the second region head.
HEADS = ("head", "head.fc", "fc", "head_dist", "token_head")


def _build_from(config: Any, build: Callable[..., ImageModel] = build_model) -> ImageModel:
    """Builds the model that a checkpoint's `model_config` describes."""
    try:
        return build(**{**config, "input_size": as_pair(config["input_size"])})
    except (TypeError, KeyError) as error:
        raise InputError(f"the checkpoint's model_config is damaged: {error}") from error


def load_foreign(
    model: ImageModel, checkpoint: Mapping[str, Any], source: str, fresh_heads: bool = True
) -> list[str]:
    """Loads the weights of a checkpoint of this project, DeiT, timm or the authors' released code.

    Args:
        model: receives the weights.
        checkpoint: the content of the file, as `storage.checkpoints.load_checkpoint` returns it.
        source: the path of the file, for messages.
        fresh_heads: a head that does not fit keeps its fresh initialisation. If false, it is
            refused.

    Returns:
        The choice among several sets, and a note for each change to the weights: see
        `choice_of_weights` and `adapt_weights`.

    Raises:
        InputError: the file contains no weights, or those of another architecture.
    """
    old_grid = None
    if "model_config" in checkpoint:
        # A checkpoint of this project: the grid of its position embedding is known.
        old_grid = _build_from(checkpoint["model_config"], build_on_meta).grid_size
    try:
        found = pick_weights(checkpoint)
    except InputError as error:
        raise InputError(f"{source}: {error.text}") from error
    weights, notes = adapt_weights(model, found, old_grid, fresh_heads)
    load_strictly(model, weights, source=source)
    return [*choice_of_weights(checkpoint), *notes]


def restore_model(checkpoint: Mapping[str, Any], ema: bool = False) -> ImageModel:
    """Builds the model of a checkpoint of this project and loads its weights.

    Args:
        checkpoint: the content of the file, as `storage.checkpoints.load_checkpoint` returns it.
        ema: load the weights of the average.

    Raises:
        InputError: the checkpoint was not written by this project, or contains no average.
    """
    key = "ema" if ema else "model"
    if "model_config" not in checkpoint or checkpoint.get(key) is None:
        missing = "model_config" if "model_config" not in checkpoint else key
        raise InputError(
            f"the checkpoint holds no {missing}: it was not written by this project's main.py"
        )
    config, weights = checkpoint["model_config"], to_model_keys(checkpoint[key])
    # Checked without memory first, so that weights of other shapes are refused early.
    check_fit(_build_from(config, build_on_meta), weights, source="the checkpoint")
    model = _build_from(config)
    load_strictly(model, weights, source="the checkpoint")
    return model


def plain_weights(model: ImageModel) -> dict[str, Tensor]:
    """The state dict under timm's keys, plus `token_head.*` for a second region head."""
    weights = dict(model.network.state_dict())
    if model.token_head is not None:
        head = model.token_head.state_dict()
        weights.update({f"token_head.{key}": value for key, value in head.items()})
    return weights


def to_model_keys(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `plain_weights`: timm's keys -> the keys of `ImageModel.load_state_dict`."""
    return {
        key if key.startswith("token_head.") else f"network.{key}": value
        for key, value in weights.items()
    }


def adapt_weights(
    model: ImageModel,
    weights: Mapping[str, Tensor],
    old_grid: tuple[int, int] | None = None,
    fresh_heads: bool = True,
) -> tuple[dict[str, Tensor], list[str]]:
    """Adapts weights of the same architecture to the model's input size, patch size and classes.

    Args:
        weights: under the keys of `plain_weights`, which are those of the files of timm, DeiT and
            the authors' released code.
        old_grid: the grid they were trained on. None: a square one is assumed.
        fresh_heads: a head that does not fit keeps its fresh initialisation.

    Returns:
        The weights under the keys of `ImageModel.load_state_dict`, and a note for each change.
    """
    own = plain_weights(model)
    adapted, notes = model.resize_weights(weights, old_grid)
    for head in HEADS if fresh_heads else ():
        for key in (f"{head}.weight", f"{head}.bias"):
            if key in adapted and key not in own:
                del adapted[key]
                notes.append(f"{key} dropped: this model has no {head}")
            elif key in own and (key not in adapted or adapted[key].shape != own[key].shape):
                was = f"has shape {tuple(adapted[key].shape)}" if key in adapted else "is missing"
                shape = tuple(own[key].shape)
                notes.append(f"{key} {was} in the file: starts anew with shape {shape}")
                adapted[key] = own[key]
    return to_model_keys(adapted), notes


# Where the model's state dict may be in a checkpoint, in the order of preference.
PLACES = ("model", "state_dict", "model_state")


def pick_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's state dict in a checkpoint, without the prefixes of DDP and torch.compile.

    Its place is one of `PLACES`, or the whole checkpoint is a state dict.

    Raises:
        InputError: no state dict was found (the message lists the keys of the checkpoint), or a
            tensor is sparse, complex, quantized, without data or not finite.
    """
    for candidate in (*map(checkpoint.get, PLACES), checkpoint):
        if _is_state_dict(candidate):
            _check_tensors(candidate)
            return _strip_prefixes(dict(candidate))
    raise InputError(
        "no weights in this checkpoint: expected named tensors under model, state_dict or "
        "model_state, found the keys " + first_of([str(key) for key in checkpoint])
    )


def choice_of_weights(checkpoint: Mapping[str, Any]) -> list[str]:
    """A note that says which set `pick_weights` takes, if the file also has others (an average)."""
    sets = [key for key, value in checkpoint.items() if _is_state_dict(value)]
    taken = next((key for key in PLACES if key in sets), None)
    if taken is None or len(sets) == 1:
        return []
    others = first_of([key for key in sets if key != taken])
    return [f"the file has several sets of weights: {taken} is used, not {others}"]


def _is_state_dict(candidate: Any) -> TypeGuard[Mapping[str, Tensor]]:
    if not isinstance(candidate, Mapping) or not candidate:
        return False
    return all(isinstance(key, str) and isinstance(v, Tensor) for key, v in candidate.items())


def _check_tensors(weights: Mapping[str, Tensor]) -> None:
    if unusual := [name for name, weight in weights.items() if not is_ordinary(weight)]:
        raise InputError(f"these weights are no ordinary tensors of numbers: {first_of(unusual)}")
    floats = {name: weight for name, weight in weights.items() if weight.is_floating_point()}
    if bad := [name for name, weight in floats.items() if not weight.isfinite().all()]:
        raise InputError(f"these weights are not finite, use another checkpoint: {first_of(bad)}")


def _strip_prefixes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes "module." (DDP) and "_orig_mod." (torch.compile), however they are nested."""

    def common_prefix() -> str | None:
        for prefix in ("module.", "_orig_mod."):
            if all(name.startswith(prefix) for name in weights):
                return prefix
        return None

    while prefix := common_prefix():
        weights = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    return weights


def load_strictly(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    tolerate_missing: Collection[str] = (),
    tolerate_unexpected: Collection[str] = (),
    source: str,
) -> list[str]:
    """Copies `weights` into `module`, after all of them have been checked.

    Args:
        tolerate_missing: names that may be absent from `weights`; they keep the module's value.
        tolerate_unexpected: names in `weights` that may stay unused. A name with another shape must
            be in both.
        source: the name of the weights in messages, such as the path of their file.

    Returns:
        One line for each tolerated difference, sorted by name.

    Raises:
        InputError: a name is missing or unexpected or has another shape, and that is not tolerated.
    """
    kept, notes = check_fit(module, weights, tolerate_missing, tolerate_unexpected, source)
    module.load_state_dict(kept, strict=False)
    return notes


def check_fit(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    tolerate_missing: Collection[str] = (),
    tolerate_unexpected: Collection[str] = (),
    source: str = "",
) -> tuple[dict[str, Tensor], list[str]]:
    """`load_strictly` without the copy, so the module may be on the meta device.

    Returns:
        The weights that fit, and one line for each tolerated difference.
    """
    own = module.state_dict()
    refused: list[str] = []
    notes: list[str] = []
    kept: dict[str, Tensor] = {}
    for name in sorted(own.keys() | weights.keys()):
        may_miss, may_drop = name in tolerate_missing, name in tolerate_unexpected
        if name not in weights:
            tolerated, note, result = may_miss, "missing", "the model's value is kept"
        elif name not in own:
            tolerated, note, result = may_drop, "unknown to the model", "not used"
        elif not is_ordinary(weights[name]):
            tolerated, note, result = False, "no ordinary tensor of numbers", ""
        elif own[name].shape != weights[name].shape:
            found, expected = tuple(weights[name].shape), tuple(own[name].shape)
            note = f"shape {found} instead of the model's {expected}"
            result = "the model's value is kept"
            tolerated = may_miss and may_drop
        else:
            kept[name] = weights[name]
            continue
        if tolerated:
            notes.append(f"{name}: {note}, {result}")
        else:
            refused.append(f"{name}: {note}")
    if refused:
        raise InputError(
            f"{source} does not fit the model in {len(refused)} names: {first_of(refused, '; ')}"
        )
    return kept, notes
