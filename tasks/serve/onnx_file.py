"""What an ONNX file may not hold: a reference to data outside itself.

ONNX Runtime follows such a reference when it loads: bytes are resolved against the working directory, a file
against its folder. Neither is under the package's manifest, so the file is read here first, as the protobuf
that it is (onnx.proto), without the ``onnx`` library, and without recursion, for it may be hostile.
"""

from __future__ import annotations

from collections.abc import Iterator

from tasks.spec.errors import BadRequest

# Message -> field number -> message; only the way to tensors is followed. From onnx.proto (IR version 13).
FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
TENSOR_EXTERNAL_DATA, TENSOR_DATA_LOCATION = 13, 14
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5


def refuse_external_data(content: bytes, where: str) -> None:
    """Check that an ONNX model holds all of its data itself.

    Raises:
        BadRequest: a tensor lies in another file, or the bytes are no ONNX model.
    """
    waiting: list[tuple[str, memoryview]] = [("model", memoryview(content))]
    graphs = 0
    while waiting:
        message, data = waiting.pop()
        graphs += message == "graph"
        for number, value in _fields(data, where):
            if message == "tensor" and _is_external(number, value):
                raise BadRequest(f"{where}: holds a tensor whose data lies elsewhere; export it whole")
            inner = FIELDS[message].get(number)
            if inner and isinstance(value, memoryview):
                waiting.append((inner, value))
    if not graphs:
        raise BadRequest(f"{where}: holds no ONNX graph, must be one ONNX model")


def _is_external(number: int, value: int | memoryview) -> bool:
    return number == TENSOR_EXTERNAL_DATA or (number == TENSOR_DATA_LOCATION and value != 0)


def _fields(data: memoryview, where: str) -> Iterator[tuple[int, int | memoryview]]:
    """Yield the fields of one protobuf message: number, and the number or the bytes it holds."""
    position, end = 0, len(data)
    try:
        while position < end:
            key, position = _varint(data, position)
            kind = key & 7
            if kind == VARINT:
                value, position = _varint(data, position)
                yield key >> 3, value
                continue
            length, position = _length(data, position, kind)
            if position + length > end:
                raise IndexError
            yield key >> 3, data[position : position + length]
            position += length
    except IndexError:
        raise BadRequest(f"{where}: is cut or is no ONNX model") from None


def _length(data: memoryview, position: int, kind: int) -> tuple[int, int]:
    if kind == LENGTH:
        return _varint(data, position)
    if kind in (FIXED64, FIXED32):
        return (8 if kind == FIXED64 else 4), position
    raise IndexError


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise IndexError
