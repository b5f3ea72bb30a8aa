"""The prediction log: packed without loss, found by passport, dropped after its days."""

from __future__ import annotations

import datetime as dt
import json
import os
from pathlib import Path

import pytest

from tasks.data import predictions
from tasks.data.predictions import find_prediction, pack_predictions

pytestmark = pytest.mark.timeout(30)
NOW = dt.datetime(2026, 11, 24, 12, tzinfo=dt.UTC)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(predictions, "SETTLE_SECONDS", 0)


def logged(folder: Path, name: str, *lines: tuple[str, str], age_seconds: float = 3600) -> Path:
    path = folder / f"{name}.jsonl"
    entries = [{"passport": p, "row": 0, "at": at, "label": "7", "probability": 0.5} for p, at in lines]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    stamp = NOW.timestamp() - age_seconds
    os.utime(path, (stamp, stamp))
    return path


def test_quiet_files_are_packed_by_day_and_found(tmp_path):
    logged(tmp_path, "A", ("p.1", "2026-11-23T23:59:59.000+00:00"), ("p.2", "2026-11-24T00:00:01.000+00:00"))
    busy = logged(tmp_path, "B", ("p.3", "2026-11-24T11:59:59.000+00:00"), age_seconds=1)
    assert pack_predictions(tmp_path, 30, NOW) == 2
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        "B.jsonl",
        "day=2026-11-23/A.parquet",
        "day=2026-11-24/A.parquet",
    ]
    assert busy.exists()
    assert [find_prediction(tmp_path, p)[0]["passport"] for p in ("p.1", "p.2", "p.3")] == ["p.1", "p.2", "p.3"]
    assert find_prediction(tmp_path, "p.4") == []


def test_a_killed_packing_is_done_again_and_half_a_line_is_left_out(tmp_path):
    path = logged(tmp_path, "A", ("p.1", "2026-11-24T01:00:00.000+00:00"))
    with path.open("a") as stream:
        stream.write('{"passport": "p.2", "ro')
    path.rename(tmp_path / "A.packing")
    assert find_prediction(tmp_path, "p.1")
    assert pack_predictions(tmp_path, 30, NOW) == 1
    assert pack_predictions(tmp_path, 30, NOW) == 0
    assert len(find_prediction(tmp_path, "p.1")) == 1


def test_days_beyond_the_declared_ones_are_dropped(tmp_path):
    logged(tmp_path, "A", *((f"p.{day}", f"2026-11-{day}T01:00:00.000+00:00") for day in ("10", "17", "24")))
    pack_predictions(tmp_path, 30, NOW)
    pack_predictions(tmp_path, 7, NOW)
    assert [p.name for p in sorted(tmp_path.glob("day=*"))] == ["day=2026-11-17", "day=2026-11-24"]
