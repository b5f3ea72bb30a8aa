"""The history of a revision at the remote, beside its bytes: ``history/<revision>.bundle``, a Git bundle with its tag.

With it a machine that has nothing but the remote's address can copy a revision out. Each revision has a bundle of its
own, so that two sites that share a remote never write the same file with other content.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.data.tags import adopt, find
from tasks.spec.errors import TryAgain
from tasks.store.files import write_whole

if TYPE_CHECKING:
    from tasks.data.version_store import Remote


def push_history(repository: Path, revision: str, remote: Remote) -> None:
    """Write a revision's tag, with all that it needs, to the remote, unless it is there.

    Raises:
        TryAgain: the remote did not take it.
    """
    from dulwich.bundle import create_bundle_from_repo, write_bundle
    from dulwich.repo import Repo as Git

    name, content = f"history/{revision}.bundle", io.BytesIO()
    if _read(remote, name) is not None:
        return
    with Git(str(repository)) as git, create_bundle_from_repo(git, [f"refs/tags/{revision}".encode()]) as bundle:
        write_bundle(content, bundle)
    try:
        _write(remote, name, content.getvalue())
    except OSError as error:
        reason = " ".join(str(error).split())[:160]
        raise TryAgain(f"{remote.url}: did not take the revision's history ({reason}); it is pushed again") from error


def fetch_history(repository: Path, revision: str, remote: Remote | None) -> None:
    """Bring a revision's tag from the remote, unless it is here; where the remote has none, nothing happens.

    Raises:
        IntegrityLost: the bundle is damaged, or of another revision. TryAgain: the remote does not answer.
    """
    if remote is None or find(repository, revision) is not None:
        return
    content = _read(remote, f"history/{revision}.bundle")
    if content is not None:
        where = f"{remote.url}/history/{revision}.bundle"
        adopt(repository, revision, content, where)


def _write(remote: Remote, name: str, content: bytes) -> None:
    if not remote.url.startswith("s3://"):
        write_whole(Path(remote.url) / name, content)
        return
    # An object appears when it is whole.
    with _s3(remote).open_output_stream(f"{_prefix(remote)}/{name}") as stream:
        stream.write(content)


def _read(remote: Remote, name: str) -> bytes | None:
    try:
        if not remote.url.startswith("s3://"):
            return (Path(remote.url) / name).read_bytes()
        with _s3(remote).open_input_stream(f"{_prefix(remote)}/{name}") as stream:
            return stream.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TryAgain(f"{remote.url}: does not give {name} ({' '.join(str(error).split())[:160]})") from None


def _s3(remote: Remote) -> Any:
    from pyarrow import fs

    scheme, _, host = remote.endpoint.rpartition("://")
    options = {"endpoint_override": host, "scheme": scheme or "https"} if host else {}
    return fs.S3FileSystem(connect_timeout=30, request_timeout=30, **options)


def _prefix(remote: Remote) -> str:
    return remote.url.removeprefix("s3://").rstrip("/")
