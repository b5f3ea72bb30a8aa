"""What the verbs share with the terminal: printing for a person or a program, and who sits there."""

from __future__ import annotations

import json
import os
from typing import Any

import click

json_option = click.option("--json", "as_json", is_flag=True, help="print JSON for a program")


def give(data: Any, as_json: bool, text: str) -> None:
    """Print data for a program, or text for a person."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False, default=str) if as_json else text)


def user() -> str:
    """Return who asks, as the ledger and the corrections keep it."""
    return os.environ.get("DRYDOCK_USER") or os.environ.get("SUDO_USER") or os.environ.get("USER") or "root"
