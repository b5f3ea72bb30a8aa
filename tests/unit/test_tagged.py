"""Entities among tags, how they are counted, and words that a graph is asked."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.evaluate.tagged import TagAnswers
from tasks.spec.entities import entities, f1, kinds_of, matched
from tasks.spec.errors import BadRequest
from tasks.spec.feature import TokensFeature, encode
from tasks.spec.label import Label
from tasks.spec.tokens import ask_words

NAMES = ("O", "B-PER", "I-PER", "B-MISC", "I-MISC")
FEATURE = TokensFeature(kind="tokens", max_tokens=4)


def test_the_f1_that_the_literature_s_example_has():
    """The example that seqeval, and before it conlleval's documentation, is introduced by: F1 0.50."""
    true = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    said = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    counts = np.array([matched(*pair, ("PER", "MISC")) for pair in zip(true, said, strict=True)]).sum(axis=0)
    assert counts.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert f1(*counts.sum(axis=0)) == 0.5


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O O", set()),
        ("B-PER I-PER B-PER", {("PER", 0, 2), ("PER", 2, 3)}),
        ("O I-PER I-PER O", {("PER", 1, 3)}),
        ("B-PER I-LOC O", {("PER", 0, 1), ("LOC", 1, 2)}),
        ("B-PER O I-PER", {("PER", 0, 1), ("PER", 2, 3)}),
        ("PER PER LOC", {("PER", 0, 2), ("LOC", 2, 3)}),
        ("B-work-of-art I-work-of-art", {("work-of-art", 0, 2)}),
    ],
)
def test_entities_are_spans_of_one_type(tags, found):
    assert entities(tags.split()) == found


def test_what_is_measured_of_tags():
    rng = np.random.default_rng(0)
    true = [rng.integers(0, 5, size=rng.integers(1, 9)) for _ in range(60)]
    flat = np.concatenate(true)
    p = 0.7 * np.eye(5)[np.where(rng.random(len(flat)) < 0.8, flat, 0)] + 0.06
    answers = TagAnswers(true, p, NAMES)
    found = {(m.metric, m.slice): m for m in answers.measure()}
    columns = answers.columns()
    counts = [matched(*pair, kinds_of(NAMES)) for pair in zip(columns["label"], columns["prediction"], strict=True)]
    by_kind = np.array(counts).sum(axis=0)
    assert found["entity_f1", "overall"].value == f1(*by_kind.sum(axis=0))
    assert found["f1", "class:PER"].value == f1(*by_kind[0])
    assert found["recall", "class:PER"].samples == found["f1", "class:PER"].samples == by_kind[0][2]
    assert found["macro_f1", "overall"].value == pytest.approx(np.mean([f1(*kind) for kind in by_kind]))
    assert found["accuracy", "overall"].value == pytest.approx((p.argmax(1) == flat).mean())
    assert found["log_loss", "overall"].value == pytest.approx(-np.log(p[np.arange(len(flat)), flat]).mean())
    from tasks.evaluate.metrics import calibration_error

    assert found["calibration_error", "overall"].value == pytest.approx(calibration_error(flat, p))
    for m in found.values():
        assert m.low <= m.value <= m.high, m
    whole = answers.measure_part("slice:all", np.ones(60, dtype=bool))
    assert [m.value for m in whole] == [found[name, "overall"].value for name in ("accuracy", "entity_f1")]
    assert {m.samples for m in answers.measure_part("slice:none", np.zeros(60, dtype=bool))} == {0}
    perfect = TagAnswers(true, np.eye(5)[flat], NAMES).measure()
    assert {m.value for m in perfect if m.metric in ("entity_f1", "accuracy")} == {1.0}


def test_late_labels_of_served_tags(tmp_path):
    from tasks.truth import _read, measure_tagged

    served = [("B-PER O", "B-PER O"), ("B-PER O", "O O"), ("O O", "O"), ("O B-X", "O O")]
    found = {(m.metric, m.slice): m for m in measure_tagged(served, NAMES)}
    assert found["accuracy", "overall"].value == 0.75, "the last two have other tags than the model"
    assert found["entity_f1", "overall"].value == found["f1", "class:PER"].value == f1(1, 2, 1)
    assert measure_tagged(served[2:], NAMES) == ()
    path, tags = tmp_path / "later.csv", Label(classes=NAMES)
    path.write_text("passport,label\na.1,B-PER  O\n")
    assert _read(path, tags, True) == {("a.1", 0): "B-PER  O"}
    for label in ("B-PER B-LOC", "''"):
        path.write_text(f"passport,label\na.1,{label}\n")
        with pytest.raises(BadRequest, match="is no class"):
            _read(path, tags, True)


class Letters:
    """A tokenizer as the library's looks: a piece a letter, and nothing left of a word of ``~`` alone."""

    def encode(self, words, is_pretokenized):
        assert is_pretokenized
        kept = [(ord(letter), place) for place, word in enumerate(words) for letter in word if letter != "~"]
        return type("Encoding", (), {"ids": [one for one, _ in kept], "word_ids": [word for _, word in kept]})()

    def encode_batch(self, rows, is_pretokenized):
        return [self.encode(row, is_pretokenized) for row in rows]


def test_every_word_is_answered_at_its_first_piece_however_long_the_row():
    asked = []

    def run(x):
        asked.append(x)
        return np.stack([x, -x], axis=1).astype(np.float32)

    rows = [["ab", "c"], ["abcdefg", "h", "ij", "k", "l"], ["~", "a"]]
    found = ask_words(FEATURE, rows, Letters(), run)
    assert [chr(int(value)) for value in found[:, 0]] == list("acahikl.a")
    assert (found[:, 1] == -found[:, 0]).all()
    assert [x.shape for x in asked] == [(3, 4), (1, 4), (1, 4)]
    assert encode(FEATURE, ["ab  c", ["ab", "c"]], Letters()).tolist() == 2 * [[97, 98, 99, 0]]
    for bad in ("", " \n", ["a b"], [], 3, ["x" * 10_001]):
        with pytest.raises(BadRequest, match="tokens input"):
            encode(FEATURE, [bad], Letters())
