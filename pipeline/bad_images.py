"""Keeps the list of training images that cannot be read, and stops the run if there are too many.

It uses the numbers of the images only: it reads no images, devices or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from errors import InputError


def max_bad_images(num_images: int) -> int:
    """The most images that `--skip-corrupt` replaces: a thousandth of them, but at least 10."""
    return max(10, num_images // 1000)


class BadImages:
    """The unreadable training images that this rank met, and those that all ranks know of.

    Args:
        num_images: images in the training set.
        name_of: index -> the image's name in messages.
    """

    def __init__(self, num_images: int, name_of: Callable[[int], str]) -> None:
        self.num_images = num_images
        self.name_of = name_of
        self.limit = max_bad_images(num_images)
        self.known: set[int] = set()  # all ranks know of them
        self.own: set[int] = set()  # only this rank knows of them, until the next `merge`

    def add(self, indices: Tensor, replaced: Tensor) -> int:
        """Adds the replaced images of a batch. Returns how many of them are new on this rank.

        Args:
            indices: (B,) int64, on the host.
            replaced: (B,) bool, on the host.
        """
        new = set(indices[replaced].tolist()) - self.known - self.own
        self.own |= new
        return len(new)

    def state(self) -> list[int]:
        """All images that this rank knows of, for `merge` on other ranks and checkpoints."""
        return sorted(self.known | self.own)

    def load(self, state: Iterable[int]) -> None:
        """Takes the images of a checkpoint; they have been reported already."""
        self.known, self.own = set(state), set()

    def merge(self, states: Iterable[Iterable[int]]) -> list[int]:
        """Adds the `state` of every rank, including this one.

        Returns:
            The images that no rank has reported yet, sorted.
        """
        new = set().union(*states) - self.known
        self.known |= new
        self.own.clear()
        return sorted(new)

    def report(self, indices: Iterable[int]) -> str:
        """The warning about these new unreadable images."""
        names = "\n  ".join(map(self.name_of, indices))
        return (
            f"images that cannot be read, each replaced by another image ({len(self.known)} "
            f"so far, at most {self.limit}):\n  {names}"
        )

    def stop_if_too_many(self) -> None:
        """Stops the run if there are more than `limit`. All ranks call it together, after `merge`.

        Raises:
            InputError: more than `limit` images cannot be read; the message names them all.
        """
        if len(self.known) > self.limit:
            names = "\n  ".join(map(self.name_of, sorted(self.known)))
            raise InputError(
                f"{len(self.known)} of {self.num_images:,} training images cannot be read, and "
                f"--skip-corrupt replaces at most {self.limit}; repair or remove them "
                f"(python -m tools.check_data finds all):\n  {names}"
            )
