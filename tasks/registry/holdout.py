"""A sample of the holdout that travels with its version: what a rollout replays where live requests are too few.

    <packages>/<package digest>.holdout.jsonl    one row a line, as a client would send it; in MLflow too
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tasks.registry import runs
from tasks.registry.client import translated
from tasks.registry.versions import Version
from tasks.spec.feature import Feature, columns_to_rows
from tasks.spec.ids import ROLES
from tasks.spec.value import RoomRef
from tasks.store.files import write_whole
from tasks.store.room import open_room

MAX_ROWS, MAX_BYTES = 256, 1 << 20


def keep_holdout(client: Any, run_id: str, dataset: RoomRef, feature: Feature, digest: str, packages: Path) -> None:
    """Sample the dataset's holdout: into ``packages``, and into MLflow under the version's run. Idempotent."""
    lines, size = [], 0
    for row in _rows(open_room(dataset) / "data.parquet", feature):
        lines.append(json.dumps(row) + "\n")
        size += len(lines[-1])
        if size > MAX_BYTES:
            break
    path = _path(packages, digest)
    write_whole(path, "".join(lines))
    runs.log_file(client, run_id, path, _artifacts(digest))


def load_holdout(client: Any, version: Version, packages: Path) -> list[Any]:
    """Return the rows that were kept with a version, fetched from MLflow where they are not at hand.

    Raises:
        TryAgain: MLflow can't be reached.
    """
    path = _path(packages, version.package_sha256)
    if not path.exists():
        with tempfile.TemporaryDirectory() as scratch, translated(f"the holdout of {version.workload}"):
            name = f"{_artifacts(version.package_sha256)}/{path.name}"
            write_whole(path, Path(client.download_artifacts(version.run_id, name, scratch)).read_text())
    return [json.loads(line) for line in path.read_text().splitlines()]


def request_of(feature: Feature, row: Any) -> dict[str, Any]:
    """Return the Open Inference Protocol request that asks for one row."""
    if feature.kind == "ids":
        told = zip(ROLES, row, strict=True)
        return {"inputs": [{"name": n, "datatype": "BYTES", "shape": [1], "data": [value]} for n, value in told]}
    if feature.holds == "texts":
        return {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": [row]}]}
    return {"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, len(row)], "data": list(row)}]}


def _rows(data: Path, feature: Feature) -> list[Any]:
    import pyarrow.parquet as pq


    table = pq.read_table(data, columns=list(feature.columns), filters=[("split", "==", "holdout")])
    # Spread over the split, which may lie in the order of its classes.
    table = table.take(list(range(0, table.num_rows, max(1, -(-table.num_rows // MAX_ROWS)))))
    rows = columns_to_rows(table, feature)
    if feature.kind == "ids":
        return rows
    if feature.holds == "texts":
        return [row if isinstance(row, str) else " ".join(row) for row in rows]
    # A missing number is null in JSON.
    return [[None if value != value else value for value in row] for row in rows.tolist()]


def _path(packages: Path, digest: str) -> Path:
    return packages / f"{digest}.holdout.jsonl"


def _artifacts(digest: str) -> str:
    return f"holdout-{digest[:12]}"
