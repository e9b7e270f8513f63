"""The flags of mixing and of its loss: those of the methods, and those of the protocol.

The flags of a method are in its options (`mixers/options.py`); `config/mixing_checks.py` refuses
flags that contradict each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from errors import flag_name
from mixers.registry import METHODS, all_flags


def add_method_flags(group: Any, methods: Iterable[str] = METHODS) -> None:
    """Adds the flags that say how images are mixed.

    Args:
        group: a parser, or one of its argument groups.
        methods: the choices of `--mixer`.
    """
    group.add_argument("--mixer", default="smmix", choices=list(methods), help="mixing method")
    _add_options(group, of_training=False)


def add_training_flags(group: Any) -> None:
    """Adds the flags that say how often images are mixed, by which guide, and with which loss."""
    _add_protocol_flags(group)
    _add_options(group, of_training=True)
    group.add_argument(
        "--bce-loss", action="store_true", help="binary cross entropy for L_cls and L_fine"
    )


def _add_options(group: Any, of_training: bool) -> None:
    for name, flag in all_flags().items():
        if flag.of_training == of_training:
            group.add_argument(
                flag_name(name), default=flag.default, help=flag.help, **flag.keywords
            )


def _add_protocol_flags(group: Any) -> None:
    group.add_argument(
        "--mix-protocol",
        default="switch",
        choices=["switch", "single", "split"],
        help="switch: each batch is mixed by --mixer or by Mixup, unless --mixup is 0; single: "
        "always by --mixer; split: one part of each batch by --mixer, the rest by Mixup",
    )
    group.add_argument("--mixup-prob", default=1.0, type=float, help="share of batches to mix")
    group.add_argument(
        "--mixup-switch-prob",
        default=0.5,
        type=float,
        help="share of --mixer when Mixup is on too: of the mixed batches (switch), or of the "
        "images of each batch (split)",
    )
    group.add_argument(
        "--mix-off-epoch", type=int, help="epoch, counted from 0, from which nothing is mixed"
    )
