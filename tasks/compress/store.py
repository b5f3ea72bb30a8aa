"""How an ONNX graph's numbers are stored: float, half, int8, int4. What would be slower for it falls back to float.

ONNX Runtime's own tools do the work. They need no torch, and know no workload: a file in, a file out.
"""

from __future__ import annotations

import logging
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tasks.serve.session import start_session
from tasks.spec.compress import Int4, StaticInt8, Stored, Variant
from tasks.spec.errors import BadRequest

# Dynamic quantisation of convolutions is slower than float on most CPUs, so they stay float.
DYNAMIC_OPERATORS = ("MatMul", "Gemm", "Gather")
STATIC_OPERATORS = ("MatMul", "Gemm", "Conv")
# One row at a time, both graphs in turns, so that what else the machine does strikes both.
ROUNDS, ROUND_SECONDS, MOST_CALLS = 15, 0.02, 200
# A smaller model is given up where it takes more than 5 % and 20 microseconds a row longer: what is less is noise, and
# a tenth of what the server itself needs for a request.
SLOWER_RATIO, SLOWER_SECONDS = 0.95, 20e-6


class Samples(NamedTuple):
    """Encoded rows: some of the validation split, and a function that gives the training split's."""

    validation: np.ndarray
    training: Callable[[], np.ndarray]


class Done(NamedTuple):
    kind: Stored
    speed_ratio: float
    note: str


class Speed(NamedTuple):
    """How many times as fast as its float graph another is, and whether it is so much slower that it is given up."""

    ratio: float
    slower: bool


def store(variant: Variant, source: Path, target: Path, samples: Samples) -> Done:
    """Write ``target`` as the variant says and time it beside ``source``; int8 that is slower falls back to it.

    Raises:
        BadRequest: too few training rows to calibrate with, or nothing in the graph that can be stored so.
    """
    if variant.stored == "fp32":
        shutil.copyfile(source, target)
        return Done("fp32", 1.0, "smaller only" if variant.kind == "sparse" else "")
    with _quiet():
        note = _write(variant, source, target, samples)
    ratio, slower = speed(source, target, samples.validation)
    if slower and variant.stored in ("int8", "int8-static"):
        shutil.copyfile(source, target)
        return Done("fp32", 1.0, f"fell back to fp32: {variant.stored} takes {1 / ratio:.2f} times as long")
    only = "smaller only: no faster than fp32" if ratio < 1 / SLOWER_RATIO else ""
    return Done(variant.stored, ratio, "; ".join(filter(None, [note, only])))


def _write(variant: Variant, source: Path, target: Path, samples: Samples) -> str:
    if variant.stored == "int8":
        return quantise(source, target)
    if variant.stored == "int8-static":
        options = variant if isinstance(variant, StaticInt8) else StaticInt8(kind="int8-static")
        from tasks.compress.static import quantise_static

        return quantise_static(source, target, samples, options)
    if variant.stored == "fp16":
        return halve(source, target)
    if variant.stored == "bf16":
        return keep_as_bf16(source, target)
    return to_int4(source, target, variant if isinstance(variant, Int4) else Int4(kind="int4"))


def quantise(source: Path, target: Path) -> str:
    """Dynamic int8: weights stored as int8 with a scale for each output, activations quantised at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        str(source),
        str(target),
        op_types_to_quantize=list(DYNAMIC_OPERATORS),
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    return ""


def halve(source: Path, target: Path) -> str:
    """float16 weights and operators; inputs and outputs stay float32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), str(target))
    return ""


def keep_as_bf16(source: Path, target: Path) -> str:
    """Weights of float32 stored as bfloat16, rounded to the nearest, and cast back when the session starts.

    The operators stay float32: ONNX Runtime has none of bfloat16 for CPUs.
    """
    import ml_dtypes
    import onnx

    model = onnx.load(source)
    graph, casts = model.graph, []
    for weight in graph.initializer:
        if weight.data_type != onnx.TensorProto.FLOAT or not weight.dims:
            continue
        name, rounded = weight.name, onnx.numpy_helper.to_array(weight).astype(ml_dtypes.bfloat16)
        weight.CopyFrom(onnx.numpy_helper.from_array(rounded, f"{name}.bf16"))
        casts.append(onnx.helper.make_node("Cast", [weight.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend(casts + nodes)
    onnx.save(model, str(target))
    return ""


def to_int4(source: Path, target: Path, options: Int4) -> str:
    """int4 weights of matrix products, in blocks, symmetric; the products' activations stay float. A table that is both
    read and multiplied by, as a language model's, is stored so for either.

    Raises:
        BadRequest: the graph has no matrix product with constant weights.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel

    graph = ONNXModel(onnx.load(source))
    graph.replace_gemm_with_matmul()
    kinds = ("MatMul", "Gather") if _multiply_by_own(graph.model) else ("MatMul",)
    quantiser = MatMulNBitsQuantizer(
        graph.model, block_size=options.block_size, is_symmetric=True, accuracy_level=4, op_types_to_quantize=kinds
    )
    quantiser.process()
    if not any(node.op_type == "MatMulNBits" for node in quantiser.model.model.graph.node):
        raise BadRequest("int4: the graph has no matrix product with constant weights; use int8")
    onnx.save(quantiser.model.model, str(target))
    return ""


def _multiply_by_own(model: Any) -> bool:
    """Let products have weights of their own where they take another's transposed; return whether there were any."""
    from onnx import numpy_helper

    weights = {weight.name: weight for weight in model.graph.initializer}
    turned = [node for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in weights]
    for node in turned:
        axes = next((list(one.ints) for one in node.attribute if one.name == "perm"), None)
        array = np.ascontiguousarray(numpy_helper.to_array(weights[node.input[0]]).transpose(axes))
        model.graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
        model.graph.node.remove(node)
    return bool(turned)


def speed(reference: Path, candidate: Path, rows: np.ndarray) -> Speed:
    """Time two graphs beside each other, on one row at a time."""
    before, after = seconds_a_row(reference, candidate, rows)
    return Speed(before / after, after > before / SLOWER_RATIO and after > before + SLOWER_SECONDS)


def seconds_a_row(reference: Path, candidate: Path, rows: np.ndarray) -> tuple[float, float]:
    """Return the reference's time for one row, and the candidate's: the reference's by the median of the ratios."""
    sessions = [start_session(path.read_bytes(), str(path), threads=1) for path in (reference, candidate)]
    one = _seconds(sessions[0], rows, 3)
    calls = int(min(MOST_CALLS, max(2, ROUND_SECONDS / max(one, 1e-6))))
    turns = [[_seconds(session, rows, calls) for session in sessions] for _ in range(ROUNDS)]
    before = statistics.median(turn[0] for turn in turns)
    return before, before * statistics.median(turn[1] / turn[0] for turn in turns)


def _seconds(session: Any, rows: np.ndarray, calls: int) -> float:
    started = time.perf_counter()
    for call in range(calls):
        row = call % len(rows)
        session.run(None, {"input": rows[row : row + 1]})
    return (time.perf_counter() - started) / calls


def answers(path: Path, rows: np.ndarray) -> np.ndarray:
    """Return a graph's probabilities [B, K] for encoded rows."""
    session = start_session(path.read_bytes(), str(path), threads=1)
    parts: Iterable[Any] = np.array_split(rows, max(1, len(rows) // 64))
    return np.concatenate([session.run(None, {"input": part})[0] for part in parts])


@contextmanager
def _quiet() -> Iterator[None]:
    """The tools log advice on the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
