"""A cache of answers, bounded in bytes; what was not asked for the longest time goes first."""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from typing import Any

import numpy as np

# What an entry costs beside its numbers: key, array and the place in the dictionary.
ENTRY_BYTES = 320


class Cache:
    """Answers by package digest and input digest: another version never answers for this one."""

    def __init__(self, package_sha256: str, max_bytes: int) -> None:
        self._seed = hashlib.sha256(package_sha256.encode())
        self._max_bytes, self.num_bytes = max_bytes, 0
        self._entries: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def __bool__(self) -> bool:
        return self._max_bytes > 0

    def key(self, rows: Any) -> bytes:
        """Return the digest of rows: numbers [B, N], B texts or B pairs of ids."""
        digest = self._seed.copy()
        if isinstance(rows, np.ndarray):
            digest.update(f"{rows.dtype.str}{rows.shape}".encode())
            digest.update(rows.tobytes())
        else:
            for text in rows if isinstance(rows[0], str) else itertools.chain.from_iterable(rows):
                raw = text.encode()
                digest.update(b"%d:" % len(raw) + raw)
        return digest.digest()

    def get(self, key: bytes) -> np.ndarray | None:
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
        return found

    def put(self, key: bytes, probabilities: np.ndarray) -> None:
        """Keep a copy: the given one may be a view of a whole batch."""
        cost = probabilities.nbytes + ENTRY_BYTES
        if cost > self._max_bytes or key in self._entries:
            return
        self._entries[key] = probabilities.copy()
        self.num_bytes += cost
        while self.num_bytes > self._max_bytes:
            _, dropped = self._entries.popitem(last=False)
            self.num_bytes -= dropped.nbytes + ENTRY_BYTES
