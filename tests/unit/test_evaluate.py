"""Evaluation's numbers against values worked out by hand or by another library, and their properties."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.evaluate.answers import ClassAnswers
from tasks.evaluate.metrics import auroc, difference
from tasks.evaluate.numeric import NumberAnswers
from tasks.evaluate.paired import mcnemar, paired_interval
from tasks.evaluate.pareto import front
from tasks.evaluate.plots import draw_pareto, png
from tasks.evaluate.robust import OUT_OF_RANGE, PERTURBATIONS, measure_robustness
from tasks.evaluate.slices import gap_between, gaps, measure_slices
from tasks.serve.package import open_package
from tasks.spec.evaluate import Evaluate
from tasks.spec.feature import ImageFeature, TableFeature, TextFeature
from tasks.spec.label import NumberLabel

pytestmark = pytest.mark.timeout(60)
COUNT = st.integers(0, 60)


def test_auroc_is_scikit_learns():
    from sklearn.metrics import roc_auc_score

    draw = np.random.default_rng(1)
    true, p = draw.integers(0, 4, 300), draw.dirichlet(np.ones(4), 300).round(2)
    p /= p.sum(axis=1, keepdims=True)
    assert auroc(true, p) == pytest.approx(roc_auc_score(true, p, multi_class="ovr"), abs=1e-9)
    assert auroc(np.zeros(5, int), p[:5]) == 0.5


@pytest.mark.parametrize(("gained", "lost", "p"), [(0, 0, 1.0), (5, 5, 1.0), (10, 0, 2 / 1024), (1, 9, 22 / 1024)])
def test_mcnemar_is_exact(gained, lost, p):
    assert mcnemar(gained, lost) == pytest.approx(p)
    assert mcnemar(lost, gained) == pytest.approx(p)


def test_mcnemar_of_many_is_near_the_exact_one():
    from scipy.stats import binomtest

    assert mcnemar(540, 480) == pytest.approx(binomtest(540, 1020).pvalue, rel=0.02)


@given(gained=COUNT, lost=COUNT, both=st.integers(1, 500))
def test_a_paired_interval_holds_its_difference(gained, lost, both):
    n = gained + lost + both
    low, high = paired_interval(gained, lost, n)
    assert -1 <= low <= (gained - lost) / (n + 2) <= high <= 1
    assert paired_interval(lost, gained, n) == pytest.approx((-high, -low))


@given(a=COUNT, b=COUNT, more=st.integers(1, 60))
def test_a_difference_of_shares_lies_in_its_interval(a, b, more):
    low, high = difference(a, a + more, b, b + more)
    assert low <= a / (a + more) - b / (b + more) <= high


def test_newcombes_own_example():
    """56/70 against 48/80: 0.0524 to 0.3339 (Newcombe 1998, table II, method 10)."""
    assert difference(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_gaps_between_groups():
    values = np.array(["a"] * 20 + ["b"] * 20 + ["rare"] * 3)
    true = np.array([0, 1] * 10 + [0, 1] * 10 + [0] * 3)
    predicted = true.copy()
    predicted[20:30] = 1
    found = {(m.metric, m.slice): m for m in gaps("sex", values, true, predicted, 2)}
    assert found["accuracy", "sex=b"].value == 0.75
    assert found["accuracy_gap", "group:sex"].value == pytest.approx(0.25)
    assert found["selection_gap", "group:sex"].value == pytest.approx(0.25)
    assert found["recall_gap", "group:sex"].value == pytest.approx(0.5)
    assert ("accuracy", "sex=rare") not in found
    assert found["recall_gap", "group:sex"].low < 0.5 < found["recall_gap", "group:sex"].high


def test_the_gap_between_groups_of_what_is_no_share(tmp_path):
    """Of numbers: two groups of known errors, one too small to count; the interval is of both groups' together."""
    label = NumberLabel(kind="number", column="y", min=0, max=10)
    draw, values = np.random.default_rng(0), np.array(["a"] * 400 + ["b"] * 400 + ["rare"] * 3)
    true = draw.uniform(2, 8, 803)
    said = true + np.concatenate([draw.normal(0, 0.5, 400), draw.normal(0, 1.5, 400), np.zeros(3)])
    answers = NumberAnswers(true, said, label)
    pq.write_table(pa.table({"split": ["holdout"] * 803, "sex": values}), tmp_path / "data.parquet")
    measured = measure_slices(Evaluate(groups=("sex",)), tmp_path / "data.parquet", answers)
    found = {(m.metric, m.slice): m for m in measured}
    gap, a, b = found["rmse_gap", "group:sex"], found["rmse", "sex=a"], found["rmse", "sex=b"]
    assert ("rmse", "sex=rare") not in found
    assert gap.value == pytest.approx(b.value - a.value)
    assert gap.samples == 400
    assert b.low - a.high < gap.low < gap.value < gap.high < b.high - a.low
    assert gap.low > 0.8, "the groups differ by one, and that is no chance"
    one = gap_between("sex", np.array(["a"] * 803), answers)
    assert {m.metric for m in one} == {"rmse", "mae"}, "one group has no gap"


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_the_front_holds_the_best_and_nothing_that_is_beaten(found):
    points = [(str(k), cost, quality) for k, (cost, quality) in enumerate(found)]
    best = front(points)
    assert best
    for name, cost, quality in points:
        beaten = any(c <= cost and q >= quality and (c < cost or q > quality) for _, c, q in points)
        assert (name in best) == (not beaten)


def test_the_pareto_picture_has_size_latency_and_energy_and_each_name_once():
    costs = {"model_bytes": 2048.0, "p50_ms": 0.1, "joules_per_1000": 3.0}
    names = ["fp32", "fp16", "a-name-that-is-far-from-short", "champion"]
    alike = [(name, {"accuracy": 0.9, **costs}) for name in names]
    figure = draw_pareto(alike)
    png(figure)
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert [label.split()[:2] for label in labels] == [["model", "size"], ["median", "latency"], ["joules", "per"]]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    boxes = sorted((text.get_window_extent() for text in legend.get_texts()), key=lambda box: box.y0)
    assert all(lower.y1 <= upper.y0 + 1 for lower, upper in pairwise(boxes))
    assert max(axes.get_window_extent().x1 for axes in figure.axes) < min(box.x0 for box in boxes)
    shown = [axes.collections for axes in figure.axes]
    assert [[points.get_offsets()[0][0] for points in panel] for panel in shown] == [[2.0] * 4, [0.1] * 4, [3.0] * 4]


FEATURES = [
    (ImageFeature(kind="image", height=3, width=4, max_value=16), np.arange(24, dtype=np.float32).reshape(2, 12) % 16),
    (TextFeature(kind="text", max_chars=30), ["a short message", "", "x"]),
    (TableFeature(kind="table", columns=("a", "b")), np.array([[1, 2], [3, np.nan]], dtype=np.float32)),
]


def test_only_what_is_declared_is_changed(digits_package):
    made = digits_package()
    package = open_package(made.folder, made.digest_sha256, None)
    rows = np.array(made.rows, dtype=np.float32)
    answers = ClassAnswers(np.zeros(len(rows), int), package.predict(rows), package.signature.classes)
    for names in ((), ("blur",), ("shift", "noise")):
        found = measure_robustness(package, rows, answers, names)
        expected = [("accuracy", f"perturbed:{name}") for name in names] + [("out_of_range", "overall")]
        assert [(m.metric, m.slice) for m in found] == expected


@pytest.mark.parametrize(("feature", "rows"), FEATURES, ids=["image", "text", "table"])
def test_a_perturbed_row_is_still_a_row(feature, rows):
    from tasks.spec.feature import check_texts, encode

    for perturb in PERTURBATIONS[feature.kind].values():
        changed = perturb(rows, feature, np.random.default_rng(0))
        assert len(changed) == len(rows)
        check_texts(feature, changed) if feature.kind == "text" else encode(feature, changed)
    assert len(OUT_OF_RANGE[feature.kind](feature)) == 4
