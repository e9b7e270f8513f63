"""Files that would make a folder if anything but a restricted reader opened them, in every shape
that we know of."""

from __future__ import annotations

import argparse
import os
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


class Malicious:
    """Unpickled by anything but a restricted reader, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def _hidden(evil: Malicious) -> dict[str, Any]:
    """A checkpoint of ours in all but one number, deep in the optimizer's state."""
    weights = {"head.weight": torch.zeros(2, 3)}
    state = {0: {"step": torch.tensor(1.0), "exp_avg": [{"deep": ({"deeper": evil},)}]}}
    return {
        "format": 1,
        "args": {"lr": 0.1},
        "model_config": {"name": "vit_nano_patch4_32"},
        "data": {"class_names": []},
        "model": weights,
        "ema": None,
        "optimizer": {"state": state, "param_groups": []},
        "scaler": {},
        "epoch": 0,
        "step": 1,
        "best_acc1": 0.0,
    }


def _module(evil: Malicious) -> nn.Module:
    module = nn.Linear(2, 2)
    module.evil = evil  # type: ignore[assignment]
    return module


def _save(content: Any, path: Path, **settings: Any) -> None:
    torch.save(content, path, **settings)


def _pickle(content: Any, path: Path, protocol: int) -> None:
    path.write_bytes(pickle.dumps(content, protocol))


# What the file holds, how it is written, and the class that a refusal has to name.
KINDS: dict[str, tuple[Callable[[Malicious], Any], Callable[..., None], str]] = {
    "zip": (lambda evil: {"model": evil}, _save, "mkdir"),
    "legacy": (
        lambda evil: {"model": evil},
        partial(_save, _use_new_zipfile_serialization=False),
        "mkdir",
    ),
    "zip of protocol 5": (lambda evil: {"model": evil}, partial(_save, pickle_protocol=5), "mkdir"),
    "pickle": (lambda evil: {"model": evil}, partial(_pickle, protocol=2), "mkdir"),
    "pickle of protocol 5": (lambda evil: {"model": evil}, partial(_pickle, protocol=5), "mkdir"),
    "hidden deep": (_hidden, _save, "mkdir"),
    "namespace": (
        lambda evil: {"model": {}, "args": argparse.Namespace(lr=0.1, data=evil)},
        _save,
        "mkdir",
    ),
    "object array": (lambda evil: {"model": np.array([evil], dtype=object)}, _save, "_reconstruct"),
    "module": (_module, _save, "torch.nn.modules.linear.Linear"),
}


def write(kind: str, path: Path, marker: Path) -> str:
    """Writes such a file; returns the name of the class that a refusal has to name."""
    make, save, named = KINDS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(make(Malicious(marker)), path)
    return named
