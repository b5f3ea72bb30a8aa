"""NPY, NPZ and IDX files, read block by block. Plain numbers and texts only: no pickle is ever loaded.

    B rows   N values of one item
"""

from __future__ import annotations

import gzip
import math
import zipfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from tasks.spec.errors import BadRequest

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

BLOCK_BYTES = 8 << 20
GZIP = b"\x1f\x8b"
# The IDX format's codes for its types, all big-endian (yann.lecun.com/exdb/mnist).
IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
# A compressed member that grows more than this is a bomb, unless it is small.
MAX_GROWTH, SMALL_BYTES = 1000, 64 << 20


class Items(NamedTuple):
    """An array in a stream, behind its header: ``rows`` items of ``shape``."""

    name: str
    stream: BinaryIO
    dtype: np.dtype
    rows: int
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class Npz:
    """One file: ``header()`` gives its arrays' names, then ``batches(columns)``."""

    def __init__(self, name: str, stream: BinaryIO) -> None:
        self._name = name
        try:
            self._zip = zipfile.ZipFile(stream)
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise BadRequest(f"{name}: is no whole NPZ file: {error}; write it again") from None

    def header(self) -> list[str]:
        return [item.removesuffix(".npy") for item in self._zip.namelist()]

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield the named arrays, one a column.

        Raises:
            BadRequest: arrays of different lengths, Python objects, a damaged or an exploding member.
        """
        try:
            yield from batches({name: self._member(name) for name in columns})
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
            raise BadRequest(f"{self._name}: can't be unpacked: {error}; write it again") from None

    def _member(self, name: str) -> Items:
        info = self._zip.getinfo(f"{name}.npy")
        if info.file_size > max(SMALL_BYTES, MAX_GROWTH * info.compress_size):
            found = f"{info.compress_size} bytes that unpack to {info.file_size}"
            raise BadRequest(f"{self._name}: {info.filename} has {found}; write it again with less compression")
        return items_of(f"{self._name}: {info.filename}", self._zip.open(info))  # type: ignore[arg-type]


def items_of(name: str, stream: BinaryIO) -> Items:
    """Return the array that an NPY or IDX stream holds, behind its header; gzip is unpacked on the way.

    Raises:
        BadRequest: neither of the two, Python objects, or columns before rows (Fortran order).
    """
    head = stream.read(2)
    if head == GZIP:
        stream.seek(0)
        stream = gzip.GzipFile(fileobj=stream)  # type: ignore[assignment]
        head = stream.read(2)
    try:
        return _npy(name, stream) if head == b"\x93N" else _idx(name, stream, head)
    except (ValueError, EOFError, OSError, SyntaxError, OverflowError, gzip.zlib.error) as error:  # type: ignore[attr-defined]
        reason = " ".join(str(error).split())[:160]
        raise BadRequest(f"{name}: is no whole NPY or IDX array: {reason}; write it again") from None


def batches(columns: dict[str, Items]) -> Iterator[pa.RecordBatch]:
    """Yield arrays of one length as columns: items of several values as lists [B, N]."""
    import pyarrow as pa

    first = next(iter(columns.values()))
    for items in columns.values():
        if items.rows != first.rows:
            raise BadRequest(f"{items.name}: has {items.rows} items, {first.name} has {first.rows}; must be as many")
    step = max(1, BLOCK_BYTES // max(1, *(items.item_bytes for items in columns.values())))
    for start in range(0, first.rows, step):
        count = min(step, first.rows - start)
        yield pa.record_batch({name: _block(items, count) for name, items in columns.items()})
    for items in columns.values():
        if items.stream.read(1):
            raise BadRequest(f"{items.name}: goes on after the {items.rows} items of its header; write it again")


def _block(items: Items, count: int) -> pa.Array:
    import numpy as np
    import pyarrow as pa

    size = count * items.item_bytes
    try:
        content = items.stream.read(size)
    except (OSError, EOFError, gzip.zlib.error) as error:  # type: ignore[attr-defined]
        raise BadRequest(f"{items.name}: can't be unpacked: {error}; write it again") from None
    if len(content) != size:
        raise BadRequest(f"{items.name}: ends before the {items.rows} items of its header; write it again")
    array = np.frombuffer(content, items.dtype).astype(items.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind == "b":
        array = array.view(np.uint8)
    flat = pa.array(array.astype(object) if array.dtype.kind in "US" else array)
    return flat if not items.shape else pa.FixedSizeListArray.from_arrays(flat, math.prod(items.shape))


def _npy(name: str, stream: BinaryIO) -> Items:
    from numpy.lib import format as npy

    major = stream.read(6)
    if not major.startswith(b"UMPY") or major[4] not in (1, 2):
        raise ValueError("its first bytes are not those of NPY version 1 or 2")
    read = npy.read_array_header_1_0 if major[4] == 1 else npy.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    return _items(name, stream, dtype, shape, fortran)


def _idx(name: str, stream: BinaryIO, head: bytes) -> Items:
    import numpy as np

    kind, dimensions = (*stream.read(2), 0, 0)[:2]
    if head != b"\0\0" or kind not in IDX_TYPES or not dimensions:
        raise ValueError("its first bytes are those of neither")
    shape = tuple(int.from_bytes(stream.read(4), "big") for _ in range(dimensions))
    return _items(name, stream, np.dtype(IDX_TYPES[kind]), shape, False)


def _items(name: str, stream: BinaryIO, dtype: Any, shape: tuple[int, ...], fortran: bool) -> Items:
    if dtype.hasobject:
        raise BadRequest(f"{name}: holds Python objects, which only a pickle can carry; save plain numbers or texts")
    if dtype.names or dtype.kind not in "biufUS":
        raise BadRequest(f"{name}: holds values of type {dtype}; must be numbers or texts")
    if not shape or (fortran and len(shape) > 1):
        raise BadRequest(f"{name}: has shape {shape}{' in Fortran order' * fortran}; must be rows first")
    found = Items(name, stream, dtype, shape[0], shape[1:])
    if not found.item_bytes or found.item_bytes > BLOCK_BYTES * 8:
        raise BadRequest(f"{name}: has items of {found.item_bytes} bytes; must be 1 to {BLOCK_BYTES * 8}")
    return found
