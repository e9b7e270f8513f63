"""Training images that cannot be read: which ones, how many there may be, and the message on them.

Numbers on the host only: reads no images, devices or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from utils import InputError


def max_bad_images(num_images: int) -> int:
    """How many images `--skip-corrupt` replaces: a thousandth of them, and ten of few."""
    return max(10, num_images // 1000)


class BadImages:
    """Unreadable training images: those that this rank met, and those that all ranks know of.

    Args:
        num_images: images in the training set.
        name_of: index -> the image's name in messages.
    """

    def __init__(self, num_images: int, name_of: Callable[[int], str]) -> None:
        self.num_images = num_images
        self.name_of = name_of
        self.limit = max_bad_images(num_images)
        self.known: set[int] = set()  # on all ranks
        self.own: set[int] = set()  # met on this rank, not known to all yet

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
        """All that this rank knows of, sorted: for `merge` on other ranks and for checkpoints."""
        return sorted(self.known | self.own)

    def load(self, state: Iterable[int]) -> None:
        """Takes those of a checkpoint, which were reported before."""
        self.known, self.own = set(state), set()

    def merge(self, states: Iterable[Iterable[int]]) -> list[int]:
        """Adds the `state` of every rank, this one's included. Returns the images that no rank has
        reported yet."""
        new = set().union(*states) - self.known
        self.known |= new
        self.own.clear()
        return sorted(new)

    def report(self, indices: Iterable[int]) -> str:
        """The warning about new ones."""
        names = "\n  ".join(map(self.name_of, indices))
        return (
            f"images that cannot be read; others are trained on in their place ({len(self.known)} "
            f"so far, at most {self.limit}):\n  {names}"
        )

    def stop_if_too_many(self) -> None:
        """Called by all ranks together, after `merge`.

        Raises:
            InputError: more than the limit, all by name.
        """
        if len(self.known) > self.limit:
            names = "\n  ".join(map(self.name_of, sorted(self.known)))
            raise InputError(
                f"{len(self.known)} of {self.num_images:,} training images cannot be read, and "
                f"--skip-corrupt replaces at most {self.limit}; mend or remove them "
                f"(python -m tools.check_data finds all):\n  {names}"
            )
