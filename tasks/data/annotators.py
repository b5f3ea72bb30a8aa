"""Several people's labels of one row: how far they agree, which label is likely true, and how good each of them is.

Agreement is Krippendorff's alpha for nominal data (2011), which takes any number of labels a row: 1 is perfect, 0 is
chance. Truth is what most say, or what Dawid and Skene's model says (1979): each annotator has a confusion matrix,
found by expectation maximisation together with the true labels, so that a careless one counts less.

    B rows   A annotators   K classes
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

ROUNDS, TOLERANCE = 100, 1e-6
# Added to each cell of a confusion matrix: an annotator with few labels is drawn to knowing nothing.
PRIOR = 0.01


class Truth(NamedTuple):
    """``codes`` int64 [B], -1 where nobody labelled; ``certainty`` float64 [B]: the probability of that label;
    ``accuracy`` float64 [A]: how often each annotator says it."""

    codes: np.ndarray
    certainty: np.ndarray
    accuracy: np.ndarray


def agreement(given: np.ndarray, num_classes: int) -> float | None:
    """Return Krippendorff's alpha of labels int [B, A], -1 where there is none; None where no row has two labels, or
    all labels are one class."""
    import numpy as np

    counts = _counts(given, num_classes)
    labels = counts.sum(axis=1)
    counts, labels = counts[labels > 1], labels[labels > 1]
    if not len(counts):
        return None
    pairs = (counts / (labels - 1)[:, None]).T @ counts
    pairs[np.diag_indices(num_classes)] -= (counts / (labels - 1)[:, None]).sum(axis=0)
    totals = pairs.sum(axis=1)
    total = totals.sum()
    by_chance = total**2 - np.square(totals).sum()
    return None if by_chance <= 0 else float(1 - (total - 1) * (total - np.trace(pairs)) / by_chance)


def majority(given: np.ndarray, num_classes: int) -> Truth:
    """Return what most annotators say; of two classes with as many votes the first."""
    import numpy as np

    counts = _counts(given, num_classes)
    votes = counts.sum(axis=1)
    codes = np.where(votes > 0, counts.argmax(axis=1), -1)
    certainty = counts.max(axis=1) / np.maximum(votes, 1)
    return Truth(codes, certainty, _accuracy(given, codes))


def dawid_skene(given: np.ndarray, num_classes: int) -> Truth:
    """Return what the annotators mean by the model of Dawid and Skene, begun at the votes."""
    import numpy as np

    counts = _counts(given, num_classes)
    belief = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    there = counts.sum(axis=1) > 0
    for _ in range(ROUNDS):
        before, belief = belief, _expected(given, belief, there)
        if np.abs(belief - before).max(initial=0) < TOLERANCE:
            break
    codes = np.where(there, belief.argmax(axis=1), -1)
    return Truth(codes, belief.max(axis=1), _accuracy(given, codes))


def _expected(given: np.ndarray, belief: np.ndarray, there: np.ndarray) -> np.ndarray:
    """One round: confusion matrices from beliefs, then beliefs from confusion matrices."""
    import numpy as np

    num_classes = belief.shape[1]
    share = belief[there].mean(axis=0) if there.any() else np.full(num_classes, 1 / num_classes)
    log = np.tile(np.log(np.maximum(share, 1e-12)), (len(given), 1))
    for labels in given.T:
        rows = np.flatnonzero(labels >= 0)
        confusion = np.full((num_classes, num_classes), PRIOR)  # [true, given]
        np.add.at(confusion.T, labels[rows], belief[rows])
        confusion /= confusion.sum(axis=1, keepdims=True)
        log[rows] += np.log(confusion[:, labels[rows]]).T
    raised = np.exp(log - log.max(axis=1, keepdims=True))
    return np.where(there[:, None], raised / raised.sum(axis=1, keepdims=True), belief)


def _counts(given: np.ndarray, num_classes: int) -> np.ndarray:
    """How many annotators say each class of each row: float64 [B, K]."""
    import numpy as np

    counts = np.zeros((len(given), num_classes))
    for labels in given.T:
        rows = np.flatnonzero(labels >= 0)
        counts[rows, labels[rows]] += 1
    return counts


def _accuracy(given: np.ndarray, codes: np.ndarray) -> np.ndarray:
    import numpy as np

    said = (given >= 0) & (codes >= 0)[:, None]
    return ((given == codes[:, None]) & said).sum(axis=0) / np.maximum(said.sum(axis=0), 1)
