"""The entries that the ledger adds: what each kind of row says, checked before it is written. Pure."""

from __future__ import annotations

from typing import Any

from tasks.release.model import Action, Intent, Route, Version
from tasks.spec.errors import BadRequest

Entry = dict[str, Any]


def opening(
    workload: str,
    action: Action,
    target: Version | None,
    actor: str,
    reason: str,
    intent_id: str,
    route: Route | None,
) -> Entry:
    if action == "rollback":
        required("reason", reason)
    if (target is None) != (action == "retire"):
        raise BadRequest(f"{workload}: {action} {'needs' if target is None else 'takes no'} version")
    entry = entry_of("intent", workload, actor, reason)
    entry |= {"intent_id": required("intent_id", intent_id), "action": action}
    entry |= target.model_dump() if target else {"version": None, "digest_sha256": None}
    return entry | {"detail": {"route": route.model_dump(mode="json") if route else None}}


def entry_of(kind: str, workload: str, actor: str, reason: str) -> Entry:
    return {
        "kind": kind,
        "workload": lock_name(workload),
        "actor": required("actor", actor),
        "reason": plain_text("reason", reason),
    }


def closing(
    intent: Intent, kind: str, reason: str | None, by: str | None, superseded_by: str | None = None
) -> Entry:
    """The row that ends an intent: about the same versions, by the same actor; ``by`` says who ended it."""
    entry = entry_of(kind, intent.workload, intent.actor, intent.reason if reason is None else reason)
    entry |= {"intent_id": intent.intent_id, "action": intent.action} | previous_columns(intent.champion)
    entry |= intent.target.model_dump() if intent.target else {}
    detail = {"by": by, "superseded_by": superseded_by}
    return entry | {"detail": {name: value for name, value in detail.items() if value}}


def previous_columns(champion: Version | None) -> Entry:
    if champion is None:
        return {}
    return {"previous_version": champion.version, "previous_digest_sha256": champion.digest_sha256}


def required(name: str, text: str) -> str:
    if not text.strip():
        raise BadRequest(f"{name} is empty, must say something")
    return plain_text(name, text)


def plain_text(name: str, text: str) -> str:
    """A text that every database keeps as it is."""
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise BadRequest(f"{name} = {ascii(text)[:80]}, must be text without NUL or lone surrogates")
    return text


def lock_name(workload: str) -> str:
    """The workload's name, which is part of a lock's file name too."""
    if not workload or not all(char.isalnum() or char in "-_" for char in workload):
        raise BadRequest(f"workload {ascii(workload)[:80]}: must be of letters, digits and hyphens")
    return workload
