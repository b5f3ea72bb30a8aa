"""The dataset revisions that there are, read from the dataset repository's tags."""

from __future__ import annotations

import datetime as dt
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tasks.data.version import check_out, tagged_sha256
from tasks.spec.errors import BadRequest


def revisions(repository: Path, workload: str | None = None) -> list[dict[str, Any]]:
    """Return revision, workload, time and SHA-256 of each tag, oldest first; none where there is no repository."""
    if not (repository / ".git").is_dir():
        return []
    from dulwich.repo import Repo as Git

    found = []
    with Git(str(repository)) as git:
        for ref in git.refs.keys(base=b"refs/tags/"):
            tag, made_at = ref.decode(), git[git.get_peeled(b"refs/tags/" + ref)].commit_time
            facts = {"revision": tag, "workload": tag.rpartition("-")[0]}
            at = dt.datetime.fromtimestamp(made_at, dt.UTC).isoformat()
            found.append(facts | {"at": at, "data_sha256": tagged_sha256(repository, tag)})
    return sorted((row for row in found if workload in (None, row["workload"])), key=lambda row: row["at"])


def get(repository: Path, revision: str, out: Path) -> Path:
    """Write a revision's data to ``out`` (a file), held against its digest.

    Raises:
        BadRequest: no such revision (the message lists those there are), or ``out`` is there already.
        IntegrityLost: DVC gave other bytes than were versioned.
    """
    known = [row["revision"] for row in revisions(repository)]
    if revision not in known:
        raise BadRequest(f"revision {revision!r} is not there, must be one of {', '.join(known) or 'none yet'}")
    if out.exists():
        raise BadRequest(f"{out}: is there already; name a new file")
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=".revision-") as scratch:
        data = Path(scratch) / "data.parquet"
        check_out(repository, revision, data)
        shutil.move(data, out)
    return out


def show(repository: Path, revision: str) -> dict[str, Any]:
    """Return a revision's rows by split and by class, and its columns."""
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as scratch:
        table = pq.read_table(get(repository, revision, Path(scratch) / "data.parquet"))
    return {
        "revision": revision,
        "columns": {field.name: str(field.type) for field in table.schema},
        "rows_by_split": _counts(table.column("split")),
        "class_counts": _counts(table.column("label")),
    }


def diff(repository: Path, before: str, after: str) -> dict[str, Any]:
    """Return how two revisions differ in rows by split and by class: before, after."""
    one, two = show(repository, before), show(repository, after)
    return {
        kind: {name: [one[kind].get(name, 0), two[kind].get(name, 0)] for name in sorted({*one[kind], *two[kind]})}
        for kind in ("rows_by_split", "class_counts")
    }


def _counts(column: Any) -> dict[str, int]:
    return {str(row["values"]): row["counts"] for row in column.value_counts().to_pylist()}
