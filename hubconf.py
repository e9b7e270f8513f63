"""Entries of `torch.hub`: the plain networks of this project's recipes, without SMMix.

    model = torch.hub.load("path/of/this/project", "deit_tiny_patch16_224", source="local",
                           checkpoint="checkpoint.pth")

Each entry returns timm's network (or ours, for PVT) in eval mode: images -> logits.

Save its weights, `network.state_dict()`, and load them into a network of the same entry. A pickle
of the network itself (`torch.save(network)`, an argument of a spawned process) names its classes.
Those of timm can be imported anywhere, those of PVT only where `models` means this folder's.
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

# The models that `scripts/` trains; each is a name of --model.
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
def _project_modules() -> _Iterator[None]:
    """Within this context, `import utils` and the like import this project's files.

    The calling program may have modules of the same names. They are restored afterwards and ours
    are removed, so that the program's later imports do not change.
    """
    files = {path.stem for path in _ROOT.glob("*.py")} - {"hubconf"}
    names = files | {path.parent.name for path in _ROOT.glob("*/__init__.py")}

    def loaded() -> dict[str, _ModuleType]:
        return {
            key: module for key, module in _sys.modules.items() if key.partition(".")[0] in names
        }

    def is_ours(key: str, module: _ModuleType) -> bool:
        # Compares exact paths: an environment inside the project's folder may hold a package of the
        # same name.
        ours = _ROOT / key.partition(".")[0]
        found = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
        paths = [_Path(path).resolve() for path in found if path]
        return any(
            path in (ours, ours.with_suffix(".py")) or ours in path.parents for path in paths
        )

    before = loaded()
    if all(is_ours(key, module) for key, module in before.items()):
        yield
        return
    for key in before:
        del _sys.modules[key]
    try:
        # timm warns if our models are registered for the second time.
        with _warnings.catch_warnings():
            _warnings.filterwarnings("ignore", "Overwriting .* in registry")
            yield
    finally:
        for key in loaded():
            del _sys.modules[key]
        _sys.modules.update(before)


with _project_modules():
    from errors import InputError as _InputError
    from models.build import ALIASES as _ALIASES
    from models.build import build_model as _build_model
    from models.weights import restore_model as _restore_model
    from storage.checkpoints import load_checkpoint as _load_checkpoint


def _entry(
    name: str,
    pretrained: bool = False,
    *,
    checkpoint: str | None = None,
    ema: bool = False,
    **settings: _Any,
) -> _nn.Module:
    """The plain network in eval mode.

    Args:
        pretrained: must be false: no trained weights are published.
        checkpoint: a checkpoint that main.py wrote for this model; it also gives the classes and
            the input size.
        ema: load the averaged weights of `checkpoint`.
        settings: keywords of `models.build.build_model` (`num_classes`, `input_size`, ...), without
            `checkpoint` only.

    Raises:
        InputError: `pretrained` is true, the checkpoint is of another model, or settings were given
            together with a checkpoint.
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
        raise _InputError(f"{name}: the checkpoint sets {', '.join(settings)}; leave it out")
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
