"""Ask the model beside this file. Needs onnxruntime and numpy (texts: tokenizers too), and nothing of Drydock.

    python run.py 'free prize now'                 one text
    python run.py '[[0, 3.5, 16, …]]'              rows of numbers as JSON
    echo '["a", "b"]' | python run.py              either, from standard input

Prints one JSON line a row: {"label", "probability"}. Every file is held against SHA256SUMS first; it exits 40 where
one differs, and 30 where the input is wrong.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(argument):
    verify()
    signature = json.loads((HERE / "signature.json").read_text())
    x = encode(signature["feature"], parse(argument))
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it would tell its maker about each use
    import onnxruntime

    session = onnxruntime.InferenceSession((HERE / "model.onnx").read_bytes(), providers=["CPUExecutionProvider"])
    for row in session.run(["probabilities"], {"input": x})[0]:
        best = int(row.argmax())
        print(json.dumps({"label": signature["classes"][best], "probability": round(float(row[best]), 6)}))  # noqa: T201


def verify():
    for line in (HERE / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ", 1)
        if hashlib.sha256((HERE / name).read_bytes()).hexdigest() != digest:
            fail(40, f"{name}: its digest is not the one in SHA256SUMS")


def parse(argument):
    try:
        found = json.loads(argument)
    except ValueError:
        return [argument]
    return found if isinstance(found, list) else [str(argument)]


def encode(feature, rows):
    import numpy

    if feature["kind"] == "text":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
        x = numpy.zeros((len(rows), feature["max_tokens"]), dtype=numpy.int64)
        for number, encoding in enumerate(tokenizer.encode_batch([str(row) for row in rows])):
            ids = encoding.ids[: feature["max_tokens"]]
            x[number, : len(ids)] = ids
        return x
    try:
        x = numpy.array(rows, dtype=numpy.float32).reshape(len(rows), -1)
    except (TypeError, ValueError):
        fail(30, "the input must be rows of numbers as JSON: [[1, 2.5, null]]")
    width = feature["height"] * feature["width"] if feature["kind"] == "image" else len(feature["columns"])
    if not len(x) or x.shape[1] != width:
        fail(30, f"found rows of {x.shape[1] if len(x) else 0} values, must be {width}")
    return x


def fail(code, message):
    print(f"error: {message}", file=sys.stderr)  # noqa: T201
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else sys.stdin.read())
