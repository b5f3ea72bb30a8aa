"""What ranks read: arrays that are mapped, not loaded, and each rank's rows of each global batch.

The order is a function of (seed, epoch) and of the rows alone, and a rank's share of a batch of its position: a
training goes on at any batch, on any number of ranks, with no row lost or seen twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# A batch that takes longer to gather than this is gathered while the one before is computed.
AHEAD_SECONDS = 0.002
# So many batches' rows are sorted by length together: enough that a batch's rows are alike, and few that stay together.
SORTED_BATCHES, LENGTHS_ROWS = 50, 8192
# Stored narrow, computed wide.
WIDE = {"uint8": torch.float32, "int32": torch.int64}


class Split(NamedTuple):
    """One split's mapped arrays, as ``tasks.train.prepare`` stored them: inputs [B, ...], class indices int64 [B], of
    words or pieces [B, T]; or numbers float32 [B]."""

    x: Any
    y: Any

    def __len__(self) -> int:
        return len(self.y)


def open_split(arrays: Path, name: str) -> Split:
    x, y = (np.load(arrays / f"{name}.{part}.npy", mmap_mode="r", allow_pickle=False) for part in "xy")
    return Split(x, y)


class Loader:
    """Gathers rows into tensors on a device. ``trim``: texts are cut to the longest of the rows."""

    def __init__(self, device: torch.device, trim: bool) -> None:
        self.device, self.trim = device, trim
        self.waited_seconds = 0.0
        self._ahead: ThreadPoolExecutor | None = None

    def load(self, split: Split, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return inputs and class indices of ``rows``."""
        x, y = _gather(split, rows, self.trim)
        x = x.to(self.device, non_blocking=True)
        return x.to(WIDE.get(str(x.dtype).removeprefix("torch."), x.dtype)), y.to(self.device, non_blocking=True)

    def stream(self, split: Split, shares: Iterator[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches in order. Where gathering is slow (a cold file, wide rows) a thread is one batch ahead."""
        following: Future[tuple[Tensor, Tensor]] | None = None
        rows = next(shares, None)
        while rows is not None:
            started = time.monotonic()
            batch = following.result() if following else self.load(split, rows)
            took = time.monotonic() - started
            self.waited_seconds += took
            if took > AHEAD_SECONDS and self._ahead is None:
                self._ahead = ThreadPoolExecutor(1, "batches")
            rows = next(shares, None)
            ahead = self._ahead is not None and rows is not None
            following = self._ahead.submit(self.load, split, rows) if ahead else None
            yield batch


def _gather(split: Split, rows: np.ndarray, trim: bool) -> tuple[Tensor, Tensor]:
    x, y = split.x[rows], split.y[rows]
    if trim:
        # A student's targets are probabilities [B, K], which no width has to do with.
        by_place = y.ndim == 2 and y.dtype.kind == "i"
        # A text's end is asked where there is padding already.
        asked = (x != 0) | (y >= 0) if by_place else x != 0
        width = max(1, int(asked.any(axis=0).nonzero()[0].max(initial=-1)) + 1)
        x = np.ascontiguousarray(x[:, :width])
        y = np.ascontiguousarray(y[:, :width]) if by_place else y
    return torch.from_numpy(x), torch.from_numpy(y)


def shares(
    n: int,
    batch: int,
    seed: int,
    epoch: int,
    rank: int,
    world: int,
    done: int = 0,
    lengths: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Yield this rank's row numbers of each global batch after the first ``done``; rows that fill no batch wait for
    another epoch. With ``lengths`` [n] rows of similar length share a batch."""
    draw = np.random.default_rng((seed, epoch))
    order, batch = draw.permutation(n), whole_batch(n, batch, world)
    if lengths is not None:
        order = _by_length(order, lengths, batch, draw)
    for start in range(done * batch, n - batch + 1, batch):
        yield order[start + rank : start + batch : world]


def _by_length(order: np.ndarray, lengths: np.ndarray, batch: int, draw: np.random.Generator) -> np.ndarray:
    """Sort a shuffled order by length, a few batches' rows at a time; then shuffle the batches."""
    whole, window = len(order) - len(order) % batch, SORTED_BATCHES * batch
    parts = [order[start : min(start + window, whole)] for start in range(0, whole, window)]
    parts = [part[np.argsort(lengths[part], kind="stable")] for part in parts]
    batches = draw.permutation(np.concatenate(parts).reshape(-1, batch))
    return np.concatenate([batches.ravel(), order[whole:]])


def lengths_of(split: Split) -> np.ndarray:
    """Return how many tokens each row has, int64 [B]."""
    parts = [split.x[start : start + LENGTHS_ROWS] for start in range(0, len(split), LENGTHS_ROWS)]
    return np.concatenate([(part != 0).sum(axis=1) for part in parts])


def whole_batch(n: int, batch: int, world: int) -> int:
    """Return how many rows a global batch has: fewer than asked for where there are fewer."""
    return min(batch, n - n % world)


def steps_of_epoch(n: int, batch: int, world: int) -> int:
    return n // whole_batch(n, batch, world)


def seed_of(*parts: int) -> int:
    """One seed from several numbers (NumPy's SeedSequence mixes them; the same everywhere)."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
