"""ONNX Runtime's session over a model, set up as a server's: what is timed in it is what is served."""

from __future__ import annotations

import functools
from typing import Any

from tasks.spec.errors import BadRequest

# A sum and its layer norm as one operator take twice the time of the two (1.32, AVX2): 6 % of an int8 encoder.
SLOWER_FUSIONS = ["SkipLayerNormFusion"]


def start_session(content: bytes, where: str, threads: int) -> Any:
    """Return a session over a model's bytes; ``threads`` is what one prediction may use.

    Raises:
        BadRequest: ONNX Runtime can't load it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Batches differ in rows and width: a plan of memory for each, and an arena that keeps the largest, cost tens of
    # megabytes and save no time.
    options.enable_mem_pattern = options.enable_cpu_mem_arena = False
    options.log_severity_level = 4  # what matters is raised; the rest would go to stderr unasked
    # Its own binary format is another parser, which an .onnx name must not reach; and threads that spin
    # while they wait take the core from the server itself.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOWER_FUSIONS
        )
    except session_errors() as error:
        raise BadRequest(f"{where}: ONNX Runtime can't load it: {error}") from error
    # Kept to load it again with other providers, and as large as the model; an attribute of another name would
    # cost memory, no more.
    session._model_bytes = None
    return session


@functools.cache
def session_errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("EPFail", "EngineError", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel",
             "NoSuchFile", "NotImplemented", "RuntimeException")  # fmt: skip
    return tuple(getattr(state, name) for name in names)
