"""Ingest: declared types, streaming, and one line for every way a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.data import jsonlines
from tasks.data.ingest import ingest, resolve
from tasks.spec.errors import BadRequest, IntegrityLost
from tasks.spec.feature import ImageFeature, TableFeature, TextFeature
from tasks.spec.label import Label
from tasks.spec.requests import IngestRequest
from tasks.spec.source import BundledSource, FilesSource

pytestmark = pytest.mark.timeout(30)
TABLE = TableFeature(kind="table", columns=("a", "b"))
TEXT = TextFeature(kind="text")
IMAGE = ImageFeature(kind="image", height=2, width=2)
LABEL = Label(classes=("x", "y"))


def run(folder: Path, path: str, feature, label=LABEL, split=None):
    source = FilesSource(kind="files", path=path)
    files = resolve(source, folder)
    request = IngestRequest(
        workload="w", source=source, files=files, feature=feature, label=label, split_column=split
    )
    result = ingest(request, folder / "room")
    return result, pq.read_table(folder / "room" / "raw.parquet")


def csv(folder: Path, content: str | bytes, name: str = "d.csv") -> str:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return name


def test_a_table_has_the_declared_types_and_nulls_where_values_are_missing(tmp_path):
    name = csv(tmp_path, "\ufeffb,a,label,other\n 1.5 ,2,x,\n,nan,y,z\nN/A,-0,x,z\n")
    result, table = run(tmp_path, name, TABLE)
    assert result.rows == 3
    assert result.columns == ("a", "b", "label")
    assert table.schema.types == [pa.float64(), pa.float64(), pa.string()]
    assert table.column("b").to_pylist() == [1.5, None, None]
    assert table.column("a").to_pylist() == [2.0, None, 0.0]


def test_texts_keep_newlines_commas_and_odd_characters(tmp_path):
    name = csv(tmp_path, 'text,label\n"a,\n""b""",x\n5" pipe,y\n=cmd|x,x\n')
    _, table = run(tmp_path, name, TEXT)
    assert table.column("text").to_pylist() == ['a,\n"b"', '5" pipe', "=cmd|x"]


@pytest.mark.parametrize(
    ("content", "feature", "words"),
    [
        ("a,b,label\n1,2,x\n1,abc,x\n", TABLE, ["d.csv", "'b'", "row 2", "'abc'", "must be a number"]),
        ("a,b,label\n1,1e999,x\n", TABLE, ["'b'", "row 1", "1e999", "finite"]),
        ("a,b,label\n1,0x10,x\n", TABLE, ["0x10"]),
        ("a,b,label\n1,1_000,x\n", TABLE, ["1_000"]),
        ("a,c,label\n1,2,x\n", TABLE, ["column 'b' is not there", "found a, c, label"]),
        ("a,b,target\n1,2,x\n", TABLE, ["label column 'label' is not there", "target"]),
        ("a,b,label\n", TABLE, ["no rows"]),
        ("a,b,a,label\n1,2,3,x\n", TABLE, ["'a' is there twice"]),
        (b"text,label\n\xff\xfe,x\n", TEXT, ["UTF-8"]),
        (b"t\xffxt,label\nq,x\n", TEXT, ["UTF-8"]),
        ("text,label\nq,x\nq\n", TEXT, ["Expected 2 columns, got 1"]),
        ('text,label\nq,x\n"open,x\nq,y\n', TEXT, ["line", "quote"]),
        ("label,pixels0,pixels1,pixels2\nx,1,2,3\n", IMAGE, ["'pixels3' is not there", "4 values"]),
        ("label,pixels0,pixels1,pixels2,pixels3,pixels4\nx,1,2,3,4,5\n", IMAGE, ["pixels4", "must have 4"]),
        ("label,pixels0,pixels1,pixels2,pixels3\nx,1,2,3,256\n", IMAGE, ["'pixels3'", "row 1", "0 to 255"]),
        ("label,pixels0,pixels1,pixels2,pixels3\nx,1,2,3,\n", IMAGE, ["'pixels3'", "row 1", "0 to 255"]),
        ("label,other\nx,1\n", IMAGE, ["column 'pixels' is not there"]),
    ],
)
def test_a_wrong_csv_is_a_bad_request_of_one_line(tmp_path, content, feature, words):
    name = csv(tmp_path, content)
    with pytest.raises(BadRequest) as caught:
        run(tmp_path, name, feature)
    message = str(caught.value)
    assert "\n" not in message
    for word in ["d.csv", *words]:
        assert word in message


@pytest.mark.parametrize("stem", ["pixels", "pixels_"])
def test_an_image_may_lie_in_columns_of_any_order(tmp_path, stem):
    name = csv(tmp_path, f"{stem}3,{stem}1,label,{stem}0,{stem}2\n4,2,x,1,3\n")
    _, table = run(tmp_path, name, IMAGE)
    assert table.column("pixels").to_pylist() == [[1, 2, 3, 4]]
    pq.write_table(
        pa.table({f"{stem}{i}": [10 + i] for i in (2, 0, 3, 1)} | {"label": ["x"]}), tmp_path / "d.parquet"
    )
    _, table = run(tmp_path, "d.parquet", IMAGE)
    assert table.column("pixels").to_pylist() == [[10, 11, 12, 13]]


@pytest.mark.parametrize(
    "kind",
    [pa.binary(4), pa.binary(), pa.list_(pa.int64()), pa.list_(pa.uint8(), 4), pa.large_list(pa.float64())],
    ids=str,
)
def test_images_come_from_bytes_and_lists_and_may_be_missing(tmp_path, kind):
    rows = [[1, 2, 3, 4], None, [0, 255, 7, 8]]
    if kind == pa.list_(pa.uint8(), 4):
        # Parquet can't hold this type with a missing row.
        rows[1] = [5, 5, 5, 5]
    if "binary" in str(kind):
        rows = [None if row is None else bytes(row) for row in rows]
    pq.write_table(
        pa.table({"pixels": pa.array(rows, kind), "label": [1.0, 2.0, None]}), tmp_path / "d.parquet"
    )
    _, table = run(tmp_path, "d.parquet", IMAGE)
    assert table.schema.field("pixels").type == pa.list_(pa.uint8())
    assert table.column("pixels").to_pylist() == [None if row is None else list(row) for row in rows]
    assert table.column("label").to_pylist() == ["1", "2", None]


def test_images_may_be_missing_in_a_whole_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonlines, "BATCH_BYTES", 1)
    lines = [{"pixels": pixels, "label": "1"} for pixels in ([1, 2, 3, 4], None, [5, 6, 7, 8])]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, table = run(tmp_path, "d.jsonl", IMAGE)
    assert table.column("pixels").to_pylist() == [[1, 2, 3, 4], None, [5, 6, 7, 8]]


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (pa.array([b"1234", b"123"]), ["row 2", "found 3, must be 4 values"]),
        (pa.array([[1, 2, 3, 4], [1, 2, 3, 4, 5]]), ["row 2", "found 5"]),
        (pa.array([[1, 2, 3, 4], [1, 2, 3, -1]]), ["row 2", "-1"]),
        (pa.array([[1, 2, 3, 4], [1, 2, 3, 0.5]]), ["row 2", "0.5"]),
        (pa.array([[1, 2, 3, 4], [1, 2, None, 4]]), ["row 2", "None"]),
        (pa.array(["1234", "1234"]), ["string", "bytes or a list"]),
    ],
)
def test_a_wrong_image_is_named_by_its_row(tmp_path, pixels, words):
    pq.write_table(pa.table({"pixels": pixels, "label": ["x", "y"]}), tmp_path / "d.parquet")
    with pytest.raises(BadRequest) as caught:
        run(tmp_path, "d.parquet", IMAGE)
    for word in ["d.parquet", "'pixels'", *words]:
        assert word in str(caught.value)


def test_several_files_are_read_in_order_and_batches_count_on(tmp_path):
    rows = 40_000
    for index in (2, 1):
        frame = pa.table({"a": np.full(rows, index), "b": np.arange(rows), "label": ["x"] * rows})
        pq.write_table(frame, tmp_path / f"part{index}.parquet")
    result, table = run(tmp_path, "part*.parquet", TABLE)
    assert result.rows == 2 * rows == table.num_rows
    assert table.column("a").to_pylist()[:: rows - 1] == [1.0, 1.0, 2.0]
    bad = pa.table({"a": ["1"] * 30_000 + ["oops"], "b": ["1"] * 30_001, "label": ["x"] * 30_001})
    pq.write_table(bad, tmp_path / "part3.parquet")
    with pytest.raises(BadRequest, match="row 30001: found 'oops'"):
        run(tmp_path, "part*.parquet", TABLE)


def test_a_split_column_comes_along(tmp_path):
    name = csv(tmp_path, "text,label,part\nq,x,train\n")
    result, table = run(tmp_path, name, TEXT, split="part")
    assert result.columns == ("text", "label", "part")
    assert table.column("part").to_pylist() == ["train"]
    with pytest.raises(BadRequest, match=r"data\.split\.column"):
        run(tmp_path, name, TEXT, split="label")


@pytest.mark.parametrize("cut", [0.5, 0.98])
def test_a_truncated_parquet_is_a_bad_request(tmp_path, cut):
    pq.write_table(pa.table({"text": ["q"] * 1000, "label": ["x"] * 1000}), tmp_path / "d.parquet")
    content = (tmp_path / "d.parquet").read_bytes()
    (tmp_path / "d.parquet").write_bytes(content[: int(len(content) * cut)])
    with pytest.raises(BadRequest, match="no whole Parquet"):
        run(tmp_path, "d.parquet", TEXT)


def test_what_a_killed_attempt_left_does_not_stay(tmp_path):
    (tmp_path / "room" / "docs").mkdir(parents=True)
    (tmp_path / "room" / "raw.parquet").write_bytes(b"half")
    (tmp_path / "room" / "docs" / "x").write_bytes(b"")
    run(tmp_path, csv(tmp_path, "text,label\nq,x\n"), TEXT)
    assert [path.name for path in (tmp_path / "room").iterdir()] == ["raw.parquet"]


def test_a_file_that_changed_or_went_since_it_was_resolved_is_refused(tmp_path):
    source = FilesSource(kind="files", path=csv(tmp_path, "text,label\nq,x\n"))
    request = IngestRequest(
        workload="w", source=source, files=resolve(source, tmp_path), feature=TEXT, label=LABEL
    )
    csv(tmp_path, "text,label\nq,y\n")
    with pytest.raises(IntegrityLost, match="changed since the run was planned"):
        ingest(request, tmp_path / "room")
    csv(tmp_path, "nonsense")
    with pytest.raises(IntegrityLost, match="changed since the run was planned"):
        ingest(request, tmp_path / "room")
    (tmp_path / "d.csv").unlink()
    with pytest.raises(IntegrityLost, match="start a new run"):
        ingest(request, tmp_path / "room")


def test_resolve_says_what_is_there(tmp_path):
    csv(tmp_path, "a\n", "one.csv")
    csv(tmp_path, "", "empty.csv")
    csv(tmp_path, "a", "notes.doc")
    (tmp_path / "folder").mkdir()
    for path, words in {
        "two.csv": "two.csv: is not there; .* has empty.csv, folder/, notes.doc, one.csv",
        "no/such/*.csv": "matches no file; .* has empty.csv",
        "*.json": "matches no file",
        "empty.csv": "0 bytes",
        "folder": "is a folder",
        "notes.doc": "set data.source.format",
    }.items():
        with pytest.raises(BadRequest, match=words):
            resolve(FilesSource(kind="files", path=path), tmp_path)
    (found,) = resolve(FilesSource(kind="files", path=str(tmp_path / "one.csv")), Path("/elsewhere"))
    assert found.name == str(tmp_path / "one.csv")
    assert found.bytes == 2


def test_a_pipe_does_not_hang(tmp_path):
    import os

    os.mkfifo(tmp_path / "d.csv")
    with pytest.raises(BadRequest, match="no regular file"):
        resolve(FilesSource(kind="files", path="d.csv"), tmp_path)


def test_the_bundled_digits_are_what_they_were(tmp_path):
    source = BundledSource(kind="sklearn", name="digits")
    files = resolve(source, tmp_path)
    assert files[0].name.startswith("sklearn/digits/")
    feature = ImageFeature(kind="image", height=8, width=8, max_value=16)
    label = Label(classes=tuple(range(10)))
    request = IngestRequest(workload="digits", source=source, files=files, feature=feature, label=label)
    assert ingest(request, tmp_path / "room").rows == 1797
    table = pq.read_table(tmp_path / "room" / "raw.parquet")
    assert set(table.column("label").to_pylist()) == set(label.names)
    pixels = np.array(table.column("pixels").to_pylist())
    assert (pixels.min(), pixels.max(), pixels.shape) == (0, 16, (1797, 64))
    wrong = request.model_copy(update={"feature": feature.model_copy(update={"width": 7})})
    with pytest.raises(BadRequest, match="found 64, must be 56 values"):
        ingest(wrong, tmp_path / "room")
