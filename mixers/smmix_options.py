"""The flags of SMMix, and the choices that they describe: its arithmetic and its regions."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from errors import as_written, flag_name
from mixers.options import PastingOptions, Rule, option


@dataclass(frozen=True)
class Variant:
    """The three places where the arithmetic of the released code differs from the paper's.

    Args:
        region_head: classifier of the regions: the model's own F (Eq. 12), or a second one.
        consistency: reference of L_con: mixed probabilities (Eq. 14), or the softmax of mixed
            logits.
        region_size: side of the region: floor(delta * side), or uniform over whole numbers.
    """

    region_head: Literal["shared", "separate"] = "shared"
    consistency: Literal["probs", "logits"] = "probs"
    region_size: Literal["floor", "integer"] = "floor"


VARIANTS = {"paper": Variant(), "released": Variant("separate", "logits", "integer")}


@dataclass(frozen=True)
class Scheme:
    """How both regions are chosen (Table A4), and by which score (Table A5). SMMix: the defaults.

    Args:
        source: the most attended window of the source, or a random one for each image.
        target: the least or the most attended window of the target, or (corr) the place of the
            source region.
        score: the score of the motivating pass (Eq. 6), or a random number for each token.
    """

    source: Literal["max", "random"] = "max"
    target: Literal["min", "max", "corr"] = "min"
    score: Literal["guide", "random"] = "guide"

    @property
    def needs_score(self) -> bool:
        return self.source == "max" or self.target != "corr"

    @property
    def needs_guide(self) -> bool:
        """Whether the score comes from the motivating pass. L_con may need that pass too."""
        return self.needs_score and self.score == "guide"


@dataclass(frozen=True)
class SMMixOptions(PastingOptions):
    """The flags of SMMix."""

    has_own_con = True

    variant: str = option(
        "paper",
        "arithmetic of SMMix: that of the paper, or that of the released code",
        choices=["paper", "released"],
    )
    region_head: Literal["shared", "separate"] | None = option(
        None,
        "classifier of the regions: the model's head, or a second one; overrides --variant",
        choices=["shared", "separate"],
    )
    region_size: Literal["floor", "integer"] | None = option(
        None,
        "side of the region: rounded down from a real number, or drawn from whole numbers; "
        "overrides --variant",
        choices=["floor", "integer"],
    )
    source_region: Literal["max", "random"] = option(
        "max",
        "where SMMix takes its region: the most attended one, or a random one",
        choices=["max", "random"],
    )
    target_region: Literal["min", "max", "corr"] = option(
        "min",
        "where SMMix pastes its region: over the least or the most attended region, or at the "
        "place from which it was taken",
        choices=["min", "max", "corr"],
    )
    side_ratio: tuple[float, float] = option(
        (0.25, 0.75),
        "range of the region's side as a share of the image's side",
        "ranges",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
    )
    score: Literal["attention", "rollout", "random"] = option(
        "attention",
        "score by which SMMix chooses its regions: the attention of one block, the mean over "
        "all blocks, or a random number for each token",
        of_training=True,
        choices=["attention", "rollout", "random"],
    )
    score_block: int | None = option(
        None,
        "block whose attention is the score, counted from 1; default: the last",
        of_training=True,
        type=int,
        metavar="D",
    )
    fine_weight: float = option(
        1.0,
        "weight of L_fine; 0 removes it from the loss",
        "not_negative",
        of_training=True,
        type=float,
    )
    fine_temperature: float = option(
        1.0,
        "temperature of the predictions in L_fine: softmax(logits / T)",
        "positive",
        of_training=True,
        type=float,
        metavar="T",
    )

    @property
    def arithmetic(self) -> Variant:
        """That of `--variant`, with the parts that have been given as flags."""
        whole = VARIANTS[self.variant]
        return Variant(
            self.region_head or whole.region_head,
            self.consistency or whole.consistency,
            self.region_size or whole.region_size,
        )

    @property
    def scheme(self) -> Scheme:
        """How the regions are chosen."""
        score: Literal["guide", "random"] = "random" if self.score == "random" else "guide"
        return Scheme(self.source_region, self.target_region, score)

    def filled(self) -> dict[str, Any]:
        return vars(self.arithmetic)

    def rules(self, args: argparse.Namespace) -> Iterator[Rule]:
        yield from self._rules_of_guide()
        of_con = self.changed("con_temperature", "con_warmup_epochs")
        written = ", ".join(as_written(name, getattr(self, name)) for name in of_con)
        yield (
            not self.has_con and bool(of_con),
            f"{written} is for L_con, which --con-weight 0 removes: leave out one of them",
        )
        yield (
            self.fine_temperature != 1 and self.fine_weight == 0,
            f"--fine-temperature {self.fine_temperature} is for L_fine, which --fine-weight 0 "
            "removes: leave out one of them",
        )
        yield (
            self.fine_temperature != 1 and args.bce_loss,
            f"--fine-temperature {self.fine_temperature} is for a softmax, and --bce-loss has "
            "none: leave out one of them",
        )

    def _rules_of_guide(self) -> Iterator[Rule]:
        """The rules between flags of the score and of the motivating pass."""
        of_score = self.changed("score", "score_block")
        of_guide = self.changed("guide_size", "guide_amp", "motivator", "score_block")
        written = ", ".join(as_written(name, getattr(self, name)) for name in of_guide)
        yield (
            len(of_score) > 1,
            f"--score {self.score} does not use one block alone: leave out --score-block, or "
            "--score",
        )
        yield (
            bool(of_score) and not self.scheme.needs_score,
            "--source-region random with --target-region corr uses no score: leave out "
            f"{' and '.join(map(flag_name, of_score))}",
        )
        yield (
            bool(of_guide) and not (self.scheme.needs_guide or self.has_con),
            f"{written}: no motivating pass is run, as the regions do not use its score and "
            "--con-weight is 0; leave it out",
        )
