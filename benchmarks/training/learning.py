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
KINDS = ("corporation", "creative-work", "group", "location", "person", "product")
TAGS = ("O", *(f"{begin}-{kind}" for kind in KINDS for begin in "BI"))
IMAGE = {"kind": "image", "height": 28, "width": 28}


class Case(NamedTuple):
    """``load`` gives the table with a split column; every tenth training row is for validation. ``metrics``: the one
    that has a limit (``limit``: the least, of an error the most), and others to tell."""

    name: str
    source: Path
    load: Callable[[Path, int], pa.Table]
    feature: Table
    label: Table
    train: Table
    metrics: tuple[str, ...]
    limit: float
    encoder: Path | None = None


class Learnt(NamedTuple):
    measured: dict[str, float]
    epochs: int
    cpu_seconds: float


def learnt(case: Case, seed: int, base: Path) -> Learnt:
    """Train once; score the best weights on the test rows."""
    room = Room(base, "dataset")
    pq.write_table(case.load(case.source, seed), room.begin() / "data.parquet")
    ref = room.publish({})
    request = TrainRequest.parse(
        {
            "workload": "bench", "dataset": ref.model_dump(), "revision": "bench-000000000000",
            "feature": case.feature, "label": case.label, "train": case.train | {"seed": seed},
            "encoder_sha256": encoder_sha256(case.encoder) if case.encoder else None,
        },
        case.name,
    )  # fmt: skip
    folder = base / "trained"
    done = fit(request, folder, None, lambda line: None, encoder=case.encoder)
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    measured = measure(request, folder, Path(ref.uri) / "data.parquet")
    return Learnt(measured, int(done["epochs"]), sum(line["cpu_seconds"] for line in lines))


def measure(request: TrainRequest, folder: Path, data: Path) -> dict[str, float]:
    """Return what the trained network is worth on the test rows, by metric: as the evaluation of a candidate has it,
    and ``macro_accuracy``, the mean of the classes' recall."""
    import torch
    from safetensors.torch import load_file

    from tasks.evaluate.answers import answers_of
    from tasks.spec.evaluate import Evaluate
    from tasks.spec.feature import encode
    from tasks.spec.ids import KnownIds
    from tasks.spec.tokens import ask_words
    from tasks.train.prepare import load_stats, read_split
    from tasks.train.recipes import build

    label = request.label
    network = build(request.train.recipe, request.feature, label.num_outputs, load_stats(folder), folder)
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    rows, y = read_split(data, request.feature, request.label, "holdout")
    tokenizer: Any = None
    if request.feature.kind == "ids":
        tokenizer = KnownIds.parse((folder / "ids.json").read_text(), "ids.json")
    if request.feature.holds == "texts":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    network, any_width = network.eval(), getattr(network, "any_width", False)

    def run(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            said = network(torch.from_numpy(x))
            return (said.clip(label.min, label.max) if label.kind == "number" else said.softmax(1)).numpy()

    parts = []
    for start in range(0, len(rows), 256):
        part = rows[start : start + 256]
        if request.feature.kind == "tokens":
            parts.append(ask_words(request.feature, part, tokenizer, run, any_width))
        else:
            parts.append(run(encode(request.feature, part, tokenizer, pad_to_longest=any_width)))
    found = answers_of(request.feature, label, Evaluate(), rows, y, np.concatenate(parts)).measure()
    recalls = [m.value for m in found if m.metric == "recall" and m.slice.startswith("class:")]
    macro = {"macro_accuracy": float(np.mean(recalls))} if recalls else {}
    return {m.metric: m.value for m in found if m.slice == "overall"} | macro


def cases(data: Path, encoder: Path) -> list[Case]:
    """Return the cases, the short ones first."""
    mlp = {"recipe": {"kind": "mlp", "hidden": [512, 256, 128], "dropout": 0.2}, "ranks": 2, "parallel": "auto"}
    mlp |= {"batch_size": 256, "optimiser": {"name": "adamw", "learning_rate": 0.001, "schedule": {"kind": "cosine"}}}
    cnn = mlp | {"recipe": {"kind": "cnn", "channels": [32, 64], "hidden": 128, "dropout": 0.4}, "batch_size": 128}
    sms = {"recipe": {"kind": "text-cnn", "embedding": 64, "channels": 128, "kernel": 5, "token_dropout": 0.15}}
    sms |= {"ranks": 1, "batch_size": 64, "label_smoothing": 0.05, "class_weights": "adjusted"}
    sms |= {"optimiser": {"name": "adamw", "learning_rate": 0.002, "weight_decay": 0.01}}
    bank = {"recipe": {"kind": "pretrained", "folder": str(encoder)}, "ranks": 2, "parallel": "auto", "batch_size": 32}
    moved = {"clip_norm": 1.0, "schedule": {"kind": "linear", "warmup_ratio": 0.1}}
    bank |= {"optimiser": {"name": "adamw", "learning_rate": 2e-4, "weight_decay": 0.01} | moved}
    bank |= {"precision": "bf16", "similar_lengths": True}
    text, minilm = {"kind": "text", "max_tokens": 64}, {"vocabulary": 30522, "max_tokens": 64}
    tags, intents = {"kind": "tokens", "max_tokens": 128}, {"classes": list(range(77))}
    film = {"recipe": {"kind": "factors", "width": 16}, "ranks": 1, "batch_size": 1024}
    film |= {"optimiser": {"learning_rate": 0.005, "weight_decay": 3e-4}}
    ids = {"kind": "ids", "user": "userId", "item": "movieId"}
    stars = {"kind": "number", "column": "rating", "min": 0.5, "max": 5}
    ner = {"stopping": {"max_epochs": 8, "patience_epochs": 8, "metric": "entity_f1"}}
    mnist = (data / "mnist" / "train.parquet", pictures, IMAGE, {"classes": list(range(10))})
    return [
        Case("MovieLens small, factors", data / "movielens_small" / "ratings.parquet", ratings, ids, stars,
             film | epochs(40, 4), ("rmse", "mae", "ndcg_at_10"), 0.885),
        Case("SMS spam, Conv1D", data / "sms_spam" / "sms.parquet", messages, text | {"vocabulary": 1000},
             {"classes": ["ham", "spam"]}, sms | epochs(12, 4), ("macro_accuracy", "accuracy"), 0.986),
        Case("MNIST, MLP", *mnist, mlp | epochs(16), ("accuracy",), 0.983),
        Case("MNIST, CNN", *mnist, cnn | epochs(8), ("accuracy",), 0.992),
        Case("Banking77, MiniLM fine-tuned", data / "banking77" / "train.parquet", questions, text | minilm, intents,
             bank | epochs(8), ("accuracy",), 0.935, encoder),
        Case("WNUT-17, MiniLM tagging", data / "wnut17" / "wnut17.parquet", entities, tags | minilm,
             {"classes": list(TAGS)}, bank | ner, ("entity_f1", "entity_precision", "entity_recall"), 0.40, encoder),
    ]  # fmt: skip


def epochs(most: int, patience: int | None = None) -> Table:
    return {"stopping": {"max_epochs": most, "patience_epochs": patience or most}}


def pictures(source: Path, seed: int) -> pa.Table:
    parts = [pq.read_table(source), pq.read_table(source.with_name("test.parquet"))]
    pixels = [np.frombuffer(b"".join(part.column("pixels").to_pylist()), np.uint8).reshape(-1, 784) for part in parts]
    flat = pa.array(np.concatenate(pixels).reshape(-1))
    return split(parts, {"pixels": pa.FixedSizeListArray.from_arrays(flat, 784)})


def questions(source: Path, seed: int) -> pa.Table:
    parts = [pq.read_table(source), pq.read_table(source.with_name("test.parquet"))]
    return split(parts, {"text": pa.concat_tables(parts).column("text")})


def messages(source: Path, seed: int) -> pa.Table:
    table = pq.read_table(source)
    parts = [table.filter(pa.compute.equal(table.column("split"), name)) for name in ("train", "test")]
    return split(parts, {"text": pa.concat_tables(parts).column("text")})


def entities(source: Path, seed: int) -> pa.Table:
    """With the development rows that were made for it as the validation split."""
    table = pq.read_table(source)
    words, tags = ([" ".join(row) for row in table.column(name).to_pylist()] for name in ("tokens", "tags"))
    names = {"train": "train", "dev": "validation", "test": "holdout"}
    split = [names[name] for name in table.column("split").to_pylist()]
    return pa.table({"row_id": list(range(len(split))), "tokens": words, "label": tags, "split": split})


def ratings(source: Path, seed: int) -> pa.Table:
    """A fifth of the rows drawn for the test, and of the others one in thirty for validation."""
    table = pq.read_table(source)
    rows = table.num_rows
    names = np.array(["train"] * rows, dtype="<U10")
    order = np.random.default_rng(seed).permutation(rows)
    names[order[: rows // 5]] = "holdout"
    names[order[rows // 5 :: 30]] = "validation"
    texts = {name: table.column(name).cast(pa.string()) for name in ("userId", "movieId")}
    label = table.column("rating").cast(pa.float64())
    return pa.table({"row_id": list(range(rows)), **texts, "label": label, "split": names.tolist()})


def split(parts: list[pa.Table], columns: dict[str, Any]) -> pa.Table:
    """Training rows and test rows: every tenth of the first is for validation."""
    train, test = (part.num_rows for part in parts)
    names = ["validation" if i % 10 == 9 else "train" for i in range(train)] + ["holdout"] * test
    label = [str(value) for part in parts for value in part.column("label").to_pylist()]
    return pa.table({"row_id": list(range(train + test)), **columns, "label": label, "split": names})
