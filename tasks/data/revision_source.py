"""A revision of data as a source: Git says which bytes, DVC's cache has them, and both are held to their word.

No DVC is run: a pointer is a small YAML file, and the cache names its files by their MD5.
"""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path
from typing import Any

from tasks.data import tags
from tasks.data.version_store import POINTER, object_path
from tasks.spec.errors import BadRequest, IntegrityLost
from tasks.spec.requests import SourceFile
from tasks.spec.source import RevisionSource
from tasks.store.files import CHUNK_BYTES


def resolve_revision(source: RevisionSource, workload_folder: Path, datasets: Path | None) -> SourceFile:
    """Return the file in DVC's cache that a revision names, with the SHA-256 of its bytes.

    Raises:
        BadRequest: no such repository, revision or file (what there is is named), or its bytes are not in the cache.
        IntegrityLost: the cache holds other bytes than the pointer says.
    """
    repository = (workload_folder / source.repository).absolute() if source.repository else datasets
    if repository is None or not (repository / ".git").exists():
        raise BadRequest(f"{repository}: is no Git repository; name its folder in data.source.repository")
    path = f"{source.path}.dvc" if source.path else f"{source.revision.rpartition('-')[0]}/{POINTER}"
    pointer = _read(repository, source.revision, path)
    try:
        stored = object_path(repository, pointer)
        is_folder = stored.suffix == ".dir"
    except (KeyError, IndexError, TypeError, ValueError):
        is_folder = True
    if is_folder:
        raise BadRequest(f"{repository}: {path} at {source.revision} is no DVC pointer to one file") from None
    if not stored.is_file():
        raise BadRequest(f"{stored}: is not in the cache; run dvc fetch in {repository}, or drydock data get")
    md5, sha256, size = _digests(stored)
    if md5 != stored.parent.name + stored.name:
        raise IntegrityLost(f"{stored}: has MD5 {md5[:12]}, its name says otherwise; remove it and fetch it again")
    return SourceFile(name=str(stored), sha256=sha256, bytes=size)


def _read(repository: Path, revision: str, path: str) -> str:
    from dulwich.errors import NotGitRepository
    from dulwich.object_store import tree_lookup_path
    from dulwich.objectspec import parse_commit
    from dulwich.repo import Repo as Git

    try:
        with Git(str(repository)) as git:
            commit: Any = parse_commit(git, revision.encode())
            _, blob = tree_lookup_path(git.__getitem__, commit.tree, path.encode())
            return git[blob].data.decode()
    except NotGitRepository:
        raise BadRequest(f"{repository}: is no Git repository; name its folder in data.source.repository") from None
    except (KeyError, ValueError, UnicodeDecodeError, zlib.error):
        known = ", ".join(tag.name for tag in tags.tags(repository)[-8:]) or "none"
        raise BadRequest(f"{repository}: has no {path} at {revision!r}; its newest tags: {known}") from None


def _digests(path: Path) -> tuple[str, str, int]:
    md5, sha256, size = hashlib.md5(usedforsecurity=False), hashlib.sha256(), 0
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            md5.update(chunk)
            sha256.update(chunk)
            size += len(chunk)
    return md5.hexdigest(), sha256.hexdigest(), size
