"""The flags of TransMix: CutMix's, as CutMix mixes its images."""

from __future__ import annotations

from dataclasses import dataclass

from mixers.cutmix_options import CutMixOptions


@dataclass(frozen=True)
class TransMixOptions(CutMixOptions):
    """Those of CutMix; TransMix always computes the labels."""

    @property
    def relabels(self) -> bool:
        return True
