"""Several annotators: agreement against the published example, truth against what was drawn."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.data.annotators import agreement, dawid_skene, majority

pytestmark = pytest.mark.timeout(60)
# Four observers, twelve units, five values, with gaps: the example of Krippendorff (2011), section C.
PUBLISHED = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""


def labels_of(text: str) -> np.ndarray:
    rows = [[-1 if word == "." else int(word) - 1 for word in line.split()] for line in text.split("\n") if line]
    return np.array(rows).T


def test_alpha_is_that_of_the_published_example():
    assert agreement(labels_of(PUBLISHED), 5) == pytest.approx(0.743, abs=0.0005)


def test_alpha_of_perfect_agreement_of_chance_and_of_nothing():
    same = np.repeat(np.arange(50)[:, None] % 3, 4, axis=1)
    assert agreement(same, 3) == 1
    assert abs(agreement(np.random.default_rng(0).integers(0, 3, (5000, 3)), 3)) < 0.02
    assert agreement(np.array([[0, -1], [-1, 1]]), 2) is None
    assert agreement(np.zeros((9, 2), int), 2) is None


def drawn(rows=800, classes=4):
    """True labels, and five annotators: three careful, one careless, one who confuses two classes."""
    draw = np.random.default_rng(5)
    truth = draw.integers(0, classes, rows)
    given = np.repeat(truth[:, None], 5, axis=1)
    for annotator, wrong in enumerate((0.1, 0.15, 0.2, 0.75)):
        hit = draw.random(rows) < wrong
        given[hit, annotator] = draw.integers(0, classes, hit.sum())
    given[:, 4] = np.array([1, 0, 2, 3])[truth]
    given[draw.random(given.shape) < 0.2] = -1
    return truth, given


def test_dawid_and_skene_find_the_truth_and_the_annotators_better_than_votes():
    truth, given = drawn()
    labelled = (given >= 0).any(axis=1)
    by_model, by_votes = dawid_skene(given, 4), majority(given, 4)
    right = [(found.codes == truth)[labelled].mean() for found in (by_model, by_votes)]
    assert right[0] > 0.98
    assert right[0] > right[1] + 0.03
    assert list(np.argsort(-by_model.accuracy)[:3]) == [0, 1, 2]
    assert by_model.accuracy[3] < 0.5
    wrong = by_model.codes != truth
    assert by_model.certainty[labelled & wrong].mean() < by_model.certainty[labelled & ~wrong].mean()


def test_a_row_without_a_label_has_none_and_one_vote_is_taken():
    given = np.array([[-1, -1], [1, -1], *[[0, 0], [1, 1]] * 5])
    for found in (majority(given, 2), dawid_skene(given, 2)):
        assert found.codes.tolist() == [-1, 1, *[0, 1] * 5]
    assert np.isfinite(dawid_skene(given, 2).certainty).all()
