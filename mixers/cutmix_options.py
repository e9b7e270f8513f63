"""The flags of CutMix."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from mixers.options import PastingOptions, Rule, option


@dataclass(frozen=True)
class CutMixOptions(PastingOptions):
    """The flags of CutMix, which TransMix has too."""

    cutmix: float = option(
        1.0,
        "CutMix's alpha, for --mixer cutmix and transmix",
        "not_negative",
        ignorable=True,
        type=float,
    )
    cutmix_minmax: tuple[float, float] | None = option(
        None,
        "range of the sides of CutMix's box as shares of the image's sides",
        "ranges",
        type=float,
        nargs=2,
    )

    def rules(self, args: argparse.Namespace) -> Iterator[Rule]:
        yield (
            self.cutmix <= 0 and self.cutmix_minmax is None,
            f"--cutmix {self.cutmix}: --mixer {args.mixer} needs an alpha above 0, or "
            "--cutmix-minmax",
        )
