"""Weights of a model: found in a checkpoint, made to fit by named rules, and loaded strictly.

Takes what was read from a file, never a path. Letters as in `models/interface.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn

from models.build import build_model, draft_model
from models.interface import ImageModel
from utils import InputError, as_pair, first_of, is_ordinary


def _rebuild(config: Any, build: Callable[..., ImageModel] = build_model) -> ImageModel:
    """The model of a checkpoint's `model_config`."""
    try:
        return build(**{**config, "input_size": as_pair(config["input_size"])})
    except (TypeError, KeyError) as error:
        raise InputError(f"the checkpoint's model_config is damaged: {error}") from error


def load_foreign(
    model: ImageModel, checkpoint: Mapping[str, Any], source: str, fresh_heads: bool = True
) -> list[str]:
    """Starts from the weights in a checkpoint: this project's, DeiT's, timm's, or the released
    code's.

    Args:
        checkpoint: what `storage.checkpoints.load_checkpoint` returned.
        source: its path, for messages.
        fresh_heads: a head that does not fit starts anew; otherwise it is refused.

    Returns:
        A note for each thing that had to be changed, see `adapt_weights`.

    Raises:
        InputError: it holds no weights, or those of another architecture.
    """
    old_grid = None
    if (
        "model_config" in checkpoint
    ):  # ours: the grid behind its position embedding is known, square or not
        old_grid = _rebuild(checkpoint["model_config"], draft_model).grid_size
    try:
        found = pick_weights(checkpoint)
    except InputError as error:
        raise InputError(f"{source}: {error.text}") from error
    weights, notes = adapt_weights(model, found, old_grid, fresh_heads)
    load_strictly(model, weights, source=source)
    return notes


def restore_model(checkpoint: Mapping[str, Any], ema: bool = False) -> ImageModel:
    """The model of one of our own checkpoints, with its weights: `model_config` says what to build.

    Args:
        checkpoint: what `storage.checkpoints.load_checkpoint` returned.
        ema: take the averaged weights.

    Raises:
        InputError: not a checkpoint of this project, or no averaged weights in it.
    """
    key = "ema" if ema else "model"
    if "model_config" not in checkpoint or checkpoint.get(key) is None:
        missing = "model_config" if "model_config" not in checkpoint else key
        raise InputError(
            f"the checkpoint holds no {missing}: it was not written by this project's main.py"
        )
    weights = own_keys(checkpoint[key])
    check_fit(_rebuild(checkpoint["model_config"], draft_model), weights, source="the checkpoint")
    model = _rebuild(checkpoint["model_config"])
    load_strictly(model, weights, source="the checkpoint")
    return model


def plain_weights(model: ImageModel) -> dict[str, Tensor]:
    """The state dict under the network's own (timm's) keys, plus `token_head.*` where there is a
    second head."""
    weights = dict(model.network.state_dict())
    if model.token_head is not None:
        weights.update(
            {f"token_head.{key}": value for key, value in model.token_head.state_dict().items()}
        )
    return weights


def own_keys(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `plain_weights`: keys as `ImageModel.load_state_dict` expects them."""
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
    """Makes plain weights of the same architecture fit another input size, patch size or class
    count.

    Args:
        weights: keys as `plain_weights` gives them (timm's, DeiT's and the released code's files
            have the same).
        old_grid: the grid the weights were trained on; a square one is assumed if absent.
        fresh_heads: let heads that do not fit start anew.

    Returns:
        The weights under `ImageModel`'s own keys, complete, and a note for each thing that was
        changed. Heads that do not fit keep their fresh initialisation, which the notes say.
    """
    own = plain_weights(model)
    adapted, notes = model.resize_weights(weights, old_grid)
    for head in ("head", "head.fc", "fc", "head_dist", "token_head") if fresh_heads else ():
        for key in (f"{head}.weight", f"{head}.bias"):
            if key in adapted and key not in own:
                del adapted[key]
                notes.append(f"{key} dropped: this model has no {head}")
            elif key in own and (key not in adapted or adapted[key].shape != own[key].shape):
                was = f"has shape {tuple(adapted[key].shape)}" if key in adapted else "is missing"
                notes.append(
                    f"{key} {was} in the file: starts anew with shape {tuple(own[key].shape)}"
                )
                adapted[key] = own[key]
    return own_keys(adapted), notes


def pick_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's state dict in a checkpoint, ours or foreign, without the prefixes of DDP and
    torch.compile.

    It is under `model`, `state_dict` or `model_state`, or the checkpoint is nothing but named
    tensors.

    Raises:
        InputError: neither is the case, and the message lists the keys that were found; or a tensor
            is sparse, complex, quantized, without content or not finite.
    """
    for candidate in (
        *(checkpoint.get(key) for key in ("model", "state_dict", "model_state")),
        checkpoint,
    ):
        if (
            isinstance(candidate, Mapping)
            and candidate
            and all(map(_is_named_tensor, candidate.items()))
        ):
            if odd := [name for name, weight in candidate.items() if not is_ordinary(weight)]:
                raise InputError(
                    f"these weights are no ordinary tensors of numbers: {first_of(odd)}"
                )
            floats = (
                (name, weight) for name, weight in candidate.items() if weight.is_floating_point()
            )
            if bad := [name for name, weight in floats if not weight.isfinite().all()]:
                raise InputError(
                    f"these weights are not finite, use another checkpoint: {first_of(bad)}"
                )
            return _strip_prefixes(dict(candidate))
    raise InputError(
        "no weights in this checkpoint: expected named tensors under model, state_dict or "
        "model_state, found the keys " + first_of([str(key) for key in checkpoint])
    )


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _strip_prefixes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    prefixes = ("module.", "_orig_mod.")
    while prefix := next(
        (p for p in prefixes if all(name.startswith(p) for name in weights)), None
    ):
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
    """Copies `weights` into `module`; everything is checked before anything is copied.

    Args:
        tolerate_missing: names that may keep the module's own value because `weights` lacks them.
        tolerate_unexpected: names in `weights` that may stay unused. A name whose shape differs is
            both.
        source: what messages call the weights, such as the path of their file.

    Returns: one line per tolerated difference, sorted by name.

    Raises:
        InputError: a name is missing or unexpected, or its shape differs, and that is not
            tolerated.
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
    """The weights that `load_strictly` would copy, and its notes, without copying: the module may
    be on `meta`."""
    own = module.state_dict()
    refused: list[str] = []
    notes: list[str] = []
    kept: dict[str, Tensor] = {}
    for name in sorted(own.keys() | weights.keys()):
        may_miss, may_drop = name in tolerate_missing, name in tolerate_unexpected
        if name not in weights:
            tolerated, note, result = may_miss, "missing", "keeps the model's own value"
        elif name not in own:
            tolerated, note, result = may_drop, "unknown to the model", "not used"
        elif not is_ordinary(weights[name]):
            tolerated, note, result = False, "no ordinary tensor of numbers", ""
        elif (here := tuple(own[name].shape)) != (there := tuple(weights[name].shape)):
            note, result = (
                f"shape {there} instead of the model's {here}",
                "keeps the model's own value",
            )
            tolerated = may_miss and may_drop
        else:
            kept[name] = weights[name]
            continue
        (notes if tolerated else refused).append(
            f"{name}: {note}" + (f", {result}" if tolerated else "")
        )
    if refused:
        raise InputError(
            f"{source} does not fit the model in {len(refused)} names: {first_of(refused, '; ')}"
        )
    return kept, notes
