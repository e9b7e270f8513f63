"""The flags of FMix."""

from __future__ import annotations

from dataclasses import dataclass

from mixers.options import BetaOptions, option


@dataclass(frozen=True)
class FMixOptions(BetaOptions):
    """The flags of FMix."""

    fmix_decay: float = option(
        3.0,
        "exponent with which the spectrum of FMix's noise falls",
        "not_negative",
        type=float,
    )
