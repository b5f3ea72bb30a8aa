"""Near-equal texts: MinHash bands to find candidates (Broder 1997), the exact Jaccard similarity to judge them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from tasks.data.engine import Engine

BANDS, BAND_ROWS = 8, 4
# A prime above all trigram codes (3 x 20 bits would not fit into the products; codes are hashed to 31 bits).
PRIME = 2**31 - 1


def add_functions(engine: Engine) -> tuple[Any, Any]:
    """Return the two functions, on columns: bands of a text (int64 each), similarity of two texts (0 to 1)."""
    similar = engine.function(_similarities, "trigram_similarity", ("string", "string"), "float64")
    return engine.function(_bands, "minhash_bands", ("string",), "array<int64>"), similar


def trigrams(text: str) -> np.ndarray:
    """Return the distinct codes of a text's trigrams, without regard to case and to white space around it."""
    import numpy as np

    letters = np.frombuffer(f"  {text.strip().lower()} ".encode("utf-32-le"), np.uint32).astype(np.int64)
    return np.unique((letters[:-2] * 961_748_927 + letters[1:-1] * 982_451_653 + letters[2:]) % PRIME)


def bands(text: str) -> list[int]:
    """Return one number for each band: two texts that share a number are candidates."""
    import numpy as np

    factors, terms = _permutations()
    signature = ((trigrams(text)[:, None] * factors + terms) % PRIME).min(axis=0).reshape(BANDS, BAND_ROWS)
    mixed = np.zeros(BANDS, np.int64)
    for column in signature.T:
        mixed = (mixed * 1_000_003 + column) % (2**55)
    return (mixed * BANDS + np.arange(BANDS)).tolist()


def similarity(left: str, right: str) -> float:
    """Return the Jaccard similarity of two texts' trigrams."""
    import numpy as np

    a, b = trigrams(left), trigrams(right)
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(1, len(a) + len(b) - both)


def _permutations() -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    draw = np.random.default_rng(0)
    size = BANDS * BAND_ROWS
    return draw.integers(1, PRIME, size), draw.integers(0, PRIME, size)


def _bands(texts: Any) -> Any:
    import pyarrow as pa

    return pa.array([None if text is None else bands(text) for text in texts.to_pylist()], pa.list_(pa.int64()))


def _similarities(lefts: Any, rights: Any) -> Any:
    import pyarrow as pa

    pairs = zip(lefts.to_pylist(), rights.to_pylist(), strict=True)
    return pa.array([similarity(left, right) for left, right in pairs], pa.float64())
