"""Means of named values over an epoch. Their sums stay on the device until they are read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from utils import Processes

Number = float | Tensor


class _Sums:
    """The weighted sum and the weight of one name, as two pairs: `past` and `recent`.

    `recent` holds the updates since `fold` was called, `past` those before. A difference of two
    totals would not do: in float32 (MPS) it loses digits when the total is large.
    """

    def __init__(self) -> None:
        self.past: list[Number] = [0.0, 0.0]
        self.recent: list[Number] = [0.0, 0.0]

    def add(self, value: Number, weight: Number) -> None:
        total, total_weight = self.recent
        value, weight = _wide(value), _wide(weight)
        if isinstance(value, Tensor):  # a value of a skipped step has no weight
            finite = value.isfinite()
            value, weight = torch.where(finite, value, 0.0), weight * finite
        self.recent = [value * weight + total, weight + total_weight]

    def fold(self) -> None:
        self.past = self.both()
        self.recent = [0.0, 0.0]

    def both(self) -> list[Number]:
        return [past + recent for past, recent in zip(self.past, self.recent, strict=True)]


class Meters:
    """Weighted means of named scalars. Updating never waits for the device; reading waits once.

    A name may be absent from some updates; its mean is over the updates that have it. A tensor that
    is not finite is not counted. A name whose weights sum to 0 has the mean NaN.
    """

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}

    def update(self, weight: Number = 1, **scalars: Number) -> None:
        """Adds one value per name with this weight, such as the number of samples of a mean."""
        for name, value in scalars.items():
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(
                    f"meter {name}: a scalar is needed, not shape {tuple(value.shape)}"
                )
            self._sums.setdefault(name, _Sums()).add(value, weight)

    def read(self) -> dict[str, float]:
        """The means of all updates. One transfer from the device."""
        return self._means([sums.both() for sums in self._sums.values()])

    def recent(self) -> dict[str, float]:
        """The means of the updates since the last call. One transfer from the device.

        Names without an update since then are left out.
        """
        means = self._means([sums.recent for sums in self._sums.values()])
        fresh = {
            name
            for name, sums in self._sums.items()
            if isinstance(sums.recent[1], Tensor) or sums.recent[1]
        }
        for sums in self._sums.values():
            sums.fold()
        return {name: mean for name, mean in means.items() if name in fresh}

    def _means(self, pairs: list[list[Number]]) -> dict[str, float]:
        numbers = _to_host([number for pair in pairs for number in pair])
        totals, weights = numbers[::2], numbers[1::2]
        means = (
            total / weight if weight else math.nan
            for total, weight in zip(totals, weights, strict=True)
        )
        return dict(zip(self._sums, means, strict=True))

    def state(self) -> dict[str, list[float]]:
        """All sums as plain numbers, for a checkpoint. One transfer from the device.

        Each name has four: total and weight of `_Sums.past`, total and weight of `_Sums.recent`.
        """
        held = [number for sums in self._sums.values() for number in [*sums.past, *sums.recent]]
        numbers = iter(_to_host(held))
        return {name: [next(numbers) for _ in range(4)] for name in self._sums}

    @classmethod
    def from_state(cls, state: dict[str, list[float]]) -> Meters:
        """Meters with the sums of `state`, as if the run had not been interrupted."""
        meters = cls()
        for name, numbers in state.items():
            sums = meters._sums.setdefault(name, _Sums())
            sums.past, sums.recent = list(numbers[:2]), list(numbers[2:])
        return meters

    def copy(self) -> Meters:
        """A copy, which can be reduced or read without a change to this object."""
        other = Meters()
        for name, sums in self._sums.items():
            kept = other._sums.setdefault(name, _Sums())
            kept.past, kept.recent = list(sums.past), list(sums.recent)
        return other

    def reduce(self, processes: Processes) -> Meters:
        """Replaces the sums by those over all ranks, and returns this object.

        All ranks call it together, once. Ranks may have different names: first their union is
        gathered, then one all-reduce adds all numbers.
        """
        if processes.world_size == 1:
            return self
        all_names = processes.gather(list(self._sums))
        names = sorted({name for of_one_rank in all_names for name in of_one_rank})
        pairs = [self._sums.setdefault(name, _Sums()).both() for name in names]
        numbers = [_on(number, processes.device) for pair in pairs for number in pair]
        if not names:
            return self
        for name, pair in zip(names, processes.sum(torch.stack(numbers)).view(-1, 2), strict=True):
            self._sums[name].past, self._sums[name].recent = list(pair), [0.0, 0.0]
        return self


def _dtype_on(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def _on(value: Number, device: torch.device) -> Tensor:
    return torch.as_tensor(value, dtype=_dtype_on(device), device=device)


def _wide(value: Number) -> Number:
    """A tensor as a detached 0-dim tensor of its device's widest dtype; a number as a float."""
    if not isinstance(value, Tensor):
        return float(value)
    return value.detach().reshape(()).to(_dtype_on(value.device))


def _to_host(values: list[Number]) -> list[float]:
    """The values as Python floats. All tensors are copied in one transfer."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return [float(value) for value in values]
    other_devices = (tensor.device for tensor in tensors if tensor.device.type != "cpu")
    device = next(other_devices, tensors[0].device)
    read = iter(torch.stack([_on(tensor, device) for tensor in tensors]).tolist())
    return [next(read) if isinstance(value, Tensor) else float(value) for value in values]
