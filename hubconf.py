"""Entries of `torch.hub`: the plain networks of this project's recipes, for programs that know
nothing of SMMix.

    model = torch.hub.load("path/of/this/project", "deit_tiny_patch16_224", source="local",
    checkpoint="checkpoint.pth")

Each gives timm's network (or ours, for PVT) in evaluation mode: images in, logits out. Builds
nothing itself.
"""

from __future__ import annotations

import functools as _functools
import sys as _sys
import warnings as _warnings
from collections.abc import Callable as _Callable
from collections.abc import Iterator as _Iterator
from contextlib import contextmanager as _contextmanager
from pathlib import Path as _Path
from types import ModuleType as _ModuleType
from typing import Any as _Any

from torch import nn as _nn

dependencies = ["torch", "timm", "numpy"]

# What `scripts/` trains, each a name of --model.
MODELS = (
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "cait_xxs24_224",
    "cait_xxs36_224",
    "pvt_tiny",
    "pvt_small",
    "pvt_medium",
    "pvt_large",
    "swin_tiny_patch4_window7_224",
    "vit_nano_patch4_32",
)

_ROOT = _Path(__file__).resolve().parent


@_contextmanager
def _own_modules() -> _Iterator[None]:
    """Inside, `import utils` and the like give this project's files, whatever the calling program
    has by that name.

    Its own modules are put back afterwards, and ours go, so that its later imports find what they
    did before.
    """
    files = {path.stem for path in _ROOT.glob("*.py")} - {"hubconf"}
    names = files | {path.parent.name for path in _ROOT.glob("*/__init__.py")}

    def loaded() -> dict[str, _ModuleType]:
        return {
            key: module for key, module in _sys.modules.items() if key.partition(".")[0] in names
        }

    def is_own_checkpoint(key: str, module: _ModuleType) -> bool:
        """By its place: an environment inside the project's folder may hold a package of the same
        name."""
        own = _ROOT / key.partition(".")[0]
        found = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
        places = [_Path(place).resolve() for place in found if place]
        return any(
            place in (own, own.with_suffix(".py")) or own in place.parents for place in places
        )

    before = loaded()
    if all(is_own_checkpoint(key, module) for key, module in before.items()):
        yield
        return
    for key in before:
        del _sys.modules[key]
    try:
        with _warnings.catch_warnings():  # the second time timm meets our own models
            _warnings.filterwarnings("ignore", "Overwriting .* in registry")
            yield
    finally:
        for key in loaded():
            del _sys.modules[key]
        _sys.modules.update(before)


with _own_modules():
    from models.build import ALIASES as _ALIASES
    from models.build import build_model as _build_model
    from models.weights import restore_model as _restore_model
    from storage.checkpoints import load_checkpoint as _load_checkpoint
    from utils import InputError as _InputError


def _entry(
    name: str,
    pretrained: bool = False,
    *,
    checkpoint: str | None = None,
    ema: bool = False,
    **settings: _Any,
) -> _nn.Module:
    """The plain network in evaluation mode.

    Args:
        pretrained: must be false: no trained weights are published.
        checkpoint: a file that main.py wrote for this model; it says which classes and which input
            size.
        ema: take the averaged weights of `checkpoint`.
        settings: without `checkpoint`, keywords of `models.build.build_model` (`num_classes`,
            `input_size`, ...).

    Raises:
        InputError: `pretrained`, a checkpoint of another model, or settings beside a checkpoint,
            which has its own.
    """
    if pretrained:
        raise _InputError(
            f"{name}: no trained weights are published; give checkpoint='path/of/checkpoint.pth'"
        )
    if checkpoint is None:
        if ema:
            raise _InputError(f"{name}: ema is for checkpoint='path/of/checkpoint.pth'")
        return _build_model(name, **{"num_classes": 1000, **settings}).network.eval()
    if settings:
        raise _InputError(
            f"{name}: the checkpoint brings its own {', '.join(settings)}; leave it out"
        )
    content = _load_checkpoint(checkpoint)
    config = content.get("model_config")
    held = config.get("name") if isinstance(config, dict) else None
    if held is not None and _ALIASES.get(held, held) != name:
        raise _InputError(f"{checkpoint} holds a {held}, not a {name}")
    return _restore_model(content, ema).network.eval()


def _make_entry(name: str) -> _Callable[..., _nn.Module]:
    entry = _functools.partial(_entry, name)
    entry.__doc__ = f"{name}. {_entry.__doc__}"
    return entry


globals().update({_name: _make_entry(_name) for _name in MODELS})
