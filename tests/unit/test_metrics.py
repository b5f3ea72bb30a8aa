"""Classification metrics against known values, scikit-learn, and what they must be by construction."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.evaluate.metrics import calibration_error, confusion, log_loss, macro_f1, measure, wilson

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),  # Newcombe 1998, Statistics in Medicine 17, table I, method 3, and R's prop.test
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (0, 0, 0.0, 1.0),
    ],
)
def test_the_interval_of_a_proportion(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(n=st.integers(1, 10_000), share=st.floats(0, 1))
def test_the_interval_holds_the_proportion_and_narrows_with_samples(n, share):
    successes = round(share * n)
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    more_low, more_high = wilson(successes * 4, n * 4)
    assert more_high - more_low <= high - low


@given(seed=st.integers(0, 1000), k=st.integers(2, 6), n=st.integers(1, 200))
@settings(max_examples=30, deadline=None)
def test_f1_and_log_loss_are_scikit_learns(seed, k, n):
    from sklearn.metrics import confusion_matrix, f1_score
    from sklearn.metrics import log_loss as reference_log_loss

    rng = np.random.default_rng(seed)
    true, probabilities = rng.integers(0, k, n), rng.dirichlet(np.ones(k), n)
    predicted, labels = probabilities.argmax(1), list(range(k))
    matrix = confusion(true, predicted, k)
    assert (matrix == confusion_matrix(true, predicted, labels=labels)).all()
    reference = f1_score(true, predicted, labels=labels, average="macro", zero_division=0)
    assert macro_f1(matrix) == pytest.approx(reference)
    assert log_loss(true, probabilities) == pytest.approx(reference_log_loss(true, probabilities, labels=labels))


def test_a_calibrated_model_has_a_small_calibration_error_and_a_boastful_one_a_large():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1, 20_000)
    true = (rng.uniform(size=len(p)) > p).astype(int)
    assert calibration_error(true, np.column_stack([p, 1 - p])) < 0.02
    sure = np.tile([1.0, 0.0], (len(p), 1))
    assert calibration_error(true, sure) == pytest.approx((true == 1).mean())
    assert calibration_error(np.zeros(5, int), sure[:5]) == 0


def test_measured_numbers_carry_samples_and_intervals_overall_and_by_class():
    true = np.array([0] * 8 + [1] * 2)
    probabilities = np.tile([0.9, 0.1, 0.0], (10, 1))
    found = {(m.metric, m.slice): m for m in measure(true, probabilities, ("a", "b", "c"))}
    accuracy = found["accuracy", "overall"]
    assert (accuracy.value, accuracy.samples) == (0.8, 10)
    assert accuracy.low < 0.8 < accuracy.high
    assert (found["recall", "class:a"].value, found["recall", "class:b"].value) == (1.0, 0.0)
    assert [found["recall", f"class:{name}"].samples for name in "abc"] == [8, 2, 0]
    f1 = found["macro_f1", "overall"]
    assert f1.low <= f1.value <= f1.high
    assert all(math.isfinite(m.value) for m in found.values())


def test_a_certain_and_wrong_answer_has_a_finite_loss():
    assert math.isfinite(log_loss(np.array([1]), np.array([[1.0, 0.0]])))
