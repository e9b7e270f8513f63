"""Lines over epochs as SVG text: axes, ticks, a legend, colours that the page chooses.

Level 1: knows numbers and names only. No scripts, no styles of its own beyond class names, nothing
from elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from html import escape
from itertools import groupby
from typing import NamedTuple

from tools.report.records import Chart, Series

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, BOTTOM = (
    58,
    14,
    38,
)  # room for the ticks of y, the last tick of x, the ticks and title of x
LEGEND_LINE, LETTER = 17, 7.0  # pixels of a line of the legend, and of a letter in it, about
COLORS = 8  # that the page has; further lines repeat them with other dashes
DASHES = ("", "7 3", "2 3", "9 3 2 3")
MOST_POINTS = 400  # of a line; longer ones are thinned out, their ends kept
LOG_FROM = 30.0  # ratio of the largest to the smallest value from which on the axis is logarithmic


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `count`: steps of 1, 2 or 5 times a power of
    ten."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from `low` to `high`, some left out where there are many; 1, 2, 5 where there
    are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / 5))
    digits = (1,) if last - first > 2 else (1, 2, 5)
    ticks = [digit * 10.0**power for power in range(first, last + 1, every) for digit in digits]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


def tick_text(value: float) -> str:
    """Short, and the same on every machine."""
    return "0" if abs(value) < 1e-15 else f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e+")


def thin(points: list[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """At most `MOST_POINTS` of the points, evenly spread, first and last among them."""
    if len(points) <= MOST_POINTS:
        return points
    last = len(points) - 1
    return [points[round(place * last / (MOST_POINTS - 1))] for place in range(MOST_POINTS)]


class Axis(NamedTuple):
    """One direction: values from `low` to `high` on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        scale: Callable[[float], float] = math.log10 if self.is_log else float
        low, high = scale(self.low), scale(self.high)
        return self.start + (scale(value) - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.is_log else nice_ticks(self.low, self.high)


def y_axis(values: list[float], top: float) -> Axis:
    """The axis of values: logarithmic where they are positive and far apart, else a little wider
    than they are."""
    low, high = min(values), max(values)
    bottom = HEIGHT - BOTTOM
    if low > 0 and high / low > LOG_FROM:
        return Axis(low / 1.15, high * 1.15, bottom, top, is_log=True)
    room = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    return Axis(0.0 if 0 <= low < room * 2 else low - room, high + room, bottom, top)


def draw(chart: Chart, number: str) -> str:
    """The chart as an `<svg>` element, or a paragraph that says that there is nothing to draw.

    Args:
        number: unlike any other chart's on the page.
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
    said = "; ".join(f"{one.name} ends at {tick_text(_last_of(one))}" for one in series)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{number}t '
        f'{number}d">',
        f'<title id="{number}t">{escape(title)}</title><desc id="{number}d">{escape(said)}</desc>',
        *_axes(across, up),
        *(line for place, one in enumerate(series) for line in _line(one, place, across, up)),
        *entries,
        "</svg>",
    ]
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}</figure>"


def _last_of(series: Series) -> float:
    return [y for _, y in series.points if y is not None][-1]


def _style(place: int) -> str:
    dash = DASHES[(place + place // COLORS) % len(DASHES)]
    return f'class="s{place % COLORS}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _legend(series: list[Series]) -> tuple[list[str], float]:
    """The names with their strokes, in lines as they fit, and where the plot may begin below."""
    parts, x, y = [], float(LEFT), 12.0
    for place, one in enumerate(series):
        name = one.name if len(one.name) <= 40 else one.name[:39] + "…"
        width = 34 + LETTER * len(name) + 10
        if x > LEFT and x + width > WIDTH:
            x, y = float(LEFT), y + LEGEND_LINE
        parts.append(
            f'<line {_style(place)} x1="{x:.1f}" x2="{x + 26:.1f}" y1="{y - 4:.1f}" '
            f'y2="{y - 4:.1f}"/>'
        )
        parts.append(f'<text x="{x + 31:.1f}" y="{y:.1f}">{escape(name)}</text>')
        x += width
    return parts, y + 12


def _axes(across: Axis, up: Axis) -> Iterable[str]:
    for tick in up.ticks():
        y = up.place(tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{tick_text(tick)}</text>'
    bottom = HEIGHT - BOTTOM
    yield f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
    whole = sorted(
        {
            round(tick)
            for tick in [across.low, *across.ticks(), across.high]
            if across.low <= round(tick)
        }
    )
    shown = [
        tick
        for tick in whole
        if tick == whole[-1] or (whole[-1] - tick) >= 0.08 * (across.high - across.low)
    ]
    for tick in shown:
        yield f'<text class="middle" x="{across.place(tick):.1f}" y="{bottom + 15}">{tick}</text>'
    yield f'<text class="middle" x="{(LEFT + WIDTH - RIGHT) / 2:.1f}" y="{HEIGHT - 5}">epoch</text>'


def _line(series: Series, place: int, across: Axis, up: Axis) -> Iterable[str]:
    """Strokes between neighbouring points that are there, a dot where one stands alone."""
    for there, points in groupby(thin(series.points), key=lambda point: point[1] is not None):
        if not there:
            continue
        places = [(across.place(x), up.place(y)) for x, y in points if y is not None]
        if len(places) == 1:
            x, y = places[0]
            yield f'<circle class="s{place % COLORS}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
        else:
            text = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            yield f'<polyline {_style(place)} points="{text}"/>'
