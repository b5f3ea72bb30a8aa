"""The report's plots: each a matplotlib figure, drawn without a display."""

from __future__ import annotations

import io
from typing import Any

from tasks.evaluate.pareto import better_up, front, quality_of
from tasks.spec.rules import Measurement

MOST_SLICES = 60
# What quality is drawn over: by which factor, and how it is told.
COSTS = {
    "model_bytes": (1 / 1024, "model size (KiB)"),
    "p50_ms": (1.0, "median latency of one row (ms)"),
    "joules_per_1000": (1.0, "joules per thousand predictions"),
}
# As many colours come in turn, and so that both together stay distinct, not as many shapes.
MARKERS = "osD^vPX"


def png(figure: Any) -> bytes:
    """Return a figure as a PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def draw_pareto(rows: list[tuple[str, dict[str, float]]]) -> Any:
    """Draw accuracy, entity F1, RMSE or perplexity over model size, latency and energy, one point for each candidate;
    up (of errors down) and left is better. Those that no other beats in both are joined. Names stand in a legend:
    candidates that are alike lie on each other, and so would names beside them."""
    figure, scored = _figure(12.6, 4.2), quality_of(rows[0][1])
    sides = figure.subplots(1, len(COSTS), sharey=True)
    for axes, (metric, (scale, label)) in zip(sides, COSTS.items(), strict=True):
        points = [(name, scale * values[metric], values[scored]) for name, values in rows]
        in_front = front([(name, cost, better_up(scored) * quality) for name, cost, quality in points])
        best = sorted((cost, quality) for name, cost, quality in points if name in in_front)
        axes.plot(*zip(*best, strict=True), color="#8aa0b4", linewidth=1, zorder=1)
        for place, (name, cost, quality) in enumerate(points):
            look = ("*", 150, "black") if name == "champion" else (MARKERS[place % len(MARKERS)], 60, f"C{place}")
            marker, size, colour = look
            axes.scatter(cost, quality, s=size, marker=marker, color=colour, alpha=0.8, label=name, zorder=2)
        axes.set_xlim(0, 1.1 * max(cost for _, cost, _ in points))
        axes.margins(y=0.15)
        axes.locator_params(axis="x", nbins=5)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    sides[0].set(ylabel=f"{scored.replace('_f1', ' F1')} on the holdout")
    figure.legend(*sides[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    return figure


def draw_calibration(bins: list[tuple[float, float, int]]) -> Any:
    """Draw how often the top class is right over how sure the model is: on the diagonal both are the same."""
    figure = _figure(4.6, 4.0)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#8aa0b4", linestyle="--", linewidth=1)
    sure, right, rows = zip(*bins, strict=True)
    axes.plot(sure, right, color="#1f5f99", linewidth=1)
    axes.scatter(sure, right, s=[20 + 180 * n / sum(rows) for n in rows], color="#1f5f99")
    axes.set(xlim=(0, 1.03), ylim=(0, 1.03), xlabel="confidence", ylabel="share that is right", title="Calibration")
    axes.grid(alpha=0.3)
    return figure


def draw_numbers(true: Any, said: Any) -> Any:
    """Draw what was said over what is true, darker where more rows lie: on the diagonal both are the same; and how far
    answers are off."""
    figure = _figure(9.6, 4.0)
    left, right = figure.subplots(1, 2)
    left.hexbin(true, said, gridsize=30, bins="log", cmap="Blues", mincnt=1)
    ends = [min(true.min(), said.min()), max(true.max(), said.max())]
    left.plot(ends, ends, color="#8aa0b4", linestyle="--", linewidth=1)
    left.set(xlabel="true", ylabel="answered", title="Answers on the holdout")
    right.hist(said - true, bins=40, color="#1f5f99")
    right.axvline(0, color="#8aa0b4", linestyle="--", linewidth=1)
    right.set(xlabel="answered - true", ylabel="rows", title="Errors")
    return figure


def draw_texts(pieces: Any, mean: Any) -> Any:
    """Draw how likely texts are, by the mean log-probability of their pieces, and over how many pieces they have."""
    figure = _figure(9.6, 4.0)
    left, right = figure.subplots(1, 2)
    left.hist(mean, bins=40, color="#1f5f99")
    left.set(xlabel="mean log-probability of a piece (nats)", ylabel="texts", title="Texts of the holdout")
    right.hexbin(pieces, mean, gridsize=30, bins="log", cmap="Blues", mincnt=1)
    right.set(xlabel="pieces", ylabel="mean log-probability (nats)", title="By length")
    return figure


def draw_slices(measured: list[Measurement]) -> Any:
    """Draw each slice's value with its interval, worst first."""
    measured = sorted(measured, key=lambda m: -m.value)
    figure = _figure(7.0, 1.2 + 0.24 * len(measured))
    axes = figure.subplots()
    for place, m in enumerate(measured):
        low, high = m.low if m.low is not None else m.value, m.high if m.high is not None else m.value
        axes.plot([low, high], [place, place], color="#8aa0b4", linewidth=2)
        axes.plot(m.value, place, "o", color="#1f5f99", markersize=5)
    axes.set(yticks=range(len(measured)), yticklabels=[f"{m.slice} {m.metric} (n = {m.samples})" for m in measured])
    axes.tick_params(axis="y", labelsize=8)
    axes.set(title="By class, slice, group and perturbation, with 95 % intervals")
    axes.grid(alpha=0.3, axis="x")
    return figure


def draw_confusion(matrix: Any, classes: tuple[str, ...]) -> Any:
    """Draw the confusion matrix, shares of each true class as colour, counts as text."""
    import numpy as np

    k = len(classes)
    side = min(0.55 * k, 14.0)
    figure = _figure(max(4.0, side + 1.6), max(3.6, side + 1.2))
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xticks=range(k), yticks=range(k), xticklabels=classes, yticklabels=classes)
    axes.set(xlabel="predicted", ylabel="true", title="Confusion matrix of the holdout")
    if k <= 20:
        for (row, column), count in np.ndenumerate(matrix):
            colour = "white" if shares[row, column] > 0.5 else "black"
            if count:
                axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    else:
        axes.tick_params(labelsize=5)
        axes.tick_params(axis="x", rotation=90)
    return figure


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
