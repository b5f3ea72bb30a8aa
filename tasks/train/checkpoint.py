"""Training checkpoints: laid out as one safetensors file, verified before they are loaded.

No format notices a flipped byte by itself, so a checkpoint whose digest does not hold is set aside and the one before
it is taken. There is no pickle in it: tensors, and plain JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from tasks.spec.errors import IntegrityLost
from tasks.store.manifest import verify
from tasks.train.deposit import FACTS, TENSORS, Deposit, Guard, deposit, set_aside, whole

# safetensors' names of types.
TYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Saved(NamedTuple):
    """Where training is (``facts``: plain values) and what it holds (``tensors``, by name)."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    def of(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix/``, without it."""
        start = f"{prefix}/"
        return {name[len(start) :]: value for name, value in self.tensors.items() if name.startswith(start)}


class Layout(NamedTuple):
    """Tensors as the bytes of one file: its header, and each tensor's bytes with where they begin."""

    header: bytes
    parts: list[tuple[int, Tensor]]
    num_bytes: int

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Layout:
        listed, parts, end = {}, [], 0
        for name, tensor in tensors.items():
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            begin, end = end, end + content.numel()
            listed[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
            parts.append((begin, content))
        text = json.dumps(listed, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        return cls(header, [(len(header) + begin, content) for begin, content in parts], len(header) + end)

    def pieces(self) -> Iterator[memoryview]:
        yield memoryview(self.header)
        for _, content in self.parts:
            yield memoryview(content.numpy())


def name_of(epoch: int, step: int) -> str:
    """Return the name of what is saved ``step`` steps after the end of ``epoch``."""
    return f"epoch-{epoch:05d}" + (f"-step-{step:07d}" if step else "")


def save(folder: Path, name: str, saved: Saved, keep: int, guard: Guard) -> None:
    """Write a checkpoint whole, here and now.

    Raises:
        TryAgain: the disk is full, see ``deposit``.
    """
    layout = Layout.of(saved.tensors)

    def fill(stream: BinaryIO) -> None:
        for piece in layout.pieces():
            stream.write(piece)

    deposit(folder, Deposit(name, saved.facts, layout.num_bytes, keep), fill, guard)


def load_newest(folder: Path, guard: Guard) -> tuple[Saved | None, list[str]]:
    """Return the newest checkpoint that verifies (or None), and a line for each that did not: it is renamed, or it
    would outlive the whole ones that are written next. ``guard`` is held while it is."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    refused = []
    for path in whole(folder):
        try:
            verify(path)
            return Saved(json.loads((path / FACTS).read_text()), load_file(path / TENSORS)), refused
        except (IntegrityLost, OSError, ValueError, SafetensorError) as error:
            refused.append(f"{path.name} set aside: {str(error).splitlines()[0]}")
            with guard():
                set_aside(path)
    return None, refused
