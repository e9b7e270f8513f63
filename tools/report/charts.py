"""Draws charts over epochs as SVG text: axes, ticks, lines and a legend.

The elements have class names only; the colours are in `tools/report/style.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from html import escape
from itertools import groupby
from typing import NamedTuple

from tools.report.page import Chart, Series

WIDTH, HEIGHT = 420, 250
# Margins for: the ticks of y, the last tick of x, the ticks and the title of x.
LEFT, RIGHT, BOTTOM = 58, 14, 38
LEGEND_LINE = 17  # pixels of one line of the legend
LETTER = 7.0  # pixels of one letter of the legend, roughly
COLORS = 8  # colours in the style sheet; further lines repeat them with other dashes
DASHES = ("", "7 3", "2 3", "9 3 2 3")
MAX_POINTS = 400  # longer lines are thinned out; their ends stay
LOG_FROM = 30.0  # the axis is logarithmic if largest / smallest value is above this


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`, in steps of 1, 2 or 5 times 10^n."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: at most about five powers of ten.

    A short axis also has 2 and 5 times each power.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / 5))
    digits = (1,) if last - first > 2 else (1, 2, 5)
    ticks = [digit * 10.0**power for power in range(first, last + 1, every) for digit in digits]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


def tick_text(value: float) -> str:
    """The number as a short text, the same on every machine."""
    return "0" if abs(value) < 1e-15 else f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e+")


def thin(points: list[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """At most `MAX_POINTS` points, evenly spread, with the first and the last."""
    if len(points) <= MAX_POINTS:
        return points
    last = len(points) - 1
    return [points[round(index * last / (MAX_POINTS - 1))] for index in range(MAX_POINTS)]


class Axis(NamedTuple):
    """One axis: values from `low` to `high` on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def pixel(self, value: float) -> float:
        scale: Callable[[float], float] = math.log10 if self.is_log else float
        low, high = scale(self.low), scale(self.high)
        return self.start + (scale(value) - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.is_log else nice_ticks(self.low, self.high)


def y_axis(values: list[float], top: float) -> Axis:
    """The vertical axis, a little longer than the range of the values.

    It is logarithmic if the values are positive and far apart.
    """
    low, high = min(values), max(values)
    bottom = HEIGHT - BOTTOM
    if low > 0 and high / low > LOG_FROM:
        return Axis(low / 1.15, high * 1.15, bottom, top, is_log=True)
    margin = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    return Axis(0.0 if 0 <= low < margin * 2 else low - margin, high + margin, bottom, top)


def draw(chart: Chart, name: str) -> str:
    """The chart as an `<svg>` element, or a paragraph if nothing is recorded.

    Args:
        name: a prefix for ids; no other chart on the page may have the same one.
    """
    series = [one for one in chart.series if any(y is not None for _, y in one.points)]
    if not series:
        return f'<p class="nothing">{escape(chart.title)}: nothing recorded</p>'
    entries, top = _legend(series)
    known = [(x, y) for one in series for x, y in one.points if y is not None]
    last = max(x for x, _ in known)
    across = Axis(min(1.0, *(x for x, _ in known)) if last > 1 else 0.0, last, LEFT, WIDTH - RIGHT)
    up = y_axis([y for _, y in known], top)
    title = f"{chart.title}, {chart.unit}" + (" (logarithmic)" if up.is_log else "")
    ends = "; ".join(f"{one.name} ends at {tick_text(_last_of(one))}" for one in series)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-labelledby="{name}t {name}d">',
        f'<title id="{name}t">{escape(title)}</title><desc id="{name}d">{escape(ends)}</desc>',
        *_axes(across, up),
        *(line for index, one in enumerate(series) for line in _line(one, index, across, up)),
        *entries,
        "</svg>",
    ]
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}</figure>"


def _last_of(series: Series) -> float:
    return [y for _, y in series.points if y is not None][-1]


def _style(index: int) -> str:
    """Class and dashes of the line with this index."""
    dash = DASHES[(index + index // COLORS) % len(DASHES)]
    return f'class="s{index % COLORS}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _legend(series: list[Series]) -> tuple[list[str], float]:
    """The elements of the legend, wrapped into lines, and the y at which the plot begins."""
    parts, x, y = [], float(LEFT), 12.0
    for index, one in enumerate(series):
        name = one.name if len(one.name) <= 40 else one.name[:39] + "…"
        width = 34 + LETTER * len(name) + 10
        if x > LEFT and x + width > WIDTH:
            x, y = float(LEFT), y + LEGEND_LINE
        parts.append(
            f'<line {_style(index)} x1="{x:.1f}" x2="{x + 26:.1f}" y1="{y - 4:.1f}" '
            f'y2="{y - 4:.1f}"/>'
        )
        parts.append(f'<text x="{x + 31:.1f}" y="{y:.1f}">{escape(name)}</text>')
        x += width
    return parts, y + 12


def _axes(across: Axis, up: Axis) -> Iterable[str]:
    for tick in up.ticks():
        y = up.pixel(tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{tick_text(tick)}</text>'
    bottom = HEIGHT - BOTTOM
    yield f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
    ticks = [across.low, *across.ticks(), across.high]
    epochs = sorted({round(tick) for tick in ticks if across.low <= round(tick)})
    last, gap = epochs[-1], 0.08 * (across.high - across.low)
    for epoch in epochs:
        if epoch == last or last - epoch >= gap:  # no tick too close to the last one
            x = across.pixel(epoch)
            yield f'<text class="middle" x="{x:.1f}" y="{bottom + 15}">{epoch}</text>'
    yield f'<text class="middle" x="{(LEFT + WIDTH - RIGHT) / 2:.1f}" y="{HEIGHT - 5}">epoch</text>'


def _line(series: Series, index: int, across: Axis, up: Axis) -> Iterable[str]:
    """One stroke for each part of a line without a gap; a dot if the part is a single point."""
    parts = groupby(thin(series.points), key=lambda point: point[1] is not None)
    for has_values, points in parts:
        if not has_values:
            continue
        pixels = [(across.pixel(x), up.pixel(y)) for x, y in points if y is not None]
        if len(pixels) == 1:
            x, y = pixels[0]
            yield f'<circle class="s{index % COLORS}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
        else:
            text = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
            yield f'<polyline {_style(index)} points="{text}"/>'
