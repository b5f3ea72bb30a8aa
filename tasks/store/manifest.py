"""A manifest lists a folder's files with size and SHA-256. It is written last: it exists, the folder is whole.

The folder's digest is the SHA-256 of the manifest's bytes. No model or checkpoint format notices a flipped
byte (torch, safetensors and ONNX all load one silently), so every hand-over verifies.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from tasks.spec.errors import IntegrityLost
from tasks.spec.value import canonical_json
from tasks.store.files import sha256_file, write_whole

NAME = "manifest.json"
SIGNATURE = "manifest.sig"
# Written beside the manifest and not listed in it.
UNLISTED = {NAME, SIGNATURE}


def write_manifest(folder: Path) -> str:
    """List ``folder``, write its manifest and return its digest (hex)."""
    content = _content(_list(folder))
    write_whole(folder / NAME, content)
    return hashlib.sha256(content).hexdigest()


def digest_of(folder: Path) -> str:
    """Return the digest that a whole folder states, without reading its files.

    Raises:
        IntegrityLost: there is no manifest, so the folder is not whole.
    """
    try:
        return hashlib.sha256((folder / NAME).read_bytes()).hexdigest()
    except FileNotFoundError:
        raise IntegrityLost(f"{folder}: has no {NAME}, so it is not whole") from None


def verify(folder: Path, digest_sha256: str | None = None) -> str:
    """Read every byte of ``folder`` and hold it against its manifest; return the digest.

    Raises:
        IntegrityLost: a changed, missing, extra or linked file, or another folder than the one expected.
    """
    stated = digest_of(folder)
    if digest_sha256 is not None and stated != digest_sha256:
        raise IntegrityLost(f"{folder}: its digest is {stated[:12]}, must be {digest_sha256[:12]}")
    listed = _listed(folder)
    names = {str(path.relative_to(folder)) for path in _files(folder)}
    if extra := sorted(names - set(listed)):
        raise IntegrityLost(f"{folder}: {extra[0]} is not in its manifest")
    for name, entry in sorted(listed.items()):
        if name not in names:
            raise IntegrityLost(f"{folder}: {name} is missing")
        path = folder / name
        found = sha256_file(path) if path.stat().st_size == entry["bytes"] else "another size"
        if found != entry["sha256"]:
            raise IntegrityLost(f"{folder}: {name} has digest {found[:12]}, must be {entry['sha256'][:12]}")
    return stated


def _list(folder: Path) -> dict[str, dict[str, str | int]]:
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in _files(folder)
    }


def _listed(folder: Path) -> dict[str, dict[str, str | int]]:
    """The manifest's entries. It must be what we write, to the byte: whoever opens a folder without knowing its digest
    (a checkpoint, say) would else not see a change that means nothing."""
    content = (folder / NAME).read_bytes()
    try:
        files = json.loads(content)["files"]
        found = {str(name): {"bytes": entry["bytes"], "sha256": entry["sha256"]} for name, entry in files.items()}
        if _content(found) == content:
            return found
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise IntegrityLost(f"{folder}: its {NAME} can't be read")


def _content(files: dict[str, dict[str, str | int]]) -> bytes:
    return canonical_json({"files": files, "format": 1})


def _files(folder: Path) -> list[Path]:
    """All files below ``folder`` but the manifest's own; a link or a special file is refused."""
    found = []
    for directory, folders, names in os.walk(folder, followlinks=False):
        for name in (*names, *folders):
            path = Path(directory, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise IntegrityLost(f"{folder}: {path.relative_to(folder)} is not a plain file")
        found += [Path(directory, name) for name in names]
    return sorted(path for path in found if str(path.relative_to(folder)) not in UNLISTED)
