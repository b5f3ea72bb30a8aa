"""The dataset revisions that there are: listed, shown, compared, copied out."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tasks.data import tags
from tasks.data.history_remote import fetch_history
from tasks.data.profile import profile_of, shift
from tasks.data.scalars import named, opened, quoted
from tasks.data.version import FACTS, REPORT, check_out, file_of
from tasks.data.version_store import DATA, Remote
from tasks.spec.errors import BadRequest, IntegrityLost
from tasks.spec.feature import Feature
from tasks.spec.privacy import TOLD
from tasks.spec.requests import Previous
from tasks.spec.value import Value
from tasks.store.files import write_whole
from tasks.store.manifest import verify, write_manifest

__all__ = ["REPORT", "diff", "facts_of", "file_of", "get", "last_accepted", "revisions", "show"]
# Columns that say where a row stands, not what it is.
PLACES = ("row_id", "label", "split")
SHOWN = 5


def revisions(repository: Path, workload: str | None = None) -> list[dict[str, Any]]:
    """Return revision, workload, time and SHA-256 of each tag, oldest first; none where there is no repository."""
    found = [
        {"revision": t.name, "workload": _workload(t.name), "at": t.at.isoformat(), "data_sha256": t.data_sha256}
        for t in tags.tags(repository)
    ]
    return [row for row in found if workload in (None, row["workload"])]


def last_accepted(repository: Path, workload: str, apart_from: str | None) -> Previous | None:
    """Return a workload's newest revision, apart from one made of the cleaned room with this digest."""
    for row in reversed(revisions(repository, workload)):
        content = file_of(repository, row["revision"], FACTS)
        facts = json.loads(content)
        # A revision of an older release has no profile to compare with.
        if "profile" in facts and facts["lineage"]["rooms"]["clean"] != apart_from:
            return Previous(revision=row["revision"], facts_sha256=hashlib.sha256(content).hexdigest())
    return None


def facts_of(repository: Path, previous: Previous) -> dict[str, Any]:
    """Return a revision's facts, held against the digest that a request states.

    Raises:
        IntegrityLost: the revision is gone, or its facts changed.
    """
    content = file_of(repository, previous.revision, FACTS)
    if hashlib.sha256(content).hexdigest() != previous.facts_sha256:
        raise IntegrityLost(f"{repository}: {previous.revision}: its facts changed since the plan; start a new run")
    return json.loads(content)


def show(repository: Path, revision: str) -> dict[str, Any]:
    """Return what is known of a revision: schema, rows, splits, classes, cleaning, validation, label noise, lineage.

    Raises:
        BadRequest: no such revision; the message lists those there are.
    """
    facts = _facts(repository, revision)
    labels, validation = facts.get("labels", {}), facts.get("validation", {})
    noise = {m["slice"].partition(":")[2]: round(m["value"], 4) for m in labels.get("measurements", ())
             if m["metric"] == "class_noise_ratio"}  # fmt: skip
    kept = ("revision", "workload", "data_sha256", "rows", "augmented_rows", "schema", "rows_by_split", "class_counts")
    return {
        **{name: facts[name] for name in kept if name in facts},
        "cleaning": facts.get("cleaning", []),
        "validation": {name: value for name, value in validation.items() if value not in (None, [])},
        "label_noise": {"ratio": labels.get("noise_ratio"), "suspects": labels.get("suspects"), "by_class": noise},
        "shift_against": {validation["compared_with"]: _shifts(facts)} if validation.get("compared_with") else None,
        "privacy": _receipt(facts.get("privacy") or {}),
        "sources": facts.get("sources", []),
        "lineage": facts.get("lineage"),
    }


def _receipt(privacy: dict[str, Any]) -> dict[str, Any]:
    """The receipt as one reads it: what was found where, and what was done; never a value."""
    lines = [f"{f['column']}: {f['found']} {f['kind']} in {f['cells']} cells, {TOLD[f['action']]}"
             for f in privacy.get("findings", ())]  # fmt: skip
    kept = ("scanned_rows", "scanned_columns", "suspected", "key_id")
    return {"findings": lines, **{name: privacy[name] for name in kept if privacy.get(name)}}


def get(repository: Path, revision: str, out: Path, remote: Remote | None = None) -> Path:
    """Write a verified copy of a revision to the new folder ``out``: data, facts, report, and a manifest, last.

    What is not here is fetched from the remote, the revision's history too.

    Raises:
        BadRequest: no such revision (the message lists those there are), or ``out`` is there already.
        IntegrityLost: the store gave other bytes than were versioned.
    """
    fetch_history(repository, revision, remote)
    _check(repository, revision)
    if out.exists():
        raise BadRequest(f"{out}: is there already; name a new folder")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=".revision-"))
    try:
        check_out(repository, revision, working / DATA, remote)
        for name in (FACTS, REPORT):
            write_whole(working / name, file_of(repository, revision, name))
        verify(working, write_manifest(working))
        working.chmod(0o755)
        os.rename(working, out)
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return out


def diff(repository: Path, before: str, after: str, remote: Remote | None = None) -> dict[str, Any]:
    """Return how two revisions differ: schema, rows, rows by their features, and the shift of each column.

    A row is the same where its features are; it is changed where their label or split is another.
    """
    facts = [_facts(repository, name) for name in (before, after)]
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch) / f"{place}.parquet" for place in ("before", "after")]
        for name, path in zip((before, after), paths, strict=True):
            check_out(repository, name, path, remote)
        rows = _rows(*paths, facts[1])
        shifts = _shift_between(paths, facts)
    counts = {kind: _pairs(facts[0][kind], facts[1][kind]) for kind in ("rows_by_split", "class_counts")}
    return {"before": before, "after": after, "schema": _schema(facts), **counts, "rows": rows, "shift": shifts}


def _pairs(one: dict[str, int], two: dict[str, int]) -> dict[str, list[int]]:
    return {name: [one.get(name, 0), two.get(name, 0)] for name in sorted({*one, *two})}


def _schema(facts: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Columns that were added, removed or changed their type: before, after."""
    one, two = facts[0]["schema"], facts[1]["schema"]
    both = {name: [one.get(name), two.get(name)] for name in sorted({*one, *two})}
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}


def _rows(before: Path, after: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """How many rows were added, removed and changed, by the hash of their features, with some of each."""
    import duckdb

    columns = ", ".join(named(name) for name in facts["schema"] if name not in PLACES)
    with duckdb.connect(":memory:", config={"memory_limit": "512MB"}) as connection:
        for name, path in (("one", before), ("two", after)):
            # Equal rows are numbered, so that a twin more is a row more.
            key = f"hash({columns}) AS features"
            twin = "row_number() OVER (PARTITION BY features ORDER BY label, split, row_id) AS twin"
            inner = f"SELECT {key}, row_id, label, split FROM read_parquet({quoted(str(path))})"
            connection.execute(f"CREATE TABLE {name} AS SELECT *, {twin} FROM ({inner})").fetchall()
        return {
            "added": _some(connection, "two.row_id, NULL, two.label", "one.features IS NULL"),
            "removed": _some(connection, "one.row_id, one.label, NULL", "two.features IS NULL"),
            "relabelled": _some(connection, "two.row_id, one.label, two.label", "one.label IS DISTINCT FROM two.label"
                                " AND one.features IS NOT NULL AND two.features IS NOT NULL"),
            "moved": _some(connection, "two.row_id, one.split, two.split", "one.split <> two.split"),
        }  # fmt: skip


def _some(connection: Any, columns: str, condition: str) -> dict[str, Any]:
    joined = f"FROM one FULL JOIN two USING (features, twin) WHERE {condition}"
    found = connection.execute(f"SELECT {columns} {joined} ORDER BY ALL LIMIT {SHOWN}").fetchall()
    count = connection.execute(f"SELECT count(*) {joined}").fetchall()[0][0]
    return {"count": count, "first": [{"row_id": row[0], "before": row[1], "after": row[2]} for row in found]}


class _Described(Value):
    feature: Feature


def _shift_between(paths: list[Path], facts: list[dict[str, Any]]) -> dict[str, float]:
    """The shift of each column that both have, in the older one's bins."""
    feature = _Described.parse({"feature": facts[1]["feature"]}, FACTS).feature
    with opened(paths[0], feature) as one, opened(paths[1], feature) as two:
        older, frame = profile_of(one.frame()), two.frame()
    return {name: round(shift(older[name], frame, name), 4) for name in older if name in frame.columns}


def _shifts(facts: dict[str, Any]) -> dict[str, float]:
    history = facts.get("history") or {}
    return {name.removeprefix("shift_"): round(v, 4) for name, v in history.items() if name.startswith("shift_")}


def _facts(repository: Path, revision: str) -> dict[str, Any]:
    _check(repository, revision)
    return json.loads(file_of(repository, revision, FACTS))


def _check(repository: Path, revision: str) -> None:
    known = [row["revision"] for row in revisions(repository)]
    if revision not in known:
        raise BadRequest(f"revision {revision!r} is not there, must be one of {', '.join(known) or 'none yet'}")


def _workload(revision: str) -> str:
    return revision.rpartition("-")[0]
