"""What every peer shares: the model in ONNX Runtime on one thread, and the same protocol read and written.

B rows   N input width   K classes
"""

from __future__ import annotations

import os

import numpy as np
import onnxruntime
import orjson

PATH = "/v2/models/bench-m/infer"
WIDTH, MAX_ROWS = 784, 64


class Model:
    """Opened from ``PEER_MODEL``, the path of an ONNX file."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(os.environ["PEER_MODEL"], options, ["CPUExecutionProvider"])

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """float32 [B, N] -> probabilities [B, K]."""
        return self._session.run(None, {"input": rows})[0]


def read(body: bytes) -> np.ndarray:
    """Return the rows of a request, float32 [B, N].

    Raises:
        ValueError: what is no such request.
    """
    request = orjson.loads(body)
    try:
        (tensor,) = request["inputs"]
        shape, datatype, data = tensor["shape"], tensor["datatype"], tensor["data"]
    except (KeyError, TypeError) as error:
        raise ValueError("inputs: must be one tensor with shape, datatype and data") from error
    if datatype != "FP32" or len(shape) != 2 or shape[1] != WIDTH or not 1 <= shape[0] <= MAX_ROWS:
        raise ValueError(f"inputs: found {datatype} {shape}, must be FP32 [1 to {MAX_ROWS}, {WIDTH}]")
    rows = np.array(data, dtype=np.float32)
    if rows.ndim != 1 or len(rows) != shape[0] * WIDTH:
        raise ValueError(f"data: found {len(rows)} values, must be as many as the shape says")
    return rows.reshape(shape)


def write(probabilities: np.ndarray) -> bytes:
    """Return the answer: a label and the probabilities of each row."""
    labels = [str(label) for label in probabilities.argmax(axis=1)]
    outputs = [
        {"name": "label", "datatype": "BYTES", "shape": [len(labels)], "data": labels},
        {
            "name": "probabilities",
            "datatype": "FP32",
            "shape": list(probabilities.shape),
            "data": probabilities.ravel().tolist(),
        },
    ]
    return orjson.dumps({"model_name": "bench-m", "outputs": outputs})
