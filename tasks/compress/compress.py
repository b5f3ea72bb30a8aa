"""Make one model package: the trained network, or a smaller one made of it, exported to ONNX and stored as declared.

    network (as trained, pruned, sparse or distilled) -> fp32.onnx -> stored (int8, fp16, …) -> package/

The package is opened again and held against the torch network on real rows before it counts: an export that
answers otherwise than the network did is a fault, not a candidate. Where int8 is no faster, fp32 is taken.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tasks.compress.bom import write_bom
from tasks.compress.forms import write_forms
from tasks.compress.network import Learn, Source, answers_of, export, smaller
from tasks.compress.store import Samples, store
from tasks.serve.package import open_package, write_package
from tasks.serve.signature import Golden, Signature, sides_of
from tasks.spec.errors import DrydockError
from tasks.spec.feature import VOCABULARIES, Feature, encode
from tasks.spec.requests import CompressRequest, CompressResult
from tasks.store.files import write_json
from tasks.store.room import open_room
from tasks.train.prepare import read_split

SAMPLE_ROWS = 256
GOLDEN_ROWS = 2
# A float graph must agree with torch up to rounding; a quantised one is another model, judged by the gate, and only
# held sane here.
PARITY_LIMITS = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 5e-2}
PARITY_LIMIT_QUANTISED = 0.5
GOLDEN_TOLERANCE = 1e-3
# Two numbers nearer than this agree; of their range, as the limits above are where the answer is a number.
SAME_RATIO = 0.01

def compress(request: CompressRequest, room: Path, learn: Learn) -> CompressResult:
    """Write ``package/`` into ``room`` and return its digest, size, parity with its network and speed.

    ``learn`` trains a student in a folder, on the engines that train everything.

    Raises:
        BadRequest: a network that can't be exported or made smaller, too few rows to calibrate with, and the like.
        DrydockError: the exported graph's answers differ from the network's by more than the variant's limit.
    """
    data = open_room(request.dataset) / "data.parquet"
    teacher = Source(request, open_room(request.trained), request.train.recipe)
    package = room / "package"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir()
    source = smaller(teacher, data, room, learn)
    if vocabulary := VOCABULARIES.get(request.feature.holds):
        shutil.copyfile(source.folder / vocabulary, package / vocabulary)
    fp32 = room / "fp32.onnx"
    export(source.exported, request, fp32)
    rows, _ = read_split(data, request.feature, request.label, "validation")
    rows = rows[:SAMPLE_ROWS]
    samples = Samples(
        validation=encode(request.feature, rows, source.tokenizer),
        training=lambda: encode(
            request.feature, read_split(data, request.feature, request.label, "train")[0], source.tokenizer
        ),
    )
    stored = store(request.variant, fp32, package / "model.onnx", samples)
    fp32.unlink()
    write_bom(request, source.recipe, package)
    result = _finish(request, package, source, rows, stored.kind)
    agreement = _agreement(package, teacher, rows)
    note = "; ".join(filter(None, [source.note, stored.note]))
    result = result.model_copy(update={"agreement": agreement, "speed_ratio": stored.speed_ratio, "note": note})
    write_forms(source, request.also, room)
    shutil.rmtree(room / "student", ignore_errors=True)
    write_json(room / "compression.json", result.model_dump(mode="json"))
    return result


def _finish(request: CompressRequest, package: Path, source: Source, rows: Any, kind: str) -> CompressResult:
    """Write the package's papers with its own answers as the golden sample, then check parity."""
    signature = signature_of(request)
    golden_rows = _client_rows(rows[:GOLDEN_ROWS], request.feature)
    span = number.span if (number := request.label.number) else 1.0
    # First with the network's answers, to open it at all; then with its own.
    answers = answers_of(source, golden_rows)
    write_package(package, signature, Golden(rows=golden_rows, probabilities=answers.tolist(), tolerance=span))
    answers = open_package(package, None, None).predict(golden_rows)
    golden = Golden(rows=golden_rows, probabilities=answers.tolist(), tolerance=GOLDEN_TOLERANCE * span)
    digest = write_package(package, signature, golden)
    opened = open_package(package, digest, None)
    difference = float(abs(opened.predict(rows) - answers_of(source, rows)).max()) / span
    limit = PARITY_LIMITS.get(kind, PARITY_LIMIT_QUANTISED)
    if not difference <= limit:  # so that NaN fails it
        name = request.variant.label
        what = "differs from the torch network by"
        raise DrydockError(f"{name}: {what} {difference:.3g} of the answers' range, limit {limit}")
    return CompressResult(
        variant=request.variant.label,
        package_sha256=digest,
        model_bytes=(package / "model.onnx").stat().st_size,
        parity_max_difference=difference,
    )


def signature_of(request: CompressRequest) -> Signature:
    asked, answered = sides_of(request.feature, len(request.label.names))
    return Signature.parse(
        {
            "format": 1,
            "workload": request.workload,
            "variant": request.variant.label,
            "feature": request.feature.model_dump(mode="json"),
            "classes": list(request.label.names),
            "number": number.model_dump(mode="json") if (number := request.label.number) else None,
            "graph_input": asked.model_dump(mode="json"),
            "graph_output": answered.model_dump(mode="json"),
        },
        "signature.json",
    )


def _agreement(package: Path, teacher: Source, rows: Any) -> float:
    opened = open_package(package, None, None)
    found, wanted = opened.predict(rows), answers_of(teacher, rows)
    if (number := opened.signature.number) is not None:
        return float((abs(found - wanted) <= SAME_RATIO * number.span).mean())
    return float((found.argmax(axis=1) == wanted.argmax(axis=1)).mean())


def _client_rows(rows: Any, feature: Feature) -> list[Any]:
    """Rows as a client's JSON holds them; a missing number has no JSON form and becomes 0."""
    if feature.kind == "ids":
        return rows
    if isinstance(rows, list):
        return [row if isinstance(row, str) else " ".join(row) for row in rows]
    return np.nan_to_num(rows).tolist()
