"""Files of elsewhere: objects in S3 and addresses on the web, copied to a local file while a step reads them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tasks.data.known import Known
from tasks.spec.errors import BadRequest, DrydockError, IntegrityLost, TryAgain
from tasks.spec.requests import SourceFile
from tasks.spec.source import HttpSource, S3Source
from tasks.store.files import CHUNK_BYTES

Secrets = Callable[[str], str]
TIMEOUT_SECONDS = 30
CLOCK_SECONDS = 900


def resolve_s3(source: S3Source, secrets: Secrets, known: Known) -> tuple[SourceFile, ...]:
    """Return the objects under the prefix, by name, each with the SHA-256 of its bytes.

    Raises:
        BadRequest: no such bucket or object, or no right to read it. TryAgain: the store can't be reached.
    """
    from pyarrow import fs

    place = source.url.removeprefix("s3://")
    store = _store(source, secrets)
    try:
        found = [store.get_file_info(place)]
        if found[0].type != fs.FileType.File:
            folder = place if found[0].type == fs.FileType.Directory else place.rpartition("/")[0]
            found = store.get_file_info(fs.FileSelector(folder.rstrip("/"), recursive=True, allow_not_found=True))
        files = sorted((item for item in found if item.is_file and item.path.startswith(place)), key=lambda i: i.path)
        resolved = tuple(_known_object(store, source, item, known) for item in files)
    except OSError as error:
        raise _s3_error(source.url, error) from None
    if not files:
        raise BadRequest(f"{source.url}: no object is there; name one, or a prefix of some")
    if empty := [item.path for item in files if not item.size]:
        raise BadRequest(f"s3://{empty[0]}: is empty (0 bytes); bring a file with rows")
    return resolved


def _known_object(store: Any, source: S3Source, item: Any, known: Known) -> SourceFile:
    name, changed = f"s3://{item.path}", (item.mtime_ns or 0) / 1e9
    state = f"{source.endpoint} {source.region} {item.size} {item.mtime_ns}"

    def read() -> SourceFile:
        return SourceFile(name=name, sha256=_digest(_object(store, item.path)), bytes=item.size)

    # Its time has whole seconds and is the store's, whose clock may differ.
    return known.read(name, state, changed + CLOCK_SECONDS if changed else math.inf, read)


def resolve_http(source: HttpSource) -> SourceFile:
    """Return the file by the digest that the workload states; nothing is fetched yet."""
    return SourceFile(name=source.url, sha256=source.sha256, bytes=0)


def fetch(source: S3Source | HttpSource, file: SourceFile, secrets: Secrets, to: Path) -> None:
    """Copy a resolved file to ``to``, piece by piece.

    Raises:
        IntegrityLost: other bytes than those resolved. BadRequest, TryAgain: as when it was resolved.
    """
    digest = hashlib.sha256()
    with to.open("wb") as stream:
        for chunk in _chunks(source, file, secrets):
            digest.update(chunk)
            stream.write(chunk)
    if digest.hexdigest() != file.sha256:
        to.unlink()
        found = f"digest {digest.hexdigest()[:12]}, must be {file.sha256[:12]}"
        what = "correct data.source.sha256" if source.kind == "http" else "start a new run"
        raise IntegrityLost(f"{file.name}: has other bytes ({found}); if they are right, {what}")


def _chunks(source: S3Source | HttpSource, file: SourceFile, secrets: Secrets) -> Iterator[bytes]:
    if source.kind == "http":
        yield from _download(source, file, secrets)
        return
    try:
        yield from _object(_store(source, secrets), file.name.removeprefix("s3://"))
    except OSError as error:
        raise _s3_error(file.name, error) from None


def _object(store: Any, path: str) -> Iterator[bytes]:
    with store.open_input_stream(path) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _digest(chunks: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _store(source: S3Source, secrets: Secrets) -> Any:
    from pyarrow import fs

    options: dict[str, Any] = {"connect_timeout": TIMEOUT_SECONDS, "request_timeout": TIMEOUT_SECONDS}
    options["retry_strategy"] = fs.AwsStandardS3RetryStrategy(max_attempts=3)
    if source.access_key or source.secret_key:
        options["access_key"] = secrets(source.access_key or "")
        options["secret_key"] = secrets(source.secret_key or "")
    if source.endpoint:
        scheme, _, host = source.endpoint.rpartition("://")
        options |= {"endpoint_override": host, "scheme": scheme or "https"}
    return fs.S3FileSystem(region=source.region or "us-east-1", **options)


def _s3_error(where: str, error: OSError) -> DrydockError:
    reason = " ".join(str(error).split())
    refused = ("ACCESS_DENIED", "NO_SUCH", "NoSuch", "INVALID_ACCESS", "SIGNATURE", "HTTP status 403", "404")
    if isinstance(error, FileNotFoundError) or any(word in reason for word in refused):
        return BadRequest(f"{where}: the store refuses it ({reason[:160]}); check address, keys and rights")
    return TryAgain(f"{where}: the store does not answer ({reason[:160]})")


def _download(source: HttpSource, file: SourceFile, secrets: Secrets) -> Iterator[bytes]:
    import httpx

    try:
        # The digest is of the file, not of what a server may pack it into on the way.
        plain = {"Accept-Encoding": "identity"}
        options: Any = {"timeout": TIMEOUT_SECONDS, "follow_redirects": True, "headers": plain}
        with httpx.stream("GET", secrets(source.url), **options) as answer:
            if answer.status_code >= 500 or answer.status_code == 429:
                raise TryAgain(f"{file.name}: answers with status {answer.status_code}")
            if answer.status_code != 200:
                raise BadRequest(f"{file.name}: answers with status {answer.status_code}, must be 200")
            yield from answer.iter_raw(CHUNK_BYTES)
    except httpx.InvalidURL:
        raise BadRequest(f"{file.name}: is no address; correct data.source.url") from None
    except httpx.HTTPError as error:
        raise TryAgain(f"{file.name}: can't be fetched: {type(error).__name__}") from None
