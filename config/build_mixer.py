"""Makes the mixer of a run from the values of the mixing flags."""

from __future__ import annotations

import argparse
from functools import partial
from importlib import import_module

from mixers.consistent import Consistent
from mixers.interface import Mixer, MixerContext
from mixers.mixup import Mixup
from mixers.mixup_options import MixupOptions
from mixers.options import PastingOptions
from mixers.registry import METHODS, options_of
from mixers.split import Split
from mixers.switch import Switch
from mixers.transmix import TransMix
from smmix import mix_predictions


def build_mixer(flags: argparse.Namespace, context: MixerContext) -> Switch:
    """The mixer of a run: the method of `--mixer`, alone or with Mixup, in a `Switch`.

    Raises:
        InputError: the model's token grid is too small for regions.
    """
    first = _build_method(flags, context)
    mixup = Mixup.from_options(MixupOptions.from_flags(vars(flags)), context)
    mixup.groups = context.groups
    second = None
    is_alone = flags.mixer in ("mixup", "none") or flags.mixup <= 0
    if flags.mix_protocol == "split":
        first = Split(first, mixup, flags.mixup_switch_prob)
    elif flags.mix_protocol == "switch" and not is_alone:
        second = mixup
    return Switch(
        first,
        second,
        flags.mixup_prob,
        flags.mixup_switch_prob,
        flags.mix_off_epoch,
    )


def _build_method(flags: argparse.Namespace, context: MixerContext) -> Mixer:
    """The method of `--mixer`, with TransMix's labels and the reference of L_con if they are on."""
    options = options_of(vars(flags))
    module, _, name = METHODS[flags.mixer].place.partition(":")
    mixer: Mixer = getattr(import_module(module), name).from_options(options, context)
    mixer.groups = context.groups
    if not isinstance(options, PastingOptions):
        return mixer
    if options.relabels:
        mixer = TransMix(mixer, context.grid_size, options.relabel_ratio)
    if options.has_con and not options.has_own_con:
        rule, temperature = options.con_rule, options.con_temperature
        mixer = Consistent(mixer, partial(mix_predictions, rule=rule, temperature=temperature))
    return mixer
