"""Keep each dataset version under a Git tag, its bytes in DVC, and whatever a person asks of it beside them.

    <repository>/.git                  the history of revisions (``tasks.data.tags``)
    <repository>/.dvc/cache/           the bytes, by content (``tasks.data.version_store``)

Contents first, the tag last. Neither DVC nor Parquet notices a flipped byte (DVC trusts every object of mode 0444),
so what comes back is held against the digest that the tag states.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.data import tags
from tasks.data.augment import MARK, augmented
from tasks.data.corrections import read, summary
from tasks.data.history_remote import push_history
from tasks.data.report import report
from tasks.data.table import SPLITS, class_counts, empty_room, read_table
from tasks.data.version_store import DATA, POINTER, Remote, fetch, keep, object_path
from tasks.spec.errors import IntegrityLost
from tasks.spec.requests import VersionRequest, VersionResult
from tasks.spec.value import RoomRef
from tasks.store.files import sha256_file, write_json
from tasks.store.room import open_room

if TYPE_CHECKING:
    import pyarrow as pa

FACTS, REPORT, PRIVACY = "dataset.json", "report.html", "privacy.json"
TAG_DIGITS = 12
WORK, ACCEPTED = ".work", ".accepted.parquet"


def version(request: VersionRequest, room: Path, repository: Path, remote: Remote | None = None) -> VersionResult:
    """Tag the accepted rows as a dataset revision, and write them, as the store gives them back, into ``room``.

    The same rows again have the same tag and make no new commit. The tag is written last, after the object in the
    cache was read and found right and the remote, where there is one, has taken it.

    Raises:
        IntegrityLost: a room changed, or the cache gives back other bytes; the message says how to repair it.
        TryAgain: the remote did not take the bytes.
    """
    empty_room(room)
    data = _accepted(request, room)
    digest = sha256_file(data)
    name = f"{request.workload}-{digest[:TAG_DIGITS]}"
    known = tags.find(repository, name)
    if known is None or not object_path(repository, _pointer(repository, known)).is_file():
        pointer = keep(repository, data, room / WORK, remote)
        _hold(object_path(repository, pointer), object_path(repository, pointer), digest)
        if known is None:
            facts = _facts(request, data, digest, name)
            page = report(facts, request, data, _before(repository, facts))
            files = {POINTER: pointer, FACTS: _json(facts), REPORT: page}
            paths = {f"{request.workload}/{file}": content.encode() for file, content in files.items()}
            tags.write_tag(repository, name, paths, f"{DATA} sha256 {digest}")
    if remote is not None:
        push_history(repository, name, remote)
    check_out(repository, name, room / DATA, remote)
    (room / ACCEPTED).unlink(missing_ok=True)
    write_json(room / PRIVACY, request.privacy.model_dump(mode="json"))
    facts = json.loads(file_of(repository, name, FACTS))
    counts = {kind: facts[kind] for kind in ("rows_by_split", "class_counts")}
    return VersionResult(revision=name, data_sha256=digest, augmented_rows=facts.get("augmented_rows", 0), **counts)


def check_out(repository: Path, revision: str, out: Path, remote: Remote | None = None) -> None:
    """Write a revision's data to ``out``, held against the digest that its tag states.

    What the cache lacks is fetched from the remote.

    Raises:
        IntegrityLost: the store has not the bytes, or other ones.
    """
    tag = tags.find(repository, revision)
    if tag is None:
        raise IntegrityLost(f"{repository}: revision {revision} is gone; restore this folder from a backup")
    pointer = _pointer(repository, tag)
    stored = object_path(repository, pointer)
    if not stored.is_file():
        fetch(repository, pointer, out.with_name(f".{out.name}.fetch"), remote)
    shutil.copyfile(stored, out)
    _hold(out, stored, tag.data_sha256)


def file_of(repository: Path, revision: str, name: str) -> bytes:
    """Return one of the small files of a revision: ``dataset.json``, ``report.html``."""
    tag = tags.find(repository, revision)
    if tag is None:
        raise IntegrityLost(f"{repository}: revision {revision} is gone; restore this folder from a backup")
    return tags.read_file(repository, tag, f"{revision.rpartition('-')[0]}/{name}")


def _pointer(repository: Path, tag: tags.Tag) -> str:
    return tags.read_file(repository, tag, f"{tag.name.rpartition('-')[0]}/{POINTER}").decode()


def _hold(found: Path, stored: Path, digest: str) -> None:
    if (got := sha256_file(found)) != digest:
        if found != stored:
            found.unlink()
        raise IntegrityLost(
            f"{stored}: DVC's cache holds digest {got[:12]}, must be {digest[:12]}; remove this object "
            "and run the step again, which writes it anew from the cleaned room (that one is whole)"
        )


def _accepted(request: VersionRequest, room: Path) -> Path:
    """The cleaned rows without those in quarantine, with the copies that the workload asks for, as a file."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    data = open_room(request.clean) / DATA
    quarantined = read_table(open_room(request.validate_data) / "quarantine.parquet").column("row_id")
    if not len(quarantined) and request.augment is None:
        return data
    gone, source = quarantined.combine_chunks(), pq.ParquetFile(data)
    with pq.ParquetWriter(room / ACCEPTED, source.schema_arrow, compression="zstd") as writer:
        for number in range(source.num_row_groups):
            table = source.read_row_group(number)
            table = table.filter(pc.invert(pc.is_in(table.column("row_id"), value_set=gone)))
            writer.write_table(table)
            if request.augment is not None:
                writer.write_table(augmented(table, request.feature, request.augment))
    return room / ACCEPTED


def _facts(request: VersionRequest, data: Path, digest: str, name: str) -> dict[str, Any]:
    """What a person asks of a revision, and what the next one is compared with."""
    import pyarrow.compute as pc

    validated, labels = open_room(request.validate_data), open_room(request.validate_labels)
    profile = json.loads((validated / "profile.json").read_text())
    validation = json.loads((validated / "validation.json").read_text())
    validation.pop("suites", None)
    table = read_table(data, ["row_id", "label", "split"])
    own = pc.invert(pc.match_substring(table.column("row_id"), MARK))
    copies, table = table.num_rows, table.filter(own)
    return {
        "revision": name,
        "workload": request.workload,
        "data_sha256": digest,
        "rows": table.num_rows,
        "augmented_rows": copies - table.num_rows,
        "rows_by_split": {split: 0 for split in SPLITS} | _counts(table.column("split")),
        "class_counts": dict(sorted(class_counts(table, request.feature).items())),
        "schema": profile["schema"],
        "cleaning": json.loads((open_room(request.clean) / "report.json").read_text())["rules"],
        "validation": validation,
        "labels": json.loads((labels / "report.json").read_text()),
        "history": profile["history"],
        "max_shift": profile["max_shift"],
        "profile": profile["columns"],
        "feature": request.feature.model_dump(mode="json"),
        "sources": list(request.sources),
        "privacy": request.privacy.model_dump(mode="json") | {"summary": request.privacy.summary},
        "lineage": _lineage(request),
    }


def _before(repository: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """The facts of the revision that validation compared with."""
    name = facts["validation"].get("compared_with")
    return json.loads(file_of(repository, name, FACTS)) if name else None


def _lineage(request: VersionRequest) -> dict[str, Any]:
    """What the revision comes from: digests of the rooms it was made in, and the people who corrected labels."""
    rooms = {name: getattr(request, name) for name in ("clean", "validate_data", "validate_labels", "corrections")}
    digests = {name: ref.digest_sha256 for name, ref in rooms.items() if isinstance(ref, RoomRef)}
    return {"rooms": digests, "corrections": summary(read(request.corrections))}


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {str(item["values"]): item["counts"] for item in column.value_counts().to_pylist()}


def _json(data: Any) -> str:
    return json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
