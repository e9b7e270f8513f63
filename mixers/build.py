"""From flags' values to the mixer of a run: the one importer of `smmix`."""

from __future__ import annotations

from collections.abc import Callable

from mixers.cutmix import CutMix
from mixers.interface import Mixer, NoMixing
from mixers.mixup import Mixup
from mixers.switch import Switch
from smmix import SMMix, Variant
from utils import InputError

MIXERS = ("smmix", "cutmix", "mixup", "none")


def build_mixer(
    name: str,
    num_classes: int,
    grid_size: tuple[int, int],
    *,
    smoothing: float,
    variant: Variant,
    side_ratio: tuple[float, float],
    mixup_alpha: float,
    cutmix_alpha: float,
    cutmix_minmax: tuple[float, float] | None,
    mixup_prob: float,
    switch_prob: float,
    mode: str,
) -> Switch:
    """The switch of a run. `smmix` and `cutmix` share their steps with Mixup as in DeiT, unless `mixup_alpha` is 0.

    Args:
        grid_size: the model's token grid.
        mixup_prob: share of batches that are mixed at all.
        switch_prob: share of mixed batches that the named method gets; Mixup gets the rest.
        mode: Mixup's and CutMix's draws per batch, pair or image.

    Raises:
        InputError: the model's grid is too small for regions.
    """

    def smmix() -> Mixer:
        try:
            return SMMix(num_classes, grid_size, smoothing, side_ratio, variant)
        except ValueError as error:
            raise InputError(f"--mixer smmix: {error}; use a larger --input-size or a smaller --patch-size") from error

    def mixup() -> Mixer:
        return Mixup(num_classes, smoothing, mixup_alpha, mode)

    makers: dict[str, Callable[[], Mixer]] = {
        "smmix": smmix,
        "cutmix": lambda: CutMix(num_classes, smoothing, cutmix_alpha, cutmix_minmax, mode),
        "mixup": mixup,
        "none": lambda: NoMixing(num_classes, smoothing),
    }
    second = mixup() if name in ("smmix", "cutmix") and mixup_alpha > 0 else None
    return Switch(makers[name](), second, mixup_prob, switch_prob)
