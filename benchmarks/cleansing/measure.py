"""One arm of the comparison in a process of its own: seconds, and the peak of its memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

MEMORY_BYTES = 384 << 20


class Stage(NamedTuple):
    """What has been spent since the start: by the clock, by the processors, and at most in memory."""

    seconds: float
    cpu_seconds: float
    megabytes: float


class Measured(NamedTuple):
    """``facts`` are what both arms must agree on."""

    facts: dict[str, Any]
    cleaned: Stage
    validated: Stage


def measured(arm: str, raw: Path, room: Path) -> Measured:
    """Run one arm."""
    command = [sys.executable, "-P", str(Path(__file__)), arm, str(raw), str(room)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    facts, cleaned, validated = json.loads(done.stdout.splitlines()[-1])
    return Measured(facts, Stage(*cleaned), Stage(*validated))


def spent(began: float) -> Stage:
    """Return what this process has spent, its imports included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024 / 1e6
    times = os.times()
    return Stage(time.monotonic() - began, times.user + times.system, peak)


def ours(raw: Path, room: Path, began: float) -> tuple[dict[str, Any], Stage]:
    """The two steps as a run calls them."""
    from cleansing.request import clean_request, validate_request

    from tasks.data.clean import clean
    from tasks.data.engine import Runs
    from tasks.data.expectations import suites_sha256, validate_data
    from tasks.store.manifest import write_manifest

    request, suites = clean_request(raw), room / "suites"
    (room / "clean").mkdir(parents=True)
    result = clean(request, room / "clean", Runs(MEMORY_BYTES))
    cleaned = spent(began)
    digest = write_manifest(room / "clean")
    suites.mkdir()
    asked = validate_request(request, room / "clean", digest, result, suites_sha256(suites, request.workload))
    validated = validate_data(asked, room / "validated", suites)
    return {"rows": result.rows_out, "changed": result.changed_cells, "valid": validated.success}, cleaned


def hand(raw: Path, room: Path, began: float) -> tuple[dict[str, Any], Stage]:
    """The same work as one would write it in DuckDB's SQL."""
    from cleansing.by_hand import clean_by_hand, validate_by_hand

    room.mkdir(parents=True)
    connection, facts = clean_by_hand(raw / "raw.parquet", room, MEMORY_BYTES)
    cleaned = spent(began)
    return facts | {"valid": validate_by_hand(connection, room)}, cleaned


def pandas(raw: Path, room: Path, began: float) -> tuple[dict[str, Any], Stage]:
    """The same in pandas and Great Expectations, all in memory."""
    from cleansing.by_pandas import clean_by_pandas, validate_by_gx

    room.mkdir(parents=True)
    frame, facts = clean_by_pandas(raw / "raw.parquet", room)
    cleaned = spent(began)
    return facts | {"valid": validate_by_gx(frame)}, cleaned


def main(arm: str, raw: Path, room: Path) -> None:
    began = time.monotonic()
    facts, cleaned = {"ours": ours, "hand": hand, "pandas": pandas}[arm](raw, room, began)
    print(json.dumps([facts, cleaned, spent(began)]))


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
