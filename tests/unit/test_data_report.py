"""Profiles, their shift, the conditions in SQL, and the drawings of a report."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data import drawing
from tasks.data.conditions import broken_by, broken_rows, count_broken
from tasks.data.profile import profile_of, shift
from tasks.data.scalars import opened
from tasks.spec.errors import BadRequest
from tasks.spec.feature import TextFeature
from tasks.spec.validation import Expectations

pytestmark = pytest.mark.timeout(60)
NUMBERS = st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=60)
TEXTS = st.lists(st.one_of(st.none(), st.sampled_from("abc")), min_size=1, max_size=40)


def column(values, kind="float64"):
    return pd.DataFrame({"x": pd.Series(values, dtype=kind)})


@given(NUMBERS)
def test_the_same_numbers_have_not_shifted(values):
    frame = column(values)
    assert shift(profile_of(frame)["x"], frame, "x") == pytest.approx(0, abs=1e-9)


@given(TEXTS, TEXTS)
def test_a_shift_of_categories_is_half_the_sum_of_differences(one, two):
    before, now = profile_of(column(one, "str"))["x"], column(two, "str")
    kinds = ["a", "b", "c", None]
    expected = sum(abs(one.count(k) / len(one) - two.count(k) / len(two)) for k in kinds) / 2
    assert shift(before, now, "x") == pytest.approx(expected)


@given(NUMBERS, NUMBERS)
def test_a_shift_lies_between_0_and_1_and_nothing_in_common_is_1(one, two):
    before = profile_of(column(one))["x"]
    assert 0 <= shift(before, column(two), "x") <= 1
    gone = profile_of(column([1.0, 2.0]))["x"]
    assert shift(gone, column([None, None]), "x") == 1


def test_a_column_of_another_kind_has_shifted_wholly():
    many = column(np.arange(100.0))
    assert shift(profile_of(many)["x"], column(["a"] * 5, "str"), "x") == 1


def test_far_numbers_and_new_numbers_are_noticed():
    random = np.random.default_rng(0)
    before = profile_of(column(random.normal(size=5000)))["x"]
    assert shift(before, column(random.normal(size=5000)), "x") < 0.06
    assert shift(before, column(random.normal(3, 1, 5000)), "x") > 0.8
    few = profile_of(column([0.0, 1.0] * 50))["x"]
    assert shift(few, column([0.0, 7.0] * 50), "x") == pytest.approx(0.5)


# --- conditions ----------------------------------------------------------------------------------------------


def expectation(kind, **kwargs):
    return {"type": f"expect_column_{kind}", "kwargs": {"column": "label"} | kwargs}


@settings(max_examples=20, deadline=None)
@given(labels=st.lists(st.one_of(st.none(), st.sampled_from(["a", "b'", "cc"])), min_size=1, max_size=20))
def test_exact_counts_are_what_the_rows_say(tmp_path_factory, labels):
    path = tmp_path_factory.mktemp("t") / "t.parquet"
    ids = [str(index) for index in range(len(labels))]
    pq.write_table(pa.table({"row_id": ids, "text": ["t"] * len(ids), "label": pa.array(labels, pa.string())}), path)
    present = [label for label in labels if label is not None]
    asked = [
        (len(labels) - len(present), expectation("values_to_not_be_null")),
        (sum(label != "b'" for label in present), expectation("values_to_be_in_set", value_set=["b'"])),
        (sum(label == "b'" for label in present), expectation("values_to_not_be_in_set", value_set=["b'"])),
        (sum(len(label) > 1 for label in present), expectation("value_lengths_to_be_between", max_value=1)),
    ]
    with opened(path, TextFeature(kind="text")) as scalars:
        counts = count_broken(scalars, [item for _, item in asked])
        assert list(counts.values()) == [count for count, _ in asked]
        for count, item in asked:
            assert len(broken_rows(scalars, item)) == count
        unique = expectation("values_to_be_unique")
        assert count_broken(scalars, [unique]) == {0: len(present) - len(set(present))}
        assert len(broken_rows(scalars, unique)) == sum(present.count(label) > 1 for label in present)


@pytest.mark.parametrize(
    "item",
    [
        expectation("mean_to_be_between", min_value=1),
        expectation("values_to_not_be_null", mostly=0.9),
        expectation("values_to_be_between"),
        {"type": "expect_table_row_count_to_equal", "kwargs": {"value": 3}},
    ],
)
def test_what_names_no_rows_has_no_condition(item):
    assert broken_by(item) is None


def test_a_check_on_no_single_row_cannot_quarantine():
    with pytest.raises(BadRequest, match=r"severity\.volume = 'quarantine', must be stop or warn"):
        Expectations.parse({"severity": {"volume": "quarantine"}}, "x")
    with pytest.raises(BadRequest, match="colour"):
        Expectations.parse({"severity": {"colour": "warn"}}, "x")
    assert Expectations().severity_of("shift") == "stop"
    assert Expectations(severity={"shift": "warn"}).severity_of("shift") == "warn"


# --- drawings ------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4), min_size=1, max_size=5))
def test_a_histogram_stays_inside_its_frame(counts):
    import xml.etree.ElementTree as xml

    tree = xml.fromstring(drawing.histogram(counts, ("<low>", "high & mighty")))
    for box in tree.iter("{http://www.w3.org/2000/svg}rect"):
        assert float(box.get("y")) >= -0.6
        assert float(box.get("y")) + float(box.get("height")) <= drawing.HEIGHT - drawing.FOOT + 0.6


def test_nothing_to_draw_is_drawn_all_the_same():
    assert drawing.shares([], [], []).startswith("<svg")
    assert drawing.missing_map({}).startswith("<svg")
    assert drawing.meter(2, 1).startswith("<svg")
    assert drawing.histogram([[]], ("", "")).startswith("<svg")
