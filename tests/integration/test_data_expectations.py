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

from tasks.data import scalars
from tasks.data.expectations import suites_sha256, validate_data
from tasks.data.revisions import last_accepted
from tasks.data.version import version
from tasks.spec.data import Split
from tasks.spec.errors import BadRequest, IntegrityLost
from tasks.spec.feature import ImageFeature, TableFeature, TextFeature
from tasks.spec.label import Label
from tasks.spec.privacy import Anonymity
from tasks.spec.requests import ValidateDataRequest, VersionRequest
from tasks.spec.validation import Expectations, Newest
from tasks.spec.value import RoomRef
from tasks.store.manifest import write_manifest

pytestmark = pytest.mark.timeout(120)
ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "great_expectations" / "expectations"
IMAGE = ImageFeature(kind="image", height=2, width=2, max_value=16)
ROWS = 120


def room_of(folder: Path, columns: dict) -> tuple[RoomRef, RoomRef]:
    """The raw and the cleaned room of these columns; row ids, labels and splits are made up where they lack."""
    rows = len(next(iter(columns.values())))
    own = {
        "row_id": [str(index) for index in range(rows)],
        "label": ["xy"[index // 3 % 2] for index in range(rows)],
        "split": [("train", "validation", "holdout")[index % 3] for index in range(rows)],
    }
    cleaned = pa.table(own | columns)
    raw = cleaned.drop_columns(["row_id", "split", *(["extra"] if "extra" in columns else [])])
    return _room(folder / "raw", "raw.parquet", raw), _room(folder / "clean", "data.parquet", cleaned)


def _room(room: Path, name: str, table: pa.Table) -> RoomRef:
    room.mkdir(exist_ok=True)
    pq.write_table(table, room / name)
    (room / "report.json").write_text('{"rules": []}')
    return RoomRef(uri=str(room), digest_sha256=write_manifest(room))


def images(rows: int = ROWS, high: int = 16) -> pa.Array:
    pixels = np.random.default_rng(0).integers(1, high, (rows, 4), dtype=np.uint8)
    pixels[:, 0], pixels[:, 1] = 0, high
    return pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), 4)


def run(folder: Path, columns: dict, feature, suites: Path | None = None, name: str = "w", **changes):
    suites = suites or folder / "suites"
    suites.mkdir(exist_ok=True)
    return validate_data(request_for(folder, columns, feature, suites, name, **changes), folder / "room", suites)


def request_for(folder: Path, columns: dict, feature, suites: Path, name: str = "w", **changes) -> ValidateDataRequest:
    raw, clean = room_of(folder, columns)
    facts = {"rows_in": ROWS, "dropped_rows": 0, "expectations": Expectations(), "split": Split()}
    facts["suites_sha256"] = suites_sha256(suites, name)
    given = {"raw": raw, "clean": clean, "feature": feature, "label": Label(classes=("x", "y"))}
    return ValidateDataRequest(workload=name, **(given | facts | changes))


def write_suite(folder: Path, name: str, *expectations: dict) -> Path:
    suites = folder / "suites"
    suites.mkdir(exist_ok=True)
    (suites / name).write_text(json.dumps({"name": "mine", "expectations": list(expectations), "meta": {}}))
    return suites


def expect(kind: str, severity: str = "stop", **kwargs) -> dict:
    return {"type": f"expect_{kind}", "kwargs": kwargs, "meta": {"severity": severity}}


def assert_reads_alone(docs: Path) -> str:
    """The data docs are one page with all results, which asks no other host and runs nothing."""
    (page,) = docs.rglob("*")
    text = page.read_text()
    assert not re.findall(r"//|<script|<link|<img|<iframe|url\(|@import|\bsrc=|\bon\w+=", text)
    assert all(target.startswith("#") for target in re.findall(r'href="?([^">]*)', text))
    assert "Generated.clean" in text
    assert "Observed Value" in text
    return text


def test_sound_images_pass_and_the_docs_can_be_read(tmp_path, capfd):
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "left over").touch()
    result = run(tmp_path, {"pixels": images()}, IMAGE)
    assert result.success, result.failed
    assert result.evaluated == 16
    assert not result.quarantined
    files = ["docs", "profile.json", "quarantine.parquet", "validation.json"]
    assert sorted(path.name for path in (tmp_path / "room").iterdir()) == files
    assert_reads_alone(tmp_path / "room" / "docs")
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
            r"row_count_to_equal on the table \(value = 3\): found 1",
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
    assert result.suites == ("Generated.raw", "Generated.clean", "Generated.split", "w", "w.more")
    assert result.evaluated == 18
    told = assert_reads_alone(tmp_path / "room" / "docs")
    assert told.count('class="bad"') == 3
    assert "✘" in told
    assert tuple(re.findall(r"Expectation Suite: *(\S+)", re.sub("<[^>]*>", " ", told))) == result.suites
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
    request = request_for(tmp_path, {"pixels": images()}, IMAGE, suites, suites_sha256=before)
    with pytest.raises(IntegrityLost, match="changed since the run was planned"):
        validate_data(request, tmp_path / "room", suites)


def test_the_digits_suite_that_ships_can_be_run_and_no_file_of_it_changes(tmp_path):
    before = {path: path.read_bytes() for path in (ROOT / "great_expectations").rglob("*") if path.is_file()}
    result = run(tmp_path, {"pixels": images()}, IMAGE, SHIPPED, name="digits")
    assert result.suites[-1] == "digits"
    assert {line.split(" on ")[1].split(" ")[0] for line in result.failed} <= {"pixels_mean"}
    after = {path: path.read_bytes() for path in (ROOT / "great_expectations").rglob("*") if path.is_file()}
    assert after == before


def test_planning_a_run_imports_no_great_expectations():
    code = (
        "import sys; from pathlib import Path; from tasks.data.expectations import suites_sha256; "
        "suites_sha256(Path('.'), 'w'); sys.exit('great_expectations' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- severities, stages, large tables, the last revision ---------------------------------------------------


def test_each_severity_does_what_it_says(tmp_path):
    texts = {"text": ["hi"] * 118 + ["bad", "worse"]}
    write_suite(
        tmp_path,
        "w.json",
        expect("column_values_to_not_be_in_set", "quarantine", column="text", value_set=["bad"]),
        expect("column_values_to_not_match_regex", "warn", column="text", regex="^worse"),
    )
    result = run(tmp_path, texts, TextFeature(kind="text"))
    assert result.success, result.failed
    assert result.quarantined == 1
    assert sum(line.startswith("w: ") for line in result.warned) == 2
    quarantine = pq.read_table(tmp_path / "room" / "quarantine.parquet").to_pylist()
    assert [row["row_id"] for row in quarantine] == ["118"]
    assert "not_be_in_set on text" in quarantine[0]["reason"]


def test_a_workload_file_says_how_severe_a_check_is(tmp_path):
    severity = {"pixels": "quarantine", "rows": "warn"}
    pixels = images(60)
    loud = pa.concat_arrays([pixels.slice(0, 59), images(1, high=200)])
    result = run(tmp_path, {"pixels": loud}, IMAGE, expectations=Expectations(severity=severity))
    assert result.success, result.failed
    assert result.quarantined == 1
    assert any("row_count" in line for line in result.warned)
    few = Expectations(severity=severity, max_rejected_ratio=0.001)
    assert "in quarantine, must be at most 0.001" in run(tmp_path, {"pixels": loud}, IMAGE, expectations=few).failed[0]


@pytest.mark.parametrize(
    ("meta", "item", "words"),
    [
        ({"stage": "later"}, {}, r"meta\.stage = 'later', must be one of raw, clean, split"),
        ({}, {"severity": "shrug"}, "severity = 'shrug', must be one of stop, quarantine, warn"),
        ({"stage": "split"}, {"severity": "quarantine"}, "at stage split can't quarantine"),
    ],
)
def test_a_suite_that_asks_for_what_is_not_there_is_refused(tmp_path, meta, item, words):
    (tmp_path / "suites").mkdir()
    one = {"type": "expect_column_values_to_not_be_null", "kwargs": {"column": "label"}, "meta": item}
    (tmp_path / "suites" / "w.json").write_text(json.dumps({"expectations": [one], "meta": meta}))
    with pytest.raises(BadRequest, match=words):
        run(tmp_path, {"pixels": images()}, IMAGE)


def test_users_suites_may_look_at_the_raw_table_and_at_the_splits(tmp_path):
    suites = write_suite(tmp_path, "w.split.json", expect("column_min_to_be_between", column="rows", min_value=41))
    raw = {"expectations": [expect("column_values_to_not_be_null", column="label")], "meta": {"stage": "raw"}}
    (suites / "w.raw.json").write_text(json.dumps(raw))
    content = json.loads((suites / "w.split.json").read_text()) | {"meta": {"stage": "split"}}
    (suites / "w.split.json").write_text(json.dumps(content))
    (line,) = run(tmp_path, {"pixels": images()}, IMAGE).failed
    assert line.startswith("w.split: expect_column_min_to_be_between on rows")


def test_a_large_table_is_counted_exactly_though_expectations_see_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(scalars, "WHOLE_BYTES", 0)
    monkeypatch.setattr(scalars, "SAMPLE_ROWS", 500)
    rows = 5_000
    a = np.arange(rows, dtype=float)
    a[4_321] = -5.0
    write_suite(tmp_path, "w.json", expect("column_values_to_be_between", "quarantine", column="a", min_value=0))
    feature, size = TableFeature(kind="table", columns=("a",)), Expectations(min_rows=rows, max_rows=rows)
    result = run(tmp_path, {"a": a}, feature, expectations=size, rows_in=rows)
    assert result.success, result.failed
    assert result.sampled
    assert result.quarantined == 1
    assert "found 1 of 5000 rows off, all rows counted" in result.warned[0]
    more = run(tmp_path, {"a": a, "row_id": ["0", *map(str, range(rows - 1))]}, feature, rows_in=rows)
    assert any("be_unique on row_id" in line and "1 of 5000 rows off" in line for line in more.failed)


def accepted(folder: Path, columns: dict, feature, name: str, **changes):
    """A validated revision in the dataset repository, as a later request compares with it."""
    place = folder / name
    place.mkdir()
    suites = folder / "suites"
    suites.mkdir(exist_ok=True)
    request = request_for(place, columns, feature, suites, **changes)
    result = validate_data(request, place / "room", suites, folder / "datasets")
    if result.success:
        labels = {"noise_ratio": 0.0, "suspects": 0, "audited_rows": 0, "measurements": []}
        (place / "labels").mkdir()
        (place / "labels" / "report.json").write_text(json.dumps(labels))
        suspects = pa.table({column: pa.array([], pa.string()) for column in ("row_id", "label", "suggested")})
        pq.write_table(suspects, place / "labels" / "suspects.parquet")
        refs = {key: RoomRef(uri=str(place / folder), digest_sha256=write_manifest(place / folder))
                for key, folder in (("validate_data", "room"), ("validate_labels", "labels"))}  # fmt: skip
        version(
            VersionRequest(workload="w", feature=feature, clean=request.clean, sources=request.sources, **refs),
            place / "version",
            folder / "datasets",
        )
    return result


NUMBERS = TableFeature(kind="table", columns=("a", "b"))


def numbers(rows: int = 600, seed: int = 0, **changes) -> dict:
    random = np.random.default_rng(seed)
    return {"a": random.normal(size=rows), "b": random.normal(size=rows)} | changes


def test_what_changed_upstream_is_named_with_its_limit(tmp_path):
    def previous():
        return last_accepted(tmp_path / "datasets", "w", None)

    first = accepted(tmp_path, numbers(), NUMBERS, "first", rows_in=600, sources=("f1",))
    assert first.success
    assert "Generated.history" not in first.suites
    same = accepted(tmp_path, numbers(seed=1), NUMBERS, "same", rows_in=600, previous=previous(), sources=("f2",))
    assert same.success, same.failed
    assert same.suites[3] == "Generated.history"
    shifted = numbers(seed=2, b=np.random.default_rng(3).normal(2, 1, 600))
    facts = {"rows_in": 600, "previous": previous()}
    (line,) = accepted(tmp_path, shifted, NUMBERS, "shifted", **facts).failed
    assert re.search(r"shift_b \(max_value = 0\.3\): found 0\.[6-9]", line)
    emptied = numbers(seed=2, b=pa.array([None] * 599 + [1.0], pa.float64()))
    assert "shift_b" in accepted(tmp_path, emptied, NUMBERS, "emptied", **facts).failed[0]
    (line,) = accepted(tmp_path, numbers(150, 4), NUMBERS, "fewer", **facts | {"rows_in": 150}).failed
    assert re.search(r"volume_ratio \(min_value = 0\.5.*0\.25", line)
    other = accepted(tmp_path, {"a": numbers()["a"]}, TableFeature(kind="table", columns=("a",)), "other", **facts)
    assert any("missing_columns" in line for line in other.failed)
    twice = accepted(tmp_path, numbers(seed=6), NUMBERS, "twice", **facts, sources=("f9", "f9"))
    assert twice.success
    assert any("repeated_files" in line for line in twice.warned)
    fresh = Expectations(fresh=True)
    stale = accepted(tmp_path, numbers(seed=7), NUMBERS, "stale", **facts, sources=("f2",), expectations=fresh)
    assert not stale.success
    assert any("new_files" in line for line in stale.failed)


@pytest.mark.parametrize(
    ("values", "more", "age"),
    [
        (["2026-11-01", "2026-11-20T12:00:00"], {}, 6.5),
        (["01.11.2026", "20.11.2026"], {"format": "%d.%m.%Y"}, 7),
        ([1.0, 1795176000.0], {}, 6.5),
        (["soon", None], {}, None),
    ],
)
def test_a_source_whose_newest_row_is_old_is_told(tmp_path, values, more, age):
    numbers = [1.0 + row % 7 for row in range(ROWS)]
    feature = TableFeature(kind="table", columns=("n",))
    (tmp_path / "suites").mkdir()
    asked = request_for(tmp_path, {"n": numbers}, feature, tmp_path / "suites")
    raw = _room(tmp_path / "raw", "raw.parquet", pa.table({"label": ["x", "y"], "n": [1.0, 2.0], "day": values}))

    def judged(days: float):
        rules = Expectations(newest=Newest(column="day", max_age_days=days, **more))
        given = {"raw": raw, "columns": ("day",), "today": "2026-11-26", "expectations": rules}
        return validate_data(asked.model_copy(update=given), tmp_path / "room", tmp_path / "suites")

    refused = judged((age or 1) - 0.1)
    assert "Generated.newest" in refused.failed[0], refused.failed
    if age is not None:
        assert judged(age + 0.1).success


def test_rows_of_small_groups_stop_the_run_or_go_to_quarantine(tmp_path):
    ages, numbers = [float(row // 50 * 10) for row in range(ROWS)], [1.0 + row % 7 for row in range(ROWS)]
    columns = {"age": ages, "n": numbers}
    feature = TableFeature(kind="table", columns=("age", "n"))
    anonymity = Anonymity(columns=("age",), k=30)
    refused = run(tmp_path, columns, feature, anonymity=anonymity)
    assert not refused.success
    assert "group_rows" in refused.failed[0]
    assert "20 of 120" in refused.failed[0]
    rules = Expectations(severity={"anonymity": "quarantine"})
    aside = run(tmp_path, columns, feature, anonymity=anonymity, expectations=rules)
    assert (aside.success, aside.quarantined) == (True, 20)
    assert run(tmp_path, columns, feature, anonymity=Anonymity(columns=("age",), k=20)).success


def test_further_columns_and_those_that_cleaning_makes_are_expected_where_they_are(tmp_path):
    numbers = [1.0 + row % 7 for row in range(ROWS)]
    columns = {"n": numbers, "extra": numbers}
    feature = TableFeature(kind="table", columns=("n", "extra"))
    assert run(tmp_path, columns, feature, made_columns=("extra",)).success
    kept = TableFeature(kind="table", columns=("n",))
    further = {"columns": ("age",), "keep": ("age",), "anonymity": Anonymity(columns=("age",), k=17)}
    asked = request_for(tmp_path, {"n": numbers, "age": numbers}, kept, tmp_path / "suites").model_copy(update=further)
    assert validate_data(asked, tmp_path / "room", tmp_path / "suites").success
    asked = request_for(tmp_path, columns, feature, tmp_path / "suites", made_columns=("extra",))
    refused = validate_data(asked.model_copy(update={"columns": ("zip",)}), tmp_path / "room", tmp_path / "suites")
    assert "raw: expect_table_columns_to_match_set" in refused.failed[0]
