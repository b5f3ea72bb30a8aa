"""The reader of each kind of source. A reader has ``header() -> names`` and ``batches(names) -> record batches``."""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol

from tasks.data.huggingface import ARROW, INFO, Saved
from tasks.data.rejects import Rejects
from tasks.data.source import Secrets, format_of, opened
from tasks.spec.requests import IngestRequest, SourceFile

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_BYTES = 16 << 20
MAX_BATCH_ROWS = 16_384


class Reader(Protocol):
    """One file, or one table made of several."""

    def header(self) -> list[str]: ...

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]: ...


class Opening(NamedTuple):
    """What it takes to open a source: the request, its secrets, room for copies, and where findings go."""

    request: IngestRequest
    secrets: Secrets
    scratch: Path
    rejects: Rejects
    encodings: dict[str, str]


def readers(opening: Opening) -> Iterator[tuple[str, AbstractContextManager[Reader]]]:
    """Yield each table's name and its reader, to be opened with ``with``: an error inside tells a changed file."""
    source: Any = opening.request.source
    if source.kind == "folders":
        yield source.path, contextlib.nullcontext(Pictures(opening.request, opening.rejects))
    elif source.kind == "sql":
        from tasks.data.query import NAME, Query

        yield NAME, Query(source, opening.request.files[0], opening.secrets)
    elif source.kind == "arrays":
        yield "data.source.columns", _arrays(opening)
    elif source.kind == "huggingface":
        yield from ((file.name, _saved(opening, file)) for file in opening.request.files if file.name.endswith(ARROW))
    else:
        yield from ((file.name, _file(opening, file)) for file in opening.request.files)


@contextlib.contextmanager
def _saved(opening: Opening, file: SourceFile) -> Iterator[Reader]:
    """One part of a data set that ``datasets`` saved, beside the description that is its own."""
    request, folder = opening.request, Path(file.name).parent
    described = next(other for other in request.files if other.name == str(folder / INFO))
    with (
        opened(request.source, described, opening.secrets, opening.scratch) as info,
        opened(request.source, file, opening.secrets, opening.scratch) as stream,
    ):
        yield Saved(file.name, stream, info.read())


@contextlib.contextmanager
def _arrays(opening: Opening) -> Iterator[Reader]:
    request = opening.request
    with contextlib.ExitStack() as stack:
        files = [opened(request.source, file, opening.secrets, opening.scratch) for file in request.files]
        yield Arrays(request, [stack.enter_context(file) for file in files])


@contextlib.contextmanager
def _file(opening: Opening, file: SourceFile) -> Iterator[Reader]:
    with opened(opening.request.source, file, opening.secrets, opening.scratch) as stream:
        yield _file_reader(opening, file.name, stream)


def _file_reader(opening: Opening, name: str, stream: BinaryIO) -> Reader:
    source: Any = opening.request.source
    if source.kind == "sklearn":
        return Digits(stream)
    kind = "parquet" if source.kind == "dvc" and not source.path else format_of(source, source_path(source, name))
    if kind == "parquet":
        from tasks.data.columnar import Columnar

        return Columnar(name, stream, batch_rows(opening.request))
    if kind == "npz":
        from tasks.data.arrays import Npz

        return Npz(name, stream)
    from tasks.data.encoding import as_utf8, detect

    encoding = opening.encodings[name] = detect(name, stream, getattr(source, "encoding", None))
    text = as_utf8(stream, encoding)
    if kind == "jsonl":
        from tasks.data.jsonlines import JsonLines

        return JsonLines(name, text, opening.rejects)
    if kind == "text":
        from tasks.data.plaintext import PlainText

        return PlainText(name, text, getattr(source, "row", "line"))
    from tasks.data.delimited import DELIMITERS, Delimited

    return Delimited(name, text, DELIMITERS[kind], opening.rejects)


def source_path(source: Any, name: str) -> str:
    """Return the path whose ending says the format: DVC's cache names its files by content."""
    return source.path if source.kind == "dvc" else name


def batch_rows(request: IngestRequest) -> int:
    """Return how many rows a batch may have: images can be megabytes each."""
    width = request.feature.shape[0] if request.feature.kind == "image" else 1
    return max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // width))


class Digits:
    """The bundled digits as columns ``pixels`` and ``label``: 1797 grey images of 8 x 8, values 0 to 16."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def header(self) -> list[str]:
        return ["pixels", "label"]

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        import numpy as np
        import pyarrow as pa

        with gzip.open(self._stream) as lines:
            table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
        pixels = pa.FixedSizeListArray.from_arrays(pa.array(table[:, :-1].reshape(-1)), 64)
        yield pa.record_batch({"pixels": pixels, "label": pa.array(table[:, -1])})


class Pictures:
    """Images in folders."""

    def __init__(self, request: IngestRequest, rejects: Rejects) -> None:
        self._request, self._rejects = request, rejects

    def header(self) -> list[str]:
        return [self._request.feature.columns[0], self._request.label.column]

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        from tasks.data.pictures import picture_batches

        return picture_batches(self._request, self._rejects)


class Arrays:
    """One array file for each column."""

    def __init__(self, request: IngestRequest, streams: list[BinaryIO]) -> None:
        self._source: Any = request.source
        self._files, self._streams = request.files, streams

    def header(self) -> list[str]:
        return list(self._source.columns)

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        from tasks.data.arrays import batches, items_of

        found = zip(self._source.columns, self._files, self._streams, strict=True)
        return batches({name: items_of(file.name, stream) for name, file, stream in found if name in columns})
