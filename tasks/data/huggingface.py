"""Data sets that Hugging Face's ``datasets`` saved to a folder: Arrow streams, with a description beside them.

    <path>/dataset_info.json, state.json, data-00000-of-00002.arrow, ...      one data set
    <path>/dataset_dict.json, <path>/<split>/...                              one for each split
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tasks.spec.errors import BadRequest

if TYPE_CHECKING:
    import pyarrow as pa

INFO, STATE, SPLITS, ARROW = "dataset_info.json", "state.json", "dataset_dict.json", ".arrow"


def resolve_saved(folder: Path) -> list[Path]:
    """Return the files of a saved data set: of each split its description, then its parts in order.

    Raises:
        BadRequest: no such folder, one of another kind, or a part that is not there.
    """
    if (folder / SPLITS).is_file():
        names = _json(folder / SPLITS).get("splits")
        if not isinstance(names, list) or not names:
            raise BadRequest(f"{folder / SPLITS}: names no splits; save the data set again")
        return [path for name in names for path in _parts(folder / str(name))]
    return _parts(folder)


def _parts(folder: Path) -> list[Path]:
    state = folder / STATE
    if not state.is_file():
        raise BadRequest(f"{folder}: holds no {STATE}; name a folder that datasets' save_to_disk has written")
    listed = _json(state).get("_data_files")
    names = [item.get("filename") for item in listed or () if isinstance(item, dict)]
    if not names:
        raise BadRequest(f"{state}: names no data files; save the data set again")
    for name in names:
        # A name is of this folder: a path would lead out of it.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(ARROW):
            raise BadRequest(f"{state}: names the data file {name!r}, must be a name that ends in {ARROW}")
    paths = [folder / INFO, *(folder / name for name in names)]
    for path in paths:
        if not path.is_file():
            raise BadRequest(f"{path}: is not there, though {state} names it; save the data set again")
    return paths


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadRequest(f"{path}: can't be read as JSON ({str(error)[:80]}); save the data set again") from None
    return found if isinstance(found, dict) else {}


class Saved:
    """One part: ``header()`` first, then ``batches(columns)``. Of a split there is a column with its name too."""

    def __init__(self, name: str, stream: BinaryIO, info: bytes) -> None:
        self._name, self._stream = name, stream
        folder = Path(name).parent
        self._split = folder.name if (folder.parent / SPLITS).is_file() else None
        self._classes = _classes(f"{folder / INFO}", info)

    def header(self) -> list[str]:
        names = list(self._open().schema.names)
        return [*names, "split"] if self._split and "split" not in names else names

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield the named columns.

        Raises:
            BadRequest: a damaged stream, or a class number that has no name.
        """
        import pyarrow as pa

        try:
            for batch in self._open():
                yield pa.record_batch([self._column(batch, name) for name in columns], names=columns)
        except (pa.ArrowException, OSError) as error:
            raise self._error(error) from None

    def _open(self) -> Any:
        import pyarrow as pa

        self._stream.seek(0)
        try:
            return pa.ipc.open_stream(self._stream)
        except (pa.ArrowException, OSError) as error:
            raise self._error(error) from None

    def _column(self, batch: pa.RecordBatch, name: str) -> pa.Array:
        import pyarrow as pa

        if name not in batch.schema.names:
            return pa.array([self._split] * batch.num_rows, pa.string())
        column = batch.column(name)
        column.validate(full=True)
        return self._named(name, column) if name in self._classes else column

    def _named(self, name: str, column: pa.Array) -> pa.Array:
        """Class numbers, or lists of them, by their names; -1 is datasets' word for none."""
        import pyarrow as pa
        import pyarrow.compute as pc

        is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        numbers = column.flatten() if is_list else column
        numbers = pc.if_else(pc.equal(numbers, -1), None, numbers)
        names = self._classes[name]
        bad = pc.or_(pc.less(numbers, 0), pc.greater_equal(numbers, len(names)))
        if (index := pc.index(pc.fill_null(bad, False), True).as_py()) >= 0:
            found = f"column {name!r} has the class number {numbers[index]}"
            raise BadRequest(f"{self._name}: {found}, must be 0 to {len(names) - 1}; save the data set again")
        texts = pa.array(names, pa.string()).take(numbers)
        if not is_list:
            return texts
        return pa.ListArray.from_arrays(_offsets(column), texts, mask=column.is_null() if column.null_count else None)

    def _error(self, error: Exception) -> BadRequest:
        reason = " ".join(str(error).split())[:160]
        return BadRequest(f"{self._name}: is no whole Arrow stream: {reason}; save the data set again")


def _offsets(column: pa.Array) -> pa.Array:
    """Where each list begins among the flattened values."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0))
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def _classes(where: str, info: bytes) -> dict[str, list[str]]:
    """The names of each column's classes, as the description has them."""
    try:
        features = json.loads(info)["features"]
        found = {}
        for name, feature in features.items():
            inner = feature.get("feature", feature) if isinstance(feature, dict) else feature
            if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
                found[name] = [str(item) for item in inner["names"]]
        return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadRequest(f"{where}: describes no features ({type(error).__name__}); save the data set again") from None
