"""Small pictures as SVG text for a page: stacked histograms, a pair of shares, a map of missing values."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

# Told apart by people who see fewer colours too (Okabe and Ito 2008), then repeated paler.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6d31", "#6b6ecf", "#999999", "#f0c419")
WIDTH, HEIGHT, FOOT = 250, 96, 16


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def histogram(counts: Sequence[Sequence[int]], ends: tuple[str, str]) -> str:
    """Draw stacked bars: ``counts`` [classes][bins]; ``ends`` are written below the first and the last bin."""
    bins = len(counts[0]) if counts else 0
    highest = max((sum(column) for column in zip(*counts, strict=True)), default=0) or 1
    step, tall = WIDTH / max(bins, 1), HEIGHT - FOOT
    parts, tops = [], [float(tall)] * bins
    for index, row in enumerate(counts):
        for place, count in enumerate(row):
            if count:
                height = tall * count / highest
                tops[place] -= height
                parts.append(_box(place * step, tops[place], step - 1, height, colour(index)))
    parts += [_word(0, HEIGHT - 3, ends[0], "start"), _word(WIDTH, HEIGHT - 3, ends[1], "end")]
    return _svg(WIDTH, HEIGHT, parts)


def shares(before: Sequence[float], now: Sequence[float], names: Sequence[str]) -> str:
    """Draw two distributions over the same bins side by side: the older one grey, the newer one blue."""
    highest, step, tall = max([*before, *now], default=0) or 1, WIDTH / max(len(now), 1), HEIGHT - FOOT
    parts = []
    for place, (one, two) in enumerate(zip(before, now, strict=True)):
        for share, offset, fill in ((one, 0.0, "#b8c2cc"), (two, 0.45, COLOURS[0])):
            height = tall * share / highest
            if share:
                parts.append(_box(place * step + offset * step, tall - height, 0.43 * step, height, fill))
    if names:
        parts += [_word(0, HEIGHT - 3, names[0], "start"), _word(WIDTH, HEIGHT - 3, names[-1], "end")]
    return _svg(WIDTH, HEIGHT, parts)


def missing_map(rows: dict[str, Sequence[float]]) -> str:
    """Draw one line a column, from the first row to the last: pale where values are there, red where they lack."""
    label, line, width = 190, 15, 980
    parts = []
    for number, (name, ratios) in enumerate(rows.items()):
        top, step = number * line, (width - label) / max(len(ratios), 1)
        shown = name if len(name) <= 28 else name[:27] + "…"
        parts.append(_word(label - 8, top + 11, shown, "end"))
        parts.append(_box(label, top + 1, width - label, line - 3, "#e8eef4"))
        for place, ratio in enumerate(ratios):
            if ratio:
                opacity = f'fill-opacity="{0.25 + 0.75 * ratio:.2f}"'
                parts.append(_box(label + place * step, top + 1, step, line - 3, "#b42318", opacity))
    return _svg(width, max(len(rows), 1) * line, parts)


def meter(value: float, limit: float | None, highest: float = 1.0) -> str:
    """Draw a bar of 0 to ``highest`` with a mark at the limit; red beyond it."""
    wide, tall = 200, 14
    fill = "#b42318" if limit is not None and value > limit else COLOURS[0]
    parts = [_box(0, 3, wide, 8, "#e8eef4"), _box(0, 3, wide * min(value / highest, 1), 8, fill)]
    if limit is not None:
        parts.append(_box(wide * min(limit / highest, 1) - 1, 0, 2, tall, "#1c2530"))
    return _svg(wide, tall, parts)


def number(value: Any) -> str:
    """Return a number as a label: four digits, thousands parted."""
    if value is None:
        return "missing"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _svg(width: float, height: float, parts: list[str]) -> str:
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}>{"".join(parts)}</svg>'


def _box(x: float, y: float, width: float, height: float, fill: str, more: str = "") -> str:
    shape = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{max(height, 0.5):.1f}"'
    return f'<rect {shape} fill="{fill}" {more}/>'


def _word(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
