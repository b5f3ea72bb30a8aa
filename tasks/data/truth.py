"""The label column made of several annotators' columns, as cleaning begins, and what is told of it.

    annotators.json        agreement, truth, and of each annotator how many labels and how often the truth found
    disputed.parquet       rows in doubt, the least certain first: row_id, said, certainty
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.data.annotators import Truth, agreement, dawid_skene, majority
from tasks.data.engine import SCRATCH
from tasks.data.rawrows import RawRows
from tasks.data.table import read_table, write_table
from tasks.spec.errors import BadRequest
from tasks.spec.rules import Measurement
from tasks.store.files import write_json

if TYPE_CHECKING:
    import numpy as np

    from tasks.spec.requests import CleanRequest

FILE, DISPUTED = "annotators.json", "disputed.parquet"


class Annotations(NamedTuple):
    """What a cleaned room tells of its annotators; empty where there are none."""

    facts: dict[str, Any] | None
    measurements: tuple[Measurement, ...]
    disputed: list[dict[str, Any]]


def inferred(request: CleanRequest, raw: RawRows, base: Path, room: Path) -> Path:
    """Return the file that the engine reads: where there are annotators, with a label column, as they mean it.

    Raises:
        BadRequest: nobody labelled anything.
    """
    if request.label.annotators is None:
        return base
    columns = request.label.annotators.columns
    given = _codes(raw, columns, request.label.names)
    if not (given >= 0).any():
        found = f"columns {', '.join(columns)} name no class of data.label.classes"
        raise BadRequest(f"{request.workload}: label.annotators: {found}; correct one of the two")
    infer = {"dawid-skene": dawid_skene, "majority": majority}[request.label.annotators.truth]
    truth = infer(given, len(request.label.names))
    _tell(request, given, truth, room)
    return _with_label(request, RawRows(base), truth, room)


def annotations(room: Path) -> Annotations:
    """Return what a cleaned room tells of its annotators."""
    if not (room / FILE).is_file():
        return Annotations(None, (), [])
    facts = json.loads((room / FILE).read_text())
    measured = []
    if facts["agreement"] is not None:
        measured.append(Measurement(metric="annotator_agreement", value=facts["agreement"], samples=facts["rows"]))
    return Annotations(facts, tuple(measured), read_table(room / DISPUTED).to_pylist())


def _codes(raw: RawRows, columns: tuple[str, ...], names: tuple[str, ...]) -> np.ndarray:
    """The class of each annotator's label, int64 [B, A]; -1 where there is none, or none that is known."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    classes, parts = pa.array(names, pa.string()), []
    for start, stop in raw.chunks():
        table = raw.read(start, stop, list(columns))
        found = [pc.index_in(pc.utf8_trim_whitespace(table.column(name)), value_set=classes) for name in columns]
        parts.append(np.column_stack([np.asarray(pc.fill_null(one, -1), dtype=np.int64) for one in found]))
    return np.concatenate(parts)


def _with_label(request: CleanRequest, base: RawRows, truth: Truth, room: Path) -> Path:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path = room / SCRATCH / "labelled.parquet"
    path.parent.mkdir(exist_ok=True)
    names = pa.array(request.label.names, pa.string())
    schema = base.schema.append(pa.field(request.label.column, pa.string()))
    with pq.ParquetWriter(path, schema) as writer:
        for start, stop in base.chunks():
            codes = pa.array(truth.codes[start:stop])
            labels = names.take(pc.if_else(pc.greater_equal(codes, 0), codes, None))
            writer.write_table(base.read(start, stop).append_column(schema.field(request.label.column), labels))
    return path


def _tell(request: CleanRequest, given: np.ndarray, truth: Truth, room: Path) -> None:
    import numpy as np
    import pyarrow as pa

    asked = request.label.annotators
    assert asked is not None
    several = (given >= 0).sum(axis=1) > 1
    doubted = np.flatnonzero(several & (truth.certainty < asked.min_certainty))
    doubted = doubted[np.argsort(truth.certainty[doubted], kind="stable")]
    people = [
        {"name": name, "labels": int((given[:, place] >= 0).sum()), "accuracy": round(float(truth.accuracy[place]), 4)}
        for place, name in enumerate(asked.columns)
    ]
    alpha = agreement(given, len(request.label.names))
    facts = {"agreement": alpha, "rows": int(several.sum()), "truth": asked.truth, "disputed": len(doubted)}
    write_json(room / FILE, facts | {"people": people})
    names = request.label.names
    said = [
        ", ".join(f"{who} {names[code]}" for who, code in zip(asked.columns, given[row], strict=True) if code >= 0)
        for row in doubted
    ]
    columns = {"row_id": [str(row) for row in doubted], "said": said, "certainty": truth.certainty[doubted].tolist()}
    schema = pa.schema([("row_id", pa.string()), ("said", pa.string()), ("certainty", pa.float64())])
    write_table(room / DISPUTED, pa.table(columns, schema=schema))
