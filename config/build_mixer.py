"""From flags' values to the mixer of a run: the one importer of `smmix`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor

from config.mixing_flags import con_weight_of
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
from utils import InputError


@dataclass(frozen=True)
class MixingSettings:
    """The values of the mixing flags under the flags' own names; `config/mixing_flags.py` says what
    each is for."""

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
        """From parsed flags, of which others may be among them."""
        values: dict[str, Any] = {one.name: flags[one.name] for one in fields(cls)}
        values.update(
            {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        )
        return cls(**values)

    @property
    def arithmetic(self) -> Variant:
        """SMMix's arithmetic: that of `variant`, each part of it overridden where its own flag says
        so."""
        names = [one.name for one in fields(Variant)]
        return replace(
            VARIANTS[self.variant],
            **{name: getattr(self, name) for name in names if getattr(self, name)},
        )

    @property
    def has_con(self) -> bool:
        """Whether L_con is part of the loss."""
        return con_weight_of(self.mixer, self.con_weight) > 0

    @property
    def scheme(self) -> Scheme:
        return Scheme(
            self.source_region, self.target_region, "random" if self.score == "random" else "guide"
        )


@dataclass(frozen=True)
class MixerContext:
    """What a mixer has to know of model and data.

    Args:
        grid_size: the model's token grid (rows, columns).
        to_bytes: normalised images -> the pixels they were, uint8.
        teacher: clean images -> a frozen classifier's features (B, D, rows, columns), for
            AttentiveMix.
    """

    num_classes: int
    grid_size: tuple[int, int]
    to_bytes: Callable[[Tensor], Tensor]
    teacher: Callable[[Tensor], Tensor] | None = None


def _smmix(settings: MixingSettings, around: MixerContext) -> Mixer:
    try:
        return SMMix(
            around.num_classes,
            around.grid_size,
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


def _cutmix(settings: MixingSettings, around: MixerContext) -> Mixer:
    return CutMix(
        around.num_classes,
        settings.smoothing,
        settings.cutmix,
        settings.cutmix_minmax,
        settings.mixup_mode,
    )


def _mixup(settings: MixingSettings, around: MixerContext) -> Mixer:
    return Mixup(around.num_classes, settings.smoothing, settings.mixup, settings.mixup_mode)


def _none(settings: MixingSettings, around: MixerContext) -> Mixer:
    return NoMixing(around.num_classes, settings.smoothing)


def _resizemix(settings: MixingSettings, around: MixerContext) -> Mixer:
    return ResizeMix(
        around.num_classes,
        settings.smoothing,
        settings.resize_scope,
        settings.resize_placement,
        settings.mixup_mode,
    )


def _fmix(settings: MixingSettings, around: MixerContext) -> Mixer:
    (alpha,) = settings.mix_alpha or (1.0,)
    return FMix(
        around.num_classes, settings.smoothing, alpha, settings.fmix_decay, settings.mixup_mode
    )


def _attentivemix(settings: MixingSettings, around: MixerContext) -> Mixer:
    assert around.teacher is not None
    alphas = settings.mix_alpha or (2.0, 8.0)
    return AttentiveMix(
        around.num_classes,
        around.teacher,
        settings.smoothing,
        alphas[0],
        alphas[-1],
        settings.attentive_cells,
        settings.mixup_mode,
    )


def _saliencymix(settings: MixingSettings, around: MixerContext) -> Mixer:
    (alpha,) = settings.mix_alpha or (1.0,)
    return SaliencyMix(
        around.num_classes, around.to_bytes, settings.smoothing, alpha, settings.mixup_mode
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
    "transmix": _cutmix,  # CutMix's images; its labels come with `relabels`
}


def build_mixer(settings: MixingSettings, around: MixerContext) -> Switch:
    """The switch of a run: the named method, and Mixup where they share its steps, or its batches.

    Raises:
        InputError: the model's grid is too small for regions.
    """
    first = MIXERS[settings.mixer](settings, around)
    if settings.relabel == "transmix" or settings.mixer == "transmix":
        first = TransMix(first, around.grid_size, settings.relabel_ratio)
    if settings.has_con and settings.mixer != "smmix":
        rule, temperature = settings.arithmetic.consistency, settings.con_temperature
        first = Consistent(first, partial(mix_predictions, rule=rule, temperature=temperature))
    if settings.mix_protocol == "split":
        first = Split(first, _mixup(settings, around), settings.mixup_switch_prob)
    shares = (
        settings.mix_protocol == "switch"
        and settings.mixer not in ("mixup", "none")
        and settings.mixup > 0
    )
    return Switch(
        first,
        _mixup(settings, around) if shares else None,
        settings.mixup_prob,
        settings.mixup_switch_prob,
        settings.mix_off_epoch,
    )
