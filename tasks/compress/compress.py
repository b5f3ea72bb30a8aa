"""Make one model package: export the trained network to ONNX, quantise where the variant says so.

The package is opened again and held against the torch network on real rows before it counts: an export that
answers otherwise than the network did is a fault, not a candidate.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

from tasks.serve.package import Golden, Signature, open_package, write_package
from tasks.spec.errors import DrydockError
from tasks.spec.feature import encode
from tasks.spec.requests import CompressRequest, CompressResult
from tasks.store.room import open_room
from tasks.train.prepare import load_stats, read_split

PARITY_ROWS = 256
GOLDEN_ROWS = 2
# fp32 must agree with torch up to rounding; int8 is another model, judged by the gate, and only held sane here.
PARITY_LIMITS = {"fp32": 1e-4, "int8": 0.5}
# Dynamic quantisation of convolutions is slower than float on most CPUs, so they stay float.
QUANTISED_OPERATORS = ["MatMul", "Gemm", "Gather"]


def compress(request: CompressRequest, room: Path) -> CompressResult:
    """Write ``package/`` into ``room`` and return its digest, size and parity with the torch network.

    Raises:
        DrydockError: the exported graph's answers differ from the network's by more than the variant's limit.
    """
    trained, dataset = open_room(request.trained), open_room(request.dataset)
    package = room / "package"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir()
    network = load_network(request, trained)
    if request.feature.kind == "text":
        shutil.copyfile(trained / "tokenizer.json", package / "tokenizer.json")
    export(network, request, room / "fp32.onnx")
    if request.variant == "int8":
        quantise(room / "fp32.onnx", package / "model.onnx")
        (room / "fp32.onnx").unlink()
    else:
        (room / "fp32.onnx").rename(package / "model.onnx")
    rows, _ = read_split(dataset / "data.parquet", request.feature, request.label, "validation")
    return _finish(request, room, network, rows[:PARITY_ROWS])


def _finish(request: CompressRequest, room: Path, network: Any, rows: Any) -> CompressResult:
    """Write the package's papers with its own answers as the golden sample, then check parity."""
    package = room / "package"
    signature = signature_of(request)
    golden_rows = _client_rows(rows[:GOLDEN_ROWS])
    # First with the network's answers, to open it at all; then with its own.
    answers = _torch_answers(network, request, golden_rows, package)
    write_package(package, signature, Golden(rows=golden_rows, probabilities=answers.tolist(), tolerance=1.0))
    answers = open_package(package, None, None).predict(golden_rows)
    digest = write_package(package, signature, Golden(rows=golden_rows, probabilities=answers.tolist()))
    opened = open_package(package, digest, None)
    difference = float(abs(opened.predict(rows) - _torch_answers(network, request, rows, package)).max())
    if not difference <= PARITY_LIMITS[request.variant]:  # so that NaN fails it
        limit = PARITY_LIMITS[request.variant]
        raise DrydockError(f"{request.variant}: differs from the torch network by {difference:.3g}, limit {limit}")
    return CompressResult(
        variant=request.variant,
        package_sha256=digest,
        model_bytes=(package / "model.onnx").stat().st_size,
        parity_max_difference=difference,
    )


def signature_of(request: CompressRequest) -> Signature:
    return Signature.parse(
        {
            "format": 1,
            "workload": request.workload,
            "variant": request.variant,
            "feature": request.feature.model_dump(mode="json"),
            "classes": list(request.label.names),
            "graph_input": {
                "name": "input",
                "dtype": "int64" if request.feature.kind == "text" else "float32",
                "shape": [-1, *request.feature.shape],
            },
            "graph_output": {"name": "probabilities", "dtype": "float32", "shape": [-1, len(request.label.names)]},
        },
        "signature.json",
    )


def load_network(request: CompressRequest, trained: Path) -> Any:
    """Rebuild the trained network with softmax behind it, in evaluation mode."""
    import torch
    from safetensors.torch import load_file

    from tasks.train.recipes import build

    num_classes = len(request.label.names)
    body = build(request.train.recipe, request.feature, num_classes, load_stats(trained), trained)
    body.load_state_dict(load_file(trained / "weights.safetensors"))
    return torch.nn.Sequential(body, torch.nn.Softmax(dim=1)).eval()


def export(network: Any, request: CompressRequest, path: Path) -> None:
    """Export to one ONNX file: input [B, N] -> probabilities [B, K], B dynamic."""
    import torch

    dtype = torch.int64 if request.feature.kind == "text" else torch.float32
    example = torch.zeros((2, *request.feature.shape), dtype=dtype)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (example,),
            str(path),
            input_names=["input"],
            output_names=["probabilities"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def quantise(source: Path, target: Path) -> None:
    """Dynamic int8: weights stored as int8, activations quantised at run time (ONNX Runtime)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().setLevel(logging.ERROR)
    quantize_dynamic(
        str(source),
        str(target),
        op_types_to_quantize=QUANTISED_OPERATORS,
        weight_type=QuantType.QInt8,
        per_channel=False,
    )


def _torch_answers(network: Any, request: CompressRequest, rows: Any, package: Path) -> Any:
    import torch

    tokenizer = None
    if request.feature.kind == "text":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(package / "tokenizer.json"))
    with torch.no_grad():
        answers = network(torch.from_numpy(encode(request.feature, rows, tokenizer)))
    if not torch.isfinite(answers).all():
        raise DrydockError(f"{request.workload}: the trained network answers what is no number")
    return answers.numpy()


def _client_rows(rows: Any) -> list[Any]:
    """Rows as a client's JSON holds them; a missing number has no JSON form and becomes 0."""
    import numpy as np

    return rows if isinstance(rows, list) else np.nan_to_num(rows).tolist()
