"""From a dataset revision to the arrays that ranks map into memory.

    arrays/<split>.x.npy   encoded inputs, see tasks.spec.feature.encode
    arrays/<split>.y.npy   int64 [B] class indices
    stats.json             table features: mean and standard deviation of each column, of the training split
    tokenizer.json         text features: byte-level BPE fitted on the training split
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tasks.spec.data import Label
from tasks.spec.errors import BadRequest
from tasks.spec.feature import Feature, TextFeature, columns_to_rows, encode
from tasks.store.files import write_json, write_whole

SPLITS = ("train", "validation", "holdout")
PADDING = "[PAD]"


def prepare(data: Path, feature: Feature, label: Label, out: Path) -> None:
    """Write the training arrays of ``data`` (a Parquet file) into ``out``.

    Raises:
        BadRequest: a split has no rows.
    """
    import numpy as np

    tokenizer = None
    arrays = out / "arrays"
    arrays.mkdir(parents=True, exist_ok=True)
    if feature.kind == "text":
        tokenizer = fit_tokenizer(feature, read_split(data, feature, label, "train")[0])
        write_whole(out / "tokenizer.json", tokenizer.to_str())
    for split in ("train", "validation"):
        rows, y = read_split(data, feature, label, split)
        if not len(y):
            raise BadRequest(f"{data.name}: the {split} split has no rows; lower data.split or bring more data")
        x = encode(feature, rows, tokenizer)
        np.save(arrays / f"{split}.x.npy", x)
        np.save(arrays / f"{split}.y.npy", y)
        if split == "train" and feature.kind == "table":
            write_json(out / "stats.json", _stats(x))


def read_split(data: Path, feature: Feature, label: Label, split: str) -> tuple[Any, Any]:
    """Return one split's rows as ``encode`` takes them, and its class indices, int64 [B]."""
    import numpy as np
    import pyarrow.parquet as pq

    table = pq.read_table(data, columns=[*feature.columns, "label"], filters=[("split", "==", split)])
    index = {name: number for number, name in enumerate(label.names)}
    y = np.array([index[name] for name in table.column("label").to_pylist()], dtype=np.int64)
    return columns_to_rows(table, feature), y


def fit_tokenizer(feature: TextFeature, texts: list[str]) -> Any:
    """Fit a byte-level BPE (Sennrich 2016) on texts; id 0 is the padding."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
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


def _stats(x: Any) -> dict[str, list[float]]:
    import numpy as np

    there = ~np.isnan(x)
    count = np.maximum(there.sum(axis=0), 1)  # a column without any value has mean and deviation 0
    mean = np.where(there, x, 0).sum(axis=0, dtype=np.float64) / count
    deviation = np.sqrt((np.where(there, x - mean, 0) ** 2).sum(axis=0) / count)
    # A constant column carries nothing: dividing by one keeps it at zero.
    return {"mean": mean.tolist(), "deviation": np.where(deviation < 1e-9, 1.0, deviation).tolist()}


def load_stats(folder: Path) -> dict[str, list[float]] | None:
    path = folder / "stats.json"
    return json.loads(path.read_text()) if path.exists() else None
