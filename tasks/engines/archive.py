"""Folders as tar streams, to a container and back: the way of a room between machines without a common disk."""

from __future__ import annotations

import io
import os
import secrets
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tasks.spec.errors import IntegrityLost

CHUNK_BYTES = 1 << 20


def pack(folder: Path, name: str, uid: int) -> IO[bytes]:
    """Return a folder as an open tar file, as ``write`` makes it."""
    stream = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    write(stream, folder, name, uid)
    stream.seek(0)
    return stream


def write(stream: Any, path: Path, name: str, uid: int) -> None:
    """Write a folder or a file as a tar stream, called ``name`` in it and owned by ``uid``; what is hidden (work in
    progress) or a link stays here. ``stream`` needs no more than ``write``."""
    inside = sorted(path.rglob("*")) if path.is_dir() else []
    with tarfile.open(fileobj=stream, mode="w|", bufsize=1 << 16) as archive:
        for one in (path, *inside):
            parts = one.relative_to(path).parts
            if any(part.startswith(".") for part in parts) or one.is_symlink():
                continue
            within = "/".join((name, *parts))
            if one.is_dir():
                archive.addfile(_entry(within, uid, tarfile.DIRTYPE))
            elif one.is_file():
                with one.open("rb") as content:
                    entry = _entry(within, uid, tarfile.REGTYPE, os.fstat(content.fileno()).st_size)
                    archive.addfile(entry, content)


def pack_file(name: str, content: bytes, uid: int) -> bytes:
    """Return a tar of one file."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(_entry(name, uid, tarfile.REGTYPE, len(content)), io.BytesIO(content))
    return stream.getvalue()


def unpack(chunks: Iterable[bytes], target: Path) -> bool:
    """Write what a tar stream holds, one file or one folder, to ``target``: complete, or not at all. False where it
    holds nothing: what was asked for went while it was being packed.

    Raises:
        IntegrityLost: the stream was cut, or holds anything but plain files and folders.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    working = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    working.mkdir()
    try:
        if (found := _extract(chunks, working)) is None:
            return False
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(found, target)
        return True
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _extract(chunks: Iterable[bytes], working: Path) -> Path | None:
    try:
        with tarfile.open(fileobj=_Reader(iter(chunks)), mode="r|") as archive:
            for entry in archive:
                _write(archive, entry, working)
    except (tarfile.TarError, EOFError) as error:
        raise IntegrityLost(f"what came back from a container is no whole archive: {error}") from None
    found = list(working.iterdir())
    if len(found) > 1:
        raise IntegrityLost(f"what came back from a container holds {len(found)} entries, must be one")
    return found[0] if found else None


def _write(archive: tarfile.TarFile, entry: tarfile.TarInfo, working: Path) -> None:
    """Write one plain file or folder. (Python before 3.11.4 has no filters.)"""
    inside = PurePosixPath(entry.name)
    if inside.is_absolute() or ".." in inside.parts:
        raise IntegrityLost(f"what came back from a container holds {entry.name[:80]!r}, which leads out of its folder")
    target = working / inside
    if not (entry.isdir() or entry.isreg()):
        raise IntegrityLost(f"what came back from a container holds {entry.name[:80]!r}, which is no plain file")
    if entry.isdir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        content = archive.extractfile(entry)
        assert content is not None
        with content, target.open("xb") as stream:
            shutil.copyfileobj(content, stream, CHUNK_BYTES)


def _entry(name: str, uid: int, kind: bytes, size: int = 0) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.size, entry.uid, entry.gid = kind, size, uid, uid
    entry.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    return entry


class _Reader(io.RawIOBase):
    """A stream of chunks as a file that is read once, forwards."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._left = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            found = next(self._chunks, None)
            if found is None:
                return 0
            self._left = found
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count
