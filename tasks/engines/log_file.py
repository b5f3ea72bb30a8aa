"""A job's log as a file that grows, read on from an offset."""

from __future__ import annotations

import codecs
import os
import secrets
from pathlib import Path

CHUNK_BYTES = 1 << 20


def read_on(path: Path, since: int) -> tuple[str, int]:
    """Return the text from byte ``since`` on, at most 1 MiB of it, and where it ends; no file, no text."""
    try:
        with path.open("rb") as stream:
            stream.seek(since)
            chunk = stream.read(CHUNK_BYTES)
    except FileNotFoundError:
        return "", since
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = decoder.decode(chunk)
    # A character cut by the end of the chunk is left for the next call.
    return text, since + len(chunk) - len(decoder.getstate()[0])


def lead_to(link: Path, target: Path) -> bool:
    """Make ``link`` lead to ``target``, in one step; return whether it led elsewhere, or nowhere, before."""
    if link.is_symlink() and os.readlink(link) == str(target):
        return False
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
    temporary.symlink_to(target)
    temporary.replace(link)
    return True
