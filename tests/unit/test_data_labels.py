"""Label evidence: conflicts, leakage, balance and what the judge says on it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.data.labels import Found, measurements, rules
from tasks.data.noise import Noise, audit, wilson
from tasks.data.twins import conflicting, leaked
from tasks.gate.judge import judge
from tasks.spec.feature import TableFeature
from tasks.spec.rules import Evidence
from tasks.spec.validation import LabelRules

pytestmark = pytest.mark.timeout(30)
NOTHING = np.zeros(0, np.int64)
PAIRS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz")), max_size=30)


def found(counts, conflicts=0, leaks=0, unknown=0, noise=0.0, samples=100):
    rows = sum(counts.values()) + unknown
    codes = np.repeat([*range(len(counts)), -1], [*counts.values(), unknown])
    mask = np.arange(rows)
    low, high = (0.0, 1.0) if not samples else wilson(noise, samples)
    audited = Noise(samples, noise, low, high, NOTHING, NOTHING, np.zeros(0))
    return Found(codes, counts, mask < conflicts, mask < leaks, mask < 0, mask.astype("S32"), audited)


def verdict(**facts):
    return judge(rules(LabelRules()), Evidence(subject=measurements(found(**facts))))


@given(PAIRS)
def test_a_conflict_is_equal_features_under_two_labels(pairs):
    digests = np.array([left for left, _ in pairs], dtype="S32")
    labels = [right for _, right in pairs]
    expected = [any(a == left and b != right for a, b in pairs) for left, right in pairs]
    assert conflicting(digests, labels).tolist() == expected


@given(PAIRS)
def test_a_leak_is_a_row_that_an_earlier_split_has_too(pairs):
    digests = np.array([left for left, _ in pairs], dtype="S32")
    names = {"x": "train", "y": "validation", "z": "holdout"}
    splits = np.array([names[right] for _, right in pairs], dtype="<U10")
    expected = [any(a == left and b < right for a, b in pairs) for left, right in pairs]
    assert leaked(digests, splits).tolist() == expected


def test_sound_labels_pass():
    assert verdict(counts={"ham": 80, "spam": 20}).verdict == "pass"


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"counts": {"ham": 100, "spam": 0}}, "class_rows (class:spam) = 0, must be at least 1"),
        ({"counts": {"ham": 1000, "spam": 2}}, "class_ratio (class:spam) = 0.001996, must be at least 0.01"),
        ({"counts": {"ham": 50, "spam": 50}, "conflicts": 2}, "conflict_ratio (overall) = 0.02"),
        ({"counts": {"ham": 50, "spam": 50}, "leaks": 1}, "leaked_ratio (overall) = 0.01, must be at most 0"),
        ({"counts": {"ham": 50, "spam": 50}, "unknown": 1}, "unknown_label_ratio"),
        ({"counts": {"ham": 50, "spam": 50}, "noise": 0.3}, "noise_ratio (overall) = 0.3, must be at most"),
        ({"counts": {"ham": 100, "spam": 0}, "samples": 0}, "class_rows (class:spam) = 0"),
    ],
)
def test_each_defect_fails_with_number_and_limit(facts, words):
    said = verdict(**facts)
    assert said.verdict == "fail"
    assert words in said.summary


def test_labels_that_could_not_be_audited_are_inconclusive():
    said = verdict(counts={"ham": 50, "spam": 50}, samples=0)
    assert said.verdict == "inconclusive"
    assert "noise_ratio" in said.summary


def test_the_noise_ratio_says_how_many_rows_support_it():
    (noise,) = (m for m in measurements(found({"ham": 9, "spam": 9}, noise=0.1)) if m.metric == "noise_ratio")
    assert noise.samples == 100
    assert noise.low < 0.1 < noise.high


@given(st.floats(0, 1), st.integers(1, 10**6))
def test_the_interval_holds_the_ratio(ratio, samples):
    low, high = wilson(ratio, samples)
    assert 0 <= low <= ratio + 1e-9
    assert ratio - 1e-9 <= high <= 1


@pytest.mark.parametrize("codes", [[0] * 20, [-1] * 20, [0] * 16 + [1] * 4, []])
def test_fewer_than_two_classes_of_five_rows_give_no_samples(codes):
    table = pa.table({"a": np.arange(float(len(codes)))})
    feature = TableFeature(kind="table", columns=("a",))
    assert audit(table, feature, np.array(codes, dtype=np.int64), 100).samples == 0
