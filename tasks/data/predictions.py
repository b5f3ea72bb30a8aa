"""The log of served predictions as Parquet, one folder a day: what the servers wrote as JSON lines, packed.

    <folder>/<ULID>.jsonl                       written by a server (``tasks.serve.predictions``)
    <folder>/day=2026-11-24/<ULID>.parquet      passport, row, at, label, probability, replayed
"""

from __future__ import annotations

import datetime as dt
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A server that writes at all writes more often; one that finds its file gone begins a new one.
QUIET_SECONDS = 600
# A write that had the file open when it was moved aside is over by then.
SETTLE_SECONDS = 1.0


def pack_predictions(folder: Path, days: int, now: dt.datetime, quiet_seconds: float = QUIET_SECONDS) -> int:
    """Pack the files that no server writes any more, drop days older than ``days``; return the rows packed.

    Killed at any point it loses nothing: a file is removed once its Parquet is whole, and packing it again
    gives the same file.
    """
    _expire(folder, days, now)
    quiet = [path for path in folder.glob("*.jsonl") if now.timestamp() - path.stat().st_mtime >= quiet_seconds]
    moved = [path.rename(path.with_suffix(".packing")) for path in quiet]
    if moved:
        time.sleep(SETTLE_SECONDS)
    rows = 0
    for path in sorted(folder.glob("*.packing")):
        rows += _pack(path)
        path.unlink()
    return rows


def find_prediction(folder: Path, passport: str) -> list[dict[str, Any]]:
    """Return the logged rows of one answer; none where it was not sampled, or is no longer kept."""
    import pyarrow.parquet as pq

    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob("day=*/*.parquet")):
        found += pq.read_table(path, filters=[("passport", "==", passport)], partitioning=None).to_pylist()
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.packing")]):
        found += [line for line in _lines(path) if line["passport"] == passport]
    return sorted(found, key=lambda line: line["row"])


def all_predictions(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield every logged row that is still kept: passport, row, at, label, probability, replayed."""
    import pyarrow.parquet as pq

    for path in sorted(folder.glob("day=*/*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.packing")]):
        yield from ({"replayed": False} | line for line in _lines(path))


def _pack(path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    by_day: dict[str, list[dict[str, Any]]] = {}
    for line in _lines(path):
        by_day.setdefault(line["at"][:10], []).append({"replayed": False} | line)
    for day, lines in by_day.items():
        final = path.parent / f"day={day}" / f"{path.stem}.parquet"
        final.parent.mkdir(exist_ok=True)
        working = final.with_suffix(".writing")
        pq.write_table(pa.Table.from_pylist(lines), working, compression="zstd")
        working.replace(final)
    return sum(map(len, by_day.values()))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file; a server that was killed in mid-write leaves half of one."""
    with path.open("rb") as stream:
        for line in stream:
            if line.endswith(b"\n"):
                yield json.loads(line)


def _expire(folder: Path, days: int, now: dt.datetime) -> None:
    oldest = (now - dt.timedelta(days=days)).date().isoformat()
    for path in folder.glob("day=*"):
        if path.name.removeprefix("day=") < oldest:
            shutil.rmtree(path, ignore_errors=True)
