"""Measure one package on the holdout: quality overall, by class and slice with intervals; latency, memory, energy."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from tasks.evaluate.answers import Answers, answers_of, ask
from tasks.evaluate.energy import energy
from tasks.evaluate.footprint import open_measured
from tasks.evaluate.robust import measure_robustness
from tasks.evaluate.slices import measure_slices
from tasks.serve.package import Package
from tasks.spec.errors import BadRequest
from tasks.spec.metrics import declared, perturbations
from tasks.spec.requests import EvaluateRequest, EvaluateResult
from tasks.spec.rules import Measurement
from tasks.store.files import write_json
from tasks.store.room import open_room
from tasks.train.prepare import read_split

LATENCY_CALLS = 200
LATENCY_WARM_UP = 20
ENERGY_CALLS = 100
SERVED_BATCH_ROWS, THROUGHPUT_SECONDS = 64, 0.1


def evaluate(request: EvaluateRequest, room: Path) -> EvaluateResult:
    """Write measurements, predictions and the report into ``room``.

    Raises:
        IntegrityLost: the package is not the one that was asked for.
        BadRequest: the holdout is empty.
    """
    package, opened = open_measured(Path(request.package_uri), request.package_sha256)
    data = open_room(request.dataset) / "data.parquet"
    rows, true = read_split(data, package.signature.feature, request.label, "holdout")
    if not len(rows):
        raise BadRequest(f"{request.workload}: the holdout has no rows; raise data.split.holdout or bring more data")
    said = ask(package, rows, request.label.names)
    feature, tokenizer = package.signature.feature, package.tokenizer
    answers = answers_of(feature, request.label, request.evaluate, rows, true, said, tokenizer)
    measured = declared((*_measure(package, request, rows, answers), *opened))
    write_json(room / "measurements.json", [m.model_dump(mode="json") for m in measured])
    _write_predictions(room / "predictions.parquet", data, answers)
    _write_report(room, request, package, measured, answers)
    return _result(request, measured)


def _measure(package: Package, request: EvaluateRequest, rows: Any, answers: Answers) -> tuple[Measurement, ...]:
    data = Path(request.dataset.uri) / "data.parquet"
    changes = perturbations(package.signature.feature, request.label, request.evaluate)
    return (
        *answers.measure(),
        *measure_slices(request.evaluate, data, answers),
        *measure_robustness(package, rows, answers, changes),
        *latency(package, rows),
        throughput(package, rows),
        *energy(lambda: package.predict(rows[:1]), ENERGY_CALLS, request.core_watts, request.price_per_kwh),
        Measurement(metric="model_bytes", value=(package.folder / "model.onnx").stat().st_size, samples=1),
    )


def throughput(package: Package, rows: Any) -> Measurement:
    """Rows a second in batches as the server makes them, one thread."""
    batch, rounds, started = rows[:SERVED_BATCH_ROWS], 0, time.perf_counter()
    while rounds < 3 or time.perf_counter() - started < THROUGHPUT_SECONDS:
        package.predict(batch)
        rounds += 1
    rate = rounds * len(batch) / (time.perf_counter() - started)
    return Measurement(metric="rows_per_second", value=rate, samples=rounds)


def latency(package: Package, rows: Any) -> tuple[Measurement, ...]:
    """Time single-row predictions of the package, encoding included, in milliseconds."""
    calls = min(LATENCY_CALLS, 20 * len(rows))
    times = []
    for call in range(calls + LATENCY_WARM_UP):
        row = rows[call % len(rows) : call % len(rows) + 1]
        started = time.perf_counter()
        package.predict(row)
        times.append(1e3 * (time.perf_counter() - started))
    p50, p99 = np.quantile(times[LATENCY_WARM_UP:], [0.5, 0.99])
    return (
        Measurement(metric="p50_ms", value=float(p50), samples=calls),
        Measurement(metric="p99_ms", value=float(p99), samples=calls),
    )


def _write_predictions(path: Path, data: Path, answers: Answers) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = pq.read_table(data, columns=["row_id"], filters=[("split", "==", "holdout")]).column("row_id")
    pq.write_table(pa.table({"row_id": ids, **answers.columns()}), path)


def _write_report(
    room: Path, request: EvaluateRequest, package: Package, measured: tuple[Measurement, ...], answers: Answers
) -> None:
    from tasks.evaluate.metrics import calibration, confusion
    from tasks.evaluate.plots import draw_calibration, draw_confusion, draw_numbers, draw_texts
    from tasks.evaluate.report import write_report

    true, p = answers.flat
    if request.label.kind == "number":
        pictures = {"numbers": draw_numbers(true, p)}
    elif request.label.kind == "next":
        pictures = {"texts": draw_texts(true, p)}
    else:
        matrix = confusion(true, p.argmax(axis=1), len(request.label.names))
        pictures = {"confusion": draw_confusion(matrix, request.label.names)}
        pictures["calibration"] = draw_calibration(calibration(true, p))
    write_report(room, request, package.signature.variant, measured, pictures)


def _result(request: EvaluateRequest, measured: tuple[Measurement, ...]) -> EvaluateResult:
    value = {m.metric: m.value for m in measured if m.slice == "overall"}
    return EvaluateResult(
        package_sha256=request.package_sha256,
        **{name: value.get(name) for name in ("accuracy", "macro_f1", "entity_f1", "rmse", "perplexity")},
        p50_ms=value["p50_ms"],
        p99_ms=value["p99_ms"],
        model_bytes=int(value["model_bytes"]),
        samples=next(m.samples for m in measured if m.metric in ("accuracy", "rmse", "perplexity")),
    )
