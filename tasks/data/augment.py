"""Changed copies of training rows. A row's copies depend on its features and the seed alone, not on the rows beside it.

    B rows   H, W an image's size
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.data.table import images, row_digests
from tasks.spec import augment as a

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from tasks.spec.feature import Feature

# Between a row's id and its copy's number; no row's own id has it.
MARK = "~"


def augmented(table: pa.Table, feature: Feature, augment: a.Augment) -> pa.Table:
    """Return the copies of a cleaned table's training rows, under ``<row_id>~<number>``."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    rows = table.filter(pc.equal(table.column("split"), "train"))
    digests, ids = row_digests(rows, feature), rows.column("row_id").to_pylist()
    place, column = rows.schema.get_field_index(feature.columns[0]), rows.column(feature.columns[0])
    values: Any = images(column, feature.shape[0]) if feature.kind == "image" else column.to_pylist()
    parts = [rows.slice(0, 0)]
    for number in range(1, augment.copies + 1):
        draws = [_draw(augment.seed, digest, number) for digest in digests]
        if feature.kind == "image":
            new = [_image(value, draw, feature, augment) for value, draw in zip(values, draws, strict=True)]
            flat = np.concatenate(new) if new else np.zeros(0, np.uint8)
            changed: Any = pa.FixedSizeListArray.from_arrays(pa.array(flat), feature.shape[0])
        else:
            texts = [_text(value, draw, augment) for value, draw in zip(values, draws, strict=True)]
            changed = pa.array(texts, pa.string())
        named = pa.array([f"{row_id}{MARK}{number}" for row_id in ids], pa.string())
        copy = rows.set_column(place, rows.schema.field(place), changed)
        parts.append(copy.set_column(0, rows.schema.field(0), named))
    return pa.concat_tables(parts)


def _draw(seed: int, digest: bytes, number: int) -> np.random.Generator:
    import numpy as np

    return np.random.default_rng([seed & 0xFFFFFFFF, int(digest, 16) & 0xFFFFFFFFFFFFFFFF, number])


def _image(flat: np.ndarray, draw: np.random.Generator, feature: Any, augment: a.Augment) -> np.ndarray:
    """One image, uint8 [H*W], changed."""
    import numpy as np

    pixels = flat.reshape(feature.height, feature.width).astype(np.float32)
    for change in augment.changes:
        if isinstance(change, a.Shift):
            pixels = _shifted(pixels, *draw.integers(-change.pixels, change.pixels + 1, 2).tolist())
        elif isinstance(change, a.Rotate):
            from scipy.ndimage import rotate

            pixels = rotate(pixels, draw.uniform(-change.degrees, change.degrees), reshape=False, order=1)
        elif isinstance(change, a.Noise):
            pixels = pixels + draw.normal(0, change.deviation * feature.max_value, pixels.shape)
    return np.rint(pixels.clip(0, feature.max_value)).astype(np.uint8).reshape(-1)


def _shifted(pixels: np.ndarray, down: int, right: int) -> np.ndarray:
    import numpy as np

    out = np.zeros_like(pixels)
    height, width = pixels.shape
    if abs(down) >= height or abs(right) >= width:
        return out
    rows, columns = slice(max(0, down), height + min(0, down)), slice(max(0, right), width + min(0, right))
    out[rows, columns] = pixels[max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)]
    return out


def _text(text: str | None, draw: np.random.Generator, augment: a.Augment) -> str | None:
    if text is None:
        return None
    words = text.split(" ")
    for change in augment.changes:
        if isinstance(change, a.DropWords):
            kept = draw.random(len(words)) >= change.ratio
            words = [word for word, is_kept in zip(words, kept, strict=True) if is_kept] or words[:1]
        elif isinstance(change, a.SwapWords) and len(words) > 1:
            for place in draw.integers(0, len(words) - 1, change.times).tolist():
                words[place], words[place + 1] = words[place + 1], words[place]
    return " ".join(words)
