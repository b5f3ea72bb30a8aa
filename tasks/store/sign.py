"""Ed25519 signatures over manifests (RFC 8032). The key is made once, at set-up."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tasks.spec.errors import IntegrityLost
from tasks.store.files import write_json, write_whole
from tasks.store.manifest import NAME, SIGNATURE

PRIVATE, PUBLIC = "signing.pem", "signing.pub"


def make_key(folder: Path) -> None:
    """Make the signing key pair in ``folder`` unless it is there; the private half is readable by us alone."""
    if (folder / PRIVATE).exists() and (folder / PUBLIC).exists():
        return
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_whole(folder / PRIVATE, private, mode=0o600)
    write_whole(folder / PUBLIC, _public_pem(key.public_key()))


def sign_bytes(content: bytes, keys: Path) -> str:
    """Return the signature (base64) of ``content`` by the key in ``keys``."""
    key = serialization.load_pem_private_key((keys / PRIVATE).read_bytes(), password=None)
    assert isinstance(key, Ed25519PrivateKey)
    return base64.b64encode(key.sign(content)).decode()


def verify_bytes(content: bytes, signature: str, keys: Path, what: str) -> None:
    """Check a signature.

    Raises:
        IntegrityLost: it is not by the key in ``keys``, or over other bytes.
    """
    key = serialization.load_pem_public_key((keys / PUBLIC).read_bytes())
    assert isinstance(key, Ed25519PublicKey)
    try:
        key.verify(base64.b64decode(signature, validate=True), content)
    except (InvalidSignature, ValueError):
        raise IntegrityLost(f"{what}: its signature does not verify") from None


def sign_folder(folder: Path, keys: Path) -> None:
    """Sign a folder's manifest; the signature lies beside it."""
    content = (folder / NAME).read_bytes()
    write_json(folder / SIGNATURE, {"key_id": key_id(keys), "ed25519": sign_bytes(content, keys)})


def verify_folder_signature(folder: Path, keys: Path) -> None:
    """Check the signature of a folder's manifest (the caller verifies the files against the manifest).

    Raises:
        IntegrityLost: no signature, or one that does not verify.
    """
    try:
        signature = json.loads((folder / SIGNATURE).read_bytes())["ed25519"]
        content = (folder / NAME).read_bytes()
    except (OSError, ValueError, KeyError, TypeError):
        raise IntegrityLost(f"{folder}: has no readable {SIGNATURE} or {NAME}") from None
    verify_bytes(content, str(signature), keys, str(folder))


def key_id(keys: Path) -> str:
    """Return a short name of the public key: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256((keys / PUBLIC).read_bytes()).hexdigest()[:16]


def _public_pem(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
