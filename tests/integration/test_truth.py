"""Late labels: joined by passport, told again without effect, and held against the gate's rules."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tasks.release.model import Version
from tasks.site import Site
from tasks.spec.errors import BadRequest
from tasks.spec.load import load_workload
from tasks.spec.rules import Gate, Rule
from tasks.spec.settings import resolve
from tasks.truth import label_predictions, measure_served

pytestmark = pytest.mark.timeout(120)
LIVE, OLD = "a" * 64, "b" * 64


@pytest.fixture
def site(tmp_path: Any, monkeypatch: Any) -> Site:
    """A site whose ledger says that LIVE serves, with 40 logged answers of it and 5 of OLD; none is a replay."""
    found = Site(resolve({"DRYDOCK_HOME": str(tmp_path / "home")}))
    live = Version(version="2", digest_sha256=LIVE)
    monkeypatch.setattr(type(found.ledger), "champion", lambda self, workload: live)
    folder = found.home / "predictions" / "digits"
    folder.mkdir(parents=True)
    lines = [line(LIVE, number) for number in range(40)] + [line(OLD, number) for number in range(5)]
    lines.append(line(LIVE, 99) | {"replayed": True})
    (folder / "01ARZ3NDEKTSV4RRFFQ69G5FAV.jsonl").write_text("".join(json.dumps(item) + "\n" for item in lines))
    return found


def line(digest: str, number: int) -> dict[str, Any]:
    at = "2026-11-24T10:00:00.000+00:00"
    return {"passport": f"{digest}.{number:026d}", "row": 0, "at": at, "label": str(number % 10), "probability": 0.9}


def labels(path: Any, wrong: int, digest: str = LIVE, numbers: Any = range(40)) -> Any:
    rows = [f"{digest}.{number:026d},{(number + (number < wrong)) % 10}" for number in numbers]
    path.write_text("passport,label\n" + "\n".join(rows) + "\n")
    return path


def test_labels_are_joined_and_the_live_version_is_measured(site, tmp_path):
    told = label_predictions(site, "digits", labels(tmp_path / "l.csv", wrong=4), "rita")
    assert (told.joined, told.unmatched, told.version) == (40, 0, "2")
    accuracy = next(m for m in told.measured if m.metric == "accuracy")
    assert (accuracy.value, accuracy.samples) == (0.9, 40)
    assert accuracy.low < 0.9 < accuracy.high
    assert told.verdict.verdict == "inconclusive", "the workload's rule wants 200 samples"
    row = site.ledger.history("digits")[-1]
    assert (row.action, row.actor) == ("late labels", "rita")
    assert "version 2 has accuracy 0.9" in row.reason


def test_rules_that_late_labels_cannot_answer_do_not_count(site, tmp_path, monkeypatch):
    described = load_workload(site.workloads, "digits")
    slices = ("overall", "class:*", "slice:dark", "perturbed:noise", "region=north")
    gate = Gate(rules=tuple(Rule(metric="accuracy" if "*" not in s else "recall", slice=s, min=0.1) for s in slices))
    monkeypatch.setattr("tasks.truth.load_workload", lambda *_: described.model_copy(update={"gate": gate}))
    told = label_predictions(site, "digits", labels(tmp_path / "l.csv", wrong=4), "rita")
    assert told.verdict.verdict == "pass"


def test_the_same_again_changes_nothing_and_a_correction_replaces(site, tmp_path):
    first = label_predictions(site, "digits", labels(tmp_path / "l.csv", wrong=4), "rita")
    again = label_predictions(site, "digits", labels(tmp_path / "l.csv", wrong=4), "rita")
    assert first.measured == again.measured
    better = label_predictions(site, "digits", labels(tmp_path / "m.csv", wrong=0, numbers=range(4)), "rita")
    assert next(m for m in better.measured if m.metric == "accuracy").value == 1


def test_another_version_and_replays_do_not_count(site, tmp_path):
    old = label_predictions(site, "digits", labels(tmp_path / "l.csv", 0, OLD, range(5)), "rita")
    assert (old.joined, old.measured, old.verdict) == (5, (), None)
    none = label_predictions(site, "digits", labels(tmp_path / "m.csv", 0, LIVE, [99, 1000]), "rita")
    assert (none.joined, none.unmatched) == (0, 2)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "is not there"),
        ("passport,truth\na,1\n", "has no column 'label', has passport, truth"),
        ("passport,label\na,eleven\n", "label 'eleven' is no class, must be one of 0, 1"),
        ("", "can't be read as CSV or Parquet"),
    ],
)
def test_a_wrong_file_is_one_line(site, tmp_path, content, told):
    if content is not None:
        (tmp_path / "l.csv").write_text(content)
    with pytest.raises(BadRequest, match=told) as caught:
        label_predictions(site, "digits", tmp_path / "l.csv", "rita")
    assert "\n" not in str(caught.value)


def test_an_answer_of_a_class_that_is_gone_counts_nowhere():
    assert measure_served([("x", "a")], ("a", "b")) == ()
    assert len(measure_served([("a", "a"), ("b", "a"), ("x", "a")], ("a", "b"))) == 6
