"""A smaller graph that is slower is given up, and one that is no faster says so: by a clock that the test sets."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tasks.compress import store as stores
from tasks.compress.store import Samples, store
from tasks.spec.compress import DynamicInt8, Fp16, Int4, Pruned, Sparse, StaticInt8

pytestmark = pytest.mark.timeout(60)
WIDTH = 32


@pytest.fixture
def source(tmp_path):
    """A graph of one matrix product: input [B, 32] -> output [B, 32]."""
    made, draw = onnx.helper, np.random.default_rng(0)
    weight = onnx.numpy_helper.from_array(draw.normal(size=(WIDTH, WIDTH)).astype(np.float32), "weight")
    sides = [made.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", WIDTH]) for n in ("input", "output")]
    node = made.make_node("MatMul", ["input", "weight"], ["output"], name="product")
    graph = made.make_graph([node], "one product", sides[:1], sides[1:], [weight])
    onnx.save(made.make_model(graph, opset_imports=[made.make_opsetid("", 17)], ir_version=8), tmp_path / "fp32.onnx")
    return tmp_path / "fp32.onnx"


@pytest.fixture
def stored(source, tmp_path, monkeypatch):
    """Store as a variant says, where the float graph takes a second a row and the other takes ``seconds``."""

    def run(variant, seconds):
        monkeypatch.setattr(stores, "seconds_a_row", lambda *asked: (1.0, seconds))
        rows = np.random.default_rng(1).normal(size=(64, WIDTH)).astype(np.float32)
        done = store(variant, source, tmp_path / "model.onnx", Samples(rows, lambda: rows))
        return done, (tmp_path / "model.onnx").read_bytes() == source.read_bytes()

    return run


STATIC = StaticInt8(kind="int8-static", calibration_rows=32, max_loss=1.0)
INT8 = [DynamicInt8(kind="int8"), Pruned(kind="pruned", then="int8"), STATIC]


@pytest.mark.parametrize("variant", INT8, ids=lambda variant: variant.label)
def test_int8_that_is_slower_is_the_float_graph_again(stored, variant):
    done, same = stored(variant, 1.5)
    assert same
    assert done == ("fp32", 1.0, f"fell back to fp32: {variant.stored} takes 1.50 times as long")


@pytest.mark.parametrize("variant", INT8, ids=lambda variant: variant.label)
def test_int8_that_is_faster_stays(stored, variant):
    done, same = stored(variant, 0.5)
    assert not same
    assert done == (variant.stored, 2.0, "")


def test_int8_that_is_as_fast_stays_and_says_so(stored):
    assert stored(INT8[0], 1.0) == (("int8", 1.0, "smaller only: no faster than fp32"), False)


@pytest.mark.parametrize("variant", [Fp16(kind="fp16"), Int4(kind="int4")], ids=lambda variant: variant.label)
def test_what_is_smaller_stays_even_where_it_is_slower(stored, variant):
    done, same = stored(variant, 2.0)
    assert not same
    assert done == (variant.kind, 0.5, "smaller only: no faster than fp32")
    assert stored(variant, 0.5)[0].note == ""


def test_single_weights_that_are_zero_make_no_graph_faster(stored):
    assert stored(Sparse(kind="sparse"), 0.5) == (("fp32", 1.0, "smaller only"), True)
    assert stored(Sparse(kind="sparse", then="int8"), 0.5) == (("int8", 2.0, ""), False)


@pytest.fixture
def mixed(tmp_path):
    """A graph of two convolutions and a matrix product: input [B, 32] -> output [B, 8]."""
    made, draw = onnx.helper, np.random.default_rng(0)
    arrays = {"first": (4, 1, 3), "second": (4, 4, 3), "weight": (4 * 28, 8)}
    widths = {"input": WIDTH, "output": 8}
    sides = [made.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", w]) for n, w in widths.items()]
    weights = [onnx.numpy_helper.from_array(draw.normal(0, 0.1, s).astype(np.float32), n) for n, s in arrays.items()]
    shapes = {"signal": [-1, 1, 32], "flat": [-1, 4 * 28]}
    weights += [onnx.numpy_helper.from_array(np.array(shape), name) for name, shape in shapes.items()]
    nodes = [
        made.make_node("Reshape", ["input", "signal"], ["a"], name="signals"),
        made.make_node("Conv", ["a", "first"], ["b"], name="first convolution"),
        made.make_node("Conv", ["b", "second"], ["c"], name="second convolution"),
        made.make_node("Reshape", ["c", "flat"], ["d"], name="flattened"),
        made.make_node("MatMul", ["d", "weight"], ["output"], name="product"),
    ]
    graph = made.make_graph(nodes, "mixed", sides[:1], sides[1:], weights)
    onnx.save(made.make_model(graph, opset_imports=[made.make_opsetid("", 17)], ir_version=8), tmp_path / "fp32.onnx")
    return tmp_path / "fp32.onnx"


def quantised(path) -> set[str]:
    """Which operators of a graph read what was int8."""
    nodes = onnx.load(path).graph.node
    floats = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    return {node.op_type for node in nodes if node.op_type in ("Conv", "MatMul") and set(node.input) <= floats}


@pytest.mark.parametrize(
    ("slow", "note", "left"),
    [
        ({"Conv"}, "convolutions stay float: as int8 they are slower", {"MatMul"}),
        ({"MatMul"}, "matrix products stay float: as int8 they are slower", {"Conv"}),
        ({"Conv", "MatMul"}, "fell back to fp32: int8-static takes 1.50 times as long", set()),
        (set(), "", {"Conv", "MatMul"}),
    ],
)
def test_the_kind_of_layer_that_is_slower_as_int8_stays_float(mixed, tmp_path, monkeypatch, slow, note, left):
    """The clock is slow where a layer of a slow kind is int8, and fast where one of another is."""

    def clock(reference, candidate, rows):
        return 1.0, 1.5 if quantised(candidate) & slow else 0.5

    monkeypatch.setattr(stores, "seconds_a_row", clock)
    rows = np.random.default_rng(1).normal(size=(64, WIDTH)).astype(np.float32)
    done = store(STATIC, mixed, tmp_path / "model.onnx", Samples(rows, lambda: rows))
    assert done.note == note
    assert done.kind == ("int8-static" if left else "fp32")
    assert quantised(tmp_path / "model.onnx") == left
