"""Cases of the quality benchmark: a data set with its given test rows, a train section, and what is expected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from tasks.spec.requests import TrainRequest
from tasks.store.room import Room
from tasks.train.brought import encoder_sha256
from tasks.train.fit import fit

Table = dict[str, Any]
DIGITS = tuple(range(10))
IMAGE = {"kind": "image", "height": 28, "width": 28}


class Case(NamedTuple):
    """``load`` gives the table with a split column; every tenth training row is for validation."""

    name: str
    source: Path
    load: Callable[[Path], pa.Table]
    feature: Table
    classes: tuple[Any, ...]
    train: Table
    metric: str
    least: float
    encoder: Path | None = None


class Learnt(NamedTuple):
    score: float
    epochs: int
    cpu_seconds: float


def learnt(case: Case, seed: int, base: Path) -> Learnt:
    """Train once; score the best weights on the test rows."""
    room = Room(base, "dataset")
    pq.write_table(case.load(case.source), room.begin() / "data.parquet")
    ref = room.publish({})
    request = TrainRequest.parse(
        {
            "workload": "bench", "dataset": ref.model_dump(), "revision": "bench-000000000000",
            "feature": case.feature, "label": {"classes": list(case.classes)}, "train": case.train | {"seed": seed},
            "encoder_sha256": encoder_sha256(case.encoder) if case.encoder else None,
        },
        case.name,
    )  # fmt: skip
    folder = base / "trained"
    done = fit(request, folder, None, lambda line: None, encoder=case.encoder)
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    y, found = answers(request, folder, Path(ref.uri) / "data.parquet")
    by_class = [float((found[y == k] == k).mean()) for k in range(len(case.classes))]
    score = float(np.mean(by_class)) if case.metric == "macro accuracy" else float((found == y).mean())
    return Learnt(score, int(done["epochs"]), sum(line["cpu_seconds"] for line in lines))


def answers(request: TrainRequest, folder: Path, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the classes of the test rows, and what the trained network says."""
    import torch
    from safetensors.torch import load_file

    from tasks.spec.feature import encode
    from tasks.train.prepare import load_stats, read_split
    from tasks.train.recipes import build

    num_classes = len(request.label.names)
    network = build(request.train.recipe, request.feature, num_classes, load_stats(folder), folder)
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    rows, y = read_split(data, request.feature, request.label, "holdout")
    tokenizer = None
    if request.feature.kind == "text":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = []
    with torch.no_grad():
        for start in range(0, len(y), 256):
            x = encode(request.feature, rows[start : start + 256], tokenizer, pad_to_longest=num_classes > 10)
            found.append(network.eval()(torch.from_numpy(x)).argmax(1).numpy())
    return y, np.concatenate(found)


def cases(data: Path, encoder: Path) -> list[Case]:
    """Return the cases, the short ones first."""
    mlp = {"recipe": {"kind": "mlp", "hidden": [512, 256, 128], "dropout": 0.2}, "ranks": 2, "parallel": "auto"}
    mlp |= {"batch_size": 256, "optimiser": {"name": "adamw", "learning_rate": 0.001, "schedule": {"kind": "cosine"}}}
    cnn = mlp | {"recipe": {"kind": "cnn", "channels": [32, 64], "hidden": 128, "dropout": 0.4}, "batch_size": 128}
    sms = {"recipe": {"kind": "text-cnn", "embedding": 64, "channels": 128, "kernel": 5}, "ranks": 1, "batch_size": 32}
    sms |= {"optimiser": {"name": "adamw", "learning_rate": 0.001, "weight_decay": 0.01}, "label_smoothing": 0.05}
    bank = {"recipe": {"kind": "pretrained", "folder": str(encoder)}, "ranks": 2, "parallel": "auto", "batch_size": 32}
    moved = {"clip_norm": 1.0, "schedule": {"kind": "linear", "warmup_ratio": 0.1}}
    bank |= {"optimiser": {"name": "adamw", "learning_rate": 2e-4, "weight_decay": 0.01} | moved}
    text, minilm = {"kind": "text", "max_tokens": 64}, {"vocabulary": 30522, "max_tokens": 64}
    intents = tuple(range(77))
    mnist = (data / "mnist" / "train.parquet", pictures, IMAGE, DIGITS)
    return [
        Case("SMS spam, Conv1D", data / "sms_spam" / "sms.parquet", messages, text, ("ham", "spam"),
             sms | epochs(12, 4), "macro accuracy", 0.986),
        Case("MNIST, MLP", *mnist, mlp | epochs(16), "accuracy", 0.983),
        Case("MNIST, CNN", *mnist, cnn | epochs(8), "accuracy", 0.992),
        Case("Banking77, MiniLM fine-tuned", data / "banking77" / "train.parquet", questions, text | minilm, intents,
             bank | epochs(8), "accuracy", 0.935, encoder),
    ]  # fmt: skip


def epochs(most: int, patience: int | None = None) -> Table:
    return {"stopping": {"max_epochs": most, "patience_epochs": patience or most}}


def pictures(source: Path) -> pa.Table:
    parts = [pq.read_table(source), pq.read_table(source.with_name("test.parquet"))]
    pixels = [np.frombuffer(b"".join(part.column("pixels").to_pylist()), np.uint8).reshape(-1, 784) for part in parts]
    flat = pa.array(np.concatenate(pixels).reshape(-1))
    return split(parts, {"pixels": pa.FixedSizeListArray.from_arrays(flat, 784)})


def questions(source: Path) -> pa.Table:
    parts = [pq.read_table(source), pq.read_table(source.with_name("test.parquet"))]
    return split(parts, {"text": pa.concat_tables(parts).column("text")})


def messages(source: Path) -> pa.Table:
    table = pq.read_table(source)
    parts = [table.filter(pa.compute.equal(table.column("split"), name)) for name in ("train", "test")]
    return split(parts, {"text": pa.concat_tables(parts).column("text")})


def split(parts: list[pa.Table], columns: dict[str, Any]) -> pa.Table:
    """Training rows and test rows: every tenth of the first is for validation."""
    train, test = (part.num_rows for part in parts)
    names = ["validation" if i % 10 == 9 else "train" for i in range(train)] + ["holdout"] * test
    label = [str(value) for part in parts for value in part.column("label").to_pylist()]
    return pa.table({"row_id": list(range(train + test)), **columns, "label": label, "split": names})
