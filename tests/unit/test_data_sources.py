"""Every kind of source beside CSV and Parquet files: declared types, and one line for what is wrong."""

from __future__ import annotations

import gzip
import hashlib
import json
import sqlite3
import ssl
import struct
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from certificates import certificate
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks.data.encoding import as_utf8, detect
from tasks.data.ingest import ingest, resolve
from tasks.data.rejects import Rejects
from tasks.spec.errors import BadRequest, IntegrityLost, TryAgain
from tasks.spec.feature import ImageFeature, TableFeature, TextFeature
from tasks.spec.label import Label
from tasks.spec.requests import IngestRequest
from tasks.spec.source import (
    ArraysSource,
    FilesSource,
    FoldersSource,
    HttpSource,
    S3Source,
    SqlSource,
    secrets_of,
)

pytestmark = pytest.mark.timeout(120)
TABLE = TableFeature(kind="table", columns=("a", "b"))
TEXT = TextFeature(kind="text")
IMAGE = ImageFeature(kind="image", height=2, width=3)
LABEL = Label(classes=("x", "y"))


def run(folder: Path, source, feature, secrets=str, **more):
    files = resolve(source, folder, secrets)
    request = IngestRequest(workload="w", source=source, files=files, feature=feature, label=LABEL, **more)
    result = ingest(request, folder / "room", secrets)
    return result, pq.read_table(folder / "room" / "raw.parquet")


def files(path: str, **more) -> FilesSource:
    return FilesSource(kind="files", path=path, **more)


def write(folder: Path, name: str, content: str | bytes) -> str:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return name


# --- text files ---------------------------------------------------------------------------------------------


def test_tsv_and_json_lines_have_the_declared_types(tmp_path):
    _, table = run(tmp_path, files(write(tmp_path, "d.tsv", "a\tb\tlabel\n1\t\tx\n2.5\t3\ty\n")), TABLE)
    assert table.to_pydict() == {"a": [1, 2.5], "b": [None, 3], "label": ["x", "y"]}
    lines = '{"label": "x", "a": 1, "b": null}\n\n{"b": "2.5", "a": 1e2, "label": "y"}\n'
    _, table = run(tmp_path, files(write(tmp_path, "d.jsonl", lines)), TABLE)
    assert table.to_pydict() == {"a": [1, 100], "b": [None, 2.5], "label": ["x", "y"]}
    _, table = run(tmp_path, files(write(tmp_path, "i.jsonl", '{"pixels": [1,2,3,4,5,6], "label": "x"}\n')), IMAGE)
    assert table.column("pixels").to_pylist() == [[1, 2, 3, 4, 5, 6]]


GERMAN = "text,label\n" + "".join(f"Grüße aus Köln über die Straße {i},x\n" for i in range(50))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1252"])
def test_encodings_are_detected_and_reported(tmp_path, encoding):
    result, table = run(tmp_path, files(write(tmp_path, "d.csv", GERMAN.encode(encoding))), TEXT)
    assert table.column("text")[7].as_py() == "Grüße aus Köln über die Straße 7"
    (found,) = result.encodings.values()
    expected = {"latin-1": ("iso8859-1", "cp1252"), "cp1252": ("iso8859-1", "cp1252")}
    assert found in expected.get(encoding, (encoding,))


def test_a_declared_encoding_is_used_and_held(tmp_path):
    name = write(tmp_path, "d.csv", "text,label\n\xfcber,x\n".encode("latin-1"))
    with pytest.raises(BadRequest, match=r"data\.source\.encoding"):
        run(tmp_path, files(name), TEXT)
    _, table = run(tmp_path, files(name, encoding="latin-1"), TEXT)
    assert table.column("text").to_pylist() == ["\xfcber"]
    with pytest.raises(BadRequest, match="is no utf-8"):
        run(tmp_path, files(name, encoding="utf-8"), TEXT)
    with pytest.raises(ValueError, match="no encoding that Python knows"):
        files(name, encoding="base64")


@settings(max_examples=30, deadline=None)
@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1))
def test_transcoding_gives_the_same_text(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("t") / "t"
    path.write_bytes(text.encode("utf-16"))
    with path.open("rb") as stream:
        found = detect("t", stream, None)
        assert found in ("utf-16", "utf-32")
        if found == "utf-16":
            assert as_utf8(stream, found).read().decode() == text


def test_bad_rows_are_kept_aside_whole_where_the_workload_says_so(tmp_path):
    content = "a,b,label\n1,2,x\n1\n3,oops,y\n4,5,x\n6,7,8,9\n1e999,1,x\n"
    name = write(tmp_path, "d.csv", content)
    with pytest.raises(BadRequest, match=r"row 2: Expected 3 columns, got 1"):
        run(tmp_path, files(name), TABLE)
    result, table = run(tmp_path, files(name), TABLE, bad_rows="quarantine")
    assert table.column("a").to_pylist() == [1, 4]
    assert (result.rows, result.quarantined_rows) == (2, 4)
    aside = sorted(pq.read_table(tmp_path / "room" / "quarantine.parquet").to_pylist(), key=lambda row: row["row"])
    assert [row["row"] for row in aside] == [2, 3, 5, 6]
    assert "must be a number" in aside[1]["reason"]
    assert json.loads(aside[1]["content"]) == {"a": "3", "b": "oops", "label": "y"}
    lines = '{"text": "q", "label": "x"}\n{"text": NaN}\n[]\n{"text": "\\ud800", "label": "x"}\n{"a": 1, "a": 2}\n'
    result, table = run(tmp_path, files(write(tmp_path, "d.jsonl", lines)), TEXT, bad_rows="quarantine")
    assert (result.rows, result.quarantined_rows) == (1, 4)


@given(skipped=st.sets(st.integers(1, 30)), row=st.integers(1, 20))
def test_a_row_has_its_number_of_the_file_whatever_was_skipped_before(skipped, row):
    rejects = Rejects("quarantine")
    rejects.begin("f")
    for number in sorted(skipped):
        rejects.unread(number, "bad", "")
    read = [number for number in range(1, 60) if number not in skipped]
    assert rejects.original(row) == read[row - 1]


def test_further_columns_and_columns_to_parse_are_texts(tmp_path):
    name = write(tmp_path, "d.csv", 'a,zip,n,label\n"1.234,5",012,7,x\n')
    feature = TableFeature(kind="table", columns=("a", "made"))
    columns = {"zip": "text", "n": "number", "a": "text"}
    _, table = run(tmp_path, files(name), feature, columns=columns, made_columns=("made",))
    assert table.to_pydict() == {"a": ["1.234,5"], "label": ["x"], "zip": ["012"], "n": [7.0]}


# --- arrays and images --------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.mark.parametrize("kind", ["npy", "idx", "idx.gz", "npz"])
def test_arrays_become_columns(tmp_path, kind):
    pixels = np.arange(30, dtype=np.uint8).reshape(5, 2, 3)
    label = np.array([0, 1, 0, 1, 1])
    if kind == "npz":
        np.savez_compressed(tmp_path / "d.npz", pixels=pixels, label=label, other=np.zeros(2))
        source = files("d.npz")
    else:
        for name, array in (("pixels", pixels), ("label", label)):
            path = tmp_path / f"{name}.{kind}"
            if kind == "npy":
                np.save(path, array)
            else:
                path.write_bytes(gzip.compress(idx(array)) if kind.endswith("gz") else idx(array))
        source = ArraysSource(kind="arrays", columns={"label": f"label.{kind}", "pixels": f"pixels.{kind}"})
    _, table = run(tmp_path, source, IMAGE)
    assert table.column("pixels").to_pylist() == pixels.reshape(5, 6).tolist()
    assert table.column("label").to_pylist() == ["0", "1", "0", "1", "1"]


def test_arrays_hold_numbers_and_texts_of_a_table(tmp_path):
    np.savez(tmp_path / "d.npz", a=np.array([1.5, np.nan]), b=np.array([True, False]), label=np.array(["x", "y"]))
    _, table = run(tmp_path, files("d.npz"), TABLE)
    assert table.to_pydict() == {"a": [1.5, None], "b": [1, 0], "label": ["x", "y"]}


@pytest.mark.parametrize("kind", ["objects", "fortran", "short", "long", "lengths", "text", "records"])
def test_a_wrong_array_is_a_bad_request(tmp_path, kind):
    pixels, label = np.zeros((4, 2, 3), np.uint8), np.zeros(4, np.uint8)
    if kind == "objects":
        label = np.array([{"a": 1}] * 4, dtype=object)
    elif kind == "fortran":
        pixels = np.asfortranarray(np.ones((4, 6), np.uint8))
    elif kind == "lengths":
        label = np.zeros(3, np.uint8)
    elif kind == "records":
        label = np.zeros(4, [("a", "u1")])
    np.save(tmp_path / "pixels.npy", pixels)
    np.save(tmp_path / "label.npy", label, allow_pickle=True)
    whole = (tmp_path / "pixels.npy").read_bytes()
    changed = {"short": whole[:-3], "long": whole + b"x", "text": b"pixels\n1\n"}
    (tmp_path / "pixels.npy").write_bytes(changed.get(kind, whole))
    words = {"objects": "only a pickle", "fortran": "rows first", "short": "ends before", "long": "goes on"}
    words |= {"lengths": "must be as many", "text": "no whole NPY or IDX", "records": "numbers or texts"}
    source = ArraysSource(kind="arrays", columns={"pixels": "pixels.npy", "label": "label.npy"})
    with pytest.raises(BadRequest, match=words[kind]):
        run(tmp_path, source, IMAGE)


def picture(folder: Path, name: str, size=(3, 2), mode="L", **more) -> Path:
    path = folder / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, more.pop("colour", 7)).save(path, **more)
    return path


def test_images_in_folders_are_labelled_by_their_folder(tmp_path):
    picture(tmp_path, "x/2.png")
    picture(tmp_path, "x/10.jpg", mode="CMYK", colour=(0, 0, 0, 0))
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(tmp_path, "y/turned.png", size=(2, 3), exif=turned)
    (tmp_path / "images" / "y" / "notes.txt").write_text("no image")
    source = FoldersSource(kind="folders", path="images")
    _, table = run(tmp_path, source, IMAGE)
    assert table.column("label").to_pylist() == ["x", "x", "y"]
    assert table.column("pixels").to_pylist() == [[255] * 6, [7] * 6, [7] * 6]
    plan = resolve(source, tmp_path)
    picture(tmp_path, "y/one_more.png")
    request = IngestRequest(workload="w", source=source, files=plan, feature=IMAGE, label=LABEL)
    with pytest.raises(IntegrityLost, match="changed since the run was planned"):
        ingest(request, tmp_path / "room")


def test_a_wrong_image_is_refused_kept_aside_or_resized(tmp_path):
    picture(tmp_path, "x/a.png")
    path = picture(tmp_path, "x/b.png", size=(30, 20))
    source = FoldersSource(kind="folders", path="images")
    with pytest.raises(BadRequest, match=r"x/b.png: has 30 x 20, must be 3 x 2"):
        run(tmp_path, source, IMAGE)
    _, table = run(tmp_path, source.model_copy(update={"fit": "resize"}), IMAGE)
    assert table.column("pixels").to_pylist() == [[7] * 6] * 2
    path.write_bytes(path.read_bytes()[:40])
    first = Image.new("L", (3, 2))
    first.save(tmp_path / "images/x/moving.gif", save_all=True, append_images=[Image.new("L", (3, 2), 9)])
    result, table = run(tmp_path, source, IMAGE, bad_rows="quarantine")
    assert (result.rows, result.quarantined_rows) == (1, 2)
    with pytest.raises(BadRequest, match="holds no image"):
        resolve(FoldersSource(kind="folders", path="room"), tmp_path)


# --- a query, an address ------------------------------------------------------------------------------------


def database(folder: Path) -> str:
    with sqlite3.connect(folder / "d.db") as connection:
        connection.execute("create table t (id integer, a real, b text, label text, day date)")
        rows = [(i, i / 2, "" if i == 3 else str(i), "xy"[i % 2], "2026-01-01") for i in range(9_000)]
        connection.executemany("insert into t values (?, ?, ?, ?, ?)", rows)
    return f"sqlite:///{folder / 'd.db'}"


def test_a_query_streams_and_is_held_against_its_plan(tmp_path):
    url = database(tmp_path)
    source = SqlSource(kind="sql", url="${secret:db}", query="select a, b, label from t order by id")
    assert secrets_of(source) == ["${secret:db}"]
    secrets = {"${secret:db}": url}.__getitem__
    result, table = run(tmp_path, source, TABLE, secrets)
    assert result.rows == 9_000
    assert table.slice(2, 2).to_pydict() == {"a": [1, 1.5], "b": [2, None], "label": ["x", "y"]}
    plan = resolve(source, tmp_path, secrets)
    assert plan == resolve(source, tmp_path, secrets)
    with sqlite3.connect(tmp_path / "d.db") as connection:
        connection.execute("update t set a = 0 where id = 7")
    request = IngestRequest(workload="w", source=source, files=plan, feature=TABLE, label=LABEL)
    with pytest.raises(IntegrityLost, match="other rows than when"):
        ingest(request, tmp_path / "room", secrets)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("select nope from t order by id", "no such column"),
        ("select a from t where id < 0 order by id", "gives no rows"),
        ("selec a order by b", "correct the query"),
        ("select a, a, b, label from t order by id", "there twice"),
        ("select a, label from t order by id", "'b' is not there"),
    ],
)
def test_a_wrong_query_is_a_bad_request(tmp_path, query, words):
    source = SqlSource(kind="sql", url=database(tmp_path), query=query)
    with pytest.raises((BadRequest, TryAgain), match=words):
        run(tmp_path, source, TABLE)


def test_secrets_stand_in_no_workload_and_in_no_message(tmp_path):
    with pytest.raises(ValueError, match="belongs into a secret"):
        SqlSource(kind="sql", url="postgresql://me:hunter2@host/db", query="select 1 order by 1")
    with pytest.raises(ValueError, match="ORDER BY"):
        SqlSource(kind="sql", url="sqlite://", query="select 1")
    with pytest.raises(ValueError, match="never the key itself"):
        S3Source(kind="s3", url="s3://b/p", access_key="AKIA")
    source = SqlSource(kind="sql", url="${secret:db}", query="select 1 order by 1")
    with pytest.raises(BadRequest) as caught:
        resolve(source, tmp_path, lambda text: "no address, hunter2")
    assert "hunter2" not in str(caught.value)


@pytest.fixture
def address(tmp_path):
    """Serve the test's folder on the loopback."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_file_comes_by_https_from_a_host_whose_certificate_is_trusted(tmp_path, monkeypatch):
    authority, key = certificate(tmp_path / "tls", "host")
    content = b"text,label\nhi,x\n"
    write(tmp_path, "d.csv", content)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"https://127.0.0.1:{server.server_port}/d.csv"
    source = HttpSource(kind="http", url=address, sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(TryAgain, match="can't be fetched: ConnectError"):
        run(tmp_path, source, TEXT)
    monkeypatch.setenv("SSL_CERT_FILE", authority)
    _, table = run(tmp_path, source, TEXT)
    assert table.column("text").to_pylist() == ["hi"]
    server.shutdown()


def test_a_file_of_the_web_must_have_its_digest(tmp_path, address):
    content = b"text,label\nhi,x\n"
    write(tmp_path, "d.csv", content)
    source = HttpSource(kind="http", url=f"{address}/d.csv", sha256=hashlib.sha256(content).hexdigest())
    _, table = run(tmp_path, source, TEXT)
    assert table.column("text").to_pylist() == ["hi"]
    assert [path.name for path in (tmp_path / "room").iterdir()] == ["raw.parquet"]
    with pytest.raises(IntegrityLost, match=r"data\.source\.sha256"):
        run(tmp_path, source.model_copy(update={"sha256": "0" * 64}), TEXT)
    with pytest.raises(BadRequest, match="status 404"):
        run(tmp_path, source.model_copy(update={"url": f"{address}/none.csv"}), TEXT)
    with pytest.raises(TryAgain, match="can't be fetched: ConnectError"):
        run(tmp_path, source.model_copy(update={"url": "http://127.0.0.1:9/d.csv"}), TEXT)
