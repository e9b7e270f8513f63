"""The options of mixing methods: their flags, with default, range, help and rules, without torch.

The options of a method are a frozen dataclass in `mixers/<method>_options.py`. A field is a flag:
`mix_alpha` is `--mix-alpha`. Methods that share a flag inherit it from one class. The parser, the
checks and the methods read these classes, by way of `mixers/registry.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, ClassVar, Literal, Self

from errors import as_written

Limit = Literal["positive", "not_negative", "shares", "ranges"]  # see config/value_checks.py
Rule = tuple[bool, str]  # whether the rule is broken, and the message


@dataclass(frozen=True)
class Flag:
    """What the parser and the checks know of a flag.

    Args:
        limit: the range of its values.
        ignorable: a method that does not use the flag ignores it. Else such a method refuses every
            value but the default.
        of_training: it belongs to the guide or to the loss, not to the mixed images.
        with_con: methods without `Options.has_own_con` use it with L_con only.
        keywords: further arguments of `add_argument`: `type`, `nargs`, `choices`, `metavar`.
    """

    default: Any
    help: str
    limit: Limit | None
    ignorable: bool
    of_training: bool
    with_con: bool
    keywords: Mapping[str, Any]


def option(
    default: Any,
    help: str,
    limit: Limit | None = None,
    *,
    ignorable: bool = False,
    of_training: bool = False,
    with_con: bool = False,
    **keywords: Any,
) -> Any:
    """A field of the options; see `Flag` for the arguments."""
    flag = Flag(default, help, limit, ignorable, of_training, with_con, keywords)
    return field(default=default, metadata={"flag": flag})


@dataclass(frozen=True)
class Options:
    """The flags of every method."""

    # The method makes the reference of L_con itself, and the weight of L_con is 1 by default.
    has_own_con: ClassVar[bool] = False

    mixup_mode: str = option(
        "batch",
        "draw once per batch, pair or image; for every method but smmix",
        choices=["batch", "pair", "elem"],
    )
    smoothing: float = option(0.1, "label smoothing", "shares", type=float)

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> Self:
        """Takes the flags of this method out of all flags; one that is absent has its default."""
        values: dict[str, Any] = {}
        for name in cls.flags().keys() & flags.keys():
            value = flags[name]
            values[name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)

    @classmethod
    @cache
    def flags(cls) -> dict[str, Flag]:
        """The flags of the method, by name."""
        return {one.name: one.metadata["flag"] for one in fields(cls)}

    def uses(self, name: str) -> bool:
        """Whether the method uses this flag."""
        return name in self.flags()

    def changed(self, *names: str) -> list[str]:
        """Those of these flags whose values are not the defaults."""
        return [name for name in names if getattr(self, name) != self.flags()[name].default]

    def rules(self, args: argparse.Namespace) -> Iterator[Rule]:
        """The rules between flags of this method.

        Args:
            args: all flags of the command.
        """
        yield from ()

    def filled(self) -> dict[str, Any]:
        """The flags that may be left open, with the values that follow from other flags."""
        return {}


@dataclass(frozen=True)
class PastingOptions(Options):
    """The flags of every method that pastes a part of the source."""

    relabel: Literal["none", "transmix"] = option(
        "none",
        "transmix: labels follow the attention of the forward pass on the mixed images",
        choices=["none", "transmix"],
    )
    relabel_ratio: float = option(
        0.5,
        "weight of the area in TransMix's share; 0 is the equation of its paper, 1 keeps the "
        "labels of the mixing method",
        "shares",
        ignorable=True,  # a rule of its own refuses it without TransMix
        type=float,
    )
    consistency: Literal["probs", "logits"] | None = option(
        None,
        "reference of L_con: mixed probabilities, or the softmax of mixed logits; overrides "
        "--variant",
        with_con=True,
        choices=["probs", "logits"],
    )
    motivator: str = option(
        "self",
        "network that runs the motivating pass: the model itself, the average of its weights, "
        "or a frozen network: a timm name (timm downloads its weights), a name with a file of "
        "weights, or a checkpoint of main.py",
        of_training=True,
        with_con=True,
        metavar="self|ema|NAME|NAME=CHECKPOINT|CHECKPOINT",
    )
    guide_size: tuple[int, ...] | None = option(
        None,
        "size to which images are resized for the motivating pass: one side, or height and "
        "width, in pixels; default: not resized",
        of_training=True,
        with_con=True,
        type=int,
        nargs="+",
        metavar="SIDE",
    )
    guide_amp: Literal["fp16", "bf16", "none"] | None = option(
        None,
        "precision of the motivating pass; default: --amp",
        of_training=True,
        with_con=True,
        choices=["fp16", "bf16", "none"],
    )
    con_weight: float | None = option(
        None,
        "weight of L_con; 0 removes it from the loss, and the motivating pass ends once the "
        "score is known; default: 1 for smmix, 0 for the other methods that paste",
        "not_negative",
        of_training=True,
        type=float,
    )
    con_temperature: float = option(
        1.0,
        "temperature of both sides of L_con, which becomes T^2 times the divergence",
        "positive",
        of_training=True,
        with_con=True,
        type=float,
        metavar="T",
    )

    con_warmup_epochs: int = option(
        0,
        "the weight of L_con rises linearly from 0 over the first N epochs, step by step; an "
        "addition to the paper",
        "not_negative",
        of_training=True,
        with_con=True,
        type=int,
        metavar="N",
    )

    @property
    def relabels(self) -> bool:
        """Whether TransMix computes the labels."""
        return self.relabel == "transmix"

    @property
    def has_con(self) -> bool:
        """Whether L_con is part of the loss."""
        return self.has_own_con if self.con_weight is None else self.con_weight > 0

    @property
    def con_rule(self) -> Literal["probs", "logits"]:
        """How the reference of L_con is mixed."""
        return self.consistency or "probs"

    def uses(self, name: str) -> bool:
        has_guide = self.has_own_con or self.has_con
        return super().uses(name) and (has_guide or not self.flags()[name].with_con)

    def filled(self) -> dict[str, Any]:
        return {"consistency": self.con_rule} if self.has_con else {}


@dataclass(frozen=True)
class BetaOptions(PastingOptions):
    """The flag of methods that draw the source's share from a Beta distribution."""

    most_alphas: ClassVar[int] = 1

    mix_alpha: tuple[float, ...] | None = option(
        None,
        "parameters of the Beta distribution of the source's share: one number, or two for "
        "attentivemix; default: 1 for fmix and saliencymix, 2 8 for attentivemix",
        type=float,
        nargs="+",
        metavar="ALPHA",
    )

    def rules(self, args: argparse.Namespace) -> Iterator[Rule]:
        alphas = self.mix_alpha or ()
        yield (
            len(alphas) > self.most_alphas or any(alpha <= 0 for alpha in alphas),
            f"{as_written('mix_alpha', alphas)}: takes one number above 0, and with attentivemix "
            "up to two",
        )
