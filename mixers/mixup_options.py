"""The flags of Mixup."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from mixers.options import Options, Rule, option


@dataclass(frozen=True)
class MixupOptions(Options):
    """The flags of Mixup, alone or beside another method."""

    mixup: float = option(
        0.8, "Mixup's alpha; 0 turns Mixup off", "not_negative", ignorable=True, type=float
    )

    def rules(self, args: argparse.Namespace) -> Iterator[Rule]:
        yield self.mixup == 0, "--mixup 0 leaves --mixer mixup nothing to do; use --mixer none"
