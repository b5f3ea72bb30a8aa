"""The real cleanlab on data whose wrong labels are known by construction."""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.data.clean import clean
from tasks.data.corrections import correct, merge, read
from tasks.data.ingest import ingest, resolve
from tasks.data.labels import validate_labels
from tasks.spec.clean import DropDuplicates
from tasks.spec.data import Split
from tasks.spec.feature import ImageFeature, TableFeature, TextFeature
from tasks.spec.label import Label
from tasks.spec.requests import CleanRequest, IngestRequest, ValidateLabelsRequest
from tasks.spec.source import BundledSource, FilesSource
from tasks.spec.validation import LabelRules
from tasks.spec.value import RoomRef
from tasks.store.manifest import write_manifest

pytestmark = pytest.mark.timeout(120)
ROOT = Path(__file__).parents[2]
REAL = Path(os.environ.get("DRYDOCK_TEST_DATA") or ROOT.parent / "shared" / "data")
DIGITS = ImageFeature(kind="image", height=8, width=8, max_value=16)
TEN = Label(classes=tuple(range(10)))


def ref(folder: Path) -> RoomRef:
    return RoomRef(uri=str(folder), digest_sha256=write_manifest(folder))


def cleaned(folder: Path, source, feature, label, split=None, declared=()) -> Path:
    split = split or Split()
    request = IngestRequest(
        workload="w",
        source=source,
        files=resolve(source, folder),
        feature=feature,
        label=label,
        split_column=split.column,
    )
    ingest(request, folder / "raw")
    clean(
        CleanRequest(
            workload="w", raw=ref(folder / "raw"), feature=feature, label=label, rules=declared, split=split
        ),
        folder / "clean",
    )
    return folder / "clean"


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> pa.Table:
    folder = tmp_path_factory.mktemp("digits")
    source = BundledSource(kind="sklearn", name="digits")
    return pq.read_table(cleaned(folder, source, DIGITS, TEN) / "data.parquet")


def run(folder: Path, table: pa.Table, feature=DIGITS, label=TEN, limits=None, corrections=None):
    (folder / "clean").mkdir(exist_ok=True)
    pq.write_table(table, folder / "clean" / "data.parquet")
    request = ValidateLabelsRequest(
        workload="w",
        clean=ref(folder / "clean"),
        feature=feature,
        label=label,
        rules=limits or LabelRules(),
        corrections=corrections,
    )
    result = validate_labels(request, folder / "room")
    return result, pq.read_table(folder / "room" / "suspects.parquet").to_pylist()


def relabelled(table: pa.Table, labels) -> pa.Table:
    return table.set_column(table.column_names.index("label"), "label", pa.array(labels, pa.string()))


def flipped(table: pa.Table, ratio: float) -> tuple[pa.Table, set[str]]:
    """A table with a share of its labels moved to another class, and the ids of those rows."""
    random = np.random.default_rng(7)
    labels = np.array(table.column("label").to_pylist())
    wrong = random.random(len(labels)) < ratio
    shifts = random.integers(1, 10, len(labels))
    moved = ((labels.astype(int) + shifts) % 10).astype(str)
    labels[wrong] = moved[wrong]
    return relabelled(table, labels), set(np.array(table.column("row_id").to_pylist())[wrong])


def test_the_digits_as_they_are_pass_within_seconds(tmp_path, digits):
    began = time.process_time()
    result, suspects = run(tmp_path, digits)
    assert time.process_time() - began < 15, "measured 4 s, imports and both cores counted"
    assert result.verdict.verdict == "pass", result.verdict.summary
    assert result.noise_ratio < 0.02
    assert (result.conflicts, result.leaked) == (0, 0)
    assert len(suspects) == result.suspects < 40
    report = json.loads((tmp_path / "room" / "report.json").read_text())
    assert report["audited_rows"] == report["rows"] == 1797
    content = {path.name: path.read_bytes() for path in (tmp_path / "room").iterdir()}
    run(tmp_path, digits)
    assert {path.name: path.read_bytes() for path in (tmp_path / "room").iterdir()} == content


def test_seeded_flips_are_found_and_refused(tmp_path, digits):
    table, wrong = flipped(digits, 0.15)
    result, suspects = run(tmp_path, table)
    assert result.verdict.verdict == "fail"
    assert "noise_ratio" in result.verdict.summary
    assert abs(result.noise_ratio - 0.15) < 0.04
    found = {row["row_id"] for row in suspects}
    assert len(found & wrong) / len(wrong) > 0.8, "recall"
    assert len(found & wrong) / len(found) > 0.8, "precision"
    assert [row["quality"] for row in suspects] == sorted(row["quality"] for row in suspects)
    truth = dict(zip(digits.column("row_id").to_pylist(), digits.column("label").to_pylist(), strict=True))
    worst = suspects[: len(suspects) // 2]
    assert np.mean([row["suggested"] == truth[row["row_id"]] for row in worst]) > 0.9


def test_a_few_wrong_labels_pass_and_are_listed_first(tmp_path, digits):
    table, wrong = flipped(digits, 0.03)
    result, suspects = run(tmp_path, table)
    assert result.verdict.verdict == "pass", result.verdict.summary
    assert np.mean([row["row_id"] in wrong for row in suspects[: len(wrong) // 2]]) > 0.8


@pytest.mark.parametrize("labels", [["1"] * 1797, [str(i % 9) for i in range(1797)]])
def test_one_class_or_a_class_without_rows_fails(tmp_path, digits, labels):
    result, _ = run(tmp_path, relabelled(digits, labels), limits=LabelRules(min_class_ratio=0))
    assert result.verdict.verdict == "fail"
    assert "class_rows (class:" in result.verdict.summary
    assert "must be at least 1" in result.verdict.summary


def test_unknown_and_missing_labels_fail(tmp_path, digits):
    labels = digits.column("label").to_pylist()
    for wrong in ("ten", None):
        result, _ = run(tmp_path, relabelled(digits, [wrong, *labels[1:]]))
        assert result.verdict.verdict == "fail"
        assert "unknown_label_ratio" in result.verdict.summary


def test_conflicts_and_leaks_are_counted_and_listed(tmp_path, digits):
    twins = digits.slice(0, 30)
    twins = twins.set_column(0, "row_id", pa.array([f"twin{i}" for i in range(30)]))
    twins = relabelled(twins, [str((int(label) + 1) % 10) for label in twins.column("label").to_pylist()])
    twins = twins.set_column(twins.column_names.index("split"), "split", pa.array(["holdout"] * 30))
    result, _ = run(tmp_path, pa.concat_tables([digits, twins]))
    earlier = sum(split != "holdout" for split in digits.slice(0, 30).column("split").to_pylist())
    assert result.conflicts == 60
    assert result.leaked == earlier
    assert result.verdict.verdict == "fail"
    listed = pq.read_table(tmp_path / "room" / "conflicts.parquet").to_pylist()
    assert len(listed) == 60
    for first, second in zip(listed[::2], listed[1::2], strict=True):
        assert first["group"] == second["group"]
        assert first["label"] != second["label"]


def test_larger_sets_are_audited_by_a_sample(tmp_path, digits):
    result, _ = run(tmp_path, digits, limits=LabelRules(max_audited_rows=500))
    report = json.loads((tmp_path / "room" / "report.json").read_text())
    assert report["audited_rows"] == 500
    assert result.verdict.verdict == "pass"
    (noise,) = (item for item in report["measurements"] if item["metric"] == "noise_ratio")
    assert noise["samples"] == 500


def test_tables_with_missing_numbers_are_audited(tmp_path):
    random = np.random.default_rng(0)
    code = random.integers(0, 2, 600)
    a = code * 4 + random.normal(size=600)
    a[::50] = np.nan
    labels = np.array(["x", "y"])[code]
    labels[:18] = np.array(["y", "x"])[code[:18]]
    columns = {
        "row_id": [str(i) for i in range(600)],
        "a": a,
        "empty": pa.nulls(600, pa.float64()),
        "label": labels.tolist(),
        "split": ["train"] * 600,
    }
    feature = TableFeature(kind="table", columns=("a", "empty"))
    # Rows without a number are equal to each other, so a few are in conflict.
    limits = LabelRules(max_conflict_ratio=0.05)
    result, suspects = run(tmp_path, pa.table(columns), feature, Label(classes=("x", "y")), limits)
    assert result.verdict.verdict == "pass", result.verdict.summary
    assert abs(result.noise_ratio - 0.03) < 0.03
    assert sum(int(row["row_id"]) < 18 for row in suspects) >= 12


def test_real_messages_pass_once_duplicates_are_dropped(tmp_path):
    path = REAL / "sms_spam" / "sms.parquet"
    if not path.is_file():
        pytest.skip(f"the SMS Spam Collection is not at {path}; set DRYDOCK_TEST_DATA")
    source, label = FilesSource(kind="files", path=str(path)), Label(classes=("ham", "spam"))
    feature, split = TextFeature(kind="text"), Split(column="split")
    duplicates = DropDuplicates(rule="drop_duplicates")
    room = cleaned(tmp_path, source, feature, label, split, [duplicates])
    table = pq.read_table(room / "data.parquet")
    result, suspects = run(tmp_path, table, feature, label)
    assert result.verdict.verdict == "pass", result.verdict.summary
    assert result.noise_ratio < 0.02
    assert len(suspects) == result.suspects > 0


def test_real_mnist_is_read_and_cleaned_in_seconds(tmp_path):
    path = REAL / "mnist" / "test.parquet"
    if not path.is_file():
        pytest.skip(f"MNIST is not at {path}; set DRYDOCK_TEST_DATA")
    source = FilesSource(kind="files", path=str(path.parent / "t[er]*[tn].parquet"))
    feature = ImageFeature(kind="image", height=28, width=28)
    began = time.monotonic()
    table = pq.read_table(cleaned(tmp_path, source, feature, TEN) / "data.parquet")
    assert time.monotonic() - began < 30, "measured 4 s"
    assert table.num_rows == 70_000
    counts = np.unique(table.column("label").to_pylist(), return_counts=True)[1]
    assert counts.sum() == 70_000
    assert counts[0] == 5923 + 980


def test_the_relabel_queue_is_answered_merged_and_applied_by_the_next_cleaning(tmp_path, digits):
    """From wrong labels to a right table: the queue's CSV answered by the truth, twice audited."""
    table, wrong = flipped(digits, 0.08)
    result, _ = run(tmp_path, table, limits=LabelRules(max_noise_ratio=0.05))
    assert result.verdict.verdict == "fail"
    rows = list(csv.DictReader((tmp_path / "room" / "queue.csv").read_text().splitlines()))
    assert len(rows) == result.suspects
    assert [float(row["quality"]) for row in rows] == sorted(float(row["quality"]) for row in rows)
    truth = dict(zip(digits.column("row_id").to_pylist(), digits.column("label").to_pylist(), strict=True))
    for row in rows:
        row["answer"] = truth[row["row_id"]]
    with (tmp_path / "answers.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    found = merge(tmp_path / "kept", "w", tmp_path / "answers.csv", TEN.names, "ann", "2026-11-26T10:00:00+00:00")
    assert found.changed == len({row["row_id"] for row in rows} & wrong)
    assert found.changed + found.confirmed == len(rows)
    fixed, changes = correct(table, DIGITS, "label", read(found.room))
    labels = dict(zip(fixed.column("row_id").to_pylist(), fixed.column("label").to_pylist(), strict=True))
    assert all(labels[row["row_id"]] == truth[row["row_id"]] for row in rows)
    assert len(changes) == found.changed
    again, suspects = run(tmp_path, fixed, limits=LabelRules(max_noise_ratio=0.05), corrections=found.room)
    assert again.verdict.verdict == "pass", again.verdict.summary
    assert not {row["row_id"] for row in suspects} & {row["row_id"] for row in rows}, "nobody is asked twice"


def test_the_queue_page_shows_the_pictures_and_asks_no_network(tmp_path, digits):
    table, _ = flipped(digits, 0.03)
    run(tmp_path, table)
    page = (tmp_path / "room" / "queue.html").read_text()
    assert page.count("data:image/png;base64,") > 20
    assert "http" not in page
    assert "<option>!drop</option>" in page
