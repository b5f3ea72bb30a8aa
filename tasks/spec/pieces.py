"""Texts whose next piece is told: what each place is asked for, and how many pieces and characters that are.

A text's pieces are asked one after the other, then its end; of a text that was cut at the feature's width, no end.

    B texts   T places
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.spec.tokens import NO_TAG

if TYPE_CHECKING:
    import numpy as np

    from tasks.spec.feature import TextFeature


def lengths(x: np.ndarray) -> np.ndarray:
    """Return the pieces of encoded texts [B, T], without the end: int64 [B]. Behind the last there is padding alone."""
    import numpy as np

    return ((x != 0) * np.arange(1, x.shape[1] + 1)).max(axis=1, initial=0)


def targets(x: np.ndarray) -> np.ndarray:
    """Return what each place of encoded texts [B, T] is asked for: its piece, 0 for the end, NO_TAG behind it."""
    import numpy as np

    return np.where(np.arange(x.shape[1]) <= lengths(x)[:, None], x, NO_TAG).astype(np.int64)


def counted(feature: TextFeature, texts: list[str], tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return of each text how many answers its mean is of (pieces, and the end), and how many characters these pieces
    stand for: float64 [B] each."""
    import numpy as np

    found = tokenizer.encode_batch(texts)
    width = feature.max_tokens
    pieces = [min(len(encoding.ids) + 1, width) for encoding in found]
    chars = [
        len(text) if len(encoding.ids) <= width else encoding.offsets[width - 1][1]
        for text, encoding in zip(texts, found, strict=True)
    ]
    return np.array(pieces, np.float64), np.array(chars, np.float64)
