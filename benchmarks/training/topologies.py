"""Trainings to time: one case under a way to share it among ranks, and a bare loop of the same network."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.spec.requests import TrainRequest
from tasks.store.room import Room
from tasks.train import fit as fitting
from tasks.train.fit import fit

BARE = "bare"
# Long enough that an epoch's end and the first steps are a small part.
EPOCHS = 3


class Case(NamedTuple):
    name: str
    rows: int
    train: dict[str, Any]
    feature: dict[str, Any]
    of_ceiling: float | None


MLP = {"kind": "mlp", "hidden": [512, 256, 128], "dropout": 0.0}
ENCODER = {"kind": "transformer", "width": 384, "heads": 6, "layers": 5, "feedforward": 1536, "dropout": 0.0}
CASES = (
    Case("MLP", 40_960, {"recipe": MLP, "batch_size": 256}, {"kind": "image", "height": 28, "width": 28}, None),
    Case("encoder of 10 M", 480, {"recipe": ENCODER, "batch_size": 16},
         {"kind": "text", "max_tokens": 64, "vocabulary": 4000}, 0.92),
)  # fmt: skip


def request_of(case: Case, way: dict[str, Any], base: Path) -> TrainRequest:
    """Draw the rows; return the request to train on them."""
    room, draw = Room(base, "dataset"), np.random.default_rng(0)
    split = ["validation" if i % 20 == 0 else "train" for i in range(case.rows)]
    if case.feature["kind"] == "image":
        flat = pa.array(draw.integers(0, 256, case.rows * 784).astype(np.uint8))
        columns = {"pixels": pa.FixedSizeListArray.from_arrays(flat, 784)}
    else:
        words = [f"w{n}" for n in range(2000)]
        columns = {"text": [" ".join(draw.choice(words, 90)) for _ in range(case.rows)]}
    label = draw.integers(0, 10, case.rows).astype(str).tolist()
    pq.write_table(pa.table({**columns, "label": label, "split": split}), room.begin() / "data.parquet")
    stopping = {"max_epochs": EPOCHS, "patience_epochs": EPOCHS}
    asked = {
        "workload": "bench", "dataset": room.publish({}).model_dump(), "revision": "bench-000000000000",
        "feature": case.feature, "label": {"classes": list(range(10))},
        "train": case.train | way | {"stopping": stopping},
    }  # fmt: skip
    return TrainRequest.parse(asked, case.name)


def rows_per_second(case: Case, way: dict[str, Any], base: Path) -> tuple[float, float]:
    """Train; return rows a second and processor by wall time of all epochs but the first, validation included."""
    base.mkdir()
    fit(request_of(case, way, base), base / "trained", None, lambda line: None)
    lines = [json.loads(line) for line in (base / "trained" / "history.jsonl").read_text().splitlines()][1:]
    busy = sum(line["cpu_busy_ratio"] for line in lines) / len(lines)
    return sum(line["samples_per_second"] for line in lines) / len(lines), busy


def unexchanged(case: Case, base: Path) -> float:
    """Rows a second of two ranks that train side by side and exchange nothing: two trainings of one rank at once, each
    with half of every batch."""
    half = case._replace(rows=case.rows // 2, train=case.train | {"batch_size": case.train["batch_size"] // 2})
    context = multiprocessing.get_context("spawn")
    base.mkdir()
    with context.Pool(2) as pool:
        rates = pool.starmap(rows_per_second, [(half, {"ranks": 1}, base / name) for name in ("a", "b")])
    return sum(rate for rate, _ in rates)


def bare_rows_per_second(case: Case) -> float:
    """The reference: the loop that one would write by hand, in a process of its own with the ranks' environment."""
    import os
    from unittest.mock import patch

    context = multiprocessing.get_context("spawn")
    with patch.dict(os.environ, fitting.RANK_ENVIRONMENT), context.Pool(1) as pool:
        return pool.apply(_bare, (case,))


def _bare(case: Case) -> float:
    import torch
    from pydantic import TypeAdapter

    from tasks.spec.feature import Feature
    from tasks.spec.train import Train
    from tasks.train.recipes import build

    torch.set_num_threads(1)
    feature = TypeAdapter(Feature).validate_python(case.feature)
    train = Train.parse(case.train | {"ranks": 1}, case.name)
    network = build(train.recipe, feature, 10, None, Path())
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    rows = case.rows - case.rows // 20
    image = feature.kind == "image"
    x = torch.rand(rows, 784) if image else torch.randint(1, 300, (rows, 64))
    y, rates = torch.randint(0, 10, (rows,)), []
    held_x, held_y = x[: case.rows // 20], y[: case.rows // 20]
    for _ in range(EPOCHS):
        started, order = time.monotonic(), torch.randperm(rows)
        network.train()
        for start in range(0, rows - train.batch_size + 1, train.batch_size):
            share = order[start : start + train.batch_size]
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(network(x[share]), y[share]).backward()
            optimiser.step()
        network.eval()
        with torch.no_grad():
            for start in range(0, len(held_x), 1024):
                torch.nn.functional.cross_entropy(network(held_x[start : start + 1024]), held_y[start : start + 1024])
        rates.append((rows - rows % train.batch_size) / (time.monotonic() - started))
    return sum(rates[1:]) / len(rates[1:])
