"""Makes the mixer of a run from the values of the mixing flags."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor

from config.mixing_flags import con_weight_of
from errors import InputError
from mixers.attentivemix import AttentiveMix
from mixers.consistent import Consistent
from mixers.cutmix import CutMix
from mixers.fmix import FMix
from mixers.interface import Mixer, NoMixing
from mixers.mixup import Mixup
from mixers.resizemix import ResizeMix
from mixers.saliencymix import SaliencyMix
from mixers.split import Split
from mixers.switch import Switch
from mixers.transmix import TransMix
from smmix import VARIANTS, Scheme, SMMix, Variant, mix_predictions


@dataclass(frozen=True)
class MixingSettings:
    """The values of the mixing flags, by name; see `config/mixing_flags.py` for their meaning."""

    mixer: str
    mix_protocol: Literal["switch", "single", "split"]
    mixup: float
    cutmix: float
    cutmix_minmax: tuple[float, float] | None
    mixup_prob: float
    mixup_switch_prob: float
    mixup_mode: str
    mix_off_epoch: int | None
    mix_alpha: tuple[float, ...] | None
    resize_scope: tuple[float, float]
    resize_placement: Literal["inside", "clipped"]
    fmix_decay: float
    attentive_cells: int | None
    relabel: Literal["none", "transmix"]
    relabel_ratio: float
    variant: str
    region_head: Literal["shared", "separate"] | None
    consistency: Literal["probs", "logits"] | None
    region_size: Literal["floor", "integer"] | None
    side_ratio: tuple[float, float]
    smoothing: float
    fine_weight: float
    con_weight: float | None
    con_temperature: float
    source_region: Literal["max", "random"]
    target_region: Literal["min", "max", "corr"]
    score: Literal["attention", "rollout", "random"]

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> MixingSettings:
        """Takes the mixing flags out of all flags."""
        values: dict[str, Any] = {}
        for one in fields(cls):
            value = flags[one.name]
            values[one.name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)

    @property
    def arithmetic(self) -> Variant:
        """SMMix's arithmetic: that of `--variant`, with the parts that have been given as flags."""
        parts = {one.name: getattr(self, one.name) for one in fields(Variant)}
        given = {name: value for name, value in parts.items() if value}
        return replace(VARIANTS[self.variant], **given)

    @property
    def has_con(self) -> bool:
        """Whether L_con is part of the loss."""
        return con_weight_of(self.mixer, self.con_weight) > 0

    @property
    def scheme(self) -> Scheme:
        """How SMMix chooses its regions."""
        score: Literal["guide", "random"] = "random" if self.score == "random" else "guide"
        return Scheme(self.source_region, self.target_region, score)


@dataclass(frozen=True)
class MixerContext:
    """What mixers need from the model and the data.

    Args:
        num_classes: number of classes.
        grid_size: rows and columns of the model's token grid.
        to_bytes: normalised images -> their pixels before normalisation, uint8.
        teacher: clean images -> features (B, D, rows, columns) of a frozen classifier, for
            AttentiveMix.
    """

    num_classes: int
    grid_size: tuple[int, int]
    to_bytes: Callable[[Tensor], Tensor]
    teacher: Callable[[Tensor], Tensor] | None = None


def _smmix(settings: MixingSettings, context: MixerContext) -> Mixer:
    try:
        return SMMix(
            context.num_classes,
            context.grid_size,
            settings.smoothing,
            settings.side_ratio,
            settings.arithmetic,
            fine=settings.fine_weight > 0,
            con=settings.has_con,
            scheme=settings.scheme,
            temperature=settings.con_temperature,
        )
    except ValueError as error:
        raise InputError(
            f"--mixer smmix: {error}; use a larger --input-size or a smaller --patch-size"
        ) from error


def _cutmix(settings: MixingSettings, context: MixerContext) -> Mixer:
    return CutMix(
        context.num_classes,
        settings.smoothing,
        settings.cutmix,
        settings.cutmix_minmax,
        settings.mixup_mode,
    )


def _mixup(settings: MixingSettings, context: MixerContext) -> Mixer:
    return Mixup(context.num_classes, settings.smoothing, settings.mixup, settings.mixup_mode)


def _none(settings: MixingSettings, context: MixerContext) -> Mixer:
    return NoMixing(context.num_classes, settings.smoothing)


def _resizemix(settings: MixingSettings, context: MixerContext) -> Mixer:
    return ResizeMix(
        context.num_classes,
        settings.smoothing,
        settings.resize_scope,
        settings.resize_placement,
        settings.mixup_mode,
    )


def _fmix(settings: MixingSettings, context: MixerContext) -> Mixer:
    (alpha,) = settings.mix_alpha or (1.0,)
    return FMix(
        context.num_classes, settings.smoothing, alpha, settings.fmix_decay, settings.mixup_mode
    )


def _attentivemix(settings: MixingSettings, context: MixerContext) -> Mixer:
    assert context.teacher is not None
    alphas = settings.mix_alpha or (2.0, 8.0)
    return AttentiveMix(
        context.num_classes,
        context.teacher,
        settings.smoothing,
        alphas[0],
        alphas[-1],
        settings.attentive_cells,
        settings.mixup_mode,
    )


def _saliencymix(settings: MixingSettings, context: MixerContext) -> Mixer:
    (alpha,) = settings.mix_alpha or (1.0,)
    return SaliencyMix(
        context.num_classes, context.to_bytes, settings.smoothing, alpha, settings.mixup_mode
    )


MIXERS: dict[str, Callable[[MixingSettings, MixerContext], Mixer]] = {
    "smmix": _smmix,
    "cutmix": _cutmix,
    "mixup": _mixup,
    "none": _none,
    "resizemix": _resizemix,
    "fmix": _fmix,
    "attentivemix": _attentivemix,
    "saliencymix": _saliencymix,
    "transmix": _cutmix,  # CutMix's images; `build_mixer` adds TransMix's labels
}


def build_mixer(settings: MixingSettings, context: MixerContext) -> Switch:
    """The mixer of a run: the method of `--mixer`, alone or with Mixup, in a `Switch`.

    Raises:
        InputError: the model's token grid is too small for regions.
    """
    first = MIXERS[settings.mixer](settings, context)
    if settings.relabel == "transmix" or settings.mixer == "transmix":
        first = TransMix(first, context.grid_size, settings.relabel_ratio)
    if settings.has_con and settings.mixer != "smmix":
        rule, temperature = settings.arithmetic.consistency, settings.con_temperature
        first = Consistent(first, partial(mix_predictions, rule=rule, temperature=temperature))
    if settings.mix_protocol == "split":
        first = Split(first, _mixup(settings, context), settings.mixup_switch_prob)
    second = None
    is_alone = settings.mixer in ("mixup", "none") or settings.mixup <= 0
    if settings.mix_protocol == "switch" and not is_alone:
        second = _mixup(settings, context)
    return Switch(
        first,
        second,
        settings.mixup_prob,
        settings.mixup_switch_prob,
        settings.mix_off_epoch,
    )
