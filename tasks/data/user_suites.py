"""The suites that users edit in ``great_expectations/expectations``: which are a workload's, and what they demand.

A suite's ``meta.stage`` says what it is run on (``raw``, ``clean`` or ``split``; default ``clean``), an expectation's
``meta.severity`` what follows where it isn't met: ``stop``, ``quarantine`` or ``warn``. Without it Great Expectations'
own ``severity`` counts: critical stops, warning and info warn.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, get_args

from tasks.data.conditions import SUPPORTED, broken_by
from tasks.data.suite import STAGES, judged
from tasks.spec.errors import BadRequest
from tasks.spec.validation import Severity
from tasks.spec.value import sha256_of
from tasks.store.files import sha256_file

# GX 1.24.1 answers these with a numpy.bool, which its own result store can't write.
UNSTORABLE = {"expect_column_quantile_values_to_be_between": "expect_column_median_to_be_between"}
USERS_STAGES = STAGES[:3]
OWN_WORDS = {"critical": "stop", "warning": "warn", "info": "warn"}


class Suite(NamedTuple):
    """One suite: its name, the stage it is run on, and its expectations, each with ``meta.severity``."""

    name: str
    stage: str
    items: list[dict[str, Any]]


def suite_files(suites: Path, workload: str) -> tuple[Path, ...]:
    """Return a workload's own suites: ``<workload>.json``, ``<workload>.*.json`` and ``<workload>_*.json``.

    A workload's name holds no dot and no underscore, so none takes another's file for its own.
    """
    patterns = (f"{workload}.json", f"{workload}.*.json", f"{workload}_*.json")
    return tuple(sorted({path for pattern in patterns for path in suites.glob(pattern)}))


def suites_sha256(suites: Path, workload: str) -> str:
    """Return one digest of the suites that users edit for a workload; no suite has a digest too."""
    return sha256_of({path.name: sha256_file(path) for path in suite_files(suites, workload)})


def read_suite(path: Path) -> Suite:
    """Return a suite file in Great Expectations' own format.

    Raises:
        BadRequest: it can't be read, or demands what can't be done; the file, what was found and allowed are named.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["expectations"]
        items = [{"type": str(item["type"]), "kwargs": dict(item["kwargs"]), **_kept(item)} for item in found]
        stage = (content.get("meta") or {}).get("stage", "clean")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"is no suite in Great Expectations' format ({type(error).__name__}: {error})"
        raise BadRequest(f"{path}: {found}; see great_expectations/README.md") from None
    if not items:
        raise BadRequest(f"{path}: expectations = [], must hold at least one; or remove the file")
    if stage not in USERS_STAGES:
        raise BadRequest(f"{path}: meta.stage = {stage!r}, must be one of {', '.join(USERS_STAGES)}")
    return Suite(path.stem, stage, [_checked(path, stage, item) for item in items])


def _kept(item: dict[str, Any]) -> dict[str, Any]:
    """What else of an expectation counts; its id belongs to another context."""
    return {"meta": dict(item.get("meta") or {}), "severity": item.get("severity") or "critical"}


def _checked(path: Path, stage: str, item: dict[str, Any]) -> dict[str, Any]:
    if other := UNSTORABLE.get(item["type"]):
        raise BadRequest(f"{path}: {item['type']} can't be stored by this version of GX; use {other}")
    severity = item["meta"].get("severity") or OWN_WORDS.get(item["severity"], item["severity"])
    if severity not in get_args(Severity):
        allowed = ", ".join(get_args(Severity))
        raise BadRequest(f"{path}: {item['type']}: severity = {severity!r}, must be one of {allowed}")
    if severity == "quarantine" and (stage != "clean" or broken_by(item) is None):
        found = f"{item['type']} at stage {stage} can't quarantine: it names no rows of the cleaned table"
        raise BadRequest(f"{path}: {found}; use stop or warn, or one of {', '.join(SUPPORTED)} without mostly")
    return judged(item, severity)
