"""Makes `import datasets` find Hugging Face's package for timm.

The project's `datasets.py` has the same name and would be imported instead.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

from errors import InputError


class HuggingFace:
    """A marker whose unpickling imports Hugging Face's package.

    An object that needs the package has it as its first attribute. A spawned worker then imports
    the package before it unpickles the rest.
    """

    def __reduce__(self) -> tuple[Callable[[], HuggingFace], tuple[()]]:
        return import_hugging_face, ()


PACKAGE = "datasets"  # the name of the package, and of a file of this project


def import_hugging_face() -> HuggingFace:
    """Binds the module name `datasets` to Hugging Face's package, for the rest of the process.

    The binding stays, because the package and timm import parts of it later. Modules of the project
    that have imported `datasets.py` keep their reference to it.

    Raises:
        InputError: the package is not installed.
    """
    here = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))  # the project's folder
    own_file = os.path.join(here, f"{PACKAGE}.py")
    bound = sys.modules.get(PACKAGE)
    if bound is not None and os.path.realpath(bound.__file__ or "") != own_file:
        return HuggingFace()
    path = sys.path[:]
    sys.path[:] = [folder for folder in path if os.path.realpath(folder) != here]
    sys.modules.pop(PACKAGE, None)
    try:
        importlib.import_module(PACKAGE)
    except ImportError as error:
        if bound is not None:
            sys.modules[PACKAGE] = bound
        raise InputError(
            f"--data-set timm/hfds/ and timm/hfids/ need: pip install datasets ({error})"
        ) from error
    finally:
        sys.path[:] = path
    return HuggingFace()
