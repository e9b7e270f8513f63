"""The flags of ResizeMix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mixers.options import PastingOptions, option


@dataclass(frozen=True)
class ResizeMixOptions(PastingOptions):
    """The flags of ResizeMix."""

    resize_scope: tuple[float, float] = option(
        (0.1, 0.8),
        "range of the pasted copy's side as a share of the image's side",
        "ranges",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
    )
    resize_placement: Literal["inside", "clipped"] = option(
        "inside",
        "inside: the box is inside the image, as in the authors' code; clipped: it is cut at "
        "the border, as in the benchmark behind the paper's Table 2",
        choices=["inside", "clipped"],
    )
