"""The passport of a served answer: ``<package digest>.<ULID>``. The ledger leads from it back to the data."""

from __future__ import annotations

import secrets
import threading
import time

# Crockford's base 32: no I, L, O or U, which people misread (github.com/ulid/spec).
ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
# Two characters at a time: every answer bears a ULID.
PAIRS = tuple(first + second for first in ALPHABET for second in ALPHABET)
RANDOM_BITS = 80
# Of ULIDs in the same millisecond, only these change.
LOW_BITS, LOW_CHARS, LOW_MASK = 40, 8, (1 << 40) - 1


class Ulids:
    """Makes ULIDs: 48 bits of milliseconds, 80 random; in one process each sorts after the one before."""

    def __init__(self) -> None:
        self._last = self._millisecond = 0
        self._high, self._text = -1, ""  # the upper bits of the last one, and their characters
        self._lock = threading.Lock()

    def __call__(self) -> str:
        with self._lock:
            now = time.time_ns() // 1_000_000
            if now > self._millisecond:
                self._millisecond = now
                self._last = max(now << RANDOM_BITS | secrets.randbits(RANDOM_BITS), self._last + 1)
            else:  # the same millisecond, or a clock set back: count on
                self._last += 1
            if self._last >> LOW_BITS != self._high:
                self._high, self._text = self._last >> LOW_BITS, encode_ulid(self._last)[:-LOW_CHARS]
            low = self._last & LOW_MASK
            return self._text + PAIRS[low >> 30] + PAIRS[low >> 20 & 1023] + PAIRS[low >> 10 & 1023] + PAIRS[low & 1023]


def encode_ulid(number: int) -> str:
    """Return 128 bits as 26 characters."""
    high, low = number >> 60, number & (1 << 60) - 1  # of a size that Python is quick with
    return "".join(
        [
            PAIRS[high >> 60], PAIRS[high >> 50 & 1023], PAIRS[high >> 40 & 1023], PAIRS[high >> 30 & 1023],
            PAIRS[high >> 20 & 1023], PAIRS[high >> 10 & 1023], PAIRS[high & 1023],
            PAIRS[low >> 50], PAIRS[low >> 40 & 1023], PAIRS[low >> 30 & 1023], PAIRS[low >> 20 & 1023],
            PAIRS[low >> 10 & 1023], PAIRS[low & 1023],
        ]
    )  # fmt: skip


def passport(digest_sha256: str, ulid: str) -> str:
    return f"{digest_sha256}.{ulid}"
