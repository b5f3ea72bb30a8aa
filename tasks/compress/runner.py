"""Ask the model beside this file. Needs onnxruntime and numpy (texts: tokenizers too), and nothing of Drydock.

    python run.py 'free prize now'                 one text, or words to be tagged
    python run.py '[[0, 3.5, 16, …]]'              rows of numbers as JSON; or of a user and an item each
    echo '["a", "b"]' | python run.py              either, from standard input

Prints one JSON line a row: {"label", "probability"}; of words a tag for each, and what the least sure one has; where
the answer is a number {NAME: number}. Every file is held against SHA256SUMS first; it exits 40 where one differs, and
30 where the input is wrong.
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
    x, places = encode(signature["feature"], parse(argument))
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it would tell its maker about each use
    import onnxruntime

    # The fusion takes longer than what it fuses.
    session = onnxruntime.InferenceSession(
        (HERE / "model.onnx").read_bytes(),
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["SkipLayerNormFusion"],
    )
    for number, answer in enumerate(session.run(None, {"input": x})[0]):
        if signature["number"]:
            print(json.dumps({signature["number"]["column"]: round(float(answer[0]), 6)}))  # noqa: T201
            continue
        words = answer[:, places[number]].T if places else answer[None]
        label = " ".join(signature["classes"][int(word.argmax())] for word in words)
        probability = round(float(words.max(axis=1).min()), 6)
        print(json.dumps({"label": label, "probability": probability}))  # noqa: T201


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
    """Return the graph's input, and where it answers each word of each row, if words are asked."""
    import numpy

    if feature["kind"] in ("text", "tokens"):
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
        tagged, width = feature["kind"] == "tokens", feature["max_tokens"]
        asked = [str(row).split() if tagged else str(row) for row in rows]
        x = numpy.zeros((len(rows), width), dtype=numpy.int64)
        found = tokenizer.encode_batch(asked, is_pretokenized=tagged)
        for number, encoding in enumerate(found):
            ids = encoding.ids[:width]
            x[number, : len(ids)] = ids
        return x, [first_pieces(*pair, width) for pair in zip(asked, found)] if tagged else None  # noqa: B905
    if feature["kind"] == "ids":
        known = json.loads((HERE / "ids.json").read_text(encoding="utf-8"))
        if not rows or not all(isinstance(row, list) and len(row) == len(known) for row in rows):
            fail(30, "the input must be rows of a user and an item as JSON: [[7, 31]]")
        codes = [{name: code for code, name in enumerate(column, start=1)} for column in known]
        return numpy.array([[c.get(str(v), 0) for c, v in zip(codes, row)] for row in rows], numpy.int64), None  # noqa: B905
    try:
        x = numpy.array(rows, dtype=numpy.float32).reshape(len(rows), -1)
    except (TypeError, ValueError):
        fail(30, "the input must be rows of numbers as JSON: [[1, 2.5, null]]")
    width = feature["height"] * feature["width"] if feature["kind"] == "image" else len(feature["columns"])
    if not len(x) or x.shape[1] != width:
        fail(30, f"found rows of {x.shape[1] if len(x) else 0} values, must be {width}")
    return x, None


def first_pieces(words, encoding, width):
    pieces = encoding.word_ids[:width]
    if not words or set(range(len(words))) - set(pieces):
        fail(30, f"the input must be words of at most {width} pieces in all, each with a letter or sign of its own")
    return [pieces.index(word) for word in range(len(words))]


def fail(code, message):
    print(f"error: {message}", file=sys.stderr)  # noqa: T201
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else sys.stdin.read())
