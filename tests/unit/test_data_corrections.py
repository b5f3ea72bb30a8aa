"""Answers of a relabel queue: what is read, what is kept, what the next cleaning does with it."""

from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.data.corrections import DROP, Correction, confirmed, correct, merge, newest, read, summary
from tasks.data.near import near_copies
from tasks.data.patches import patch_features
from tasks.data.picture import data_uri
from tasks.data.ridge import left_out_probabilities
from tasks.data.table import row_digests
from tasks.spec.errors import BadRequest, IntegrityLost
from tasks.spec.feature import ImageFeature, TableFeature, TextFeature
from tasks.spec.label import Label

pytestmark = pytest.mark.timeout(60)
TEXT, LABEL = TextFeature(kind="text"), Label(classes=("x", "y"))
AT = "2026-11-26T10:00:00+00:00"


def table(rows):
    texts, labels = [row[0] for row in rows], [row[1] for row in rows]
    ids = [str(index) for index in range(len(rows))]
    return pa.table({"row_id": ids, "text": pa.array(texts, pa.string()), "label": pa.array(labels, pa.string())})


def key_of(text):
    return row_digests(table([(text, "x")]), TEXT)[0].decode()


def answered(path, rows, columns=("row_key", "label", "answer"), **kind):
    with path.open("w", newline="", **kind) as stream:
        csv.writer(stream).writerows([columns, *rows])
    return path


def add(folder, rows, who="ann", at=AT):
    path = answered(folder / "answers.csv", [(key_of(text), label, answer) for text, label, answer in rows])
    return merge(folder / "kept", "w", path, LABEL.names, who, at)


def applied(rows, corrections):
    return correct(table(rows), TEXT, "label", corrections)


def test_answers_are_kept_with_who_and_when_and_the_last_one_wins(tmp_path):
    first = add(tmp_path, [("one", "x", "y"), ("two", "x", "x"), ("three", "y", DROP), ("four", "y", "")])
    assert first[:4] == (1, 1, 1, 1)
    add(tmp_path, [("one", "x", "x")], who="bob", at="2026-11-27T10:00:00+00:00")
    kept = read(newest(tmp_path / "kept", "w"))
    assert [(item.answer, item.who) for item in kept] == [("x", "ann"), (DROP, "ann"), ("x", "bob")]
    assert [item.answer for item in read(first.room)] == ["y", "x", DROP], "what was kept before stays as it was"
    assert confirmed(kept) == {(key_of("one"), "x"), (key_of("two"), "x")}
    assert summary(kept)[0] == {"who": "ann", "at": AT, "changed": 0, "confirmed": 1, "dropped": 1}


def test_corrections_change_and_drop_rows_and_the_log_says_who(tmp_path):
    rows = [("one", "x"), ("one", "y"), ("three", "y"), ("five", "x")]
    add(tmp_path, [("one", "x", "y"), ("three", "y", DROP), ("five", "x", "x")])
    found, changes = applied(rows, read(newest(tmp_path / "kept", "w")))
    assert found.to_pydict() == {"row_id": ["0", "1", "3"], "text": ["one", "one", "five"], "label": ["y", "y", "x"]}
    assert [(change.row_id, change.after) for change in changes] == [("0", "y"), ("2", None)]
    assert changes[0].rule == f"relabel by ann at {AT}"


ROWS = st.lists(st.tuples(st.sampled_from(["a", "b", "c", ""]), st.sampled_from(["x", "y"])), max_size=12)


ASKED = st.dictionaries(st.tuples(st.sampled_from("abc"), st.sampled_from("xy")), st.sampled_from(["x", "y", DROP]))


@given(ROWS, ASKED)
def test_only_what_was_judged_changes_and_twice_is_once(rows, asked):
    given = [Correction(row_key=key_of(t), label=lab, answer=a, who="w", at=AT) for (t, lab), a in asked.items()]
    found, _ = applied(rows, given)
    expected = [(text, asked.get((text, label), label)) for text, label in rows]
    pairs = list(zip(found.column("text").to_pylist(), found.column("label").to_pylist(), strict=True))
    assert pairs == [pair for pair in expected if pair[1] != DROP]


@pytest.mark.parametrize(
    ("columns", "row", "words"),
    [
        (("row_key", "label"), ("0" * 32, "x"), "column 'answer' is not there, found row_key, label"),
        (("row_key", "label", "answer"), ("0" * 32, "x", "z"), "answer 'z', must be empty, !drop or one of x, y"),
        (("row_key", "label", "answer"), ("17", "x", "y"), "line 2: row_key '17', must be the 32 hex digits"),
    ],
)
def test_a_wrong_file_names_line_and_allowed_and_keeps_nothing(tmp_path, columns, row, words):
    path = answered(tmp_path / "a.csv", [row], columns)
    with pytest.raises(BadRequest, match=words):
        merge(tmp_path / "kept", "w", path, LABEL.names, "ann", AT)
    assert newest(tmp_path / "kept", "w") is None


def test_a_file_that_is_not_there_or_no_text_is_a_bad_request(tmp_path):
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    for name in ("a.csv", "b.csv"):
        with pytest.raises(BadRequest, match=r"give the queue\.csv you answered"):
            merge(tmp_path / "kept", "w", tmp_path / name, LABEL.names, "ann", AT)


def test_a_spreadsheets_mark_and_semicolons_are_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"row_key;label;answer\n{key_of('one')};x;y\n", encoding="utf-8-sig")
    assert merge(tmp_path / "kept", "w", path, LABEL.names, "ann", AT).changed == 1


def test_a_changed_room_of_corrections_is_refused(tmp_path):
    room = add(tmp_path, [("one", "x", "y")]).room
    with open(f"{room.uri}/corrections.jsonl", "a") as stream:
        stream.write(json.dumps({}) + "\n")
    with pytest.raises(IntegrityLost):
        read(room)


# --- the audit's own parts ----------------------------------------------------------------------------------


def test_left_out_answers_are_those_of_a_fit_without_the_row():
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(40, 5)).astype(np.float32), random.integers(0, 2, 40)
    from tasks.data.ridge import _left_out, _rotated

    rotated, strengths = _rotated(features)
    one_hot = np.eye(2, dtype=np.float32)[labels]
    quick = _left_out(rotated, strengths + 4.0, one_hot)
    for row in range(0, 40, 7):
        rest = np.arange(40) != row
        gram = rotated[rest].T @ rotated[rest] + 4.0 * np.eye(rotated.shape[1])
        slow = rotated[row] @ np.linalg.solve(gram, rotated[rest].T @ one_hot[rest])
        np.testing.assert_allclose(quick[row], slow, atol=2e-3)


def test_probabilities_sum_to_one_and_separate_what_can_be_separated():
    labels = np.arange(60) % 3
    features = np.eye(3, dtype=np.float32)[labels] + np.random.default_rng(1).normal(0, 0.1, (60, 3)).astype(np.float32)
    found = left_out_probabilities(features, labels)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert (found.argmax(axis=1) == labels).all()


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (8, 8), (28, 28), (64, 40)])
def test_patch_features_take_any_size_and_no_ink(shape):
    blank = np.zeros((3, *shape), np.float32)
    assert not patch_features(blank).any()
    noisy = np.random.default_rng(0).random((20, *shape), np.float32)
    assert np.isfinite(patch_features(noisy)).all()


def test_near_copies_are_found_across_splits_for_every_kind():
    texts = ["win a free prize now call 0800", "see you at nine", "lunch?", "win a free prize now call 0801"]
    splits = np.array(["train", "train", "train", "holdout"])
    assert near_copies(pa.table({"text": texts}), TEXT, splits, 100).tolist() == [False, False, False, True]
    numbers = pa.table({"a": [1.0, 2.0, 3.0, 1.0004], "b": [5.0, 6.0, 7.0, 5.0]})
    feature = TableFeature(kind="table", columns=("a", "b"))
    assert near_copies(numbers, feature, splits, 100).tolist() == [False, False, False, True]
    pixels = np.random.default_rng(0).integers(0, 255, (4, 64), dtype=np.uint8)
    pixels[3] = np.clip(pixels[0].astype(int) + 1, 0, 255)
    column = pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), 64)
    image = ImageFeature(kind="image", height=8, width=8)
    assert near_copies(pa.table({"pixels": column}), image, splits, 100).tolist() == [False, False, False, True]
    assert not near_copies(pa.table({"text": texts}), TEXT, np.array(["train"] * 4), 100).any()
    earlier = np.array(["train", "train", "train", "validation"])
    assert near_copies(pa.table({"text": texts}), TEXT, earlier, 100).tolist() == [False, False, False, True]
    later = np.array(["holdout", "train", "train", "validation"])
    assert near_copies(pa.table({"text": texts}), TEXT, later, 100).tolist() == [True, False, False, False]


def test_a_picture_is_a_png_that_a_library_reads():
    import base64
    import io

    from PIL import Image

    pixels = np.arange(6, dtype=np.uint8)
    uri = data_uri(pixels, ImageFeature(kind="image", height=2, width=3, max_value=5))
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert np.asarray(image).tolist() == [[0, 51, 102], [153, 204, 255]]
