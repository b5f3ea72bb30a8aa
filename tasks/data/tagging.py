"""Label errors among tags: which words' tags are likely wrong, by a model that did not see their sentence.

A linear model on what a tagger looks at (the word, its shape, its ends, its neighbours), cross-validated by sentence:
words of one sentence never part. Confident learning then judges each tag (Northcutt et al. 2021; on words, Wang and
Mueller 2022).

    S sentences   W words of all sentences   K tags
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.data.noise import Noise, confident, wilson
from tasks.data.table import SEED

if TYPE_CHECKING:
    import numpy as np

FOLDS, WIDTH = 3, 1 << 17
# Words are many and models of them unsure: a tag that the model believes in a little is no suspect.
MAX_BELIEF = 0.05
RUNS = re.compile(r"(.)\1+")


class TagNoise(NamedTuple):
    """The audit of words: ``noise`` names sentences, worst first; ``suggested`` are their labels as they may be
    meant, ``counts`` int64 how many suspects each has."""

    noise: Noise
    suggested: list[str]
    counts: np.ndarray


def audit_tags(sentences: list[list[str]], tags: list[list[str]], names: tuple[str, ...]) -> TagNoise:
    """Return the label errors of tagged sentences.

    Where fewer than two tags have words enough, nothing can be said: 0 samples.
    """
    import numpy as np

    code = {name: place for place, name in enumerate(names)}
    words = [(row, place) for row in range(len(sentences)) for place, tag in enumerate(tags[row]) if tag in code]
    sentence = np.array([row for row, _ in words], np.int64)
    given = np.array([code[tags[row][place]] for row, place in words], np.int64)
    known, counts = np.unique(given, return_counts=True)
    enough = np.isin(given, known[counts >= FOLDS])
    words = [word for word, is_kept in zip(words, enough, strict=True) if is_kept]
    classes, labels = np.unique(given[enough], return_inverse=True)
    if len(classes) < 2:
        nothing = np.zeros(0, np.int64)
        return TagNoise(Noise(0, 0.0, 0.0, 1.0, nothing, nothing, np.zeros(0)), [], nothing)
    features = [features_of(sentences[row], place) for row, place in words]
    probabilities = _out_of_sample(features, labels, sentence[enough])
    return _by_sentence(words, tags, names, classes, labels, probabilities)


def features_of(sentence: list[str], place: int) -> list[str]:
    """Return what a tagger looks at: the word and its neighbours, each by form, shape and ends."""
    found = ["bias"]
    for offset in (-2, -1, 0, 1, 2):
        there = place + offset
        word = sentence[there] if 0 <= there < len(sentence) else "\0"
        found += [f"{offset}w{word.lower()}", f"{offset}s{_shape(word)}"]
        if offset == 0:
            found += [f"p{word[:size].lower()}" for size in (1, 2, 3)] + [f"e{word[-size:].lower()}" for size in (2, 3)]
    return [*found, f"first{place == 0}"]


def _shape(word: str) -> str:
    """``iPhone6`` as ``xXx0``: runs of one kind as one sign."""
    signs = ["0" if char.isdigit() else "X" if char.isupper() else "x" if char.isalpha() else char for char in word]
    return RUNS.sub(r"\1", "".join(signs))


def _out_of_sample(features: list[list[str]], labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Probabilities, float64 [W, K], of each word by a model fitted on other sentences."""
    import numpy as np
    from sklearn.feature_extraction import FeatureHasher
    from sklearn.linear_model import SGDClassifier
    from sklearn.model_selection import GroupKFold

    hashed = FeatureHasher(WIDTH, input_type="string", alternate_sign=False).transform(features)
    out = np.full((len(labels), int(labels.max()) + 1), 1e-6)
    folds = GroupKFold(FOLDS).split(hashed, labels, groups) if len(np.unique(groups)) >= FOLDS else ()
    for fitted, asked in folds:
        # A fit that stops early ranks tags as well: the audit needs no last digit.
        model = SGDClassifier(loss="log_loss", alpha=3e-5, max_iter=5, tol=None, random_state=SEED)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(hashed[fitted], labels[fitted])
        out[np.ix_(asked, model.classes_)] = np.maximum(model.predict_proba(hashed[asked]), 1e-6)
    return out / out.sum(axis=1, keepdims=True)


def _by_sentence(
    words: list[tuple[int, int]],
    tags: list[list[str]],
    names: tuple[str, ...],
    classes: np.ndarray,
    labels: np.ndarray,
    probabilities: np.ndarray,
) -> TagNoise:
    """The suspects as sentences, worst first, each with its label as it may be meant."""
    import numpy as np

    said = confident(labels, probabilities)
    low, high = wilson(said.ratio, len(labels))
    counts = np.bincount(labels, minlength=len(classes))
    meant: dict[int, list[str]] = {}
    quality: dict[int, float] = {}
    number: dict[int, int] = {}
    for index in said.found:
        if probabilities[index, labels[index]] > MAX_BELIEF:
            continue
        row, place = words[index]
        meant.setdefault(row, list(tags[row]))[place] = names[classes[probabilities[index].argmax()]]
        quality[row] = min(quality.get(row, 1.0), float(probabilities[index, labels[index]]))
        number[row] = number.get(row, 0) + 1
    # Where the model agrees after all, there is nothing to suggest.
    rows = [row for row in sorted(meant, key=lambda row: quality[row]) if meant[row] != tags[row]]
    noise = Noise(
        samples=len(labels),
        ratio=said.ratio,
        low=low,
        high=high,
        rows=np.array(rows, np.int64),
        suggested=np.zeros(len(rows), np.int64),
        quality=np.array([quality[row] for row in rows]),
        by_class={int(k): (float(said.by_class[i]), int(counts[i])) for i, k in enumerate(classes)},
    )
    return TagNoise(noise, [" ".join(meant[row]) for row in rows], np.array([number[row] for row in rows], np.int64))


def differing(words: str, given: str, suggested: str) -> str:
    """Return the words whose tags differ, for people: ``Walk: O -> B-location``."""
    triples: Any = zip(words.split(" "), given.split(" "), suggested.split(" "), strict=False)
    return ", ".join(f"{word}: {one} -> {two}" for word, one, two in triples if one != two)
