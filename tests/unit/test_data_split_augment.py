"""Splits by group, time and class, and changed copies of training rows."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.data.augment import augmented
from tasks.data.clean import clean
from tasks.spec.augment import Augment
from tasks.spec.data import Data, Split
from tasks.spec.errors import BadRequest
from tasks.spec.feature import ImageFeature, TableFeature, TextFeature
from tasks.spec.label import Label
from tasks.spec.requests import CleanRequest
from tasks.spec.value import RoomRef
from tasks.store.manifest import write_manifest

pytestmark = pytest.mark.timeout(60)
TEXT, TABLE = TextFeature(kind="text"), TableFeature(kind="table", columns=("a",))
IMAGE = ImageFeature(kind="image", height=6, width=5, max_value=16)


def divided(folder, columns, split, rows=None):
    """The split of each row, by row id; of the first ``rows`` rows alone where said."""
    raw = folder / "raw"
    raw.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns).slice(0, rows), raw / "raw.parquet")
    request = CleanRequest(
        workload="w", raw=RoomRef(uri=str(raw), digest_sha256=write_manifest(raw)), feature=TABLE,
        label=Label(classes=("x", "y")), rules=(), split=Split.parse(split, "split"),
    )  # fmt: skip
    clean(request, folder / "room")
    table = pq.read_table(folder / "room" / "data.parquet")
    return dict(zip(table.column("row_id").to_pylist(), table.column("split").to_pylist(), strict=True))


def columns(rows=4000):
    draw = np.random.default_rng(0)
    return {
        "a": draw.normal(size=rows),
        "label": np.where(draw.random(rows) < 0.1, "x", "y"),
        "patient": [f"p{code}" for code in draw.integers(0, 300, rows)],
        "day": [f"2026-{1 + row * 12 // rows:02d}-15" for row in range(rows)],
        "at": np.arange(rows, dtype=float),
    }


def test_rows_of_a_group_never_part_and_none_moves_as_data_grow(tmp_path):
    table = columns()
    found = divided(tmp_path, table, {"group": "patient"})
    of_patient = defaultdict(set)
    for row, split in found.items():
        of_patient[table["patient"][int(row)]].add(split)
    assert {len(splits) for splits in of_patient.values()} == {1}
    assert 0.1 < Counter(found.values())["holdout"] / len(found) < 0.3
    fewer = divided(tmp_path, table, {"group": "patient"}, rows=1500)
    assert fewer == {row: found[row] for row in fewer}
    assert divided(tmp_path, table, {"group": "patient", "seed": 1}) != found


def test_the_past_is_trained_on_and_the_future_judges(tmp_path):
    table = columns()
    found = divided(tmp_path, table, {"time": {"column": "day", "validation": "2026-09", "holdout": "2026-11-01"}})
    months = defaultdict(set)
    for row, split in found.items():
        months[split].add(int(table["day"][int(row)][5:7]))
    assert months == {"train": set(range(1, 9)), "validation": {9, 10}, "holdout": {11, 12}}
    numbers = divided(tmp_path, table, {"time": {"column": "at", "validation": 3000, "holdout": 3500}})
    assert Counter(numbers.values()) == {"train": 3000, "validation": 500, "holdout": 500}
    table["day"][7] = None
    with pytest.raises(BadRequest, match="row_id 7: found None, must be a text"):
        divided(tmp_path, table, {"time": {"column": "day", "validation": "2026-09", "holdout": "2026-11"}})


def test_each_class_has_its_shares_where_the_split_is_stratified(tmp_path):
    table = columns()
    found = divided(tmp_path, table, {"stratified": True})
    for name in ("x", "y"):
        rows = np.flatnonzero(table["label"] == name)
        counts = Counter(found[str(row)] for row in rows)
        assert abs(counts["holdout"] - 0.2 * len(rows)) <= 1
        assert abs(counts["validation"] - 0.15 * len(rows)) <= 1
    plain = divided(tmp_path, table, {})
    assert np.mean([found[row] == plain[row] for row in found]) > 0.9


DATA = {"source": {"kind": "files", "path": "d.csv"}, "label": {"classes": ["x", "y"]}}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"split": {"group": "who"}}, "column 'who' is not read"),
        ({"split": {"group": "label"}}, "column 'label' is not read"),
        ({"split": {"group": "a", "stratified": True}}, "group and stratified: must be one of them"),
        ({"split": {"time": {"column": "a", "validation": 5, "holdout": 3}}}, "must be before holdout"),
        ({"split": {"time": {"column": "a", "validation": "5", "holdout": 3}}}, "must both be texts"),
        ({"augment": {"changes": [{"kind": "shift", "pixels": 1}]}}, "'shift' is for images"),
        ({"augment": {"changes": []}}, "augment.changes"),
    ],
)
def test_a_contradiction_is_refused_by_its_field(more, words):
    with pytest.raises(BadRequest) as error:
        Data.parse(DATA | {"feature": {"kind": "table", "columns": ["a"]}} | more, "w")
    assert words in str(error.value)


def images(rows):
    pixels = np.random.default_rng(1).integers(0, 17, (rows, 30), dtype=np.uint8)
    return pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), 30)


def cleaned(name, values):
    splits = ["train", "validation", "holdout", "train"] * (len(values) // 4)
    ids = [str(row) for row in range(len(values))]
    return pa.table({"row_id": ids, name: values, "label": ["x"] * len(values), "split": splits})


def test_only_training_rows_are_copied_and_the_same_seed_gives_the_same(tmp_path):
    asked = Augment.parse(
        {"copies": 2, "changes": [{"kind": "shift", "pixels": 2}, {"kind": "rotate", "degrees": 15},
                                  {"kind": "noise", "deviation": 0.05}]}, "augment"
    )  # fmt: skip
    table = cleaned("pixels", images(8))
    found = augmented(table, IMAGE, asked)
    assert found.schema == table.schema
    assert found.column("row_id").to_pylist() == [f"{row}~{copy}" for copy in (1, 2) for row in (0, 3, 4, 7)]
    assert set(found.column("split").to_pylist()) == {"train"}
    pixels = np.array(found.column("pixels").to_pylist())
    assert pixels.max() <= 16
    assert not (pixels[0] == pixels[4]).all()
    assert augmented(table, IMAGE, asked).equals(found)
    # A row's copies don't depend on its neighbours.
    assert augmented(table.slice(3, 1), IMAGE, asked).column("pixels")[0] == found.column("pixels")[1]


def test_an_image_is_shifted_and_nothing_else(tmp_path):
    asked = Augment.parse({"changes": [{"kind": "shift", "pixels": 1}], "copies": 20}, "augment")
    one = cleaned("pixels", images(4)).slice(0, 1)
    before = np.array(one.column("pixels")[0].as_py()).reshape(6, 5)
    shifted = np.pad(before, 1)
    allowed = {shifted[y : y + 6, x : x + 5].tobytes() for y in range(3) for x in range(3)}
    for image in augmented(one, IMAGE, asked).column("pixels").to_pylist():
        assert np.array(image).reshape(6, 5).tobytes() in allowed


def test_words_are_left_out_and_swapped(tmp_path):
    table = cleaned("text", ["one two three four five six", "b", "c", None])
    drop = Augment.parse({"changes": [{"kind": "drop_words", "ratio": 0.5}], "copies": 9}, "augment")
    dropped = [text.split() for text in augmented(table, TEXT, drop).column("text").to_pylist()[::2]]
    assert all(0 < len(words) <= 6 and words == sorted(words, key=["one", "two", "three", "four", "five", "six"].index)
               for words in dropped)  # fmt: skip
    assert any(len(words) < 6 for words in dropped)
    swap = Augment.parse({"changes": [{"kind": "swap_words"}]}, "augment")
    swapped = augmented(table, TEXT, swap).column("text").to_pylist()
    assert swapped[0] != "one two three four five six"
    assert sorted(swapped[0].split()) == sorted(["one", "two", "three", "four", "five", "six"])
    assert swapped[1] is None
