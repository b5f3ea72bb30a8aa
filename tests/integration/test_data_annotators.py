"""Several annotators through the steps: a label column made of theirs, told, judged, queued."""

from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from tasks.data.clean import clean
from tasks.data.ingest import ingest, resolve
from tasks.data.labels import validate_labels
from tasks.spec.clean import Allowed
from tasks.spec.data import Data, Split
from tasks.spec.errors import BadRequest
from tasks.spec.feature import TextFeature
from tasks.spec.label import Label
from tasks.spec.requests import CleanRequest, IngestRequest, ValidateLabelsRequest
from tasks.spec.source import FilesSource
from tasks.spec.validation import LabelRules
from tasks.spec.value import RoomRef
from tasks.store.manifest import write_manifest

pytestmark = pytest.mark.timeout(120)
FEATURE = TextFeature(kind="text")
PEOPLE = ("ann", "bob", "eve")


def label_of(truth="dawid-skene"):
    return Label.parse({"classes": ["ham", "spam"], "annotators": {"columns": list(PEOPLE), "truth": truth}}, "label")


def rows(count=300):
    """Texts that say what they are; ann is careful, bob a little less, eve says spam to everything."""
    draw, found = np.random.default_rng(0), []
    for number in range(count):
        truth = ("ham", "spam")[number % 2]
        other = {"ham": "spam", "spam": "ham"}[truth]
        said = [truth if draw.random() < 0.98 else other, truth if draw.random() < 0.93 else other, "spam"]
        words = {"ham": "see you at home", "spam": "win a free prize"}[truth]
        found.append([f"{words} {number}", *(None if draw.random() < 0.05 else one for one in said)])
    return found


def cleaned(folder, label, table, *rules):
    with (folder / "d.csv").open("w") as stream:
        csv.writer(stream).writerows([["text", *PEOPLE], *table])
    source = FilesSource(kind="files", path="d.csv")
    facts = {"workload": "w", "source": source, "files": resolve(source, folder), "feature": FEATURE, "label": label}
    ingest(IngestRequest(**facts), folder / "raw")
    raw = RoomRef(uri=str(folder / "raw"), digest_sha256=write_manifest(folder / "raw"))
    request = CleanRequest(workload="w", raw=raw, feature=FEATURE, label=label, rules=rules, split=Split())
    clean(request, folder / "clean")
    return RoomRef(uri=str(folder / "clean"), digest_sha256=write_manifest(folder / "clean"))


def test_truth_is_inferred_told_judged_and_queued(tmp_path):
    label = label_of()
    room = cleaned(tmp_path, label, rows(), Allowed(rule="allowed_labels"))
    table = pq.read_table(tmp_path / "clean" / "data.parquet").to_pylist()
    right = [row["label"] == ("ham", "spam")[int(row["row_id"]) % 2] for row in table]
    assert np.mean(right) > 0.95
    facts = json.loads((tmp_path / "clean" / "annotators.json").read_text())
    assert [one["name"] for one in facts["people"]] == list(PEOPLE)
    accuracy = [one["accuracy"] for one in facts["people"]]
    assert accuracy[0] > accuracy[1] > 0.9 > 0.6 > accuracy[2]
    assert 0 < facts["agreement"] < 0.6
    judge = ValidateLabelsRequest(workload="w", clean=room, feature=FEATURE, label=label, rules=LabelRules())
    passed = validate_labels(judge, tmp_path / "labels")
    assert passed.verdict.verdict == "pass", passed.verdict.summary
    queue = list(csv.DictReader((tmp_path / "labels" / "queue.csv").open()))
    disputed = [row for row in queue if row["reason"].startswith("annotators disagree: ")]
    assert 0 < len(disputed) <= facts["disputed"]
    assert all(float(row["quality"]) < 0.9 for row in disputed)
    strict = judge.model_copy(update={"rules": LabelRules(min_agreement=0.8)})
    assert "annotator_agreement" in validate_labels(strict, tmp_path / "strict").verdict.summary


def test_votes_are_counted_where_that_is_asked_and_nobody_s_label_is_refused(tmp_path):
    cleaned(tmp_path, label_of("majority"), [["a", "ham", "ham", "spam"], ["b", "spam", None, "spam"]] * 9)
    labels = pq.read_table(tmp_path / "clean" / "data.parquet").column("label").to_pylist()
    assert labels == ["ham", "spam"] * 9
    with pytest.raises(BadRequest, match="name no class of"):
        cleaned(tmp_path, label_of(), [["a", "yes", "no", None]])


def test_an_annotator_is_no_other_column():
    data = {"source": {"kind": "files", "path": "d.csv"}, "feature": {"kind": "text"}}
    label = {"classes": ["x", "y"], "annotators": {"columns": ["text", "b"]}}
    with pytest.raises(BadRequest, match="'text' is another column too"):
        Data.parse(data | {"label": label}, "w")
