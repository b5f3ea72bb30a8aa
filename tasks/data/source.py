"""Source files: resolved to digests when a run is planned, and held against them when they are read."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tasks.spec.errors import BadRequest, IntegrityLost
from tasks.spec.requests import SourceFile
from tasks.spec.workload import FilesSource, Source
from tasks.store.files import CHUNK_BYTES

FORMATS = {".csv": "csv", ".parquet": "parquet"}
# How many names a message lists before it is cut.
SHOWN = 8


def resolve(source: Source, workload_folder: Path) -> tuple[SourceFile, ...]:
    """Return a source's files, sorted, each by absolute path (or the bundled set's version) and SHA-256.

    Raises:
        BadRequest: no such file (with what the folder has), an empty or unreadable one, an unknown format.
    """
    if source.kind == "sklearn":
        return (_bundled(source.name),)
    paths = _paths(source, workload_folder)
    for path in paths:
        format_of(source, str(path))
    return tuple(_source_file(str(path), path) for path in paths)


def format_of(source: FilesSource, name: str) -> str:
    """Return a file's format: the one declared, or the one its ending names."""
    found = source.format or FORMATS.get(Path(name).suffix.lower())
    if found is None:
        raise BadRequest(f"{name}: its ending is none of {', '.join(FORMATS)}; set data.source.format")
    return found


@contextlib.contextmanager
def opened(file: SourceFile) -> Iterator[BinaryIO]:
    """Open a source file for reading; on leaving, its bytes are held against the digest once more.

    Raises:
        IntegrityLost: the file is gone, or its bytes are not those that were resolved.
    """
    path = _bundled_path() if file.name.startswith("sklearn/") else Path(file.name)
    try:
        stream = path.open("rb")
    except OSError as error:
        found = f"was there when the run was planned, now: {error.strerror}"
        raise IntegrityLost(f"{file.name}: {found}; start a new run") from None
    with stream:
        try:
            yield stream
        except BadRequest:
            # A file that changed is the cause, whatever the reader stumbled over.
            _hold(stream, file)
            raise
        _hold(stream, file)


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
    if path.is_file():
        return [path]
    if path.is_dir():
        raise BadRequest(f"{path}: is a folder, must be a file or a glob such as {source.path}/*.parquet")
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    files = [item for item in found if item.is_file()]
    if files:
        return files
    if path.exists():
        raise BadRequest(f"{path}: is no regular file; name a CSV or Parquet file")
    what = "matches no file" if glob.has_magic(str(path)) else "is not there"
    raise BadRequest(f"{path}: {what}; {_there(path)}")


def _there(path: Path) -> str:
    """What the nearest folder that exists holds, for a message."""
    folder = next(parent for parent in path.parents if parent.is_dir() and not glob.has_magic(str(parent)))
    names = sorted(item.name + "/" * item.is_dir() for item in folder.iterdir())
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{folder} has {', '.join(names[:SHOWN]) or 'no files'}{more}"


def _source_file(name: str, path: Path) -> SourceFile:
    try:
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
    return _source_file(f"sklearn/{name}/{importlib.metadata.version('scikit-learn')}", path)


def _bundled_path() -> Path:
    """The digits file inside scikit-learn, found without importing it (that takes seconds)."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise BadRequest("scikit-learn is not installed, which bundles the digits; install drydock[platform]")
    return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
