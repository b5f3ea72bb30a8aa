"""``drydock history``: the ledger for people; and from an answer's passport back to where it came from."""

from __future__ import annotations

import datetime as dt
import re
from typing import Any

from tasks.data.predictions import find_prediction
from tasks.registry import versions
from tasks.release.model import Version
from tasks.site import Site
from tasks.spec.errors import BadRequest


def history_text(workload: str, rows: list[dict[str, Any]]) -> str:
    """Return the ledger's rows of a workload, newest last, one line each."""
    lines = [f"{workload}: {len(rows)} rows, the chain and its signed head verify"]
    for row in rows:
        stage, verdict = row["detail"].get("stage"), row["detail"].get("verdict")
        what = f"{stage:<10} {verdict:<9}" if stage else f"{row['kind']:<10} {row['action'] or '':<9}"
        number = row["version"] or row["detail"].get("version")
        version = f"version {number}" if number else ""
        before = f"(before: {row['previous_version']})" if row["previous_version"] else ""
        lines.append(f"  {row['at'][:19]}  {what} {version:<11} {before:<12} {row['actor']}: {row['reason']}")
    return "\n".join(line.rstrip() for line in lines)


def served_at(site: Site, workload: str, at: str) -> dict[str, Any]:
    """Return the version that served at a time.

    Raises:
        BadRequest: no time, or nothing served then.
    """
    try:
        time = dt.datetime.fromisoformat(at)
    except ValueError:
        raise BadRequest(f"--at {at}: must be an ISO 8601 time such as 2026-11-23T10:00:00+00:00") from None
    found = site.ledger.at(workload, time if time.tzinfo else time.replace(tzinfo=dt.UTC))
    if found is None:
        raise BadRequest(f"{workload}: nothing served at {at}")
    return found.model_dump()


def origin_of(site: Site, workload: str, passport: str) -> dict[str, str]:
    """Return what an answer came from: package, version, run, dataset revision, verdict, approver.

    Raises:
        BadRequest: no passport, or a package that was never registered here.
    """
    digest, dot, ulid = passport.partition(".")
    if not dot or not re.fullmatch("[0-9a-f]{64}", digest) or len(ulid) != 26:
        raise BadRequest(f"--passport {passport}: must be <package digest>.<ULID>, as in x-drydock-passport")
    answered_at = ulid_time(ulid)
    found = versions.find(site.mlflow, workload, digest)
    if found is None:
        raise BadRequest(f"{workload}: no registered version holds package {digest[:12]}")
    served_then = Version(version=found.version, digest_sha256=digest)
    decision = site.ledger.decision(workload, served_then, until=answered_at)
    served = [row.at for row in site.ledger.history(workload) if row.kind == "commit" and row.version == found.version]
    return {
        "answered_at": answered_at.isoformat(timespec="milliseconds"),
        "version": found.version,
        "package_sha256": digest,
        "variant": found.tags.get("drydock.variant", ""),
        "run": f"{site.settings.mlflow_url}/#/runs/{found.run_id}",
        "dataset_revision": found.tags.get("drydock.dataset_revision", ""),
        "evidence_sha256": found.evidence_sha256,
        "verdict": f"{found.tags.get('drydock.verdict', '')}: {found.tags.get('drydock.why', '')}",
        "decided_by": f"{decision.kind} by {decision.actor}: {decision.reason}" if decision else "no review demanded",
        "served_since": ", ".join(served) or "never",
        "validation": f"{site.settings.mlflow_url}/#/runs/{found.run_id}/artifacts/validation",
        "rollout": found.tags.get(versions.ROLLOUT_TAG, ""),
        "answer": _answer(site, workload, passport),
    }


def _answer(site: Site, workload: str, passport: str) -> str:
    rows = find_prediction(site.home / "predictions" / workload, passport)
    told = [row["label"] + ("" if row["probability"] is None else f" ({row['probability']:.3f})") for row in rows]
    return ", ".join(told) or "not in the log (sampled)"


def ulid_time(ulid: str) -> dt.datetime:
    """Return the time in a ULID: its first ten Crockford base-32 digits are milliseconds since 1970."""
    alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
    if any(digit not in alphabet for digit in ulid[:10]):
        raise BadRequest(f"--passport: {ulid} is no ULID")
    milliseconds = 0
    for digit in ulid[:10]:
        milliseconds = milliseconds * 32 + alphabet.index(digit)
    try:
        return dt.datetime.fromtimestamp(milliseconds / 1000, dt.UTC)
    except (ValueError, OverflowError):  # beyond the year 9999
        raise BadRequest(f"--passport: {ulid} is no ULID") from None
