"""Tensors of the Open Inference Protocol v2: JSON or binary in, rows of the feature out; and answers back.

B rows   N input width   K classes
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import simdjson

from tasks.spec.errors import BadRequest
from tasks.spec.feature import Feature
from tasks.spec.ids import ROLES

# Datatype -> how its bytes lie in a binary tensor (little-endian, as the protocol says).
NUMBERS = {"FP32": "<f4", "UINT8": "u1", "INT64": "<i8"}
LENGTH = struct.Struct("<I")


def input_names(feature: Feature) -> tuple[str, ...]:
    return ROLES if feature.kind == "ids" else ("text",) if feature.holds == "texts" else ("input",)


def read_rows(feature: Feature, datatype: Any, shape: Any, data: Any, max_rows: int, flat: bool = False) -> Any:
    """Return the rows of one input: numbers [B, N], or B strings. Their values are held to the feature by
    ``Package.validate``, which is quick where many requests are one batch.

    ``data`` is the JSON's flat or nested list (``flat``: it is known to hold no list), or the bytes of a binary
    tensor.

    Raises:
        BadRequest: datatype, shape or values that do not fit the feature, or B beyond ``max_rows``.
    """
    (name,) = input_names(feature)
    allowed = ("BYTES",) if feature.holds == "texts" else tuple(NUMBERS)
    if datatype not in allowed:
        raise BadRequest(f"{name}.datatype = {show(datatype)}, must be {' or '.join(allowed)}")
    num_rows = num_rows_of(feature, shape, max_rows)
    if feature.holds == "texts":
        return _texts(name, data, num_rows)
    if isinstance(data, simdjson.Array):
        array = _from_array(name, datatype, data, [len(data)] if flat else shape)
    else:
        array = _from_bytes(name, datatype, data) if isinstance(data, bytes) else _from_json(name, datatype, data)
    if array.size != math.prod(shape) or (array.ndim != 1 and array.shape != tuple(shape)):
        found = f"{array.size} values" if array.ndim == 1 else f"shape {list(array.shape)}"
        raise BadRequest(f"{name}.data has {found}, must be {math.prod(shape)} values as its shape says")
    return array.reshape(num_rows, -1)


def read_ids(tensors: list[tuple[dict[str, Any], Any]], max_rows: int) -> list[tuple[str, ...]]:
    """Return B pairs of ids of the tensors ``user`` and ``item``, each with its data: texts, or whole numbers, whose
    digits are the id.

    Raises:
        BadRequest: datatype, shape or values that are no ids, B beyond ``max_rows``, or not of both the same.
    """
    found = {}
    for tensor, data in tensors:
        name, datatype, shape = tensor["name"], tensor.get("datatype"), tensor.get("shape")
        if not isinstance(shape, list) or [*map(type, shape)] != [int] or not 1 <= shape[0] <= max_rows:
            raise BadRequest(f"{name}.shape must be [B], B from 1 to {max_rows}")
        if datatype == "BYTES":
            found[name] = _texts(name, data, shape[0])
        elif datatype == "INT64":
            found[name] = [str(value) for value in _whole_numbers(name, data, shape)]
        else:
            raise BadRequest(f"{name}.datatype = {show(datatype)}, must be BYTES or INT64")
    if len({*map(len, found.values())}) != 1:
        raise BadRequest(f"{' and '.join(ROLES)} must be of the same shape")
    return list(zip(*(found[role] for role in ROLES), strict=True))


def _whole_numbers(name: str, data: Any, shape: list[int]) -> list[int]:
    if isinstance(data, simdjson.Array):
        array = _from_array(name, "INT64", data, shape)
    else:
        array = _from_bytes(name, "INT64", data) if isinstance(data, bytes) else _from_json(name, "INT64", data)
    if array.shape != (shape[0],):
        raise BadRequest(f"{name}.data has shape {list(array.shape)}, must be {shape} as its shape says")
    return array.tolist()


def write_bytes_tensor(texts: list[str]) -> bytes:
    """Return a BYTES tensor: each element with its length (4 bytes) before it."""
    return b"".join(LENGTH.pack(len(raw)) + raw for raw in (text.encode() for text in texts))


def show(found: Any) -> str:
    """Return a client's value short enough for a message of one line."""
    text = repr(found) if isinstance(found, str | int | float | bool | None) else f"a {type(found).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def num_rows_of(feature: Feature, shape: Any, max_rows: int) -> int:
    """Return B of a shape that fits the feature: [B] of texts, [B, N], or [B, H, W] of an image.

    Raises:
        BadRequest: another shape, or B beyond ``max_rows``.
    """
    (name,) = input_names(feature)
    if not (isinstance(shape, list) and shape and {*map(type, shape)} == {int}):
        raise BadRequest(f"{name}.shape must be a list of whole numbers")
    fitting = [[]] if feature.holds == "texts" else [list(feature.shape)]
    if shape[1:] not in fitting and not (feature.kind == "image" and shape[1:] == [feature.height, feature.width]):
        raise BadRequest(f"{name}.shape = {_line(shape)}, must be {_line(['B', *fitting[0]])}")
    if not 1 <= shape[0] <= max_rows:
        raise BadRequest(f"{name}.shape = {_line(shape)}: B must be 1 to {max_rows}")
    return shape[0]


def _line(shape: list[Any]) -> str:
    return show("[" + ", ".join(str(size) for size in shape[:8]) + "]").strip("'")


def _from_array(name: str, datatype: str, data: simdjson.Array, shape: list[int]) -> np.ndarray:
    """Return float32 by way of the parser's own buffer, 5 times as quick as by Python's lists: for plain numbers,
    flat or nested as the shape says. The buffer is flat and says nothing of the nesting, so that is counted."""
    kind = "d" if datatype == "FP32" else "i"
    try:
        array = np.frombuffer(data.as_buffer(of_type=kind), dtype="f8" if kind == "d" else "i8")
    except (TypeError, ValueError):  # null, or what is no number, or no whole one
        if b"true" in (text := data.mini) or b"false" in text:  # among numbers, numpy would take it for one
            raise BadRequest(f"{name}.data holds what is no number") from None
        return _from_json(name, datatype, data.as_list())
    if len(data) != array.size or len(shape) != 1:
        lists = data.mini.count(b"[")  # numbers alone hold no bracket
        if lists != 1 and not (_is_nested(data, shape) and lists == _num_lists(shape)):
            return _from_json(name, datatype, data.as_list())
    if datatype == "UINT8":
        _refuse_beyond_a_byte(name, array)
    return array


def _is_nested(data: Any, shape: list[int]) -> bool:
    if not isinstance(data, simdjson.Array) or len(data) != shape[0]:
        return False
    return len(shape) == 1 or all(_is_nested(inner, shape[1:]) for inner in data)


def _num_lists(shape: list[int]) -> int:
    return sum(math.prod(shape[:depth]) for depth in range(len(shape)))


def _from_json(name: str, datatype: str, data: Any) -> np.ndarray:
    if not isinstance(data, list):
        raise BadRequest(f"{name}.data = {show(data)}, must be a list of numbers")
    try:
        array = np.asarray(data)
    except (ValueError, OverflowError, RecursionError):
        raise BadRequest(f"{name}.data is ragged, must be a flat list or as nested as its shape") from None
    if array.dtype.kind == "O":
        array = _with_missing(name, array)
    kinds = "iuf" if datatype == "FP32" else "iu"
    if array.dtype.kind not in kinds and array.size:
        raise BadRequest(f"{name}.data holds what is no {datatype} number")
    if datatype == "UINT8":
        _refuse_beyond_a_byte(name, array)
    return array


def _refuse_beyond_a_byte(name: str, array: np.ndarray) -> None:
    if array.size and not (array.min() >= 0 and array.max() <= 255):
        raise BadRequest(f"{name}.data holds values outside 0 to 255, which is all that UINT8 has")


def _with_missing(name: str, array: np.ndarray) -> np.ndarray:
    """Turn null into NaN, which means missing; anything else that is no number is refused."""
    if not all(value is None or type(value) in (int, float) for value in array.flat):
        raise BadRequest(f"{name}.data holds what is no number")
    try:
        return array.astype(np.float64)
    except OverflowError:
        raise BadRequest(f"{name}.data holds numbers beyond FP32") from None


def _from_bytes(name: str, datatype: str, data: bytes) -> np.ndarray:
    kind = np.dtype(NUMBERS[datatype])
    if len(data) % kind.itemsize:
        raise BadRequest(f"{name} has {len(data)} bytes, must be a multiple of {kind.itemsize} for {datatype}")
    return np.frombuffer(data, dtype=kind)


def _texts(name: str, data: Any, num_rows: int) -> list[str]:
    texts = data.as_list() if isinstance(data, simdjson.Array) else data
    texts = _split_bytes_tensor(name, texts) if isinstance(texts, bytes) else texts
    if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        raise BadRequest(f"{name}.data must be a flat list of strings")
    if len(texts) != num_rows:
        raise BadRequest(f"{name}.data has {len(texts)} texts, must be {num_rows} as its shape says")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise BadRequest(f"{name}.data holds half a surrogate pair, which is no text") from None
    return texts


def _split_bytes_tensor(name: str, data: bytes) -> list[str]:
    texts, position = [], 0
    try:
        while position < len(data):
            (length,) = LENGTH.unpack_from(data, position)
            position += LENGTH.size + length
            if position > len(data):
                raise BadRequest(f"{name}: an element of its binary data ends beyond it")
            texts.append(data[position - length : position].decode())
    except (struct.error, UnicodeDecodeError):
        raise BadRequest(f"{name}: its binary data is no BYTES tensor of UTF-8 texts") from None
    return texts
