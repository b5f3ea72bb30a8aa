"""A large raw table with known kinds of dirt, generated in pieces: the same bytes each time."""

from __future__ import annotations

from pathlib import Path

ROWS, COLUMNS, PIECE = 10_000_000, 12, 500_000
NUMBERS = tuple(f"n{place}" for place in range(9))
FEATURES = NUMBERS
LABELS = ("no", "yes")


def generate(folder: Path, rows: int = ROWS) -> Path:
    """Write ``raw.parquet``: nine numbers, a label, and zip and city (one follows from the other) as texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    kinds = [*((name, pa.float64()) for name in NUMBERS), ("label", pa.string())]
    schema = pa.schema([*kinds, ("zip", pa.string()), ("city", pa.string())])
    with pq.ParquetWriter(folder / "raw.parquet", schema, compression="zstd") as writer:
        for start in range(0, rows, PIECE):
            writer.write_table(_piece(start, min(PIECE, rows - start)).cast(schema))
    return folder


def _piece(start: int, rows: int):
    import numpy as np
    import pyarrow as pa

    draw = np.random.default_rng(start)
    columns = {}
    for place, name in enumerate(NUMBERS):
        values = np.round(draw.normal(100, 20, rows), 3)
        values[draw.random(rows) < 0.001] = 1e6
        columns[name] = pa.array(values, mask=draw.random(rows) < 0.01 * (place % 3))
    twins = draw.integers(1, rows, rows // 1000)
    names = np.array([" yes", "YES", "no ", "no", "yes", "maybe"])
    columns["label"] = pa.array(names[draw.choice(6, rows, p=[0.01, 0.01, 0.01, 0.6, 0.365, 0.005])])
    code = draw.integers(0, 1000, rows)
    city = np.char.add("city ", (code // 3).astype(str))
    city[draw.random(rows) < 0.002] = "ctiy"
    columns["zip"], columns["city"] = pa.array(code.astype(str)), pa.array(city)
    table = pa.table(columns)
    # A row in a thousand is the one before it again.
    places = np.arange(rows)
    places[twins] = twins - 1
    return table.take(pa.array(places))
