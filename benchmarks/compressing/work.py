"""``python work.py banking77|sms_spam ENCODER OUT``: make teacher and student, measure them, write ``found.json``.

B texts   T tokens   D width   K classes
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressing.data import publish, texts
from inference.models import MiniLM, open_tokenizer
from sklearn.linear_model import LogisticRegression

from tasks.compress.compress import compress
from tasks.compress.store import quantise, seconds_a_row
from tasks.evaluate.metrics import confusion, macro_f1
from tasks.evaluate.paired import paired_interval
from tasks.serve.package import open_package
from tasks.serve.session import start_session
from tasks.site import Site
from tasks.spec.feature import TextFeature, encode
from tasks.spec.requests import CompressRequest, TrainRequest
from tasks.store.room import Room
from tasks.train.fit import fit

MAX_TOKENS = 64
WEIGHT = 0.7
STUDENT = {"kind": "text-cnn", "embedding": 64, "channels": 128, "kernel": 5, "dropout": 0.3}
STOPPING = {"max_epochs": 20, "patience_epochs": 5}


class Classifier(MiniLM):
    """MiniLM with a fitted head: ids int64 [B, T] -> probabilities [B, K]."""

    def __init__(self, encoder: Path) -> None:
        super().__init__(encoder)
        self.register_buffer("head_bias", torch.zeros(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.embed(ids) @ self.head_weight + self.head_bias, dim=1)


def main(name: str, encoder: Path, out: Path) -> None:
    rows, labels, split = texts(Site(), name)
    classes = sorted(set(labels))
    tokenizer = open_tokenizer(encoder)
    wide = TextFeature(kind="text", max_tokens=MAX_TOKENS, vocabulary=30522)
    network = Classifier(encoder).eval()
    ids = encode(wide, rows, tokenizer)
    y, where = np.array([classes.index(label) for label in labels]), np.array(split)
    held = np.flatnonzero(where == "holdout")
    short = [row[row != 0][None] for row in ids[held[:64]]]
    fp32 = out / "fp32.onnx"
    if name == "banking77":
        taught = np.flatnonzero(where == "train")[::2]
        fit_head(network, embed(network, ids[taught]), y[taught], len(classes))
        export(network, fp32)
        found = as_int8(fp32, out / "int8.onnx", ids[held], y[held], short)
    else:
        embedded, taught = embed(network, ids), np.flatnonzero(where == "train")
        fit_head(network, embedded[taught], y[taught], len(classes))
        export(network, fp32)
        teacher = answers(network, embedded)
        student = make_student(name, rows, labels, split, classes, teacher, out)
        found = as_student(fp32, student, rows, held, y[held], teacher[held], classes, short)
    (out / "found.json").write_text(json.dumps(found))


def as_int8(fp32: Path, int8: Path, ids: np.ndarray, right: np.ndarray, short: list[np.ndarray]) -> dict[str, Any]:
    """Quantise the encoder and hold both graphs against the labels ``right`` [B] of ``ids`` [B, T]."""
    quantise(fp32, int8)
    mine, theirs = (ask(path, ids).argmax(1) == right for path in (int8, fp32))
    gained, lost = mine & ~theirs, theirs & ~mine
    low, high = paired_interval(int(gained.sum()), int(lost.sum()), len(right))
    before, after = times(fp32, int8, short)
    return {
        "smaller": fp32.stat().st_size / int8.stat().st_size,
        "faster": before / after,
        "loss_points": [100 * float(lost.mean() - gained.mean()), -100 * high, -100 * low],
        "fp32_ms": 1e3 * before,
        "fp32_accuracy": float(theirs.mean()),
    }


def as_student(
    fp32: Path, student: Path, rows: list[str], held: np.ndarray, right: np.ndarray, teacher: np.ndarray,
    classes: list[str], short: list[np.ndarray],
) -> dict[str, Any]:  # fmt: skip
    """Hold a student's package against its teacher: macro F1 on the holdout, size, and time for one text (the
    student's with its tokenizer, the teacher's without, to its favour)."""
    before, _ = times(fp32, fp32, short)
    return {
        "teacher_quality": macro_f1(confusion(right, teacher.argmax(1), len(classes))),
        "smaller": fp32.stat().st_size / (student / "model.onnx").stat().st_size,
        "faster": before / text_seconds(student, [rows[k] for k in held]),
        "student_quality": student_quality(student, rows, held, right, classes),
    }


def fit_head(network: Classifier, embedded: np.ndarray, y: np.ndarray, num_classes: int) -> None:
    """Fit a logistic regression on embeddings [B, D] and put it into the network."""
    head = LogisticRegression(C=30, max_iter=200).fit(embedded, y)
    weight, bias = head.coef_, head.intercept_
    if num_classes == 2:
        weight, bias = np.vstack([0 * weight, weight]), np.concatenate([0 * bias, bias])
    network.head_weight = torch.tensor(weight.T, dtype=torch.float32)
    network.head_bias = torch.tensor(bias, dtype=torch.float32)


def embed(network: Classifier, ids: np.ndarray) -> np.ndarray:
    """Return the embeddings [B, D] of padded ids [B, T], those of a length together."""
    lengths, found = (ids != 0).sum(axis=1), np.zeros((len(ids), 384), np.float32)
    for part in np.array_split(np.argsort(lengths), max(1, len(ids) // 64)):
        width = max(2, int(lengths[part].max()))
        with torch.no_grad():
            found[part] = network.embed(torch.from_numpy(ids[part][:, :width])).numpy()
    return found


def answers(network: Classifier, embedded: np.ndarray) -> np.ndarray:
    """Return the network's probabilities [B, K] for embeddings [B, D]."""
    with torch.no_grad():
        return torch.softmax(torch.from_numpy(embedded) @ network.head_weight + network.head_bias, dim=1).numpy()


def export(network: torch.nn.Module, path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", min=2, max=512)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (torch.ones((2, 16), dtype=torch.int64),), str(path), input_names=["input"],
            output_names=["probabilities"], dynamic_shapes=(dynamic,), dynamo=True, external_data=False,
            verbose=False,
        )  # fmt: skip


def ask(path: Path, ids: np.ndarray) -> np.ndarray:
    """Probabilities [B, K], one batch for each length, as the padding of others would change an int8 answer."""
    session = start_session(path.read_bytes(), str(path), threads=2)
    lengths = np.maximum((ids != 0).sum(axis=1), 2)
    found: Any = None
    for length in np.unique(lengths):
        here = np.flatnonzero(lengths == length)
        for part in np.array_split(here, max(1, len(here) // 64)):
            answer = session.run(["probabilities"], {"input": ids[part, :length]})[0]
            found = np.zeros((len(ids), answer.shape[1]), np.float32) if found is None else found
            found[part] = answer
    return found


def times(first: Path, second: Path, rows: list[np.ndarray]) -> tuple[float, float]:
    """Seconds for one text of each graph, in turns."""
    pairs = [seconds_a_row(first, second, row) for row in rows[:5]]
    return float(np.median([a for a, _ in pairs])), float(np.median([b for _, b in pairs]))


def make_student(
    name: str, rows: list[str], labels: list[str], split: list[str], classes: list[str], teacher: np.ndarray, out: Path
) -> Path:
    """Train a student on the teacher's answers and package it as int8; return the package's folder."""
    dataset = publish(out / "data", {"text": rows}, labels, split)
    feature = {"kind": "text", "max_tokens": 48, "vocabulary": 4000}
    train = {"recipe": STUDENT, "ranks": 1, "batch_size": 64, "stopping": STOPPING}
    train["optimiser"] = {"learning_rate": 2e-3}
    common = {"dataset": dataset.model_dump(), "feature": feature, "label": {"classes": classes}, "train": train}
    request = TrainRequest.parse(common | {"workload": "bench", "revision": name}, "the benchmark's request")
    of_train = np.flatnonzero(np.array(split) == "train")
    truth = np.eye(len(classes), dtype=np.float32)[[classes.index(labels[row]) for row in of_train]]
    soft = WEIGHT * teacher[of_train] + np.float32(1 - WEIGHT) * truth

    def soften(folder: Path) -> None:
        np.save(folder / "arrays" / "train.y.npy", soft.astype(np.float32))

    room = Room(out / "student", "student")
    done = fit(request, room.begin(), None, lambda line: None, None, amend=soften)
    trained = room.publish({"run_id": "none"} | done)
    made = out / "made"
    made.mkdir()
    asked = common | {"workload": "bench", "variant": "int8", "trained": trained.model_dump()}
    print(compress(CompressRequest.parse(asked, "bench"), made, lambda *_: None))
    return made / "package"


def text_seconds(folder: Path, rows: list[str]) -> float:
    import time

    package, taken = open_package(folder, None, None), []
    for row in rows[:400]:
        started = time.perf_counter()
        package.predict([row])
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def student_quality(folder: Path, rows: list[str], held: np.ndarray, right: np.ndarray, classes: list[str]) -> float:
    package = open_package(folder, None, None)
    order = [package.signature.classes.index(name) for name in classes]
    parts = [package.predict([rows[k] for k in part])[:, order] for part in np.array_split(held, len(held) // 64)]
    return macro_f1(confusion(right, np.concatenate(parts).argmax(1), len(classes)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
