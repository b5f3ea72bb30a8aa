"""``drydock keys``: the keys that sign packages and the ledger, and how one is replaced."""

from __future__ import annotations

import click

from tasks.command.terminal import give, json_option, user
from tasks.site import Site
from tasks.store.files import exclusive
from tasks.store.sign import key_id, list_keys, revoke_key, rotate_key


@click.group(invoke_without_command=True)
@click.pass_context
def keys(context: click.Context) -> None:
    """The signing keys: which signs, which are retired, which revoked."""
    if context.invoked_subcommand is None:
        found = list_keys(Site().keys)
        click.echo("\n".join(f"{name}  {state}" for name, state in found.items()))


@keys.command("rotate")
@click.option("--reason", required=True)
@json_option
def keys_rotate(reason: str, as_json: bool) -> None:
    """Sign with a new key from now on; what the old one signed still verifies."""
    site = Site()
    with exclusive(site.home / "locks" / "keys.lock"):
        old, new = key_id(site.keys), rotate_key(site.keys)
    _record(site, f"key {new} signs instead of {old}: {reason}", {"key_id": new, "retired": old})
    give({"key_id": new, "retired": old}, as_json, f"key {new} signs now; {old} is retired")


@keys.command("revoke")
@click.argument("key")
@click.option("--reason", required=True)
@json_option
def keys_revoke(key: str, reason: str, as_json: bool) -> None:
    """Refuse what a retired KEY signed: its versions must be made anew."""
    site = Site()
    # First, so that the ledger's head is signed by the key that signs now.
    _record(site, f"key {key} is to be revoked: {reason}", {"revoked": key})
    with exclusive(site.home / "locks" / "keys.lock"):
        revoke_key(site.keys, key)
    give({"revoked": key}, as_json, f"key {key} is revoked: what it signed is refused from now on")


def _record(site: Site, text: str, detail: dict[str, str]) -> None:
    """Into the ledger, under no workload's name: the keys are everyone's."""
    site.ledger.record_event("drydock", "key", user(), text, detail)
