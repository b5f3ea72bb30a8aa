"""The evaluation report: one HTML file with its plots inside, and the first of them as a PNG."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from tasks.evaluate.plots import MOST_SLICES, draw_pareto, draw_slices, png
from tasks.spec.requests import EvaluateRequest, JudgeRequest, JudgeResult
from tasks.spec.rules import PAIRED, Measurement
from tasks.store.files import write_whole
from tasks.store.room import open_room

FOLDER = Path(__file__).parent
COLUMNS = (
    "accuracy", "macro_f1", "entity_f1", "rmse", "mae", "perplexity", "bits_per_character", "ndcg_at_10", "auroc",
    "calibration_error", "p50_ms", "p99_ms", "rows_per_second", "model_bytes", "memory_bytes", "joules_per_1000",
    "cost_per_million",
)  # fmt: skip
BY_SLICE = {"accuracy", "recall", "rmse", "perplexity"}


def write_report(
    room: Path,
    request: EvaluateRequest,
    variant: str,
    measured: tuple[Measurement, ...],
    pictures: dict[str, Any],
) -> None:
    """Write ``report.html`` with its pictures (figures by name) inside, and each beside it as a PNG."""
    slices = [m for m in measured if m.slice != "overall"]
    if drawn := [m for m in slices if m.metric in BY_SLICE][:MOST_SLICES]:
        pictures = pictures | {"slices": draw_slices(drawn)}
    for name, figure in pictures.items():
        write_whole(room / f"{name}.png", png(figure))
    html = render(
        "report.html.j2",
        workload=request.workload,
        variant=variant,
        digest=request.package_sha256,
        overall=[m for m in measured if m.slice == "overall"],
        slices=slices,
        pictures={name: embedded(room / f"{name}.png") for name in pictures},
    )
    write_whole(room / "report.html", html)


def write_comparison(
    room: Path,
    request: JudgeRequest,
    result: JudgeResult,
    measured: dict[str, tuple[Measurement, ...]],
    champion: tuple[Measurement, ...] | None,
) -> None:
    """Write ``report.html``: every candidate beside the champion, why each was taken or not, the rules' answers, the
    Pareto picture, which lies beside it as ``pareto.png``, and the pictures of the candidate that was taken."""
    rows = [(c.variant, _overall(measured[c.package_sha256])) for c in request.candidates]
    if champion is not None:
        rows.append(("champion", _overall(champion)))
    write_whole(room / "pareto.png", png(draw_pareto(rows)))
    html = render(
        "comparison.html.j2",
        request=request,
        result=result,
        rows=rows,
        columns=COLUMNS,
        paired={c.variant: _paired(measured[c.package_sha256]) for c in request.candidates},
        pareto=embedded(room / "pareto.png"),
        pictures={path.stem: embedded(path) for path in _pictures(result)},
    )
    write_whole(room / "report.html", html)


def embedded(path: Path) -> str:
    """Return a picture as base64, to stand in a page."""
    return base64.b64encode(path.read_bytes()).decode()


def _pictures(result: JudgeResult) -> list[Path]:
    """Those that the evaluation of the candidate that was taken has left."""
    return sorted(open_room(result.chosen.evaluation).glob("*.png")) if result.chosen else []


def _paired(measured: tuple[Measurement, ...]) -> list[Measurement]:
    return [m for m in measured if m.metric in (*PAIRED, "agreement")]


def render(template: str, **facts: Any) -> str:
    """Render one of this folder's HTML templates; every value is escaped, a missing one is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(FOLDER)
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["number"] = number
    return environment.get_template(template).render(facts)


def number(value: float) -> str:
    """A figure of four digits; a large one whole, in groups of three."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _overall(measured: tuple[Measurement, ...]) -> dict[str, float]:
    return {m.metric: m.value for m in measured if m.slice == "overall"}
