"""The flags of AttentiveMix."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from mixers.options import BetaOptions, Rule, option


@dataclass(frozen=True)
class AttentiveMixOptions(BetaOptions):
    """The flags of AttentiveMix."""

    most_alphas = 2

    attentive_teacher: str | None = option(
        None,
        "classifier of attentivemix: a timm name (timm downloads its weights), a name with a "
        "file of weights, or a checkpoint of main.py",
        metavar="NAME[=CHECKPOINT]",
    )
    attentive_cells: int | None = option(
        None,
        "fixed number of pasted cells, 6 in its paper; default: drawn, as in AttentiveMix+",
        "positive",
        type=int,
    )

    def rules(self, args: argparse.Namespace) -> Iterator[Rule]:
        yield from super().rules(args)
        yield (
            not self.attentive_teacher,
            "--mixer attentivemix needs --attentive-teacher NAME=CHECKPOINT, such as "
            "resnet50=FILE, or a timm name whose weights can be downloaded, such as "
            "resnet50.tv_in1k",
        )
        yield (
            self.attentive_cells is not None and bool(self.mix_alpha),
            "--attentive-cells fixes what --mix-alpha would draw: give one of them",
        )
