"""The evaluation report: one HTML file with its plots inside, and the confusion matrix as a PNG."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from tasks.spec.requests import EvaluateRequest, JudgeRequest, JudgeResult
from tasks.spec.rules import Measurement
from tasks.store.files import write_whole

FOLDER = Path(__file__).parent
COLUMNS = ("accuracy", "macro_f1", "calibration_error", "p50_ms", "p99_ms", "model_bytes")


def write_report(
    room: Path, request: EvaluateRequest, variant: str, measured: tuple[Measurement, ...], matrix: Any
) -> None:
    """Write ``report.html`` and ``confusion.png``. ``matrix`` int [K, K]: rows true, columns predicted."""
    plot_confusion(matrix, request.label.names, room / "confusion.png")
    html = render(
        "report.html.j2",
        workload=request.workload,
        variant=variant,
        digest=request.package_sha256,
        overall=[m for m in measured if m.slice == "overall"],
        slices=[m for m in measured if m.slice != "overall"],
        confusion=base64.b64encode((room / "confusion.png").read_bytes()).decode(),
    )
    write_whole(room / "report.html", html)


def write_comparison(
    room: Path,
    request: JudgeRequest,
    result: JudgeResult,
    measured: dict[str, tuple[Measurement, ...]],
    champion: tuple[Measurement, ...] | None,
) -> None:
    """Write ``report.html``: every candidate beside the champion, the rules' answers, and the Pareto picture."""
    rows = [(c.variant, _overall(measured[c.package_sha256])) for c in request.candidates]
    if champion is not None:
        rows.append(("champion", _overall(champion)))
    plot_pareto(rows, room / "pareto.png")
    html = render(
        "comparison.html.j2",
        request=request,
        result=result,
        rows=rows,
        columns=COLUMNS,
        pareto=base64.b64encode((room / "pareto.png").read_bytes()).decode(),
    )
    write_whole(room / "report.html", html)


def render(template: str, **facts: Any) -> str:
    """Render one of this folder's HTML templates; every value is escaped, a missing one is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(FOLDER)
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    return environment.get_template(template).render(facts)


def _overall(measured: tuple[Measurement, ...]) -> dict[str, float]:
    return {m.metric: m.value for m in measured if m.slice == "overall"}


def plot_pareto(rows: list[tuple[str, dict[str, float]]], path: Path) -> None:
    """Draw accuracy over model size, one point for each candidate; up and left is better."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, values in rows:
        size = values["model_bytes"] / 1024
        axes.scatter(size, values["accuracy"], s=60, marker="*" if name == "champion" else "o", label=name)
        label = f"{name}, p50 {values['p50_ms']:.3f} ms"
        axes.annotate(label, (size, values["accuracy"]), textcoords="offset points", xytext=(8, 6), fontsize=9)
    axes.set_xlim(0, 1.45 * max(values["model_bytes"] for _, values in rows) / 1024)
    axes.margins(y=0.4)
    axes.set(xlabel="model size (KiB)", ylabel="accuracy on the holdout", title="Quality against size")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def plot_confusion(matrix: Any, classes: tuple[str, ...], path: Path) -> None:
    """Draw the confusion matrix, shares of each true class as colour, counts as text."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    k = len(classes)
    figure = Figure(figsize=(max(4.0, 0.55 * k + 1.6), max(3.6, 0.55 * k + 1.2)), layout="constrained")
    FigureCanvasAgg(figure)
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
    figure.savefig(path, dpi=110)
