"""Lets `import datasets` mean Hugging Face's package where timm needs it, although our
`datasets.py` has that name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

from utils import InputError


class HuggingFace:
    """Stands in a pickle ahead of what needs the package, so that a spawned worker imports the
    package first."""

    def __reduce__(self) -> tuple[Callable[[], HuggingFace], tuple[()]]:
        return import_hugging_face, ()


def import_hugging_face() -> HuggingFace:
    """Lets `datasets` name the Hugging Face package from here on, which our file of that name
    hides.

    It stays so, because the package and timm import parts of it when they need them. Our modules
    keep their references.

    Raises:
        InputError: the package is not installed.
    """
    here = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))  # the project's folder
    bound = sys.modules.get("datasets")
    if bound is not None and os.path.realpath(bound.__file__ or "") != os.path.join(
        here, "datasets.py"
    ):
        return HuggingFace()
    path = sys.path[:]
    sys.path[:] = [folder for folder in path if os.path.realpath(folder) != here]
    sys.modules.pop("datasets", None)
    try:
        importlib.import_module("datasets")
    except ImportError as error:
        if bound is not None:
            sys.modules["datasets"] = bound
        raise InputError(
            f"--data-set timm/hfds/ and timm/hfids/ need: pip install datasets ({error})"
        ) from error
    finally:
        sys.path[:] = path
    return HuggingFace()
