"""Features of small grey images that a linear model separates: responses to patches of the images themselves.

A patch filter's rectified responses, of both signs, are summed over a grid of cells (Coates, Lee and Ng 2011; random
patches as filters after Coates and Ng 2011). There is nothing to train, so nothing learns a wrong label by heart.

    B images   H, W their size   P patch side   F filters   Q positions of a filter along one side   G cells a side
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

FILTERS, CELLS = 64, 4
# Fewer rows support fewer features: about one filter for each so many rows.
ROWS_PER_FILTER = 100
SEED = 0
# A response below this is no match; a patch of less contrast is no edge (of pixels from 0 to 1).
THRESHOLD, FLAT = 0.25, 0.1
# Added to a patch's norm, so that noise on plain paper isn't blown up to an edge.
CONTRAST = 0.3
BATCH_VALUES = 1 << 24


def patch_features(pixels: np.ndarray) -> np.ndarray:
    """Return float32 [B, 2·F·G·G] of images [B, H, W] with values from 0 to 1. The same images, the same features."""
    import numpy as np

    side = _side(pixels)
    filters = _filters(pixels, side)
    stride = max(1, min(pixels.shape[1:]) // 14)
    rows_each = max(1, BATCH_VALUES // (pixels[0].size * side * side))
    parts = [
        _responses(pixels[start : start + rows_each], filters, side, stride)
        for start in range(0, len(pixels), rows_each)
    ]
    return np.concatenate(parts)


def _side(pixels: np.ndarray) -> int:
    smaller = min(pixels.shape[1:])
    return min(smaller, max(3, min(8, round(smaller / 5))))


def _filters(pixels: np.ndarray, side: int) -> np.ndarray:
    """Unit vectors [P·P, F]: patches with contrast, drawn with a seed, their mean taken off."""
    import numpy as np

    count = int(np.clip(len(pixels) // ROWS_PER_FILTER, 16, FILTERS))
    random, drawn = np.random.default_rng(SEED), 20 * count
    tops = random.integers(0, pixels.shape[1] - side + 1, drawn)
    lefts = random.integers(0, pixels.shape[2] - side + 1, drawn)
    images = random.integers(0, len(pixels), drawn)
    places = zip(images, tops, lefts, strict=True)
    found = np.stack([pixels[i, top : top + side, left : left + side].ravel() for i, top, left in places])
    found = found - found.mean(axis=1, keepdims=True)
    kept = found[found.std(axis=1) > FLAT][:count]
    # Images without any edge have no filters of their own; their features are all zero then.
    kept = kept if len(kept) else np.zeros((1, side * side), np.float32)
    return (kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), 1e-6)).T.astype(np.float32)


def _responses(pixels: np.ndarray, filters: np.ndarray, side: int, stride: int) -> np.ndarray:
    import numpy as np

    windows = np.lib.stride_tricks.sliding_window_view(pixels, (side, side), axis=(1, 2))[:, ::stride, ::stride]
    shape = windows.shape[:3]
    flat = windows.reshape(-1, side * side).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.sqrt(np.einsum("ij,ij->i", flat, flat))[:, None] + CONTRAST
    found = (flat @ filters).reshape(*shape, -1)  # [B, Q, Q, F]
    signs = (np.maximum(found - THRESHOLD, 0), np.maximum(-found - THRESHOLD, 0))
    return np.concatenate([_pooled(part) for part in signs], axis=1)


def _pooled(found: np.ndarray) -> np.ndarray:
    """[B, Q, Q, F] -> [B, G·G·F]: sums over the cells of a grid."""
    import numpy as np

    for axis in (1, 2):
        cells = min(CELLS, found.shape[axis])
        starts = np.linspace(0, found.shape[axis], cells + 1).astype(int)[:-1]
        found = np.add.reduceat(found, starts, axis=axis)
    return found.reshape(len(found), -1)
