"""The API keys that the gateway asks for: a JSON file of client names and keys. No message ever shows a key."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.spec.errors import BadRequest

CLIENT = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
# What a header can carry; short ones could be guessed.
KEY = r"[!-~]{16,256}"


def read_api_keys(path: Path) -> dict[str, str]:
    """Return client name -> key.

    Raises:
        BadRequest: the file is not there, or is not what it must be; the message names the client at most.
    """
    try:
        found = json.loads(path.read_bytes(), object_pairs_hook=_once)
    except OSError as error:
        raise BadRequest(f"{path}: the API keys can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        told = error if isinstance(error, _TwiceError) else "is not JSON"
        raise BadRequest(f'{path}: {told}, must be {{"client name": "key"}}') from None
    if not isinstance(found, dict):
        raise BadRequest(f'{path}: holds no object, must be {{"client name": "key"}}')
    return _checked(path, found)


def _checked(path: Path, found: Mapping[str, Any]) -> dict[str, str]:
    owners: dict[str, str] = {}
    for client, key in found.items():
        if not re.fullmatch(CLIENT, client):
            raise BadRequest(f"{path}: client {client[:80]!r}, must be up to 64 letters, digits, dots and dashes")
        if not isinstance(key, str) or not re.fullmatch(KEY, key):
            raise BadRequest(f"{path}: the key of {client!r}, must be 16 to 256 visible ASCII characters")
        if key in owners:
            raise BadRequest(f"{path}: {owners[key]!r} and {client!r} have the same key, must be two")
        owners[key] = client
    return dict(found)


class _TwiceError(ValueError):
    """A name that an object holds twice: which of the two keys counts would be a guess."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise _TwiceError("names a client twice")
    return dict(pairs)
