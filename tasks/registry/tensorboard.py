"""TensorBoard's event files, for scalars: what any TensorBoard that is pointed at the folder shows.

A file is a series of records (length, masked CRC-32C of it, content, masked CRC-32C of that), each an ``Event`` in
protobuf's wire form. The libraries that write them bring torch or TensorFlow into the process, seconds of import for
these few bytes. Format: tensorflow/core/util/event.proto, summary.proto, lib/io/record_writer.
"""

from __future__ import annotations

import functools
import struct
import time
from pathlib import Path

POLYNOMIAL = 0x82F63B78


class EventFile:
    """One run's file in ``folder``, appended to record by record."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{int(time.time())}.drydock"
        self._append(_double(1, time.time()) + _bytes(3, b"brain.Event:2"))

    def add(self, scalars: dict[str, float], step: int, at_seconds: float) -> None:
        """Append one event that holds ``scalars``."""
        values = b"".join(
            _bytes(1, _bytes(1, tag.encode()) + _tag(2, 5) + struct.pack("<f", value)) for tag, value in scalars.items()
        )
        self._append(_double(1, at_seconds) + _tag(2, 0) + _varint(step) + _bytes(5, values))

    def _append(self, event: bytes) -> None:
        length = struct.pack("<Q", len(event))
        record = length + struct.pack("<I", masked_crc(length)) + event + struct.pack("<I", masked_crc(event))
        with self.path.open("ab") as stream:
            stream.write(record)


def masked_crc(content: bytes) -> int:
    """Return CRC-32C (Castagnoli), rotated and shifted as the record format has it."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _table()[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@functools.cache
def _table() -> tuple[int, ...]:
    found = []
    for crc in range(256):
        for _ in range(8):
            crc = (crc >> 1) ^ (POLYNOMIAL if crc & 1 else 0)
        found.append(crc)
    return tuple(found)


def _tag(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _double(field: int, value: float) -> bytes:
    return _tag(field, 1) + struct.pack("<d", value)


def _bytes(field: int, content: bytes) -> bytes:
    return _tag(field, 2) + _varint(len(content)) + content
