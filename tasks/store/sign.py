"""Ed25519 signatures over manifests (RFC 8032). The key is made at set-up and can be replaced.

    signing.pem  signing.pub      the key that signs, and its public half
    retired/<key id>.pub          replaced keys: what they signed still verifies
    revoked/<key id>.pub          keys that may have leaked: what they signed is refused
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tasks.spec.errors import BadRequest, IntegrityLost
from tasks.store.files import write_whole
from tasks.store.manifest import NAME, SIGNATURE

PRIVATE, PUBLIC = "signing.pem", "signing.pub"
RETIRED, REVOKED = "retired", "revoked"


def make_key(folder: Path) -> None:
    """Make the signing key pair in ``folder`` unless it is there; the private half is readable by us alone."""
    if (folder / PRIVATE).exists() and (folder / PUBLIC).exists():
        return
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write_pair(folder)


def rotate_key(folder: Path) -> str:
    """Put a new key in the place of the one that signs, whose public half is kept; return the new key's id.

    The old one is trusted before it is replaced, so whoever verifies meanwhile finds it. One caller at a time.
    """
    (folder / RETIRED).mkdir(exist_ok=True)
    write_whole(folder / RETIRED / f"{key_id(folder)}.pub", (folder / PUBLIC).read_bytes())
    _write_pair(folder)
    return key_id(folder)


def revoke_key(folder: Path, revoked: str) -> None:
    """Refuse from now on what a retired key signed.

    Raises:
        BadRequest: it is the key that signs, or no retired one; the message lists those there are.
    """
    if revoked == key_id(folder):
        raise BadRequest(f"key {revoked} is the one that signs; replace it first: drydock keys rotate")
    known = [path.stem for path in _public_keys(folder / RETIRED)]
    if revoked not in known:
        raise BadRequest(f"key {revoked!r} is not a retired one, must be one of {', '.join(known) or 'none'}")
    (folder / REVOKED).mkdir(exist_ok=True)
    (folder / RETIRED / f"{revoked}.pub").rename(folder / REVOKED / f"{revoked}.pub")


def list_keys(folder: Path) -> dict[str, str]:
    """Return key id -> ``signs``, ``retired`` or ``revoked``."""
    found = {path.stem: kind for kind in (RETIRED, REVOKED) for path in _public_keys(folder / kind)}
    return found | {key_id(folder): "signs"}


def _write_pair(folder: Path) -> None:
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    # Public first: a crash in between leaves a key that verifies nothing new, and make_key or rotate_key goes on.
    write_whole(folder / PUBLIC, _public_pem(key.public_key()))
    write_whole(folder / PRIVATE, private, mode=0o600)


def _public_keys(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.pub"))


def sign_bytes(content: bytes, keys: Path) -> str:
    """Return the signature (base64) of ``content`` by the key in ``keys``.

    Raises:
        IntegrityLost: the two halves of the key don't belong together.
    """
    key = serialization.load_pem_private_key((keys / PRIVATE).read_bytes(), password=None)
    assert isinstance(key, Ed25519PrivateKey)
    if _public_pem(key.public_key()) != (keys / PUBLIC).read_bytes():
        raise IntegrityLost(f"{keys}: {PRIVATE} and {PUBLIC} are of two keys; run drydock keys rotate")
    return base64.b64encode(key.sign(content)).decode()


def verify_bytes(content: bytes, signature: str, keys: Path, what: str) -> str:
    """Check a signature: by the key that signs, or by one that it replaced; return that key's id.

    Raises:
        IntegrityLost: it is by no key of ``keys``, by a revoked one, or over other bytes.
    """
    for path in (keys / PUBLIC, *_public_keys(keys / RETIRED)):
        if _is_by(path, content, signature):
            return _id_of(path)
    for path in _public_keys(keys / REVOKED):
        if _is_by(path, content, signature):
            raise IntegrityLost(f"{what}: was signed by key {path.stem}, which is revoked; make and sign it anew")
    raise IntegrityLost(f"{what}: its signature does not verify")


def _is_by(public: Path, content: bytes, signature: str) -> bool:
    key = serialization.load_pem_public_key(public.read_bytes())
    assert isinstance(key, Ed25519PublicKey)
    try:
        decoded = base64.b64decode(signature, validate=True)
        key.verify(decoded, content)
    except (InvalidSignature, ValueError):
        return False
    # Base64 has bits at its end that nothing reads.
    return base64.b64encode(decoded).decode() == signature


def sign_folder(folder: Path, keys: Path) -> None:
    """Sign a folder's manifest; the signature lies beside it."""
    content = (folder / NAME).read_bytes()
    write_whole(folder / SIGNATURE, _signature_file(key_id(keys), sign_bytes(content, keys)))


def verify_folder_signature(folder: Path, keys: Path) -> None:
    """Check the signature of a folder's manifest (the caller verifies the files against the manifest).

    Raises:
        IntegrityLost: no signature, or one that does not verify.
    """
    try:
        written, content = (folder / SIGNATURE).read_bytes(), (folder / NAME).read_bytes()
        signature = str(json.loads(written)["ed25519"])
    except (OSError, ValueError, KeyError, TypeError):
        raise IntegrityLost(f"{folder}: has no readable {SIGNATURE} or {NAME}") from None
    signer = verify_bytes(content, signature, keys, str(folder))
    # The manifest lists all files but this one, so it must be what the signer wrote, to the byte.
    if written != _signature_file(signer, signature).encode():
        raise IntegrityLost(f"{folder}: {SIGNATURE} is not as key {signer} wrote it")


def _signature_file(signer: str, signature: str) -> str:
    return json.dumps({"ed25519": signature, "key_id": signer}, indent=2) + "\n"


def key_id(keys: Path) -> str:
    """Return a short name of the public key: the first 16 hex digits of its SHA-256."""
    return _id_of(keys / PUBLIC)


def _id_of(public: Path) -> str:
    return hashlib.sha256(public.read_bytes()).hexdigest()[:16]


def _public_pem(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
