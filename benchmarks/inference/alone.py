"""``python alone.py MODEL IDS SECONDS``: answers a second of ONNX Runtime with nothing around it, the ceiling of T.

Batch 1, one thread; the sentence is tokenised already.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import onnxruntime

WARM_UP_CALLS = 10


def main(model: str, ids: list[int], seconds: float) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    feed = {"input": np.array([ids], np.int64)}
    for _ in range(WARM_UP_CALLS):
        session.run(None, feed)
    began, count = time.perf_counter(), 0
    while time.perf_counter() < began + seconds:
        session.run(None, feed)
        count += 1
    print(json.dumps({"rate": count / (time.perf_counter() - began)}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3]))
