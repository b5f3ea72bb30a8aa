"""Training checkpoints: one folder an epoch, whole when its manifest exists, verified before it is loaded.

``torch.load`` notices no flipped byte, so a checkpoint whose digest does not hold is set aside and the one
before it is taken. Loading is restricted to tensors and plain values (``weights_only``).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from tasks.spec.errors import IntegrityLost, TryAgain
from tasks.store.files import sync_folder
from tasks.store.manifest import verify, write_manifest

STATE = "state.pt"
KEPT = 2


def save(folder: Path, epoch: int, state: dict[str, Any]) -> None:
    """Write the checkpoint of ``epoch`` whole, then drop all but the newest two.

    Raises:
        TryAgain: the disk is full; those before it are as they were, and nothing of this one is left.
    """
    final = folder / f"epoch-{epoch:05d}"
    working = folder / f".epoch-{epoch:05d}"
    shutil.rmtree(working, ignore_errors=True)
    try:
        _write(working, state)
    except (OSError, RuntimeError) as error:  # torch tells a short write as a RuntimeError of its own
        free = shutil.disk_usage(folder).free
        shutil.rmtree(working, ignore_errors=True)
        if free > (need := size_of(state)):
            raise
        raise TryAgain(f"{folder}: the disk is full: epoch {epoch} needs {need} bytes, {free} are free") from error
    shutil.rmtree(final, ignore_errors=True)
    os.rename(working, final)
    sync_folder(folder)
    for old in _whole(folder)[KEPT:]:
        shutil.rmtree(old)


def _write(working: Path, state: dict[str, Any]) -> None:
    working.mkdir(parents=True)
    with (working / STATE).open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    write_manifest(working)


def size_of(state: Any) -> int:
    """Return about how many bytes a state takes: those of its tensors, and a little for the rest."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size() + 256
    if isinstance(state, dict):
        return sum(map(size_of, state.values())) + 4096
    return sum(map(size_of, state)) if isinstance(state, list | tuple) else 64


def load_newest(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the newest checkpoint that verifies (or None), and a line for each that did not."""
    refused = []
    for path in _whole(folder):
        try:
            verify(path)
            return torch.load(path / STATE, map_location="cpu", weights_only=True), refused
        except (IntegrityLost, OSError, RuntimeError, UnpicklingError) as error:
            refused.append(f"{path.name} set aside: {str(error).splitlines()[0]}")
    return None, refused


def _whole(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted(folder.glob("epoch-*"), reverse=True) if folder.is_dir() else []
