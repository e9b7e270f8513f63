"""The training images of a run that cannot be read: which, how many there may be, and what is said
of them.

Level 1: imports `utils` only. Numbers on the host; it must not read images, devices or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from utils import InputError


def most_corrupt(num_images: int) -> int:
    """How many images `--skip-corrupt` replaces: a thousandth of them, and ten of few."""
    return max(10, num_images // 1000)


class CorruptImages:
    """Those that this rank met, and those that all ranks know of.

    Args:
        num_images: images in the training set.
        name_of: index -> the image's name in messages.
    """

    def __init__(self, num_images: int, name_of: Callable[[int], str]) -> None:
        self.num_images = num_images
        self.name_of = name_of
        self.limit = most_corrupt(num_images)
        self.known: set[int] = set()  # to all ranks
        self.own: set[int] = set()  # met here, and not known yet

    def see(self, indices: Tensor) -> int:
        """Takes in a batch's indices (B,), on the host, where ~i is image i replaced. Returns how
        many are new here."""
        met = {~index for index in indices[indices < 0].tolist()} - self.known - self.own
        self.own |= met
        return len(met)

    def state(self) -> list[int]:
        """All that this rank knows of, in order: for other ranks' `merge`, and for a checkpoint."""
        return sorted(self.known | self.own)

    def load(self, state: Iterable[int]) -> None:
        """Goes on from the checkpoint of a run; they have been reported."""
        self.known, self.own = set(state), set()

    def merge(self, states: Iterable[Iterable[int]]) -> list[int]:
        """Takes in the `state` of every rank, this one's too. Returns those that are new to the
        run, to be reported."""
        new = set().union(*states) - self.known
        self.known |= new
        self.own.clear()
        return sorted(new)

    def report(self, indices: Iterable[int]) -> str:
        """What to say of images that were not known before."""
        names = "\n  ".join(map(self.name_of, indices))
        return (
            f"images that cannot be read; others are trained on in their place ({len(self.known)} "
            "so far, at most "
            f"{self.limit}):\n  {names}"
        )

    def stop_if_too_many(self) -> None:
        """To be called by all ranks together, after `merge`.

        Raises:
            InputError: more than the limit, all by name.
        """
        if len(self.known) > self.limit:
            names = "\n  ".join(map(self.name_of, sorted(self.known)))
            raise InputError(
                f"{len(self.known)} of {self.num_images:,} training images cannot be read, and "
                "--skip-corrupt replaces "
                f"at most {self.limit}; mend or remove them (python -m tools.check_data finds "
                f"all):\n  {names}"
            )
