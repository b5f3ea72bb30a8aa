"""Stored columns to the declared types. A value that won't fit is named by file, column and row.

    B rows   N values of one image (H*W)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tasks.spec.errors import BadRequest

if TYPE_CHECKING:
    import pyarrow as pa

# In a table's CSV these mean that the value is missing, in any case; an empty field does too.
MISSING = ("nan", "null", "na", "n/a", "none")


class Place(NamedTuple):
    """Where a batch comes from: its file, and how many of the file's rows were before it. ``is_private``: a message
    must not show what stands there."""

    file: str
    offset: int
    is_private: bool = False

    def error(self, column: str, row: int, found: object, allowed: str) -> BadRequest:
        """The error on one value; ``row`` counts from 0 in the batch, the message's from 1 in the file."""
        shown = repr(found) if len(repr(found)) <= 60 else repr(found)[:57] + "..."
        shown = "a value that data.privacy withholds" if self.is_private else shown
        number = self.offset + row + 1
        return BadRequest(f"{self.file}: column {column!r}, row {number}: found {shown}, {allowed}")


def to_text(array: pa.Array, column: str, place: Place) -> pa.Array:
    """Return string [B]; whole numbers lose their ``.0``, since a label 5.0 means the class 5.

    Raises:
        BadRequest: a nested or binary column.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    array = _plain(array)
    if pa.types.is_floating(array.type):
        # Beyond 2^53 a double names no single whole number.
        whole = pc.and_(pc.less(pc.abs(array), 2.0**53), pc.equal(pc.round(array), array))
        numbers = pc.cast(pc.if_else(whole, array, None), pa.int64(), safe=False).cast(pa.string())
        missing = pc.is_null(array, nan_is_null=True)
        return pc.if_else(missing, None, pc.coalesce(numbers, array.cast(pa.string())))
    try:
        return array.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise place.error(column, 0, str(array.type), "must be a column of texts or numbers") from None


def to_floats(array: pa.Array, column: str, place: Place) -> pa.Array:
    """Return double [B]; null and NaN are missing.

    Raises:
        BadRequest: a value that is no finite number.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    array = _plain(array)
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        floats = _parsed(array, column, place)
    else:
        try:
            floats = array.cast(pa.float64(), safe=False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise place.error(column, 0, str(array.type), "must be a column of numbers") from None
    row = pc.index(pc.is_inf(floats).fill_null(False), True).as_py()
    if row >= 0:
        raise place.error(column, row, array[row].as_py(), "must be a finite number, or empty where missing")
    return pc.if_else(pc.is_nan(floats), None, floats)


def _parsed(array: pa.Array, column: str, place: Place) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    trimmed = pc.utf8_trim_whitespace(array)
    missing = pc.is_in(pc.utf8_lower(trimmed), value_set=pa.array(["", *MISSING], trimmed.type))
    trimmed = pc.if_else(missing, None, trimmed)
    try:
        return trimmed.cast(pa.float64())
    except pa.ArrowInvalid:
        texts = enumerate(trimmed.to_pylist())
        row = next(row for row, text in texts if text is not None and not _is_number(text))
    raise place.error(column, row, array[row].as_py(), "must be a number, or empty where missing")


def _is_number(text: str) -> bool:
    import pyarrow as pa

    try:
        pa.scalar(text).cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def to_images(array: pa.Array, width: int, column: str, place: Place) -> pa.Array:
    """Return fixed_size_list<uint8>[N] [B] from byte strings or from lists of whole numbers.

    Raises:
        BadRequest: an image of another length, or a value that is no whole number from 0 to 255.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if array.null_count == len(array):
        array = pa.nulls(len(array), pa.binary())  # where all are missing, a source does not tell what they would be
    kind, types = array.type, pa.types
    is_bytes = types.is_fixed_size_binary(kind) or types.is_binary(kind) or types.is_large_binary(kind)
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if not (is_bytes or is_list):
        raise place.error(column, 0, str(kind), f"must be bytes or a list of {width} numbers")
    if types.is_fixed_size_binary(kind):
        array = array.cast(pa.binary())
    lengths = pc.binary_length(array) if is_bytes else pc.list_value_length(array)
    row = pc.index(pc.not_equal(lengths, width).fill_null(False), True).as_py()
    if row >= 0:
        raise place.error(column, row, lengths[row].as_py(), f"must be {width} values")
    present = array.drop_null()
    flat = _bytes(present) if is_bytes else _whole(present.flatten(), width, column, place)
    return _spread(flat, array, width)


def to_images_from_columns(columns: list[pa.Array], names: list[str], place: Place) -> pa.Array:
    """Return fixed_size_list<uint8>[N] [B] from N columns of one value each; a missing value is refused."""
    import numpy as np
    import pyarrow as pa

    pixels = [_pixels(array, name, place) for array, name in zip(columns, names, strict=True)]
    return pa.FixedSizeListArray.from_arrays(pa.array(np.stack(pixels, axis=1).reshape(-1)), len(names))


def _pixels(array: pa.Array, column: str, place: Place) -> object:
    import numpy as np

    floats = to_floats(array, column, place)
    if floats.null_count:
        row = floats.is_null().index(True).as_py()
        raise place.error(column, row, None, "must be a whole number from 0 to 255")
    return np.asarray(_whole(floats, 1, column, place))


def _whole(values: pa.Array, width: int, column: str, place: Place) -> pa.Array:
    """Numbers as uint8, ``width`` of them a row."""
    import pyarrow as pa
    import pyarrow.compute as pc

    wrong = "must be a whole number from 0 to 255"
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise place.error(column, 0, f"values of type {values.type}", wrong)
    try:
        if not values.null_count:
            return values.cast(pa.uint8())
    except pa.ArrowInvalid:
        pass
    in_range = pc.and_(pc.greater_equal(values, 0), pc.less_equal(values, 255))
    whole = pc.and_(in_range, pc.equal(pc.floor(values), values))
    index = pc.index(whole.fill_null(False), False).as_py()
    raise place.error(column, index // width, values[index].as_py(), wrong)


def _bytes(present: pa.Array) -> pa.Array:
    """The bytes of all images, one after the other."""
    import numpy as np
    import pyarrow as pa

    return pa.array(np.frombuffer(b"".join(present.to_pylist()), np.uint8))


def _spread(flat: pa.Array, array: pa.Array, width: int) -> pa.Array:
    """Values of the present images to a list array that has the nulls of ``array``."""
    import numpy as np
    import pyarrow as pa

    if not array.null_count:
        return pa.FixedSizeListArray.from_arrays(flat, width)
    present = np.asarray(array.is_valid())
    values = np.zeros((len(array), width), np.uint8)
    values[present] = np.asarray(flat).reshape(-1, width)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width, mask=pa.array(~present))


def _plain(array: pa.Array) -> pa.Array:
    """A dictionary (categories) as its values."""
    import pyarrow as pa

    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
