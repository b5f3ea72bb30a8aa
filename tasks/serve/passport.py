"""The passport of a served answer: ``<package digest>.<ULID>``. The ledger leads from it back to the data."""

from __future__ import annotations

import secrets
import threading
import time

# Crockford's base 32: no I, L, O or U, which people misread (github.com/ulid/spec).
ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
RANDOM_BITS = 80


class Ulids:
    """Makes ULIDs: 48 bits of milliseconds, 80 random; in one process each sorts after the one before."""

    def __init__(self) -> None:
        self._last = 0
        self._lock = threading.Lock()

    def __call__(self) -> str:
        with self._lock:
            fresh = (time.time_ns() // 1_000_000) << RANDOM_BITS | secrets.randbits(RANDOM_BITS)
            # The same millisecond, or a clock set back: count on from the last one.
            self._last = fresh if fresh > self._last else self._last + 1
            return encode_ulid(self._last)


def encode_ulid(number: int) -> str:
    """Return 128 bits as 26 characters."""
    return "".join(ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def passport(digest_sha256: str, ulid: str) -> str:
    return f"{digest_sha256}.{ulid}"
