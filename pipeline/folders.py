"""Finds the image files below a folder, and says which other files it passed over.

It asks the system about folders, not about files: 1.3 million files cost no call of their own.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import NamedTuple

from errors import InputError
from pipeline.pillow import ENDINGS

SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN")  # and those with a first dot
# Packages without which Pillow does not read a format.
PACKAGES = {".heic": "pillow-heif", ".heif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}


class Found(NamedTuple):
    """The image files below a folder."""

    folders: list[tuple[str, list[str]]]  # (path of a folder, its image files), both sorted
    passed_over: Counter[str]  # ending -> number of files that are no images

    def note(self) -> str:
        """One line on the files that were passed over; "" if there were none."""
        if not self.passed_over:
            return ""
        endings = [f"{number:,} {ending}" for ending, number in self.passed_over.most_common(5)]
        if len(self.passed_over) > 5:
            endings.append("...")
        needed = [
            f"Pillow reads {ending} only with {package}: convert these files"
            for ending, package in PACKAGES.items()
            if ending in self.passed_over
        ]
        count = f"{self.passed_over.total():,} files that are not read as images"
        return "; ".join([f"passed over {count}: {', '.join(endings)}", *needed])


def is_hidden(name: str) -> bool:
    """Whether a file or folder belongs to a program or the system, such as .ipynb_checkpoints."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def class_folders(path: str) -> list[str]:
    """The sorted names of the folders in `path` that are not hidden.

    Raises:
        InputError: `path` cannot be read.
    """
    try:
        with os.scandir(path) as entries:
            return sorted(
                entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name)
            )
    except OSError as error:
        raise _unreadable(error) from error


def find_images(root: str) -> Found:
    """All files below `root` with an ending of `ENDINGS`; links to folders are followed.

    Hidden folders and hidden files are left out without a word.

    Raises:
        InputError: a folder cannot be read, or is reached twice through a link.
    """
    found, passed_over = [], Counter[str]()
    real = os.path.realpath(root)
    seen = {real[: place or 1]: root for place, letter in enumerate(real) if letter == os.sep}
    for parent, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            raise InputError(
                f"{parent}: a link to a folder that is read already, or to one above ({real}), so "
                "that its images would count twice; remove the link"
            )
        seen[real] = parent
        folders[:] = [name for name in folders if not is_hidden(name)]
        images = []
        for name in files:
            ending = os.path.splitext(name)[1].lower()
            if is_hidden(name):
                continue
            if ending in ENDINGS:
                images.append(name)
            else:
                passed_over[ending or "without an ending"] += 1
        found.append((parent, sorted(images)))
    return Found(sorted(found), passed_over)


def _refuse(error: OSError) -> None:
    raise _unreadable(error) from error


def _unreadable(error: OSError) -> InputError:
    return InputError(
        f"{error.filename}: the folder cannot be read ({error.strerror}); its images would be "
        "missing: give the right to read it, or remove it"
    )
