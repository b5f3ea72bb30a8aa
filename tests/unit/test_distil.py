"""Which of several students is taken, and what is said of those that are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tasks import plan
from tasks.compress import distil as distils
from tasks.compress.network import Source
from tasks.spec.load import load_workload
from tasks.spec.requests import CompressRequest
from tasks.spec.workload import Workload
from tasks.train.prepare import read_split
from tasks.train.recipes import build

pytestmark = pytest.mark.timeout(60)
ROOT = Path(__file__).parents[2]
# Hidden units -> how many of the validation rows its student answers wrong.
WRONG = {8: 20, 12: 3, 16: 2, 24: 2}


@pytest.fixture
def taught(train_request, tmp_path, monkeypatch):
    """``taught(objective, *hidden)``: distil students of so many hidden units, whose training writes what was drawn."""
    from safetensors.torch import save_file

    asked = train_request()
    data = Path(asked.dataset.uri) / "data.parquet"
    _, true = read_split(data, asked.feature, asked.label, "validation")

    def learn(request, folder, amend) -> None:
        body = build(request.train.recipe, request.feature, 10, None, folder)
        save_file(body.state_dict(), folder / "weights.safetensors")

    def answers_of(student, rows):
        hidden = student.recipe.hidden[0]
        return np.eye(10)[np.where(np.arange(len(true)) < WRONG[hidden], (true + 1) % 10, true)]

    monkeypatch.setattr(distils, "answers_of", answers_of)
    monkeypatch.setattr(distils, "_seconds_a_row", lambda student, rows: 1.0 / student.recipe.hidden[0])

    def run(objective: str | None, *hidden: int, **more):
        students = [{"kind": "mlp", "hidden": [width]} for width in hidden]
        variant = {"kind": "distilled", "student": students if len(students) > 1 else students[0], **more}
        names = ("dataset", "feature", "label", "train")
        fields = {name: getattr(asked, name).model_dump(mode="json") for name in names}
        fields |= {"workload": "digits", "trained": asked.dataset.model_dump()}
        fields |= {"variant": variant, "objective": objective}
        request = CompressRequest.parse(fields, "the test's request")
        teacher = Source(request, tmp_path, asked.train.recipe)
        teacher.__dict__["body"] = build(asked.train.recipe, asked.feature, 10, None, tmp_path)
        found = distils.distil(teacher, request.variant, data, tmp_path / "student", learn)
        return found.recipe.hidden[0], found.note

    return run


@pytest.mark.parametrize(
    ("objective", "taken", "note"),
    [
        (
            "quality",
            16,
            "student 2 (mlp) taken: accuracy = 0.9889; student 0: accuracy = 0.8889, the best has 0.9889; "
            "student 1: accuracy = 0.9833; student 3: accuracy = 0.9889",
        ),
        (
            "size",
            12,
            "student 1 (mlp) taken: parameters = 910; student 0: accuracy = 0.8889, the best has 0.9889; "
            "student 2: parameters = 1210; student 3: parameters = 1810",
        ),
        (
            "latency",
            24,
            "student 3 (mlp) taken: seconds a row = 0.04167; student 0: accuracy = 0.8889, the best has 0.9889; "
            "student 1: seconds a row = 0.08333; student 2: seconds a row = 0.0625",
        ),
    ],
)
def test_the_objective_takes_one_of_those_that_are_hardly_worse_than_the_best(taught, objective, taken, note):
    assert taught(objective, *WRONG) == (taken, note)


def test_how_much_worse_it_may_be_is_declared(taught):
    assert taught("size", *WRONG, worse=0.2)[0] == 8
    assert taught("size", *WRONG, worse=0.0)[0] == 16
    assert taught("energy", *WRONG, worse=0.0)[0] == 24


def test_one_student_is_taken_and_nothing_is_said(taught):
    assert taught(None, 8) == (8, "")


def test_a_changed_objective_compresses_anew_only_where_it_takes_a_student():
    """It is asked of no other variant, whose key it would change."""
    mlp = {"kind": "mlp"}
    several = {"kind": "distilled", "name": "several", "student": [mlp, {"kind": "mlp", "hidden": [8]}]}
    one = {"kind": "distilled", "name": "one", "student": mlp}
    workload = load_workload(ROOT / "workloads", "digits")
    asked = {"variants": ["fp32", one, several], "objective": "latency"}
    workload = Workload.parse(workload.model_dump(mode="json") | {"compress": asked}, "x")
    done = {name: {"room": {"uri": "/x", "digest_sha256": "0" * 64}} for name in ("train", "version")}
    found = [plan.compress(workload, done, None, item).objective for item in workload.compress.labels]
    assert found == [None, None, "latency"]
