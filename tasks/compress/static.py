"""Static int8: ranges seen on training rows; layers that lose most, or are slower so, stay float.

Which layers lose most is measured by ONNX Runtime's own debugger: each layer's error between its float and its
quantised output, on the calibration rows. Which are slower is measured by kind, convolutions or matrix products: the
runtime fuses single layers into others, and a kernel is fast or slow on a processor for all layers of its kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from tasks.compress.store import STATIC_OPERATORS, Samples, answers, speed
from tasks.spec.compress import StaticInt8
from tasks.spec.errors import BadRequest

LEAST_CALIBRATION_ROWS = 32
DEBUG_ROWS = 32
# Layers that the same kernels compute.
KINDS = {"convolutions": ("Conv",), "matrix products": ("MatMul", "Gemm")}


def quantise_static(source: Path, target: Path, samples: Samples, options: StaticInt8) -> str:
    """Write ``target`` with as many int8 layers as ``max_loss`` allows, without a kind of layer that makes it slower
    than ``source``; say which stayed float.

    Raises:
        BadRequest: the training split has fewer rows than the calibration needs.
    """
    rows = calibration_rows(samples, options)
    reference = answers(source, samples.validation)
    worst: list[str] = []
    floating = 0
    while True:
        _quantise(source, target, rows, worst[:floating])
        loss = float(np.abs(answers(target, samples.validation) - reference).mean())
        if loss <= options.max_loss or (worst and floating >= len(worst)):
            break
        worst = worst or _worst_first(source, target, rows[:DEBUG_ROWS])
        floating = min(max(1, 2 * floating), len(worst))
    note = f"{floating} of {len(worst)} layers stay float: {', '.join(worst[:floating][:4])}" if floating else ""
    slow = _leave_slow_kind(source, target, rows, samples, worst[:floating])
    return "; ".join(filter(None, [note, slow]))


def _leave_slow_kind(source: Path, target: Path, rows: np.ndarray, samples: Samples, floating: list[str]) -> str:
    """Where ``target``, whose ``floating`` layers are float, is slower than ``source``, leave one kind of layer float
    as well if it is faster then; say which. Whether it is fast enough is for ``store`` to judge."""
    found = speed(source, target, samples.validation)
    if not found.slower:
        return ""
    layers, tried = _layers(source), {"": (found, floating)}
    for kind, operators in KINDS.items():
        names = sorted({*floating, *(node.name for node in layers if node.op_type in operators)})
        if len(floating) < len(names) < len(layers):
            _quantise(source, target, rows, names)
            tried[kind] = speed(source, target, samples.validation), names
    kind = max(tried, key=lambda kind: tried[kind][0].ratio)
    _quantise(source, target, rows, tried[kind][1])
    return f"{kind} stay float: as int8 they are slower" if kind else ""


def _layers(source: Path) -> list[Any]:
    """A graph's nodes that can be quantised."""
    import onnx

    return [node for node in onnx.load(source).graph.node if node.op_type in STATIC_OPERATORS]


def calibration_rows(samples: Samples, options: StaticInt8) -> np.ndarray:
    """Return the training rows to calibrate with, spread over the split."""
    rows, wanted = samples.training(), options.calibration_rows
    if len(rows) < max(wanted, LEAST_CALIBRATION_ROWS):
        raise BadRequest(
            f"{options.label}: calibration_rows = {wanted}, must be {LEAST_CALIBRATION_ROWS} or more and at most the "
            f"{len(rows)} rows of the training split"
        )
    return rows[np.linspace(0, len(rows) - 1, wanted).astype(int)]


class _Rows(CalibrationDataReader):
    """Rows in small batches, as ONNX Runtime's calibration asks for them."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows
        self.rewind()

    def rewind(self) -> None:
        self._parts: Iterator[Any] = iter(np.array_split(self._rows, max(1, len(self._rows) // 16)))

    def get_next(self) -> dict[str, Any] | None:
        part = next(self._parts, None)
        return None if part is None else {"input": part}


def _quantise(source: Path, target: Path, rows: np.ndarray, floating: list[str]) -> None:
    quantize_static(
        str(source),
        str(target),
        _Rows(rows),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(STATIC_OPERATORS),
        nodes_to_exclude=floating,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )


def _worst_first(source: Path, quantised: Path, rows: np.ndarray) -> list[str]:
    """The names of the graph's quantisable layers, the one whose output suffers most first."""
    from onnxruntime.quantization import qdq_loss_debug as debug

    held = []
    for path in (source, quantised):
        augmented = path.with_suffix(".debug.onnx")
        debug.modify_model_output_intermediate_tensors(str(path), str(augmented))
        held.append(debug.collect_activations(str(augmented), _Rows(rows)))
        augmented.unlink()
    errors = debug.compute_activation_error(debug.create_activation_matching(held[1], held[0]))
    layers = {node.output[0]: node.name for node in _layers(source)}
    # A signal-to-noise ratio in decibel: low is bad. A layer that the debugger can't match goes last.
    noise = {name: float(errors.get(output, {}).get("xmodel_err", np.inf)) for output, name in layers.items()}
    return sorted(layers.values(), key=lambda name: noise[name])
