"""A checkpoint on the disk: one folder, whole when its manifest exists. No torch here: the writer beside a training
(``tasks.train.writer``) starts in a blink and costs the steps nothing.

    state.safetensors   every tensor          state.json   where training is; the rest      manifest.json   written last
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tasks.spec.errors import TryAgain
from tasks.store.files import sync_folder
from tasks.store.manifest import write_manifest

TENSORS, FACTS = "state.safetensors", "state.json"
Guard = Callable[[], contextlib.AbstractContextManager[None]]


class Deposit(NamedTuple):
    """One checkpoint to write: its folder's name (names sort by age), its facts, the size of its tensors' file, and
    how many are kept."""

    name: str
    facts: dict[str, Any]
    num_bytes: int
    keep: int


def deposit(folder: Path, what: Deposit, fill: Callable[[BinaryIO], None], guard: Guard) -> None:
    """Write a checkpoint whole into ``folder``, then drop all but the newest ones. ``fill`` writes the tensors' file;
    ``guard`` is held while the result is made visible.

    Raises:
        TryAgain: the disk is full; those before it are as they were, and nothing of this one is left.
    """
    final, working = folder / what.name, folder / f".{what.name}"
    shutil.rmtree(working, ignore_errors=True)
    try:
        working.mkdir(parents=True)
        # Not each file whole by itself: the folder counts when its manifest does.
        _write(working / FACTS, lambda stream: stream.write(json.dumps(what.facts).encode()))
        _write(working / TENSORS, fill)
        write_manifest(working)
    except OSError as error:
        free = shutil.disk_usage(folder).free
        shutil.rmtree(working, ignore_errors=True)
        if free > what.num_bytes:
            raise
        raise TryAgain(
            f"{folder}: the disk is full: {what.name} needs {what.num_bytes} bytes, {free} are free"
        ) from error
    with guard():
        shutil.rmtree(final, ignore_errors=True)
        os.rename(working, final)
        sync_folder(folder)
        for old in whole(folder)[what.keep :]:
            shutil.rmtree(old)


def _write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    with path.open("wb") as stream:
        fill(stream)
        stream.flush()
        os.fsync(stream.fileno())


def whole(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted(folder.glob("epoch-*"), reverse=True) if folder.is_dir() else []


def set_aside(path: Path) -> None:
    """Give a checkpoint that does not verify a name that is no checkpoint's; it goes with the folder."""
    aside = path.with_name(f"rotted-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
