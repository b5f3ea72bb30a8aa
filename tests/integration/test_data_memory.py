"""Steps on a table of wide rows, larger than what each may hold; each in a process of its own, whose peak counts."""

from __future__ import annotations

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.store.manifest import write_manifest

pytestmark = pytest.mark.timeout(240)
ROWS, CHARS, MEBIBYTES = 150_000, 4000, 800
SHARED = {"workload": "w", "feature": {"kind": "text"}, "label": {"classes": ["x", "y"]}}
CHILD = """
import json, sys
from pathlib import Path
from tasks.data.clean import clean
from tasks.data.labels import validate_labels
from tasks.spec.requests import CleanRequest, ValidateLabelsRequest

step, request, room = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
if step == "clean":
    result = clean(CleanRequest.parse(request, "request"), room)
    said = result.rows_out
else:
    said = validate_labels(ValidateLabelsRequest.parse(request, "request"), room).conflicts
lines = Path("/proc/self/status").read_text().splitlines()
peak = int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024
print(json.dumps([said, peak]))
"""


def outcome(step, request, room):
    """What the step says, and the most memory it held, MiB."""
    command = [sys.executable, "-P", "-c", CHILD, step, json.dumps(SHARED | request), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def reference(folder):
    return {"uri": str(folder), "digest_sha256": write_manifest(folder)}


def test_cleaning_and_label_validation_hold_no_more_than_a_part_of_the_table(tmp_path):
    raw, clean = tmp_path / "raw", tmp_path / "clean"
    raw.mkdir()
    schema = pa.schema([("text", pa.string()), ("label", pa.string())])
    with pq.ParquetWriter(raw / "raw.parquet", schema) as writer:
        for start in range(0, ROWS, 5000):
            texts = [f"{number} {'q' * CHARS}" for number in range(start, start + 5000)]
            writer.write_table(pa.table({"text": texts, "label": ["x", "y"] * 2500}))
        # The first row once more, under the other label.
        writer.write_table(pa.table({"text": [f"0 {'q' * CHARS}"], "label": ["y"]}))
    request = {"raw": reference(raw), "split": {}, "rules": [{"rule": "trim", "column": "text"}]}
    rows, peak = outcome("clean", request, clean)
    assert rows == ROWS + 1
    assert peak < MEBIBYTES
    request = {"clean": reference(clean), "rules": {"max_audited_rows": 200}}
    conflicts, peak = outcome("validate_labels", request, tmp_path / "labels")
    assert conflicts == 2
    assert peak < MEBIBYTES
