"""The Open Inference Protocol v2 over REST, as pure functions: bytes in, a request; an answer in, bytes out.

Inputs: ``input`` FP32 [B, N] (UINT8 and INT64 are accepted) for images and tables, ``text`` BYTES [B] for
texts, ``user`` and ``item`` BYTES or INT64 [B] for ids. Outputs: ``label`` BYTES [B] and ``probabilities`` FP32 [B, K];
or a number, by the name of its column, FP32 [B]; of a language model, where the request's parameter ``max_new_tokens``
asks for it, ``continuation`` BYTES [B] too. Of tagged words a label is as many tags as its text has words, with a space
between two, and the probabilities are each word's, [W, K], text by text. The binary tensor extension is spoken: the
JSON part's length is in ``Inference-Header-Content-Length``, the tensors' bytes follow it.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any, NamedTuple

import msgspec
import numpy as np
import simdjson

from tasks.serve.body import read_json
from tasks.serve.signature import Signature
from tasks.serve.tensors import input_names, num_rows_of, read_ids, read_rows, show, write_bytes_tensor
from tasks.spec.errors import BadRequest
from tasks.spec.feature import VOCABULARIES, Feature

OUTPUTS = ("label", "probabilities")
CONTINUATION, MOST_NEW = "continuation", 256
ALL = dict.fromkeys(OUTPUTS, False)  # what is asked for where nothing is: both, in JSON
DATA = b'"data"'
FIRST_ID = re.compile(rb'\{"id": ?"([A-Za-z0-9_.:-]{1,128})", ?(?=")')
MAX_FRAMES, MAX_FRAME_BYTES = 64, 2048


class InferRequest(NamedTuple):
    """``rows``: numbers [B, N], B strings or B pairs of them; ``outputs``: which are asked for, and whether binary;
    ``more``: by how many pieces texts are to go on."""

    id: str | None
    rows: Any
    outputs: dict[str, bool]
    more: int = 0


class Answer(NamedTuple):
    """``labels``: B class names; ``probabilities``: float32 [B, K]. Of tagged words: B texts of tags; [W, K]. Of
    numbers: their digits; [B, 1]."""

    labels: list[str]
    probabilities: np.ndarray
    continuations: list[str] | None = None


class Reader:
    """Reads inference requests for one feature, each on its own; but what clients say again and again around their
    numbers is read once. A *frame* is a body without the list of its data and without an id at its very beginning:
    known are those that ``read_infer`` takes with that list empty, so that only the list is left to be read."""

    def __init__(self, feature: Feature, max_rows: int, outputs: tuple[str, ...] = OUTPUTS) -> None:
        self._feature, self._max_rows, self._outputs = feature, max_rows, outputs
        self._frames: dict[tuple[bytes, bytes], InferRequest] = {}

    def __call__(self, body: bytes, json_bytes: int | None) -> InferRequest:
        """Return the request, as ``read_infer`` does."""
        known = self._read_framed(body) if json_bytes is None else None
        return known or read_infer(body, json_bytes, self._feature, self._max_rows, self._outputs)

    def _read_framed(self, body: bytes) -> InferRequest | None:
        start = body.find(b"[", body.find(DATA) + len(DATA))
        end = body.find(b"]", start) + 1
        first = FIRST_ID.match(body, 0, start)
        frame = (b"{" + body[first.end() : start] if first else body[:start], body[end:])
        known = self._frames.get(frame) or self._learn(frame)
        if known is None:
            return None
        try:  # an inner list ends before its outer one, and so is no JSON here
            values = np.frombuffer(simdjson.Parser().parse(body[start:end]).as_buffer(of_type="d"))
        except (TypeError, ValueError, RuntimeError):
            return None
        if values.size != known.rows[0] * known.rows[1]:
            return None
        return InferRequest(first[1].decode() if first else None, values.reshape(known.rows), known.outputs)

    def _learn(self, frame: tuple[bytes, bytes]) -> InferRequest | None:
        """Remember a frame; its request's rows are their shape. An id elsewhere differs each time, a backslash may
        hide a name, and with another mark of data the list might be another one."""
        around = b"[]".join(frame)
        if len(around) > MAX_FRAME_BYTES or b'"id"' in around or b"\\" in around or around.count(DATA) != 1:
            return None
        try:
            request, (tensor, *_) = _read_around(around, self._feature, self._outputs)
            num_rows = num_rows_of(self._feature, tensor.get("shape"), self._max_rows)
            data = _data(tensor, b"")
        except BadRequest:
            return None
        if tensor.get("datatype") != "FP32" or not isinstance(data, simdjson.Array):
            return None
        if self._feature.holds in VOCABULARIES:
            return None
        if len(self._frames) >= MAX_FRAMES:
            self._frames.clear()
        self._frames[frame] = request._replace(rows=(num_rows, *self._feature.shape))
        return self._frames[frame]


def read_infer(
    body: bytes, json_bytes: int | None, feature: Feature, max_rows: int, outputs: tuple[str, ...] = OUTPUTS
) -> InferRequest:
    """Read an inference request; ``json_bytes`` is the length of the JSON where binary tensors follow it.
    ``outputs``: what the model answers.

    Raises:
        BadRequest: one line that says which field, what was found and what it must be.
    """
    if json_bytes is not None and json_bytes > len(body):
        raise BadRequest(f"Inference-Header-Content-Length = {json_bytes}, the body has {len(body)} bytes")
    binary = b"" if json_bytes is None else body[json_bytes:]
    text = body if json_bytes is None else body[:json_bytes]
    request, tensors = _read_around(text, feature, outputs)
    if feature.kind == "ids":
        parts = zip(tensors, _bytes_of_each(tensors, binary), strict=True)
        return request._replace(rows=read_ids([(tensor, _data(tensor, part)) for tensor, part in parts], max_rows))
    (tensor,) = tensors
    data = _data(tensor, binary)
    # The brackets of inputs, shape and data: then none is inside the data.
    flat = _has_at_most(text, b"[", 3)
    rows = read_rows(feature, tensor.get("datatype"), tensor.get("shape"), data, max_rows, flat)
    return request._replace(rows=rows)


def _read_around(
    text: bytes, feature: Feature, outputs: tuple[str, ...]
) -> tuple[InferRequest, list[dict[str, Any]]]:
    """Return the request without its rows, and the tensors that hold them."""
    request = read_json(text)
    if not isinstance(request.get("id", ""), str):
        raise BadRequest(f"id = {show(request['id'])}, must be a string")
    names = input_names(feature)
    tensors = _inputs(request.get("inputs"), names) if len(names) > 1 else [_one_input(request.get("inputs"), *names)]
    for tensor in tensors:
        _parameters(tensor, "the input")
    parameters, more = _parameters(request, "the request"), 0
    if CONTINUATION in outputs:
        more = _new_tokens(parameters)
        outputs = outputs if more else outputs[:-1]
    default = _flag(parameters, "binary_data_output", False)
    return InferRequest(request.get("id"), None, _wanted(request.get("outputs"), default, outputs), more), tensors


def _new_tokens(parameters: dict[str, Any]) -> int:
    more = parameters.get("max_new_tokens", 0)
    if type(more) is not int or not 0 <= more <= MOST_NEW:
        raise BadRequest(f"max_new_tokens = {show(more)}, must be a whole number from 0 to {MOST_NEW}")
    return more


def write_infer(request: InferRequest, answer: Answer, model: str, version: str) -> tuple[bytes, int | None]:
    """Return the response's body, and the length of its JSON where binary tensors follow it."""
    if request.outputs is ALL:
        return _write_all(request.id, answer, model, version), None
    outputs, parts = [], []
    for name, binary in request.outputs.items():
        output, raw = _output(name, binary, answer)
        outputs.append(output)
        parts.append(raw)
    response = {"model_name": model, "model_version": version, "outputs": outputs}
    if request.id is not None:
        response["id"] = request.id
    head = msgspec.json.encode(response)
    return b"".join([head, *parts]), len(head) if any(request.outputs.values()) else None


def _write_all(request_id: str | None, answer: Answer, model: str, version: str) -> bytes:
    """The usual answer: what it always says is written once."""
    before, between = _frame(model, version, len(answer.labels), *answer.probabilities.shape)
    end = b"" if request_id is None else b',"id":' + msgspec.json.encode(request_id)
    values = msgspec.json.encode(answer.probabilities.ravel().tolist())
    return b"%b%b%b%b}]%b}" % (before, msgspec.json.encode(answer.labels), between, values, end)


@functools.lru_cache(maxsize=256)
def _frame(model: str, version: str, num_rows: int, num_answers: int, num_classes: int) -> tuple[bytes, bytes]:
    """Return what stands before the labels, and between them and the probabilities."""
    answer = Answer([], np.zeros((num_answers, num_classes), np.float32))
    label, probabilities = (_output(name, False, answer)[0] | {"data": []} for name in OUTPUTS)
    label["shape"] = [num_rows]
    response = {"model_name": model, "model_version": version, "outputs": [label, probabilities]}
    before, between, _ = msgspec.json.encode(response).split(b'"data":[]')
    return before + b'"data":', between + b'"data":'


def _has_at_most(text: bytes, mark: bytes, most: int) -> bool:
    """Count no further than needed: one scan of the rest, where ``bytes.count`` costs 5 times as much."""
    place = -1
    while most >= 0 and (place := text.find(mark, place + 1)) >= 0:
        most -= 1
    return most >= 0


def server_metadata(version: str) -> dict[str, Any]:
    return {"name": "drydock", "version": version, "extensions": ["binary_tensor_data"]}


def outputs_of(signature: Signature) -> tuple[str, ...]:
    """Return the names of what a model answers."""
    if signature.number is None:
        return OUTPUTS
    return (signature.number.column, CONTINUATION) if signature.tells_next else (signature.number.column,)


def model_metadata(signature: Signature, version: str, digest_sha256: str) -> dict[str, Any]:
    text = signature.feature.holds in VOCABULARIES
    shape = [-1] if text else [-1, *signature.feature.shape]
    datatype = "BYTES" if text else "FP32"
    answers = [
        {"name": "label", "datatype": "BYTES", "shape": [-1]},
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, len(signature.classes)]},
    ]
    facts: dict[str, Any] = {"classes": list(signature.classes)}
    if (number := signature.number) is not None:
        answers = [{"name": number.column, "datatype": "FP32", "shape": [-1]}]
        facts = {"min": number.min, "max": number.max}
    if signature.tells_next:
        answers.append({"name": CONTINUATION, "datatype": "BYTES", "shape": [-1]})
        facts["max_new_tokens"] = MOST_NEW
    return {
        "name": signature.workload,
        "versions": [version],
        "platform": "onnx_onnxv1",
        "inputs": [{"name": name, "datatype": datatype, "shape": shape} for name in input_names(signature.feature)],
        "outputs": answers,
        "parameters": {"package_sha256": digest_sha256, "variant": signature.variant, **facts},
    }


def write_json(data: Any) -> bytes:
    return json.dumps(data, separators=(",", ":"), allow_nan=False).encode()


def _known(data: Any, what: str, fields: set[str]) -> None:
    if not isinstance(data, dict):
        raise BadRequest(f"{what} is {show(data)}, must be an object")
    if extra := sorted(set(data) - fields):
        raise BadRequest(f"{what} has field {show(extra[0])}, must be one of {', '.join(sorted(fields))}")


def _one_input(inputs: Any, name: str) -> dict[str, Any]:
    if not isinstance(inputs, list) or len(inputs) != 1:
        found = f"holds {len(inputs)}" if isinstance(inputs, list) else "is missing or no list"
        raise BadRequest(f"inputs {found}, must be a list of one tensor, {name!r}")
    if not isinstance(inputs[0], dict):
        raise BadRequest(f"input {name!r} is no object, must be a tensor")
    if inputs[0].get("name") != name:
        raise BadRequest(f"input name = {show(inputs[0].get('name'))}, must be {name!r}")
    return inputs[0]


def _inputs(inputs: Any, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the tensors in the order of the request, one of each name."""
    told = inputs if isinstance(inputs, list) and all(isinstance(tensor, dict) for tensor in inputs) else []
    if sorted(str(tensor.get("name")) for tensor in told) != sorted(names):
        raise BadRequest(f"inputs must be a list of {len(names)} tensors: {' and '.join(map(repr, names))}")
    return told


def _bytes_of_each(tensors: list[dict[str, Any]], binary: bytes) -> list[bytes]:
    """Cut what follows the JSON as the tensors say; what is left is the last one's, which has to be all of it."""
    parts = []
    for tensor in tensors[:-1]:
        size = _parameters(tensor, "the input").get("binary_data_size")
        cut = size if type(size) is int and 0 <= size <= len(binary) else 0
        parts.append(binary[:cut])
        binary = binary[cut:]
    return [*parts, binary]


def _data(tensor: dict[str, Any], binary: bytes) -> Any:
    """Return the JSON data of a tensor, or its bytes; all bytes of the body must belong to it."""
    name = tensor["name"]
    size = _parameters(tensor, f"input {name!r}").get("binary_data_size")
    if size is None:
        if binary:
            raise BadRequest(f"{len(binary)} bytes follow the JSON, but {name} has no binary_data_size")
        return tensor.get("data")
    if "data" in tensor:
        raise BadRequest(f"{name} has both data and binary_data_size, must have one")
    if type(size) is not int or size != len(binary):
        raise BadRequest(f"{name}.binary_data_size = {show(size)}, but {len(binary)} bytes follow the JSON")
    return binary


def _wanted(outputs: Any, default: bool, known: tuple[str, ...]) -> dict[str, bool]:
    """Return the outputs asked for, each with whether its data shall be binary; none named means all."""
    if outputs is None or outputs == []:
        return dict.fromkeys(known, default) if default or known is not OUTPUTS else ALL
    if not isinstance(outputs, list):
        raise BadRequest(f"outputs is {show(outputs)}, must be a list")
    wanted: dict[str, bool] = {}
    for output in outputs:
        _known(output, "an output", {"name", "parameters"})
        name = output.get("name")
        if name not in known or name in wanted:
            raise BadRequest(f"output name = {show(name)}, must be one of {', '.join(known)}, each once")
        wanted[name] = _flag(_parameters(output, f"output {name!r}"), "binary_data", default)
    return wanted


def _parameters(data: dict[str, Any], what: str) -> dict[str, Any]:
    parameters = data.get("parameters", {})
    if not isinstance(parameters, dict):
        raise BadRequest(f"parameters of {what} is {show(parameters)}, must be an object")
    return parameters


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise BadRequest(f"{name} = {show(value)}, must be true or false")
    return value


def _output(name: str, binary: bool, answer: Answer) -> tuple[dict[str, Any], bytes]:
    if name in ("label", CONTINUATION):
        texts = answer.labels if name == "label" else answer.continuations or []
        output = {"name": name, "datatype": "BYTES", "shape": [len(texts)]}
        data, raw = texts, write_bytes_tensor(texts) if binary else b""
    else:
        shape = answer.probabilities.shape if name == "probabilities" else [len(answer.labels)]
        output = {"name": name, "datatype": "FP32", "shape": list(shape)}
        data = [] if binary else answer.probabilities.ravel().tolist()
        raw = answer.probabilities.astype("<f4").tobytes() if binary else b""
    output |= {"parameters": {"binary_data_size": len(raw)}} if binary else {"data": data}
    return output, raw
