"""Data sets that `datasets` saved, and revisions in a repository with DVC, as sources."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.data.ingest import ingest, resolve
from tasks.data.tags import write_tag
from tasks.spec.errors import BadRequest, IntegrityLost
from tasks.spec.feature import TextFeature, TokensFeature
from tasks.spec.label import Label
from tasks.spec.requests import IngestRequest
from tasks.spec.source import HuggingFaceSource, RevisionSource
from tasks.spec.value import Value

pytestmark = pytest.mark.timeout(60)
TEXT = TextFeature(kind="text")


def read(folder: Path, source: Value, feature=TEXT, label=None, datasets=None, **more):
    label = label or Label(classes=("ham", "spam"))
    files = resolve(source, folder, datasets=datasets)
    request = IngestRequest(workload="w", source=source, files=files, feature=feature, label=label, **more)
    ingest(request, folder / "room")
    return pq.read_table(folder / "room" / "raw.parquet").to_pylist()


def save(folder: Path, *parts: dict, features: dict) -> Path:
    """A data set as save_to_disk writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        table = pa.table(part)
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


CLASSES = {"names": ["ham", "spam"], "_type": "ClassLabel"}
FEATURES = {"text": {"dtype": "string", "_type": "Value"}, "label": CLASSES}
SAVED = HuggingFaceSource(kind="huggingface", path="saved")


def test_a_saved_data_set_is_read_with_the_names_of_its_classes(tmp_path):
    save(tmp_path / "saved", {"text": ["a"], "label": [1]}, {"text": ["b"], "label": [-1]}, features=FEATURES)
    assert read(tmp_path, SAVED) == [{"text": "a", "label": "spam"}, {"text": "b", "label": None}]


def test_splits_become_a_column(tmp_path):
    for number, name in enumerate(("train", "test")):
        save(tmp_path / "saved" / name, {"text": [name], "label": [number]}, features=FEATURES)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    rows = read(tmp_path, SAVED, split_column="split")
    assert [(row["split"], row["label"]) for row in rows] == [("train", "ham"), ("test", "spam")]


def test_lists_of_classes_are_named_too(tmp_path):
    features = {"tokens": {"feature": {}}, "tags": {"feature": {"names": ["O", "PER"], "_type": "ClassLabel"}}}
    save(tmp_path / "saved", {"tokens": [["Ann", "ran"], ["x"]], "tags": [[1, 0], [0]]}, features=features)
    label = Label(column="tags", classes=("O", "PER"))
    rows = read(tmp_path, SAVED, TokensFeature(kind="tokens"), label)
    assert rows == [{"tokens": "Ann ran", "tags": "PER O"}, {"tokens": "x", "tags": "O"}]


def damage(folder: Path, name: str, content: bytes) -> None:
    (folder / "saved" / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("state.json", b"{}", "names no data files"),
        ("state.json", b"[", "can't be read as JSON"),
        ("state.json", b'{"_data_files": [{"filename": "../x.arrow"}]}', "must be a name"),
        ("state.json", b'{"_data_files": [{"filename": "gone.arrow"}]}', "is not there"),
        ("dataset_info.json", b"[]", "describes no features"),
        ("data-00000-of-00001.arrow", b"ARROW1 no stream", "is no whole Arrow stream"),
    ],
)
def test_a_damaged_one_is_refused_by_one_line(tmp_path, name, content, words):
    save(tmp_path / "saved", {"text": ["a"], "label": [1]}, features=FEATURES)
    damage(tmp_path, name, content)
    with pytest.raises(BadRequest) as error:
        read(tmp_path, SAVED)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_class_number_without_a_name_and_a_cut_stream(tmp_path):
    save(tmp_path / "saved", {"text": ["a"], "label": [2]}, features=FEATURES)
    with pytest.raises(BadRequest, match="class number 2, must be 0 to 1"):
        read(tmp_path, SAVED)
    folder = save(tmp_path / "saved", {"text": ["a" * 999] * 99, "label": [1] * 99}, features=FEATURES)
    path = folder / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(BadRequest, match="no whole Arrow stream"):
        read(tmp_path, SAVED)


def test_no_saved_data_set(tmp_path):
    with pytest.raises(BadRequest, match=r"holds no state\.json"):
        read(tmp_path, SAVED)


def repository(folder: Path, name: str, path: str, content: bytes) -> Path:
    """A Git repository with DVC's pointer to ``content`` under a tag, and its cache."""
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    stored = folder / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]
    stored.parent.mkdir(parents=True)
    stored.write_bytes(content)
    pointer = f"outs:\n- md5: {md5}\n  size: {len(content)}\n  hash: md5\n  path: {Path(path).name}\n"
    write_tag(folder, name, {f"{path}.dvc": pointer.encode()}, f"sha256 {hashlib.sha256(content).hexdigest()}")
    return stored


def test_a_revision_of_another_repository_is_read_and_held_to_its_word(tmp_path):
    stored = repository(tmp_path / "theirs", "v1", "data/rows.csv", b"text,label\na,ham\n")
    source = RevisionSource(kind="dvc", repository="theirs", revision="v1", path="data/rows.csv")
    assert read(tmp_path, source) == [{"text": "a", "label": "ham"}]
    with pytest.raises(BadRequest, match=r"has no data/rows\.csv\.dvc at 'v2'; its newest tags: v1"):
        resolve(source.model_copy(update={"revision": "v2"}), tmp_path)
    stored.write_bytes(b"text,label\na,spam\n")
    with pytest.raises(IntegrityLost, match="its name says otherwise"):
        resolve(source, tmp_path)
    stored.unlink()
    with pytest.raises(BadRequest, match="is not in the cache"):
        resolve(source, tmp_path)
    with pytest.raises(BadRequest, match="is no Git repository"):
        resolve(source.model_copy(update={"repository": "nowhere"}), tmp_path)


def test_a_revision_of_this_site_is_read_by_its_name(tmp_path):
    table = pa.table({"row_id": ["0"], "text": ["a"], "label": ["ham"], "split": ["train"]})
    pq.write_table(table, tmp_path / "d.parquet")
    repository(tmp_path / "ours", "sms-0123456789ab", "sms/data.parquet", (tmp_path / "d.parquet").read_bytes())
    source = RevisionSource(kind="dvc", revision="sms-0123456789ab")
    rows = read(tmp_path, source, datasets=tmp_path / "ours", split_column="split")
    assert rows == [{"text": "a", "label": "ham", "split": "train"}]
    with pytest.raises(Exception, match="path is missing"):
        RevisionSource(kind="dvc", revision="x", repository="y")
