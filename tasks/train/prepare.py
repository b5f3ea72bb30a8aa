"""From a dataset revision to the arrays that ranks map into memory. The rows pass in batches: whatever their number,
little more than a batch is held.

    arrays/<split>.x.npy   encoded inputs, see tasks.spec.feature.encode, in the narrowest type that holds them
    arrays/<split>.y.npy   int64 [B] class indices; of tagged words [B, T], see tasks.spec.tokens.encode_tags, of
                           texts whose next piece is told too, see tasks.spec.pieces; of numbers float32 [B]
    stats.json             of the training split: mean and standard deviation of each column of a table, and of the
                           target where it is a number; how many ids are known
    tokenizer.json         texts, words: a pretrained encoder's own, else a byte-level BPE fitted on the training split
    ids.json               ids: those of the training split
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.spec.errors import BadRequest
from tasks.spec.feature import VOCABULARIES, Feature, Texts, columns_to_rows, encode
from tasks.spec.ids import KnownIds
from tasks.spec.label import Target
from tasks.spec.pieces import targets
from tasks.spec.requests import TrainRequest
from tasks.spec.tokens import encode_tags
from tasks.store.files import write_json, write_whole

SPLITS = ("train", "validation", "holdout")
PREPARED = ("train", "validation")
PADDING = "[PAD]"
BATCH_ROWS = 8192
# Whole numbers are stored narrow and widened by the ranks (``tasks.train.batches``): a quarter of the disk and memory.
STORED = {"image": "uint8", "text": "int32", "tokens": "int32", "table": "float32", "ids": "int32"}


def prepare(data: Path, request: TrainRequest, out: Path) -> None:
    """Write the training arrays of ``data`` (a Parquet file) into ``out``.

    Raises:
        BadRequest: a split has no rows, or fewer than there are ranks; a label that is no class, or a number out of
            its range; fewer than two users or items; an encoder that can't be used.
    """
    feature = request.feature
    (out / "arrays").mkdir(parents=True, exist_ok=True)
    counts = rows_by_split(data)
    for split in PREPARED:
        if not counts.get(split):
            raise BadRequest(f"{data.name}: the {split} split has no rows; lower data.split or bring more data")
    if counts["train"] < request.train.world_size:
        raise BadRequest(
            f"{data.name}: the train split has {counts['train']} rows, fewer than train.nodes x train.ranks = "
            f"{request.train.world_size}"
        )
    vocabulary = _vocabulary(data, request, out)
    _write_arrays(data, request, out / "arrays", counts, vocabulary)
    stats: dict[str, Any] = _stats(out / "arrays" / "train.x.npy") if feature.kind == "table" else {}
    if request.label.kind == "number":
        stats["target"] = {name: part[0] for name, part in _stats(out / "arrays" / "train.y.npy").items()}
    if feature.kind == "ids":
        stats["known"] = list(map(len, vocabulary.columns))
    if stats:
        write_json(out / "stats.json", stats)


def rows_by_split(data: Path) -> dict[str, int]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    counts: dict[str, int] = {}
    for batch in pq.ParquetFile(data).iter_batches(BATCH_ROWS, columns=["split"]):
        for found in pc.value_counts(batch.column(0)).to_pylist():
            counts[found["values"]] = counts.get(found["values"], 0) + found["counts"]
    return counts


def _write_arrays(data: Path, request: TrainRequest, out: Path, counts: dict[str, int], tokenizer: Any) -> None:
    """Fill the arrays of all prepared splits in one pass over the rows, whose order is the file's."""
    import numpy as np

    feature, stored = request.feature, STORED[request.feature.kind]
    opened, done = {}, dict.fromkeys(PREPARED, 0)
    for split in PREPARED:
        tags = feature.shape if feature.kind == "tokens" or request.label.kind == "next" else ()
        target = "float32" if request.label.kind == "number" else "int64"
        shapes = {"x": (stored, (counts[split], *feature.shape)), "y": (target, (counts[split], *tags))}
        for part, (dtype, shape) in shapes.items():
            path = out / f"{split}.{part}.npy"
            opened[split, part] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    for split, rows, y in batches(data, feature, request.label, PREPARED):
        here = slice(done[split], done[split] + len(y))
        x = opened[split, "x"][here] = encode(feature, rows, tokenizer)
        if feature.kind == "tokens":
            y_of_rows = encode_tags(feature, rows, y, tokenizer)
        else:
            y_of_rows = targets(x) if request.label.kind == "next" else y
        opened[split, "y"][here] = y_of_rows
        done[split] += len(y)
    for array in opened.values():
        array.flush()


def batches(data: Path, feature: Feature, label: Target, splits: tuple[str, ...]) -> Iterator[tuple[str, Any, Any]]:
    """Yield (split, rows as ``encode`` takes them, class indices int64 [B], or numbers float32 [B]), a few thousand
    rows at a time. Of tagged words the indices are a list of one array for each row; of texts that are their own label
    it is how many characters each has.

    Raises:
        BadRequest: a label that is no class, or a number out of its range.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    columns = [*feature.columns, "label", "split"]
    for batch in pq.ParquetFile(data).iter_batches(BATCH_ROWS, columns=columns):
        table = pa.Table.from_batches([batch])
        for split in splits:
            here = table.filter(pc.equal(table.column("split"), split))
            if here.num_rows:
                yield split, columns_to_rows(here, feature), _targets(here, feature, label, data)


def read_split(data: Path, feature: Feature, label: Target, split: str) -> tuple[Any, Any]:
    """Return one split's rows as ``encode`` takes them, and its class indices, as ``batches`` does."""
    import pyarrow.parquet as pq

    table = pq.read_table(data, columns=[*feature.columns, "label"], filters=[("split", "==", split)])
    return columns_to_rows(table, feature), _targets(table, feature, label, data)


def _targets(table: Any, feature: Feature, label: Target, data: Path) -> Any:
    import numpy as np

    if label.kind == "number":
        found = table.column("label").to_numpy().astype(np.float64)
        # Written so that NaN fails it.
        if (wrong := np.flatnonzero(~((found >= label.min) & (found <= label.max)))).size:
            allowed = f"must be from {label.min:g} to {label.max:g}"
            raise BadRequest(f"{data.name}: {label.column} = {found[wrong[0]]:g}, {allowed}; see data.label")
        return found.astype(np.float32)

    if label.kind == "next":
        return table.column("label").to_numpy().astype(np.float32)

    index = {name: number for number, name in enumerate(label.names)}
    labels = table.column("label").to_pylist()
    rows = [text.split(" ") for text in labels] if feature.kind == "tokens" else [labels]
    if wrong := next((name for row in rows for name in row if name not in index), None):
        raise BadRequest(f"{data.name}: label {wrong!r} is none of data.label.classes; add it, or clean it away")
    found = [np.array([index[name] for name in row], dtype=np.int64) for row in rows]
    return found if feature.kind == "tokens" else found[0]


def _vocabulary(data: Path, request: TrainRequest, out: Path) -> Any:
    """Return the tokenizer, or the known ids, and write them as the package will carry them; None: there are none."""
    holds = request.feature.holds
    if holds not in VOCABULARIES:
        return None
    found = _known_ids(data, request) if holds == "ids" else _tokenizer(data, request, out)
    write_whole(out / VOCABULARIES[holds], found.to_str())
    return found


def _known_ids(data: Path, request: TrainRequest) -> KnownIds:
    of_train = batches(data, request.feature, request.label, ("train",))
    known = KnownIds.of_rows(row for _, rows, _ in of_train for row in rows)
    for name, column in zip(request.feature.columns, known.columns, strict=True):
        if len(column) < 2:
            raise BadRequest(f"{data.name}: the train split has {len(column)} {name}, must be 2 or more")
    return known


def _tokenizer(data: Path, request: TrainRequest, out: Path) -> Any:
    if request.train.recipe.kind == "pretrained":
        from tasks.train.brought import tokenizer_of

        return tokenizer_of(out, request.feature)
    of_train = batches(data, request.feature, request.label, ("train",))
    texts = (row if isinstance(row, str) else " ".join(row) for _, rows, _ in of_train for row in rows)
    return fit_tokenizer(request.feature, texts, keep_case=request.label.kind == "next")


def fit_tokenizer(feature: Texts, texts: Any, keep_case: bool = False) -> Any:
    """Fit a byte-level BPE (Sennrich 2016) on an iterable of texts; id 0 is the padding. Of tagged words the case is
    kept: it tells names."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    lower = [] if keep_case or feature.kind == "tokens" else [normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), *lower])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=feature.vocabulary,
        special_tokens=[PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _stats(path: Path) -> dict[str, list[float]]:
    """Mean and standard deviation of each column, in two passes over a mapped array; missing values count nowhere."""
    import numpy as np

    x = np.load(path, mmap_mode="r", allow_pickle=False)
    x = x if x.ndim == 2 else x[:, None]
    parts = [slice(start, start + BATCH_ROWS) for start in range(0, len(x), BATCH_ROWS)]
    count = np.maximum(sum((~np.isnan(x[part])).sum(axis=0) for part in parts), 1)
    # A column without any value has mean and deviation 0.
    mean = sum(np.nansum(x[part], axis=0, dtype=np.float64) for part in parts) / count
    squares = sum(np.nansum((x[part] - mean) ** 2, axis=0, dtype=np.float64) for part in parts)
    deviation = np.sqrt(squares / count)
    # A constant column carries nothing: dividing by one keeps it at zero.
    return {"mean": mean.tolist(), "deviation": np.where(deviation < 1e-9, 1.0, deviation).tolist()}


def load_stats(folder: Path) -> dict[str, Any] | None:
    path = folder / "stats.json"
    return json.loads(path.read_text()) if path.exists() else None
