"""The real Great Expectations: generated and users' suites, data docs, no trace left in the repository."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.data.expectations import suites_sha256, validate_data
from tasks.spec.errors import BadRequest, IntegrityLost
from tasks.spec.feature import ImageFeature, TableFeature, TextFeature
from tasks.spec.requests import ValidateDataRequest
from tasks.spec.value import RoomRef
from tasks.spec.workload import Expectations, Label
from tasks.store.manifest import write_manifest

pytestmark = pytest.mark.timeout(120)
ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "great_expectations" / "expectations"
IMAGE = ImageFeature(kind="image", height=2, width=2, max_value=16)
ROWS = 120


def room_of(folder: Path, columns: dict) -> RoomRef:
    room = folder / "clean"
    room.mkdir(exist_ok=True)
    rows = len(next(iter(columns.values())))
    own = {
        "row_id": [str(index) for index in range(rows)],
        "label": ["xy"[index % 2] for index in range(rows)],
        "split": [("train", "validation", "holdout")[index % 3] for index in range(rows)],
    }
    pq.write_table(pa.table(own | columns), room / "data.parquet")
    return RoomRef(uri=str(room), digest_sha256=write_manifest(room))


def images(rows: int = ROWS, high: int = 16) -> pa.Array:
    pixels = np.random.default_rng(0).integers(1, high, (rows, 4), dtype=np.uint8)
    pixels[:, 0], pixels[:, 1] = 0, high
    return pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), 4)


def run(folder: Path, columns: dict, feature, suites: Path | None = None, name: str = "w", **changes):
    suites = suites or folder / "suites"
    suites.mkdir(exist_ok=True)
    facts = {"rows_in": ROWS, "dropped_rows": 0, "expectations": Expectations()} | changes
    request = ValidateDataRequest(
        workload=name,
        clean=room_of(folder, columns),
        feature=feature,
        label=Label(classes=("x", "y")),
        suites_sha256=suites_sha256(suites, name),
        **facts,
    )
    return validate_data(request, folder / "room", suites)


def write_suite(folder: Path, name: str, *expectations: dict) -> Path:
    suites = folder / "suites"
    suites.mkdir(exist_ok=True)
    (suites / name).write_text(json.dumps({"name": "mine", "expectations": list(expectations), "meta": {}}))
    return suites


def expect(kind: str, **kwargs) -> dict:
    return {"type": f"expect_{kind}", "kwargs": kwargs}


def test_sound_images_pass_and_the_docs_can_be_read(tmp_path, capfd):
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "left over").touch()
    result = run(tmp_path, {"pixels": images()}, IMAGE)
    assert result.success, result.failed
    assert result.evaluated == 12
    assert sorted(path.name for path in (tmp_path / "room").iterdir()) == ["docs", "validation.json"]
    assert "Generated" in (tmp_path / "room" / "docs" / "index.html").read_text()
    facts = json.loads((tmp_path / "room" / "validation.json").read_text())
    assert facts["success"] is True
    write_manifest(tmp_path / "room")
    assert "Calculating Metrics" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("columns", "feature", "changes", "words"),
    [
        ({"pixels": images(high=17)}, IMAGE, {}, r"column_values_to_be_between on pixels_max"),
        ({"pixels": images(80)}, IMAGE, {}, r"row_count.*min_value = 100\): found 80"),
        ({"pixels": images()}, IMAGE, {"expectations": Expectations(max_rows=110)}, r"row_count.*found 120"),
        ({"pixels": images()}, IMAGE, {"dropped_rows": 60}, r"rejected_ratio \(max_value = 0.2\): found 0.5"),
        (
            {"pixels": images(), "label": ["x", "z"] * 60},
            IMAGE,
            {},
            r"in_set on label .* 60 of 120 values off.*'z'",
        ),
        ({"pixels": images(), "label": ["x", None] * 60}, IMAGE, {}, r"not_be_null on label"),
        (
            {"pixels": images(), "split": ["train"] * ROWS},
            IMAGE,
            {},
            r"count_to_be_between on split .*found 1",
        ),
        ({"pixels": images(), "row_id": ["1"] * ROWS}, IMAGE, {}, r"be_unique on row_id"),
        ({"pixels": images(), "extra": [1] * ROWS}, IMAGE, {}, r"match_set on the table"),
        ({"text": ["hi"] * 119 + [None]}, TextFeature(kind="text"), {}, r"not_be_null on text"),
        ({"text": ["hi"] * 119 + [""]}, TextFeature(kind="text"), {}, r"text_chars"),
        ({"text": ["hi", "hello"] * 60}, TextFeature(kind="text", max_chars=4), {}, r"text_chars.*60 of 120"),
        (
            {"a": pa.nulls(ROWS, pa.float64())},
            TableFeature(kind="table", columns=("a",)),
            {},
            r"not_be_null on a",
        ),
    ],
)
def test_each_defect_is_named_with_what_was_found(tmp_path, columns, feature, changes, words):
    result = run(tmp_path, columns, feature, **changes)
    assert not result.success
    assert any(re.search(words, line) for line in result.failed), result.failed
    assert (tmp_path / "room" / "docs" / "index.html").is_file()


def test_missing_numbers_are_for_the_model_to_fill(tmp_path):
    feature = TableFeature(kind="table", columns=("a",))
    result = run(tmp_path, {"a": [1.0, None] * 60}, feature)
    assert result.success, result.failed


def test_users_suites_are_run_beside_the_generated_one(tmp_path):
    write_suite(tmp_path, "w.json", expect("column_mean_to_be_between", column="pixels_mean", max_value=1))
    write_suite(tmp_path, "w.more.json", expect("column_values_to_not_be_null", column="nope"))
    suites = write_suite(tmp_path, "w-other.json", expect("column_values_to_not_be_null", column="another's"))
    result = run(tmp_path, {"pixels": images()}, IMAGE, suites)
    assert result.suites == ("Generated", "w", "w.more")
    assert result.evaluated == 14
    assert [line.split(":")[0] for line in result.failed] == ["w", "w.more"]
    assert "nope" in result.failed[1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no suite in Great Expectations' format"),
        ('{"expectations": {}}', "must hold at least one"),
        ('{"expectations": [{"kwargs": {}}]}', "no suite in Great Expectations' format"),
        ('{"expectations": [{"type": "expect_nonsense", "kwargs": {}}]}', "expect_nonsense not found"),
        ('{"expectations": [{"type": "expect_column_max_to_be_between", "kwargs": {"a": 1}}]}', "column"),
        (
            '{"expectations": [{"type": "expect_column_quantile_values_to_be_between", "kwargs": {}}]}',
            "use expect_column_median_to_be_between",
        ),
    ],
)
def test_a_wrong_suite_is_a_bad_request_that_names_the_file(tmp_path, content, words):
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "w.json").write_text(content)
    with pytest.raises(BadRequest, match=words) as caught:
        run(tmp_path, {"pixels": images()}, IMAGE)
    assert "w.json" in str(caught.value)


def test_a_suite_that_changed_since_the_plan_is_refused(tmp_path):
    suites = write_suite(tmp_path, "w.json", expect("column_values_to_not_be_null", column="label"))
    before = suites_sha256(suites, "w")
    write_suite(tmp_path, "w.json", expect("column_values_to_not_be_null", column="split"))
    assert suites_sha256(suites, "w") != before
    request = ValidateDataRequest(
        workload="w",
        clean=room_of(tmp_path, {"pixels": images()}),
        rows_in=ROWS,
        dropped_rows=0,
        feature=IMAGE,
        label=Label(classes=("x", "y")),
        expectations=Expectations(),
        suites_sha256=before,
    )
    with pytest.raises(IntegrityLost, match="changed since the run was planned"):
        validate_data(request, tmp_path / "room", suites)


def test_the_digits_suite_that_ships_can_be_run_and_no_file_of_it_changes(tmp_path):
    before = {path: path.read_bytes() for path in (ROOT / "great_expectations").rglob("*") if path.is_file()}
    result = run(tmp_path, {"pixels": images()}, IMAGE, SHIPPED, name="digits")
    assert result.suites == ("Generated", "digits")
    assert {line.split(" on ")[1].split(" ")[0] for line in result.failed} <= {"pixels_mean"}
    after = {path: path.read_bytes() for path in (ROOT / "great_expectations").rglob("*") if path.is_file()}
    assert after == before


def test_planning_a_run_imports_no_great_expectations():
    code = (
        "import sys; from pathlib import Path; from tasks.data.expectations import suites_sha256; "
        "suites_sha256(Path('.'), 'w'); sys.exit('great_expectations' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
