"""Files that were read before: of a source of many files only the new ones are parsed again.

    <folder>/<workload>/<key>/      part.parquet, part.json, manifest.json (written last)

A part's key is the digest of its file's bytes, of all that is asked of them and of the code that reads them. What is
found here is held against its manifest; what is damaged is parsed again. Parts that no run used for a day are removed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.spec.errors import IntegrityLost
from tasks.spec.privacy import Receipt
from tasks.spec.requests import IngestRequest, SourceFile
from tasks.spec.value import sha256_of
from tasks.store.files import write_json
from tasks.store.manifest import verify, write_manifest

if TYPE_CHECKING:
    import pyarrow as pa

TABLE, FACTS = "part.parquet", "part.json"
# Sources of many files, each a table of its own.
KINDS = ("files", "s3")
# Another run of the workload may be at work with other files.
KEPT_SECONDS = 86_400


class Part(NamedTuple):
    """What a file gave: its rows (a Parquet file), the rows kept aside, its encoding, and the receipt."""

    table: Path
    rejects: list[dict[str, Any]]
    encoding: str | None
    receipt: Receipt


class Partitions:
    """The parts of one ingest. ``folder`` None: none are kept."""

    def __init__(self, folder: Path | None, request: IngestRequest, code_sha256: str) -> None:
        many = len(request.files) > 1 and request.source.kind in KINDS
        self._folder = folder / request.workload if folder and many else None
        asked = request.model_dump(mode="json", exclude={"files"})
        self._asked = sha256_of({"request": asked, "code": code_sha256})
        self._files: dict[str, SourceFile] = {file.name: file for file in request.files}
        self._used: set[str] = set()

    def find(self, name: str) -> Part | None:
        """Return the part of a file that was read before."""
        if self._folder is None:
            return None
        part = self._folder / self._key(name)
        self._used.add(part.name)
        if not part.is_dir():
            return None
        try:
            verify(part)
        except IntegrityLost:
            shutil.rmtree(part, ignore_errors=True)
            return None
        os.utime(part)
        facts = json.loads((part / FACTS).read_text())
        # A row that was kept aside says which file it is of, which may have another name by now.
        old = facts["name"]
        rejects = [row | {"file": name, "reason": row["reason"].replace(old, name)} for row in facts["rejects"]]
        return Part(part / TABLE, rejects, facts["encoding"], Receipt.parse(facts["receipt"], FACTS))

    def begin(self, name: str, schema: pa.Schema) -> Writer | None:
        """Return what takes a file's tables while it is read; None where no parts are kept."""
        if self._folder is None:
            return None
        working = self._folder / f".{self._key(name)}"
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True)
        return Writer(working, name, schema)

    def clear(self) -> None:
        """Remove the parts that neither this ingest nor another has used for a while."""
        for path in self._folder.iterdir() if self._folder and self._folder.is_dir() else ():
            if path.name not in self._used and time.time() - path.stat().st_mtime >= KEPT_SECONDS:
                shutil.rmtree(path, ignore_errors=True)

    def _key(self, name: str) -> str:
        return sha256_of({"asked": self._asked, "file": self._files[name].sha256})[:32]


class Writer:
    """One part on its way; ``close`` publishes it, whole or not at all."""

    def __init__(self, folder: Path, name: str, schema: pa.Schema) -> None:
        import pyarrow.parquet as pq

        self._folder, self._name = folder, name
        self._writer = pq.ParquetWriter(folder / TABLE, schema, compression="zstd")

    def add(self, table: pa.Table) -> None:
        self._writer.write_table(table)

    def close(self, rejects: list[dict[str, Any]], encoding: str | None, receipt: Receipt) -> None:
        self._writer.close()
        facts = {"name": self._name, "rejects": rejects, "encoding": encoding}
        write_json(self._folder / FACTS, facts | {"receipt": receipt.model_dump(mode="json")})
        write_manifest(self._folder)
        final = self._folder.with_name(self._folder.name.removeprefix("."))
        if final.is_dir():
            # The same bytes under two names in one source, or another run of this workload.
            shutil.rmtree(self._folder)
            return
        os.rename(self._folder, final)
