"""A plan reads what changed, and nothing else; and it is never wrong about what changed."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
from PIL import Image

from tasks.data import known as module
from tasks.data import pictures, source
from tasks.data.known import Known
from tasks.data.source import resolve
from tasks.spec.source import FilesSource, FoldersSource

FILES = FilesSource(kind="files", path="*.csv")


@pytest.fixture
def reads(monkeypatch):
    """The names of the files that were read; files count as quiet at once."""
    found = []

    def counted(read):
        return lambda *arguments: found.append(str(arguments[0]).rpartition("/")[2]) or read(*arguments)

    monkeypatch.setattr(source, "_read_file", counted(source._read_file))
    monkeypatch.setattr(pictures, "_read_folder", counted(pictures._read_folder))
    monkeypatch.setattr(module, "QUIET_SECONDS", -1.0)
    return found


def plan(folder, asked=FILES):
    return [file.sha256 for file in resolve(asked, folder, known=Known(folder / "sources" / "w.json"))]


def digests(folder):
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.csv"))]


def test_only_what_changed_is_read(tmp_path, reads):
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{name},x\n")
    assert plan(tmp_path) == plan(tmp_path) == digests(tmp_path)
    assert reads == ["a.csv", "b.csv"]
    (tmp_path / "c.csv").write_text("text,label\nc,x\n")
    (tmp_path / "a.csv").unlink()
    assert plan(tmp_path) == digests(tmp_path)
    assert reads == ["a.csv", "b.csv", "c.csv"]
    assert [name.rpartition("/")[2] for name in json.loads((tmp_path / "sources" / "w.json").read_text())] == [
        "b.csv",
        "c.csv",
    ]


def test_other_bytes_of_the_same_size_and_time_are_read(tmp_path, reads):
    path = tmp_path / "a.csv"
    path.write_text("text,label\nq,x\n")
    plan(tmp_path)
    before = path.stat()
    path.write_text("text,label\nr,x\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert plan(tmp_path) == digests(tmp_path)
    assert reads == ["a.csv", "a.csv"]
    other = tmp_path / "other"
    other.write_text("text,label\ns,x\n")
    other.rename(path)
    assert plan(tmp_path) == digests(tmp_path)


def test_a_file_that_changed_a_moment_ago_is_not_remembered(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(module, "QUIET_SECONDS", 10.0)
    (tmp_path / "a.csv").write_text("text,label\nq,x\n")
    plan(tmp_path)
    plan(tmp_path)
    assert reads == ["a.csv", "a.csv"]


@pytest.mark.parametrize("content", ["", "[]", "null", '{"a": 1}', '{"a": {"state": 1}}', "\x00"])
def test_what_was_remembered_may_be_damaged_or_gone(tmp_path, reads, content):
    (tmp_path / "a.csv").write_text("text,label\nq,x\n")
    plan(tmp_path)
    (tmp_path / "sources" / "w.json").write_text(content)
    assert plan(tmp_path) == digests(tmp_path)
    (tmp_path / "sources" / "w.json").unlink()
    assert plan(tmp_path) == digests(tmp_path)
    assert len(reads) == 3


def test_all_is_read_anew_after_a_day(tmp_path, reads, monkeypatch):
    (tmp_path / "a.csv").write_text("text,label\nq,x\n")
    plan(tmp_path)
    monkeypatch.setattr(module, "MAX_AGE_SECONDS", 0.0)
    plan(tmp_path)
    assert reads == ["a.csv", "a.csv"]


def test_a_folder_of_images_is_read_where_one_of_them_changed(tmp_path, reads):
    asked = FoldersSource(kind="folders", path="images")
    for name in ("x/1.png", "x/2.png", "y/1.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), len(name)).save(tmp_path / "images" / name)
    first = plan(tmp_path, asked)
    assert plan(tmp_path, asked) == first
    assert len(reads) == 1
    (tmp_path / "images" / "y" / "1.png").rename(tmp_path / "images" / "x" / "3.png")
    assert plan(tmp_path, asked) != first
    assert len(reads) == 2
