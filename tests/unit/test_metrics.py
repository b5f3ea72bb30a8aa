"""Classification metrics against known values, scikit-learn, and what they must be by construction."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.evaluate.answers import ClassAnswers
from tasks.evaluate.metrics import (
    bootstrap_macro_f1,
    calibration_error,
    confusion,
    f1_interval,
    log_loss,
    macro_f1,
    measure,
    wilson,
)

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
    for m in found.values():
        assert m.low <= m.value <= m.high, m
    sure, unseen = found["f1", "class:a"], found["f1", "class:c"]
    assert (sure.low, sure.high) != (sure.value, sure.value)
    assert (unseen.low, unseen.high) == (0, 1), "a class that nobody saw is known nothing of"


@given(hits=st.integers(0, 300), missed=st.integers(0, 300))
def test_the_interval_of_f1_holds_it_and_has_a_width_where_all_are_right(hits, missed):
    low, high = f1_interval(hits, missed)
    assert 0 <= low <= 2 * hits / max(2 * hits + missed, 1) <= high + 1e-12 <= 1 + 1e-12
    assert low < high


def test_the_interval_of_f1_covers_as_often_as_it_says():
    draw = np.random.default_rng(0)
    share = 0.8
    true_f1 = 2 * share / (1 + share)
    found = [f1_interval(int(hits), 400 - int(hits)) for hits in draw.binomial(400, share, 2000)]
    covered = [low <= true_f1 <= high for low, high in found]
    assert 0.93 < np.mean(covered) < 0.97


def test_the_bootstrap_of_macro_f1_is_that_of_drawn_rows_and_cheap_with_many_classes():
    from sklearn.metrics import f1_score

    draw, k = np.random.default_rng(1), 3
    true = draw.choice(k, 300, p=(0.6, 0.3, 0.1))
    predicted = np.where(draw.random(300) < 0.8, true, draw.integers(0, k, 300))
    drawn = [draw.integers(0, 300, 300) for _ in range(400)]
    scores = [f1_score(true[rows], predicted[rows], average="macro") for rows in drawn]
    reference = np.quantile(scores, [0.025, 0.975])
    assert bootstrap_macro_f1(confusion(true, predicted, k)) == pytest.approx(reference, abs=0.02)
    many = confusion(draw.integers(0, 77, 3000), draw.integers(0, 77, 3000), 77)
    started = time.perf_counter()
    bootstrap_macro_f1(many)
    assert time.perf_counter() - started < 2


def test_macro_f1_of_a_part_is_over_the_classes_that_are_there():
    probabilities = np.tile([0.9, 0.1, 0.0], (20, 1))
    probabilities[15:] = [0.1, 0.9, 0.0]
    answers = ClassAnswers(np.array([0] * 14 + [1] * 6), probabilities, ("a", "b", "c"))
    accuracy, f1 = answers.measure_part("slice:x", np.arange(20))
    assert (accuracy.value, f1.samples) == (0.95, 20)
    assert f1.value == pytest.approx((28 / 29 + 10 / 11) / 2)
    assert f1.low < f1.value < f1.high <= 1
    one = answers.measure_part("slice:y", np.arange(10))[1]
    assert (one.low, one.value, one.high) == (1, 1, 1)


def test_a_certain_and_wrong_answer_has_a_finite_loss():
    assert math.isfinite(log_loss(np.array([1]), np.array([[1.0, 0.0]])))
