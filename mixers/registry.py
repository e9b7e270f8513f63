"""The mixing methods: name -> its options and its class, which is imported when it is built.

The parser, the checks, the objects and the table in `docs/flags.md` are made from this list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mixers.attentivemix_options import AttentiveMixOptions
from mixers.cutmix_options import CutMixOptions
from mixers.fmix_options import FMixOptions
from mixers.mixup_options import MixupOptions
from mixers.options import BetaOptions, Flag, Options
from mixers.resizemix_options import ResizeMixOptions
from mixers.smmix_options import SMMixOptions
from mixers.transmix_options import TransMixOptions


class Method(NamedTuple):
    """One mixing method."""

    options: type[Options]
    place: str  # module:class of the mixer


METHODS = {
    "smmix": Method(SMMixOptions, "smmix:SMMix"),
    "cutmix": Method(CutMixOptions, "mixers.cutmix:CutMix"),
    "mixup": Method(MixupOptions, "mixers.mixup:Mixup"),
    "none": Method(Options, "mixers.interface:NoMixing"),
    "resizemix": Method(ResizeMixOptions, "mixers.resizemix:ResizeMix"),
    "fmix": Method(FMixOptions, "mixers.fmix:FMix"),
    "attentivemix": Method(AttentiveMixOptions, "mixers.attentivemix:AttentiveMix"),
    "saliencymix": Method(BetaOptions, "mixers.saliencymix:SaliencyMix"),
    "transmix": Method(TransMixOptions, "mixers.cutmix:CutMix"),  # see `relabels`
}


def all_flags() -> dict[str, Flag]:
    """The flags of all methods, by name.

    Raises:
        ValueError: two methods define a flag of the same name.
    """
    found: dict[str, Flag] = {}
    for method in METHODS.values():
        for name, flag in method.options.flags().items():
            if found.setdefault(name, flag) is not flag:
                raise ValueError(f"{name}: two methods define it; both must inherit it")
    return found


all_flags()  # a flag that is defined twice is an error at once


def users(name: str) -> list[str]:
    """The methods that have this flag."""
    return [mixer for mixer, method in METHODS.items() if name in method.options.flags()]


def options_of(flags: Mapping[str, Any]) -> Options:
    """The options of the method `flags["mixer"]`, out of all flags."""
    return METHODS[flags["mixer"]].options.from_flags(flags)


def is_used(name: str, flags: Mapping[str, Any]) -> bool:
    """Whether the method `flags["mixer"]` uses this flag, or ignores its value."""
    return all_flags()[name].ignorable or options_of(flags).uses(name)


def flags_of_method(flags: Mapping[str, Any], mixer: str) -> dict[str, Any]:
    """The same flags with this `--mixer`: flags that it does not use have their defaults."""
    own = {**flags, "mixer": mixer}
    unused = {name: one.default for name, one in all_flags().items() if not is_used(name, own)}
    return {**own, **unused}


def con_weight_of(mixer: str, given: float | None) -> float:
    """The weight of L_con: `given`, or else the default of the method."""
    return float(METHODS[mixer].options.has_own_con) if given is None else given
