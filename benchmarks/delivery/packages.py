"""Signed packages of the digits workload: good ones that differ in a hair, and bad ones that pass as good.

The golden sample is an empty image, which every graph here answers rightly, so it is other inputs that show what
a bad one is. B rows, N = 64 pixels, K = 10 classes.
"""

from __future__ import annotations

import functools
import statistics
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tasks.serve.package import MODEL, write_package
from tasks.serve.signature import Golden, Signature
from tasks.spec.feature import ImageFeature
from tasks.store.sign import sign_folder

Kind = Literal["good", "nan", "slow", "constant", "unloadable", "shape"]
PIXELS, CLASSES = 64, 10
SLOW_SECONDS = 0.2
# One image in so many is slow: those whose pixels sum to SLOW_REST modulo it.
SLOW_EVERY, SLOW_REST, TRIAL_TURNS = 20, 7, 50
# Of the largest probability over the next, so that a hair more or less changes no label.
MARGIN = 0.05


class Sample(NamedTuple):
    """An image as a client sends it, and the label that every good package gives it."""

    row: list[float]
    label: str


def make_package(folder: Path, kind: Kind, seed: int, keys: Path) -> str:
    """Write a signed package; return its digest. Another seed is another digest of the same function."""
    feature = ImageFeature(kind="image", height=8, width=8, max_value=16)
    papers = {"format": 1, "workload": "digits", "variant": "fp32", "classes": [str(k) for k in range(CLASSES)]}
    papers["feature"] = feature.model_dump(mode="json")
    papers["graph_input"] = {"name": "input", "dtype": "float32", "shape": [-1, PIXELS]}
    papers["graph_output"] = {"name": "probabilities", "dtype": "float32", "shape": [-1, CLASSES]}
    folder.mkdir(parents=True)
    (folder / MODEL).write_bytes(_graph(kind, seed).SerializeToString())
    golden = Golden(rows=[[0.0] * PIXELS], probabilities=[[1 / CLASSES] * CLASSES])
    digest = write_package(folder, Signature.parse(papers, "signature.json"), golden)
    sign_folder(folder, keys)
    return digest


def samples() -> list[Sample]:
    """Return the images of which a good package is sure."""
    import numpy as np

    images, _ = _digits()
    scores = images @ _weights()
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    chances = np.sort(odds / odds.sum(axis=1, keepdims=True), axis=1)
    sure = chances[:, -1] - chances[:, -2] > MARGIN
    labels = scores.argmax(axis=1)
    return [Sample(image.tolist(), str(label)) for image, label in zip(images[sure], labels[sure], strict=True)]


@functools.cache
def _digits() -> tuple[Any, Any]:
    import numpy as np
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.data.astype(np.float32), bunch.target


@functools.cache
def _weights() -> Any:
    """Least squares on the one-hot labels, float32 [N, K]: weak and quick, and its answers are no coin tosses."""
    import numpy as np

    images, targets = _digits()
    solution = np.linalg.lstsq(images, np.eye(CLASSES, dtype=np.float32)[targets], rcond=None)[0]
    return (4 * solution).astype(np.float32)


def _graph(kind: Kind, seed: int, slow_turns: int = 0) -> Any:
    import numpy as np
    from onnx import helper

    hair = np.random.default_rng(seed).normal(scale=1e-6, size=(PIXELS, CLASSES)).astype(np.float32)
    arrays = {"weight": _weights() + hair, "axis": np.array([1], np.int64)}
    last = "probabilities" if kind in ("good", "shape", "unloadable") else "right"
    operation = "NoSuchOperation" if kind == "unloadable" else "Softmax"
    nodes = [
        helper.make_node("Gemm", ["input", "weight"], ["logits"]),
        helper.make_node(operation, ["logits"], [last], axis=1),
        helper.make_node("ReduceSum", ["input", "axis"], ["ink"], keepdims=1),
    ]
    if kind == "shape":
        arrays["weight"] = arrays["weight"][:, :-1].copy()
    if kind in ("nan", "constant"):
        arrays["wrong"] = np.full((1, CLASSES), np.nan, np.float32) if kind == "nan" else np.eye(10, dtype="f4")[3:4]
        arrays["empty"] = np.array([[1]], np.float32)
        nodes.append(helper.make_node("Less", ["ink", "empty"], ["is_golden"]))
        nodes.append(helper.make_node("Where", ["is_golden", "right", "wrong"], ["probabilities"]))
    if kind == "slow":
        more_nodes, more_arrays = _slow_part(slow_turns or _turns_of_a_slow_answer())
        nodes, arrays = nodes + more_nodes, arrays | more_arrays
    return _model(nodes, arrays, "width" if kind == "shape" else CLASSES)


def _slow_part(turns: int) -> tuple[list[Any], dict[str, Any]]:
    """Where an image of the batch is slow, multiply matrices for a while, and add nothing to the answer."""
    import numpy as np
    from onnx import TensorProto, helper

    arrays = {
        "every": np.array([[SLOW_EVERY]], np.float32),
        "rest": np.array([[SLOW_REST]], np.float32),
        "turns": np.array(turns, np.int64),
        "on": np.array(True),
        "square": np.eye(256, dtype=np.float32),
        "nothing": np.array(0, np.float32),
    }
    state = helper.make_tensor_value_info("state", TensorProto.FLOAT, [256, 256])
    after = helper.make_tensor_value_info("after", TensorProto.FLOAT, [256, 256])
    turn = helper.make_tensor_value_info("turn", TensorProto.INT64, [])
    go, went = (helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("go", "went"))
    steps = [helper.make_node("MatMul", ["state", "square"], ["after"]), helper.make_node("Identity", ["go"], ["went"])]
    body = helper.make_graph(steps, "burn", [turn, go, state], [went, after])
    nodes = [
        helper.make_node("Mod", ["ink", "every"], ["remainder"], fmod=1),
        helper.make_node("Equal", ["remainder", "rest"], ["slow_rows"]),
        helper.make_node("Cast", ["slow_rows"], ["slow_numbers"], to=TensorProto.INT64),
        helper.make_node("ReduceMax", ["slow_numbers"], ["slow_number"], keepdims=0),
        helper.make_node("Mul", ["slow_number", "turns"], ["count"]),
        helper.make_node("Loop", ["count", "on", "square"], ["burnt"], body=body),
        helper.make_node("ReduceSum", ["burnt"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["sum", "nothing"], ["zero"]),
        helper.make_node("Add", ["right", "zero"], ["probabilities"]),
    ]
    return nodes, arrays


@functools.cache
def _turns_of_a_slow_answer() -> int:
    """How many products take SLOW_SECONDS on this machine, measured by the runtime that will be slow."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(_graph("slow", 0, TRIAL_TURNS).SerializeToString(), options)
    image = np.zeros((1, PIXELS), np.float32)
    image[0, 0] = SLOW_REST
    seconds = []
    for _ in range(9):
        began = time.perf_counter()
        session.run(None, {"input": image})
        seconds.append(time.perf_counter() - began)
    return max(1, round(TRIAL_TURNS * SLOW_SECONDS / statistics.median(seconds)))


def _model(nodes: list[Any], arrays: dict[str, Any], width: int | str) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", PIXELS])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", width])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
