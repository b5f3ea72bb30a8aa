"""What a run may change of its workload: size and data freely, the gate and the review only tighter."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.spec.changes import changed
from tasks.spec.errors import BadRequest
from tasks.spec.load import load_workload

pytestmark = pytest.mark.timeout(30)
DIGITS = load_workload(Path(__file__).parents[2] / "workloads", "digits")
MNIST = load_workload(Path(__file__).parents[2] / "workloads", "mnist")


def test_no_parameter_changes_nothing():
    assert changed(DIGITS, {}) == DIGITS
    assert changed(DIGITS, {"seed": None, "min_accuracy": None, "review": None}) == DIGITS


def test_size_and_data_are_free():
    asked = {"max_epochs": 3, "batch_size": 32, "ranks": 1, "seed": 9, "objective": "quality", "source_path": "/x.csv"}
    found = changed(MNIST, asked)
    assert (found.train.stopping.max_epochs, found.train.batch_size, found.train.ranks) == (3, 32, 1)
    assert (found.train.seed, found.compress.objective, found.data.source.path) == (9, "quality", "/x.csv")
    assert found.gate == MNIST.gate
    assert found.review == MNIST.review


@given(st.floats(0, 1))
def test_min_accuracy_is_one_more_rule_beside_the_files_own(limit):
    found = changed(DIGITS, {"min_accuracy": limit})
    assert found.gate.rules[:-1] == DIGITS.gate.rules
    assert (found.gate.rules[-1].metric, found.gate.rules[-1].min) == ("accuracy", limit)
    assert found.gate.rules[-1].severity == "stop"


def test_the_review_can_be_switched_on_and_never_off():
    assert changed(DIGITS, {"review": True}).review.required
    assert changed(MNIST, {"review": True}).review.required
    with pytest.raises(BadRequest, match="mnist: review = false, must be true: the workload's file demands it"):
        changed(MNIST, {"review": False})


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"epochs": 3}, ["parameter epochs", "max_epochs", "review"]),
        ({"max_epochs": 0}, ["train.stopping.max_epochs = 0"]),
        ({"max_epochs": "3"}, ['train.stopping.max_epochs = "3"', "integer"]),
        ({"ranks": 3}, ["batch_size = 64", "nodes x ranks x accumulate = 3"]),
        ({"objective": "cheap"}, ["compress.objective", "cheap"]),
        ({"min_accuracy": "abc"}, ["abc", "number"]),
        ({"min_accuracy": float("nan")}, ["gate.rules.4.min", "finite"]),
        ({"min_accuracy": True}, ["gate.rules.4.min", "number"]),
        ({"review": "false"}, ["review.required", "boolean"]),
        ({"source_path": "/x.csv"}, ["data.source.path", "not a known field"]),
    ],
)
def test_what_a_field_refuses_is_one_line_that_names_it(params, words):
    with pytest.raises(BadRequest) as caught:
        changed(DIGITS, params)
    for word in words:
        assert word in str(caught.value)
