"""Bad files, each with its verdict: read, refused by one line, or some rows kept aside; quickly and in little memory.

Each is read in a process of its own, forked from one that has imported what is needed; that alone (Python with
Arrow) takes nearly half of the limit.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import sqlite3
import stat
import subprocess
import sys
import textwrap
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.timeout(120)
SECONDS, MEBIBYTES = 10, 256
TEXT = {"kind": "text"}
TABLE = {"kind": "table", "columns": ["a"]}
IMAGE = {"kind": "image", "height": 2, "width": 2}
# Reads the requests of cases from its input, one line each, and answers each with a line.
CHILD = """
import json, os, sys, time, traceback
from pathlib import Path
import numpy, pyarrow.parquet, pyarrow.csv
from tasks.data.ingest import ingest, resolve
from tasks.spec.errors import DrydockError
from tasks.spec.requests import IngestRequest

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024

def answer(case):
    request = IngestRequest.parse(case["request"] | {"files": [{"name": "-", "sha256": "-", "bytes": 0}]}, "case")
    folder, room = Path(case["folder"]), Path(case["folder"]) / "room"
    try:
        files = resolve(request.source, folder)
        result = ingest(request.model_copy(update={"files": files}), room)
    except DrydockError as error:
        return type(error).__name__ + ": " + str(error)
    return f"read {result.rows}, aside {result.quarantined_rows}"

for line in sys.stdin:
    if os.fork():
        os.wait()
        continue
    Path("/proc/self/clear_refs").write_text("5")
    began = time.monotonic()
    try:
        said = answer(json.loads(line))
    except BaseException:
        said = traceback.format_exc()[-3000:]
    print(json.dumps({"said": said, "seconds": time.monotonic() - began, "peak": peak()}), flush=True)
    os._exit(0)
"""


class Reader:
    """The process that reads the bad files; a new one where one had to be killed."""

    def __init__(self) -> None:
        self._process: Any = None

    def ask(self, folder: Path, request: dict[str, Any]) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-P", "-c", CHILD]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._process.stdin.write(json.dumps({"folder": str(folder), "request": request}) + "\n")
        self._process.stdin.flush()
        # The first one waits for the imports too.
        if not select.select([self._process.stdout], [], [], 6 * SECONDS)[0]:
            self.close()
            pytest.fail(f"no answer in {6 * SECONDS} s")
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    found = Reader()
    yield found
    found.close()


def judged(reader: Reader, folder: Path, path: str, feature: dict[str, Any], **more: Any) -> str:
    """What became of a file, within the limits and without a half-written result."""
    return judged_source(reader, folder, {"kind": "files", "path": path} | more.pop("source", {}), feature, **more)


def judged_source(reader: Reader, folder: Path, source: dict[str, Any], feature: dict[str, Any], **more: Any) -> str:
    seconds, mebibytes = more.pop("limits", (SECONDS, MEBIBYTES))
    request = {"workload": "w", "source": source, "feature": feature, "label": {"classes": ["x", "y"]}}
    found = reader.ask(folder, request | more)
    assert found["seconds"] < seconds
    assert found["peak"] < mebibytes
    assert "\n" not in found["said"], found["said"]
    assert len(found["said"]) < 700
    room = folder / "room"
    # A refused room is not published, and what lies in it is no table that anyone could take for whole.
    left = sorted(path.name for path in room.iterdir()) if room.is_dir() else []
    assert set(left) <= {"raw.parquet", "quarantine.parquet"}
    return found["said"]


def text(rows: str, header: str = "text,label") -> bytes:
    return f"{header}\n{rows}\n".encode()


def number(value: str) -> bytes:
    return f'a,label\n"{value}",x\n'.encode()


def name(column: str) -> bytes:
    return f"text,label,{column}\nq,x,1\n".encode()


READ, REFUSED = "read 1, aside 0", "BadRequest: "
CSV: dict[str, tuple[bytes | Callable[[], bytes], dict[str, Any], str]] = {
    "empty": (b"", TEXT, "is empty"),
    "white space alone": (b"\n\n", TEXT, REFUSED),
    "header only": (b"text,label\n", TEXT, "no rows"),
    "byte-order mark": (b"\xef\xbb\xbftext,label\nq,x\n", TEXT, READ),
    "utf-16": ("text,label\nq,x\n".encode("utf-16"), TEXT, READ),
    "utf-16 without a mark": ("text,label\nq,x\n".encode("utf-16-le"), TEXT, "NUL"),
    "latin-1 amid utf-8": (text("Köln,x").replace(b"x\n", b"x\n\xfc,x\n"), TEXT, "yet other parts are"),
    "invalid utf-8": (b"text,label\n\xff\xfe,x\n", TEXT, "is not UTF-8"),
    "NUL bytes": (text("a\0b,x"), TEXT, "NUL"),
    "CR-only ends": (b"text,label\rq,x\r", TEXT, READ),
    "ragged rows": (text("q,x\nq,x,z"), TEXT, "row 2: Expected 2 columns, got 3"),
    "duplicate column": (text("q,x,z", "text,label,text"), TEXT, "there twice"),
    "a million columns": (lambda: text("q,x", ",".join(f"c{i}" for i in range(1_000_000))), TEXT, "the header has"),
    "20000 columns": (
        lambda: text(",".join("x" * 20_000), "text,label," + ",".join(f"c{i}" for i in range(19_998))),
        TEXT,
        "has 20000 columns",
    ),
    "unbalanced quote": (text('"open,x\nq,y'), TEXT, "quote"),
    "ten million quotes in a line": (lambda: text('"' * 10_000_000 + ",x"), TEXT, "a line has more than"),
    "ten million quoted fields": (lambda: text('"q","x"\n' * 2_500_000), TEXT, "read 2500000"),
    "one line of 20 MB": (lambda: text("q" * 20_000_000 + ",x"), TEXT, "a line has more than"),
    "formula": (text("=cmd|' /C calc'!A0,x"), TEXT, READ),
    "formula after a tab": (text("\t=1+1,x\n+1,x\n-1,x\n@x,x"), TEXT, "read 4"),
    "nan": (number("NaN"), TABLE, READ),
    "infinity": (number("inf"), TABLE, "finite"),
    "1e999": (number("1e999"), TABLE, "finite"),
    "minus zero": (number("-0"), TABLE, READ),
    "hexadecimal": (number("0x10"), TABLE, "must be a number"),
    "underscore": (number("1_000"), TABLE, "must be a number"),
    "decimal comma": (number("1,5"), TABLE, "must be a number"),
    "thousands dots": (number("1.000.000"), TABLE, "must be a number"),
    "beyond 64 bits": (number(str(2**80)), TABLE, READ),
    "mixed types": (b"a,label\n1,x\ntwo,x\n", TABLE, "row 2: found 'two'"),
    "date for a number": (number("2026-02-30"), TABLE, "must be a number"),
    "constant column": (b"a,label\n1,x\n1,y\n1,x\n", TABLE, "read 3, aside 0"),
    "leap second for a number": (number("2016-12-31T23:59:60Z"), TABLE, "must be a number"),
    "personal data": (text("ann@example.org,x"), TEXT, READ),
    "all missing": (b"a,label\n,x\n", TABLE, READ),
    "label missing": (b"text,target\nq,x\n", TEXT, "label column 'label' is not there"),
    "bidi column": (name("\u202eevil"), TEXT, READ),
    "zero-width column": (name("text\u200b"), TEXT, READ),
    "homoglyph column": ("tехt,label\nq,x\n".encode(), TEXT, "'text' is not there"),
    "emoji column": (name("🚢"), TEXT, READ),
    "column __proto__": (name("__proto__"), TEXT, READ),
    "column ../x": (name("../x"), TEXT, READ),
    "column ;DROP": (name(";DROP TABLE raw"), TEXT, READ),
    "column of 10 kB": (b"t," + b"n" * 10_000 + b"\nq,x\n", TEXT, "'text' is not there"),
    "column in spaces": (b" text ,label\nq,x\n", TEXT, "'text' is not there"),
    "a token of 3 MB": (lambda: text("q" * 3_000_000 + ",x"), TEXT, READ),
    "empty text": (text('"",x'), TEXT, READ),
}


@pytest.mark.parametrize("case", CSV)
def test_csv(case, reader, tmp_path):
    content, feature, words = CSV[case]
    (tmp_path / "d.csv").write_bytes(content() if callable(content) else content)
    assert words in judged(reader, tmp_path, "d.csv", feature)


def test_a_gigabyte_without_a_line_end(reader, tmp_path):
    """Its beginning and its zeros are read, so it is not sparse by the file system's count, and still refused."""
    with (tmp_path / "d.csv").open("wb") as stream:
        stream.write(b"text,label\n")
        for _ in range(1024):
            stream.write(b"q" * (1 << 20))
    assert "a line has more than" in judged(reader, tmp_path, "d.csv", TEXT)


ROWS = {
    "ragged": (b"text,label\nq,x\nq\nq,x,x\nq,y\n", TEXT, "read 2, aside 2"),
    "numbers": (b"a,label\n1,x\ninf,x\nx,x\n,x\n", TABLE, "read 2, aside 2"),
    "all": (b"a,label\nq,x\n", TABLE, "read 0, aside 1"),
}


@pytest.mark.parametrize("case", ROWS)
def test_csv_rows_kept_aside(case, reader, tmp_path):
    content, feature, words = ROWS[case]
    (tmp_path / "d.csv").write_bytes(content)
    assert words in judged(reader, tmp_path, "d.csv", feature, bad_rows="quarantine")


JSON: dict[str, tuple[str | bytes, str]] = {
    "nested 10^5 deep": ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "no JSON object"),
    "objects 10^5 deep": ('{"a":' * 100_000 + "1" + "}" * 100_000, "no JSON object"),
    "duplicate keys": ('{"text": "q", "text": "r", "label": "x"}', "there twice"),
    "huge integer": ('{"text": ' + "9" * 10_000 + ', "label": "x"}', "no JSON object"),
    "lone surrogate": ('{"text": "\\ud800", "label": "x"}', "no JSON object"),
    "NaN": ('{"text": NaN, "label": "x"}', "NaN is no JSON"),
    "decimal bomb": ('{"text": 1e999999999, "label": "x"}', READ),
    "not an object": ("[1]", "no JSON object"),
    "cut off": ('{"text": "q", "lab', "no JSON object"),
    "an object within": ('{"text": {"a": 1}, "label": "x"}', "an object within"),
    "a token of 3 MB": ('{"text": "' + "q" * 3_000_000 + '", "label": "x"}', READ),
    "a token of 10 MB": ('{"text": "' + "q" * 10_000_000 + '", "label": "x"}', "row 1 has more than"),
    "one of many lines": ('{"text": "q", "label": "x"}\n{"text": 1}\nnull', "row 3"),
    "no object at all": ("\n\n", "holds no JSON object"),
}


@pytest.mark.parametrize("case", JSON)
def test_json_lines(case, reader, tmp_path):
    content, words = JSON[case]
    (tmp_path / "d.jsonl").write_text(content + "\n")
    assert words in judged(reader, tmp_path, "d.jsonl", TEXT)


def parquet(**more: Any) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"text": ["q"] * 1000, "label": ["x"] * 1000}), stream, **more)
    return stream.getvalue()


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def says_rows(count: int, place: int) -> bytes:
    """A Parquet file of 1000 rows that says another number: of the file (first place), or of its row group (last)."""
    whole, footer = parquet(), int.from_bytes(parquet()[-8:-4], "little")
    data, metadata = whole[: -8 - footer], whole[-8 - footer : -8]
    # Thrift's compact form: zigzag, seven bits a byte, the lowest first.
    thousand, other = (bytes([2 * n & 0x7F | 0x80, 2 * n >> 7]) for n in (1000, count))
    parts = metadata.split(thousand)
    assert len(parts) > 3
    place %= len(parts) - 1
    changed = thousand.join(parts[: place + 1]) + other + thousand.join(parts[place + 1 :])
    return data + changed + whole[-8:]


PARQUET: dict[str, tuple[Callable[[], bytes], str]] = {
    "truncated": (lambda: parquet()[:-20], "no whole Parquet"),
    "no footer": (lambda: b"PAR1" + b"\0" * 100, "no whole Parquet"),
    "absurd footer": (lambda: b"PAR1" + b"\0" * 100 + (1 << 30).to_bytes(4, "little") + b"PAR1", "its metadata has"),
    "footer beyond the file": (lambda: b"PAR1" + b"\0" * 9 + (1 << 20).to_bytes(4, "little") + b"PAR1", "no whole"),
    "bad checksum": (lambda: flipped(parquet(write_page_checksum=True), 40), "no whole Parquet"),
    "more rows in the footer": (lambda: says_rows(1001, 0), "has 1000 rows, and its footer says 1001"),
    "fewer rows in the footer": (lambda: says_rows(999, 0), "has 1000 rows, and its footer says 999"),
    "more rows in the row group": (lambda: says_rows(1001, -1), "has 1000 rows, and its footer says 1001"),
    "a csv by that name": (lambda: b"text,label\nq,x\n", "no whole Parquet"),
    "another column": (lambda: parquet().replace(b"label", b"lebal"), "label column 'label' is not there"),
}


@pytest.mark.parametrize("case", PARQUET)
def test_parquet(case, reader, tmp_path):
    content, words = PARQUET[case]
    (tmp_path / "d.parquet").write_bytes(content())
    assert words in judged(reader, tmp_path, "d.parquet", TEXT)


def test_a_parquet_of_five_thousand_row_groups_is_read(reader, tmp_path):
    table = pa.table({"text": ["q"] * 5000, "label": ["x"] * 5000})
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=1)
    assert judged(reader, tmp_path, "d.parquet", TEXT) == "read 5000, aside 0"


class Bomb:
    """What a pickle does when it is loaded: here it would leave a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


@pytest.mark.parametrize("form", ["npy", "npz"])
def test_no_pickle_is_ever_loaded(form, reader, tmp_path):
    loaded = tmp_path / "loaded"
    array = np.array([Bomb(str(loaded))], dtype=object)
    source = {"kind": "arrays", "columns": {"pixels": "d.npy", "label": "d.npy"}}
    if form == "npy":
        np.save(tmp_path / "d.npy", array, allow_pickle=True)
        assert "only a pickle can carry" in judged_source(reader, tmp_path, source, IMAGE)
    else:
        np.savez(tmp_path / "d.npz", pixels=array, label=array, allow_pickle=True)
        assert "only a pickle can carry" in judged(reader, tmp_path, "d.npz", IMAGE)
    assert not loaded.exists()


def zipped(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for member, content in members.items():
            archive.writestr(f"{member}.npy", content)
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def header(shape: str) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def encrypted(content: bytes) -> bytes:
    """The same archive, whose members say that they need a password."""
    found = bytearray(content)
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = found.find(mark)
        while place >= 0:
            found[place + offset] |= 1
            place = found.find(mark, place + 4)
    return bytes(found)


def twice(member: bytes) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w") as archive:
        warnings.simplefilter("ignore")
        for name in ("pixels.npy", "pixels.npy", "label.npy"):
            archive.writestr(name, LABELS if name == "label.npy" else member)
    return stream.getvalue()


def overlapping(member: bytes) -> bytes:
    """Two entries of the archive's directory that stand for one place, as in a bomb that repeats its kernel."""
    found = bytearray(zipped(pixels=member, labels=member))
    first = found.find(b"PK\x01\x02")
    second = found.find(b"PK\x01\x02", first + 4)
    found[second + 42 : second + 46] = found[first + 42 : first + 46]
    return bytes(found)


def nested(depth: int) -> bytes:
    content = LABELS
    for _ in range(depth):
        content = zipped(pixels=content, label=LABELS)
    return content


def special(mode: int, content: bytes) -> bytes:
    """A member that an unpacker would make a link or a device; here no member ever becomes a file."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, what in (("pixels.npy", mode), ("label.npy", stat.S_IFREG)):
            info = zipfile.ZipInfo(name)
            info.external_attr = (what | 0o4777) << 16
            archive.writestr(info, content if name == "pixels.npy" else LABELS)
    return stream.getvalue()


LABELS = npy(np.zeros(3, np.uint8))
NPZ: dict[str, tuple[Callable[[], bytes], str]] = {
    "cut off": (lambda: zipped(pixels=npy(np.zeros((3, 4), np.uint8)), label=LABELS)[:-30], "no whole NPZ"),
    "bad crc": (lambda: flipped(zipped(pixels=npy(np.arange(12).reshape(3, 4)), label=LABELS), 60), "unpacked"),
    "a bomb": (lambda: zipped(pixels=header("(100000000, 2, 2)") + b"\0" * 400_000_000, label=LABELS), "unpack to"),
    "fewer rows than it says": (lambda: zipped(pixels=header("(9, 2, 2)"), label=npy(np.zeros(9))), "ends before"),
    "absurd shape": (lambda: zipped(pixels=header("(10, 999999, 999999)"), label=LABELS), "has items of"),
    "negative shape": (lambda: zipped(pixels=header("(-5, 2, 2)"), label=LABELS), REFUSED),
    "code in the header": (lambda: zipped(pixels=header("__import__('os').system('id')"), label=LABELS), "no whole"),
    "no such array": (lambda: zipped(other=LABELS), "'pixels' is not there"),
    "no zip": (lambda: b"hello", "no whole NPZ"),
    "encrypted": (lambda: encrypted(zipped(pixels=npy(np.zeros((3, 4), np.uint8)), label=LABELS)), "unpacked"),
    "a name twice": (lambda: twice(npy(np.zeros((3, 4), np.uint8))), "'pixels' is there twice"),
    "names that lead out": (lambda: zipped(**{"../pixels": LABELS, "/label": LABELS}), "'pixels' is not there"),
    "members that overlap": (lambda: overlapping(npy(np.zeros((3, 4), np.uint8))), REFUSED),
    "ten archives deep": (lambda: nested(10), "no whole NPY"),
    "a member that is a link": (lambda: special(stat.S_IFLNK, b"/etc/passwd"), "no whole NPY"),
    "a member that is a device": (lambda: special(stat.S_IFCHR, b""), "no whole NPY"),
    "a member by another case": (lambda: zipped(Pixels=LABELS, LABEL=LABELS), "'pixels' is not there"),
    "a hundred thousand members": (
        lambda: zipped(**{f"a{n}": b"" for n in range(100_000)}, label=LABELS),
        "has 100001 columns",
    ),
    "an archive within": (lambda: zipped(pixels=zipped(pixels=LABELS), label=LABELS), "no whole NPY"),
}


@pytest.mark.parametrize("case", NPZ)
def test_npz(case, reader, tmp_path):
    content, words = NPZ[case]
    (tmp_path / "d.npz").write_bytes(content())
    said = judged(reader, tmp_path, "d.npz", IMAGE)
    assert said.startswith(REFUSED)
    assert words in said


@pytest.mark.parametrize(
    "odd", ["new\nline.csv", 'quo"te.csv', "it's.csv", "$(touch gone).csv", "-dash.csv", "n" * 251 + ".csv"]
)
def test_odd_file_names_are_names(odd, reader, tmp_path):
    (tmp_path / odd).write_bytes(text("q,x"))
    assert judged(reader, tmp_path, odd, TEXT) == READ
    assert not (tmp_path / "gone").exists()


def test_what_is_no_regular_file_is_refused(reader, tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    with (tmp_path / "sparse.csv").open("wb") as stream:
        stream.truncate(1 << 40)
    for path, words in {
        "pipe.csv": "no regular file",
        "folder.csv": "is a folder",
        "loop.csv": REFUSED,
        "sparse.csv": "is sparse",
        "none.csv": "is not there",
        "a/" * 2100 + "d.csv": "name too long",
        "/dev/zero": "no regular file",
    }.items():
        assert words.lower() in judged(reader, tmp_path, path, TEXT, source={"format": "csv"}).lower()


def test_a_file_that_may_not_be_read_is_one_line(tmp_path):
    """Root may read all, so it is asked without root's rights over files."""
    (tmp_path / "d.csv").write_bytes(text("q,x"))
    (tmp_path / "d.csv").chmod(0)
    code = """
        import sys
        from pathlib import Path
        from tasks.data.ingest import resolve
        from tasks.spec.errors import DrydockError
        from tasks.spec.source import FilesSource
        try:
            resolve(FilesSource(kind="files", path=sys.argv[1]), Path())
        except DrydockError as error:
            print(type(error).__name__, error)
    """
    bounded = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.geteuid() == 0 else []
    command = [*bounded, sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "d.csv")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    said = done.stdout.strip()
    assert said.endswith("d.csv: can't be read: Permission denied; give this user the right to read it")
    assert "\n" not in said


def test_a_time_in_the_future_is_no_matter(reader, tmp_path):
    (tmp_path / "d.csv").write_bytes(text("q,x"))
    os.utime(tmp_path / "d.csv", (time.time() + 10**8,) * 2)
    assert judged(reader, tmp_path, "d.csv", TEXT) == READ


def test_pixel_bombs_and_their_like_are_kept_aside(reader, tmp_path):
    from PIL import Image

    folder = tmp_path / "images" / "x"
    folder.mkdir(parents=True)
    Image.new("L", (2, 2), 9).save(folder / "good.png")
    Image.new("L", (1, 1)).save(folder / "tiny.png")
    whole = (folder / "good.png").read_bytes()
    (folder / "bomb.png").write_bytes(whole[:16] + (65535).to_bytes(4, "big") * 2 + whole[24:])
    (folder / "cut.png").write_bytes(whole[:45])
    (folder / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n")
    (folder / "both.png").write_bytes(whole + b"<script>alert(1)</script>")
    (folder / "empty.png").touch()
    request = {"workload": "w", "source": {"kind": "folders", "path": "images"}, "feature": IMAGE}
    request |= {"label": {"classes": ["x", "y"]}, "bad_rows": "quarantine"}
    found = reader.ask(tmp_path, request)
    assert found["said"] == "read 2, aside 5"
    assert found["peak"] < MEBIBYTES


def test_images_of_other_kinds_are_read_upright_as_grey_or_kept_aside(reader, tmp_path):
    from PIL import Image

    folder = tmp_path / "images" / "x"
    folder.mkdir(parents=True)
    Image.new("CMYK", (2, 2), (0, 0, 0, 255)).save(folder / "a-cmyk.jpg")
    upright = Image.fromarray(np.array([[250, 250], [0, 0]], np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    upright.save(folder / "b-turned.png", exif=turned)
    Image.new("RGBA", (2, 2), (9, 9, 9, 0)).save(folder / "c-clear.png")
    frames = [Image.new("L", (2, 2), shade) for shade in (0, 99)]
    frames[0].save(folder / "d-moving.gif", save_all=True, append_images=frames[1:])
    source = {"kind": "folders", "path": "images"}
    assert judged_source(reader, tmp_path, source, IMAGE, bad_rows="quarantine") == "read 3, aside 1"
    pixels = pq.read_table(tmp_path / "room" / "raw.parquet").column("pixels").to_pylist()
    assert pixels[0] == [0, 0, 0, 0]
    assert pixels[1] == [0, 0, 250, 250]
    assert "2 frames" in pq.read_table(tmp_path / "room" / "quarantine.parquet").column("reason")[0].as_py()


def saved(folder: Path, table: pa.Table, change: Callable[[bytes], bytes] = bytes) -> None:
    """A folder as Hugging Face's datasets saves one."""
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    folder.mkdir()
    (folder / "d.arrow").write_bytes(change(stream.getvalue()))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "d.arrow"}]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))


def out_of_range() -> pa.Table:
    """A dictionary column that points beyond its dictionary; whoever trusts it reads foreign memory."""
    column = pa.DictionaryArray.from_arrays(pa.array([0, 9_999_999], pa.int32()), pa.array(["q"]), safe=False)
    return pa.table({"text": column, "label": ["x", "y"]})


ARROW: dict[str, tuple[Callable[[], pa.Table], Callable[[bytes], bytes], str]] = {
    "dictionary index out of range": (out_of_range, bytes, "no whole Arrow stream"),
    "cut off": (lambda: pa.table({"text": ["q" * 99] * 99, "label": ["x"] * 99}), lambda b: b[:900], "no whole Arrow"),
    "a flipped length": (lambda: pa.table({"text": ["q"], "label": ["x"]}), lambda b: flipped(b, 6), "no whole Arrow"),
    "nested values": (lambda: pa.table({"text": [{"a": 1}], "label": ["x"]}), bytes, "must be a column of texts"),
    "another column": (lambda: pa.table({"text": ["q"], "target": ["x"]}), bytes, "'label' is not there"),
}


@pytest.mark.parametrize("case", ARROW)
def test_arrow(case, reader, tmp_path):
    table, change, words = ARROW[case]
    saved(tmp_path / "saved", table(), change)
    said = judged_source(reader, tmp_path, {"kind": "huggingface", "path": "saved"}, TEXT)
    assert said.startswith(REFUSED)
    assert words in said


ROW = "q" * 4000
LARGE_ROWS, LARGE_SECONDS, LARGE_MEBIBYTES = 160_000, 40, 448
LARGE: dict[str, dict[str, Any]] = {
    "csv": {"kind": "files", "path": "d.csv"},
    "jsonl": {"kind": "files", "path": "d.jsonl"},
    "parquet": {"kind": "files", "path": "d.parquet"},
    "npy": {"kind": "arrays", "columns": {"pixels": "pixels.npy", "label": "label.npy"}},
    "sql": {"kind": "sql", "query": "SELECT text, label FROM t ORDER BY rowid"},
}


def write_large(folder: Path, form: str) -> None:
    """640 MB, a third more than a reader may hold."""
    if form == "npy":
        pixels = np.lib.format.open_memmap(folder / "pixels.npy", "w+", np.uint8, (LARGE_ROWS, 63, 63))
        pixels[:] = 1
        np.save(folder / "label.npy", np.array(["x"] * LARGE_ROWS))
    elif form == "sql":
        with contextlib.closing(sqlite3.connect(folder / "d.db")) as database, database:
            database.execute("CREATE TABLE t (text, label)")
            database.executemany("INSERT INTO t VALUES (?, 'x')", ((ROW,) for _ in range(LARGE_ROWS)))
    elif form == "parquet":
        # Each row another one, so that there is no dictionary that holds them all in little.
        rows = [f"{n}{ROW}" for n in range(LARGE_ROWS)]
        pq.write_table(pa.table({"text": rows, "label": ["x"] * LARGE_ROWS}), folder / "d.parquet", compression="none")
    else:
        line = f"{ROW},x\n" if form == "csv" else f'{{"text": "{ROW}", "label": "x"}}\n'
        with (folder / f"d.{form}").open("w") as stream:
            stream.write("text,label\n" if form == "csv" else "")
            stream.writelines(line for _ in range(LARGE_ROWS))


@pytest.mark.parametrize("form", LARGE)
def test_a_source_larger_than_the_limit_is_read_within_it(form, reader, tmp_path):
    write_large(tmp_path, form)
    size = max(path.stat().st_size for path in tmp_path.iterdir())
    assert size > 1.3 * LARGE_MEBIBYTES * 1024**2
    feature = TEXT if form != "npy" else {"kind": "image", "height": 63, "width": 63}
    source = LARGE[form] | ({"url": f"sqlite:///{tmp_path}/d.db"} if form == "sql" else {})
    limits = LARGE_SECONDS, LARGE_MEBIBYTES
    assert judged_source(reader, tmp_path, source, feature, limits=limits) == f"read {LARGE_ROWS}, aside 0"
