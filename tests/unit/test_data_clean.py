"""Cleaning: every rule, what it records, and splits that equal rows never part in."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.data.clean import clean
from tasks.data.divide import positions
from tasks.data.table import row_digests
from tasks.spec import clean as rules
from tasks.spec.data import Split
from tasks.spec.errors import BadRequest, IntegrityLost
from tasks.spec.feature import ImageFeature, TableFeature, TextFeature
from tasks.spec.label import Label
from tasks.spec.requests import CleanRequest
from tasks.spec.value import RoomRef
from tasks.store.manifest import write_manifest

pytestmark = pytest.mark.timeout(60)
TEXT = TextFeature(kind="text")
TABLE = TableFeature(kind="table", columns=("a",))
IMAGE = ImageFeature(kind="image", height=1, width=2)
LABEL = Label(column="y", classes=("ham", "spam"))
TRIM = rules.Trim(rule="trim", column="text")
ALLOWED = rules.Allowed(rule="allowed_labels")
DUPLICATES = rules.DropDuplicates(rule="drop_duplicates")


def run(folder, columns, feature, *declared, split=None, label=LABEL, keep=()):
    raw = folder / "raw"
    raw.mkdir(exist_ok=True)
    types = {"text": pa.string(), "a": pa.float64(), "pixels": pa.list_(pa.uint8())}
    columns = {name: pa.array(values, types.get(name, pa.string())) for name, values in columns.items()}
    pq.write_table(pa.table(columns), raw / "raw.parquet")
    request = CleanRequest(
        workload="w",
        raw=RoomRef(uri=str(raw), digest_sha256=write_manifest(raw)),
        feature=feature,
        label=label,
        rules=declared,
        split=split or Split(),
        keep=keep,
    )
    result = clean(request, folder / "room")
    data, repairs = (pq.read_table(folder / "room" / f"{name}.parquet") for name in ("data", "repairs"))
    return result, data, repairs.to_pylist()


def repair(row_id, column, before, after, rule):
    return {"row_id": row_id, "column": column, "before": before, "after": after, "rule": rule}


def test_kept_columns_are_beside_the_features_as_cleaned(tmp_path):
    columns = {"text": ["hi", "win", "hi"], "y": ["ham", "spam", "ham"]}
    columns |= {"sex": [" f", "m", None], "b": ["1,5", "x", "2"]}
    parsed = rules.ParseNumber(rule="parse_number", column="b", decimal=",", action="missing")
    _, data, _ = run(tmp_path, columns, TEXT, TRIM.model_copy(update={"column": "sex"}), parsed, keep=("sex", "b"))
    assert data.column_names == ["row_id", "text", "sex", "b", "label", "split"]
    assert data.column("sex").to_pylist() == ["f", "m", None]
    assert data.column("b").to_pylist() == [1.5, None, 2.0]
    assert data.column("label").to_pylist() == ["ham", "spam", "ham"]


def test_text_rules_work_in_their_order_and_leave_a_record(tmp_path):
    texts = [" hi ", "hi", None, "", "win"]
    labels = ["HAM", "ham", "ham", "ham", "junk"]
    result, data, repairs = run(
        tmp_path,
        {"text": texts, "y": labels},
        TEXT,
        TRIM,
        rules.Synonyms(rule="synonyms", column="y", replace={"HAM": "ham"}),
        rules.DropMissing(rule="drop_missing", column="text"),
        ALLOWED,
        DUPLICATES,
    )
    assert data.column_names == ["row_id", "text", "label", "split"]
    assert data.select(["row_id", "text", "label"]).to_pylist() == [
        {"row_id": "0", "text": "hi", "label": "ham"}
    ]
    assert repairs == [
        repair("0", "text", " hi ", "hi", "trim"),
        repair("0", "y", "HAM", "ham", "synonyms"),
        repair("2", "text", None, None, "drop_missing"),
        repair("3", "text", "", None, "drop_missing"),
        repair("4", "y", "junk", None, "allowed_labels"),
        repair("1", "*", "equal to row 0", None, "drop_duplicates"),
    ]
    assert (result.rows_in, result.rows_out, result.changed_cells, result.dropped_rows) == (5, 1, 2, 4)
    report = json.loads((tmp_path / "room" / "report.json").read_text())
    assert [item["rule"] for item in report["rules"]][:2] == ["trim", "synonyms"]
    assert sum(result.rows_by_split.values()) == 1


def test_number_rules(tmp_path):
    columns = {"a": [1.0, None, float("nan"), 99.0, -5.0, 7.0], "y": ["ham"] * 6}
    fill = rules.Fill(rule="fill", column="a", value=3.0)
    clip = rules.Range(rule="range", column="a", min=0, action="clip")
    drop = rules.Range(rule="range", column="a", max=50)
    _, data, repairs = run(tmp_path, columns, TABLE, fill, clip, drop)
    assert data.column("a").to_pylist() == [1.0, 3.0, 3.0, 0.0, 7.0]
    assert repairs == [
        repair("1", "a", None, "3", "fill"),
        repair("2", "a", None, "3", "fill"),
        repair("4", "a", "-5", "0", "range"),
        repair("3", "a", "99", None, "range"),
    ]
    _, data, _ = run(tmp_path, columns, TABLE, drop)
    assert data.num_rows == 5, "a missing number is not out of range"


def test_a_missing_label_can_be_filled_or_stays_for_the_expectations(tmp_path):
    columns = {"text": ["a", "b"], "y": [None, "spam"]}
    _, data, _ = run(tmp_path, columns, TEXT, rules.Fill(rule="fill", column="y", value="ham"))
    assert data.column("label").to_pylist() == ["ham", "spam"]
    _, data, _ = run(tmp_path, columns, TEXT)
    assert data.column("label").to_pylist() == [None, "spam"]
    _, data, repairs = run(tmp_path, columns, TEXT, ALLOWED)
    assert repairs == [repair("0", "y", None, None, "allowed_labels")]


def test_duplicates_need_equal_features_and_label(tmp_path):
    columns = {"a": [0.0, -0.0, None, None, 0.0], "y": ["ham", "ham", "ham", "ham", "spam"]}
    _, data, _ = run(tmp_path, columns, TABLE, DUPLICATES)
    assert data.column("row_id").to_pylist() == ["0", "2", "4"]


def test_missing_images_are_dropped_or_refused(tmp_path):
    columns = {"pixels": [[1, 2], None, [3, 4], [1, 2]], "y": ["ham"] * 4}
    with pytest.raises(BadRequest, match=r"1 rows have no image \(first row_id 1\); add {rule: drop_missing"):
        run(tmp_path, columns, IMAGE)
    missing = rules.DropMissing(rule="drop_missing", column="pixels")
    for declared in [(missing, DUPLICATES), (DUPLICATES, missing)]:
        _, data, repairs = run(tmp_path, columns, IMAGE, *declared)
        assert data.schema.field("pixels").type == pa.list_(pa.uint8(), 2)
        assert data.column("pixels").to_pylist() == [[1, 2], [3, 4]]
        assert {item["row_id"] for item in repairs} == {"1", "3"}


@pytest.mark.parametrize(
    ("rule", "feature", "columns"),
    [
        (rules.Trim(rule="trim", column="a"), TABLE, {"a": [1.0], "y": ["ham"]}),
        (rules.Range(rule="range", column="text", min=0), TEXT, {"text": ["q"], "y": ["ham"]}),
        (rules.Fill(rule="fill", column="a", value="x"), TABLE, {"a": [None], "y": ["ham"]}),
        (rules.Fill(rule="fill", column="text", value=1.0), TEXT, {"text": [None], "y": ["ham"]}),
        (rules.Fill(rule="fill", column="pixels", value=1.0), IMAGE, {"pixels": [[1, 2]], "y": ["ham"]}),
    ],
)
def test_a_rule_that_does_not_fit_its_column_is_a_bad_request(tmp_path, rule, feature, columns):
    with pytest.raises(BadRequest, match=f"rule {rule.rule} on '{rule.column}'.*the column holds"):
        run(tmp_path, columns, feature, rule)


def test_no_row_left_is_a_bad_request_that_counts(tmp_path):
    with pytest.raises(BadRequest, match=r"dropped all 2 rows \(allowed_labels 2\)"):
        run(tmp_path, {"text": ["a", "b"], "y": ["x", None]}, TEXT, ALLOWED)


@pytest.mark.parametrize("name", ["row_id", "label", "split"])
def test_a_feature_may_not_take_a_name_of_the_cleaned_table(tmp_path, name):
    feature = TableFeature(kind="table", columns=(name,))
    with pytest.raises(BadRequest, match=f"feature column '{name}'"):
        run(tmp_path, {name: ["1"], "y": ["ham"]}, feature)


def test_a_changed_raw_room_is_refused(tmp_path):
    run(tmp_path, {"text": ["a"], "y": ["ham"]}, TEXT)
    ref = RoomRef(uri=str(tmp_path / "raw"), digest_sha256=write_manifest(tmp_path / "raw"))
    (tmp_path / "raw" / "raw.parquet").write_bytes(b"x")
    request = CleanRequest(workload="w", raw=ref, feature=TEXT, label=LABEL, rules=(), split=Split())
    with pytest.raises(IntegrityLost):
        clean(request, tmp_path / "room")


def test_named_splits_are_kept_and_validation_is_taken_from_training_only(tmp_path):
    rows = 2000
    names = ["test" if index % 4 == 0 else "train" for index in range(rows)]
    columns = {"text": [f"t{index}" for index in range(rows)], "y": ["ham"] * rows, "part": names}
    result, data, _ = run(tmp_path, columns, TEXT, split=Split(column="part", validation=0.2))
    splits = data.column("split").to_pylist()
    assert [split == "holdout" for split in splits] == [name == "test" for name in names]
    assert 0.15 < result.rows_by_split["validation"] / (rows * 0.75) < 0.25
    names[1] = " Validation "
    result, data, _ = run(tmp_path, columns | {"part": names}, TEXT, split=Split(column="part"))
    assert result.rows_by_split == {"train": 1499, "validation": 1, "holdout": 500}
    for wrong in ("later", None):
        with pytest.raises(BadRequest, match=r"row_id 2: found .*, must be one of train, validation"):
            run(
                tmp_path,
                columns | {"part": [*names[:2], wrong, *names[3:]]},
                TEXT,
                split=Split(column="part"),
            )


def test_split_shares_are_near_what_was_asked_and_the_seed_moves_rows(tmp_path):
    columns = {"a": np.arange(20_000.0), "y": ["ham"] * 20_000}
    result, first, _ = run(tmp_path, columns, TABLE, split=Split(validation=0.1, holdout=0.3))
    assert abs(result.rows_by_split["holdout"] / 20_000 - 0.3) < 0.015
    assert abs(result.rows_by_split["validation"] / 20_000 - 0.1) < 0.015
    content = (tmp_path / "room" / "data.parquet").read_bytes()
    run(tmp_path, columns, TABLE, split=Split(validation=0.1, holdout=0.3))
    assert (tmp_path / "room" / "data.parquet").read_bytes() == content, "the same request, the same bytes"
    _, other, _ = run(tmp_path, columns, TABLE, split=Split(validation=0.1, holdout=0.3, seed=1))
    assert other.column("split") != first.column("split")


def test_seventy_thousand_images_take_seconds(tmp_path):
    import time

    pixels = np.random.default_rng(0).integers(0, 255, (70_000, 784), dtype=np.uint8)
    raw = tmp_path / "raw"
    raw.mkdir()
    images = pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), 784).cast(pa.list_(pa.uint8()))
    pq.write_table(pa.table({"pixels": images, "y": ["ham"] * 70_000}), raw / "raw.parquet")
    feature = ImageFeature(kind="image", height=28, width=28)
    ref = RoomRef(uri=str(raw), digest_sha256=write_manifest(raw))
    request = CleanRequest(
        workload="w", raw=ref, feature=feature, label=LABEL, rules=(ALLOWED, DUPLICATES), split=Split()
    )
    began = time.monotonic()
    assert clean(request, tmp_path / "room").rows_out == 70_000
    assert time.monotonic() - began < 20, "measured 2 to 4 s"


ROW = st.tuples(st.sampled_from(["a", "b ", " b", "c", "", None]), st.sampled_from(["ham", "spam", "x"]))
TEXTS = st.lists(ROW)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=TEXTS.filter(lambda rows: any(label != "x" for _, label in rows)), seed=st.integers(0, 5))
def test_equal_features_never_part_and_every_row_is_accounted_for(tmp_path, rows, seed):
    columns = {"text": [text for text, _ in rows], "y": [label for _, label in rows]}
    result, data, repairs = run(tmp_path, columns, TEXT, TRIM, ALLOWED, split=Split(seed=seed))
    splits = defaultdict(set)
    for row in data.to_pylist():
        splits[row["text"]].add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    dropped = {item["row_id"] for item in repairs if item["rule"] == "allowed_labels"}
    kept = set(data.column("row_id").to_pylist())
    assert dropped | kept == {str(index) for index in range(len(rows))}
    assert not dropped & kept
    for item in repairs:
        if item["rule"] == "trim":
            assert item["before"] == columns["text"][int(item["row_id"])]
    assert result.changed_cells == sum(text is not None and text != text.strip() for text in columns["text"])


@given(st.lists(st.one_of(st.none(), st.floats(allow_infinity=False)), min_size=1))
def test_digests_are_equal_where_features_are(values):
    table = pa.table({"a": pa.array(values, pa.float64())})
    digests = row_digests(table, TABLE)
    canonical = ["missing" if value is None or value != value else value + 0.0 for value in values]
    for left, first in zip(canonical, digests, strict=True):
        for right, second in zip(canonical, digests, strict=True):
            assert (left == right) == (first == second)
    places = positions(table, TABLE, 0)
    assert ((places >= 0) & (places < 1)).all()
    for left, first in zip(digests, places, strict=True):
        assert all((left == right) == (first == second) for right, second in zip(digests, places, strict=True))


def test_digests_do_not_depend_on_chunks():
    whole = pa.table({"pixels": pa.array([[1, 2], [3, 4], None, [5, 6]], pa.list_(pa.uint8(), 2))})
    parts = pa.concat_tables([whole.slice(0, 1), whole.slice(1, 2), whole.slice(3)])
    assert row_digests(whole, IMAGE).tolist() == row_digests(parts, IMAGE).tolist()
    assert len(set(row_digests(whole, IMAGE))) == 4
