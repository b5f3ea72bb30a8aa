"""Source files: resolved to digests when a run is planned, and held against them when they are read."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.metadata
import importlib.util
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from tasks.data.known import Known, changed_at, state_of
from tasks.data.remote import fetch, resolve_http, resolve_s3
from tasks.spec.errors import BadRequest, IntegrityLost
from tasks.spec.requests import SourceFile
from tasks.spec.source import ArraysSource, Encoded, FilesSource, Source
from tasks.store.files import CHUNK_BYTES

Secrets = Callable[[str], str]
FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".npz": "npz",
    ".txt": "text",
}
# How many names a message lists before it is cut.
SHOWN = 8
# A file of which most was never written reads as endless zeros.
SPARSE_BYTES, SPARSE_RATIO = 1 << 30, 20


def resolve(
    source: Source,
    workload_folder: Path,
    secrets: Secrets = str,
    datasets: Path | None = None,
    known: Known | None = None,
) -> tuple[SourceFile, ...]:
    """Return a source's files, sorted, each by absolute path (or address, or the bundled set's version) and
    SHA-256; of a query, the digest of its rows. ``datasets`` is the repository of this site's own revisions; what
    is ``known`` from an earlier plan is not read again.

    Raises:
        BadRequest: no such file (with what the folder has), an empty or unreadable one, an unknown format.
        TryAgain: a database or a store can't be reached.
    """
    known = known or Known()
    found = _resolved(source, workload_folder, secrets, datasets, known)
    known.save()
    return found


def _resolved(
    source: Source, workload_folder: Path, secrets: Secrets, datasets: Path | None, known: Known
) -> tuple[SourceFile, ...]:
    if source.kind == "sklearn":
        return (_bundled(source.name),)
    if source.kind == "arrays":
        return _arrays(source, workload_folder, known)
    if source.kind == "folders":
        from tasks.data.pictures import resolve_folders

        return (resolve_folders((workload_folder / source.path).absolute(), known),)
    if source.kind == "sql":
        from tasks.data.query import resolve_query

        return (resolve_query(source, secrets),)
    if source.kind == "dvc":
        from tasks.data.revision_source import resolve_revision

        return (resolve_revision(source, workload_folder, datasets),)
    if source.kind == "huggingface":
        from tasks.data.huggingface import resolve_saved

        saved = resolve_saved((workload_folder / source.path).absolute())
        return tuple(_source_file(str(path), path, known) for path in saved)
    return _encoded(source, workload_folder, secrets, known)


def _encoded(source: Encoded, workload_folder: Path, secrets: Secrets, known: Known) -> tuple[SourceFile, ...]:
    if source.kind == "s3":
        files = resolve_s3(source, secrets, known)
    elif source.kind == "http":
        files = (resolve_http(source),)
    else:
        paths = _paths(source, workload_folder)
        for path in paths:
            format_of(source, str(path))
        return tuple(_source_file(str(path), path, known) for path in paths)
    for file in files:
        format_of(source, urlsplit(file.name).path)
    return files


def _arrays(source: ArraysSource, workload_folder: Path, known: Known) -> tuple[SourceFile, ...]:
    """One file a column, in the order of the columns."""
    paths = [(workload_folder / path).absolute() for path in source.columns.values()]
    for path in paths:
        if not path.is_file():
            raise BadRequest(f"{path}: is not there; {_there(path)}")
    return tuple(_source_file(str(path), path, known) for path in paths)


def format_of(source: Encoded, name: str) -> str:
    """Return a file's format: the one declared, or the one its ending names."""
    found = source.format or FORMATS.get(Path(name).suffix.lower())
    if found is None:
        raise BadRequest(f"{name}: its ending is none of {', '.join(FORMATS)}; set data.source.format")
    return found


@contextlib.contextmanager
def opened(source: Source, file: SourceFile, secrets: Secrets, scratch: Path) -> Iterator[BinaryIO]:
    """Open a source file for reading; on leaving, its bytes are held against the digest once more.

    What is not on this machine is copied to ``scratch`` for the time.

    Raises:
        IntegrityLost: the file is gone, or its bytes are not those that were resolved.
    """
    if source.kind in ("s3", "http"):
        copy = scratch / f"fetched-{file.sha256[:12]}"
        try:
            fetch(source, file, secrets, copy)
            with copy.open("rb") as stream:
                yield stream
        finally:
            copy.unlink(missing_ok=True)
        return
    path = _bundled_path() if file.name.startswith("sklearn/") else Path(file.name)
    with _open(path, file) as stream:
        try:
            yield stream
        except BadRequest:
            # A file that changed is the cause, whatever the reader stumbled over.
            _hold(stream, file)
            raise
        _hold(stream, file)


def _open(path: Path, file: SourceFile) -> BinaryIO:
    try:
        # Without waiting: a pipe that was put in the file's place would be waited for until someone writes.
        stream = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    except OSError as error:
        found = f"was there when the run was planned, now: {error.strerror}"
        raise IntegrityLost(f"{file.name}: {found}; start a new run") from None
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise IntegrityLost(f"{file.name}: was a regular file when the run was planned, now it is none")
    return stream


def _hold(stream: BinaryIO, file: SourceFile) -> None:
    found = _sha256(stream)
    if found != file.sha256:
        digests = f"digest {found[:12]}, was {file.sha256[:12]}"
        raise IntegrityLost(f"{file.name}: changed since the run was planned ({digests}); start a new run")


def _sha256(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    stream.seek(0)
    while chunk := stream.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _paths(source: FilesSource, workload_folder: Path) -> list[Path]:
    path = (workload_folder / source.path).absolute()
    try:
        if path.is_file():
            return [path]
        if path.is_dir():
            raise BadRequest(f"{path}: is a folder, must be a file or a glob such as {source.path}/*.parquet")
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        files = [item for item in found if item.is_file()]
        is_there = path.exists()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadRequest(f"data.source.path = {source.path[:60]!r}...: {reason}; name another file") from None
    if files:
        return files
    if is_there:
        raise BadRequest(f"{path}: is no regular file; name one, or a glob")
    what = "matches no file" if glob.has_magic(str(path)) else "is not there"
    raise BadRequest(f"{path}: {what}; {_there(path)}")


def _there(path: Path) -> str:
    """What the nearest folder that exists holds, for a message."""
    folder = next(parent for parent in path.parents if parent.is_dir() and not glob.has_magic(str(parent)))
    names = sorted(item.name + "/" * item.is_dir() for item in folder.iterdir())
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{folder} has {', '.join(names[:SHOWN]) or 'no files'}{more}"


def _source_file(name: str, path: Path, known: Known) -> SourceFile:
    try:
        found = path.stat()
    except OSError:  # Reading it tells why.
        return _read_file(name, path)
    return known.read(name, state_of(found), changed_at(found), lambda: _read_file(name, path))


def _read_file(name: str, path: Path) -> SourceFile:
    try:
        found = path.stat()
        if found.st_size > SPARSE_BYTES and found.st_blocks * 512 * SPARSE_RATIO < found.st_size:
            written = f"{found.st_blocks * 512} of its {found.st_size} bytes were ever written"
            raise BadRequest(f"{name}: is sparse ({written}); bring a whole file")
        with path.open("rb") as stream:
            digest = _sha256(stream)
            size = stream.tell()
    except OSError as error:
        reason = f"can't be read: {error.strerror}"
        raise BadRequest(f"{name}: {reason}; give this user the right to read it") from None
    if not size:
        raise BadRequest(f"{name}: is empty (0 bytes); bring a file with rows")
    return SourceFile(name=name, sha256=digest, bytes=size)


def _bundled(name: str) -> SourceFile:
    path = _bundled_path()
    return _read_file(f"sklearn/{name}/{importlib.metadata.version('scikit-learn')}", path)


def _bundled_path() -> Path:
    """The digits file inside scikit-learn, found without importing it (that takes seconds)."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise BadRequest("scikit-learn is not installed, which bundles the digits; install drydock[platform]")
    return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
