"""The model package: what opens, what is refused, and what never leaves."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.serve.onnx_file import refuse_external_data
from tasks.serve.package import Package, open_package
from tasks.serve.signature import Golden, Signature
from tasks.spec.errors import BadRequest, DrydockError, IntegrityLost
from tasks.store.manifest import write_manifest
from tasks.store.sign import make_key, sign_folder

pytestmark = pytest.mark.timeout(60)
ROOT = Path(__file__).parents[2]


def opened(made) -> Package:
    return open_package(made.folder, made.digest_sha256, made.keys)


def test_image_package_answers_its_golden_rows(digits_package):
    made = digits_package()
    package = opened(made)
    package.check_golden()
    probabilities = package.predict(made.rows)
    assert probabilities.shape == (3, 10)
    assert probabilities.dtype == np.float32
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert np.array_equal(probabilities, package.predict(np.asarray(made.rows).reshape(3, 8, 8)))


def test_table_package_fills_what_is_missing(table_package):
    made = table_package()
    package = opened(made)
    package.check_golden()
    assert np.array_equal(package.predict([[float("nan"), 0.5, -2.0]]), package.predict([[None, 0.5, -2.0]]))


def test_text_package_answers_texts(text_package):
    made = text_package()
    package = opened(made)
    package.check_golden()
    assert package.predict(["free prize now", "a longer text than eight tokens can ever hold, so cut"]).shape == (2, 2)
    with pytest.raises(BadRequest, match="201 characters"):
        package.predict(["x" * 201])


def test_a_candidate_opens_without_keys(digits_package):
    made = digits_package()
    (made.folder / "manifest.sig").unlink()
    assert open_package(made.folder, made.digest_sha256, None).digest_sha256 == made.digest_sha256
    with pytest.raises(IntegrityLost, match=r"manifest\.sig"):
        opened(made)


@pytest.mark.parametrize("name", ["model.onnx", "signature.json", "golden.json", "manifest.json"])
def test_a_flipped_byte_is_refused(digits_package, name):
    made = digits_package()
    content = bytearray((made.folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (made.folder / name).write_bytes(content)
    with pytest.raises(IntegrityLost):
        opened(made)


def test_every_byte_of_the_model_counts(digits_package):
    made = digits_package()
    whole = (made.folder / "model.onnx").read_bytes()
    for offset in np.random.default_rng(0).integers(0, len(whole), 50):
        content = bytearray(whole)
        content[offset] ^= 0x10
        (made.folder / "model.onnx").write_bytes(content)
        with pytest.raises(IntegrityLost):
            opened(made)


def test_another_package_of_the_same_signer_is_refused(digits_package):
    made, other = digits_package("a", seed=0), digits_package("b", seed=1)
    with pytest.raises(IntegrityLost, match=f"must be {other.digest_sha256[:12]}"):
        open_package(made.folder, other.digest_sha256, made.keys)


def test_another_signer_is_refused(digits_package, keys, tmp_path):
    make_key(tmp_path / "other")
    made = digits_package(signer=tmp_path / "other")
    with pytest.raises(IntegrityLost, match="signature does not verify"):
        open_package(made.folder, made.digest_sha256, keys)


def test_keys_without_a_public_half_are_a_bad_request(digits_package, tmp_path):
    with pytest.raises(BadRequest, match=r"signing\.pub"):
        open_package(digits_package().folder, None, tmp_path)


def test_links_and_extra_files_are_refused(digits_package, tmp_path):
    made = digits_package()
    (tmp_path / "elsewhere").write_bytes((made.folder / "model.onnx").read_bytes())
    (made.folder / "model.onnx").unlink()
    os.symlink(tmp_path / "elsewhere", made.folder / "model.onnx")
    with pytest.raises(IntegrityLost, match="not a plain file"):
        opened(made)
    other = digits_package("other")
    (other.folder / "note.txt").write_text("hello")
    with pytest.raises(IntegrityLost, match=r"note\.txt"):
        opened(other)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda f: (f / "golden.json").rename(f / "golden2.json"), r"golden2\.json is not in its manifest"),
        (lambda f: (f / "golden.json").unlink(), r"golden\.json is missing"),
        (lambda f: (f / "model.onnx").rename(f / "signature.json"), "has digest another size|is missing"),
        (lambda f: (f / "old").mkdir() or os.mkfifo(f / "old" / "pipe"), "not a plain file"),
    ],
    ids=["renamed", "missing", "one for another", "special"],
)
def test_a_file_that_was_moved_after_signing_is_refused(digits_package, harm, told):
    made = digits_package()
    harm(made.folder)
    with pytest.raises(IntegrityLost, match=told):
        opened(made)


def test_an_older_version_is_refused_where_this_one_is_expected_and_opens_where_it_is_named(digits_package):
    older, newer = digits_package("older", seed=0), digits_package("newer", seed=1)
    with pytest.raises(IntegrityLost, match=f"its digest is {older.digest_sha256[:12]}, must be"):
        open_package(older.folder, newer.digest_sha256, older.keys)
    assert open_package(older.folder, older.digest_sha256, older.keys).digest_sha256 == older.digest_sha256


@pytest.mark.parametrize(
    "name", ["model.pkl", "weights.pt", "model.joblib", "model.onnx.data", "sub/model.onnx", "tokenizer.json"]
)
def test_other_formats_are_refused_though_listed_and_signed(digits_package, name):
    def add(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")

    with pytest.raises(BadRequest, match="is not part of a model package"):
        opened(digits_package(change=add))


@pytest.mark.parametrize("name", ["model.onnx", "signature.json", "golden.json"])
def test_a_missing_file_is_named(digits_package, name):
    with pytest.raises(BadRequest, match=f"{name} is missing"):
        opened(digits_package(change=lambda folder: (folder / name).unlink()))


@pytest.mark.parametrize("content", [b"", b"\x80\x04cos\nsystem", b"{}" * 50, b"PK\x03\x04" + bytes(60)])
def test_a_model_that_is_no_onnx_is_refused(digits_package, content):
    made = digits_package(change=lambda folder: (folder / "model.onnx").write_bytes(content))
    with pytest.raises(BadRequest, match=r"model\.onnx"):
        opened(made)


@pytest.mark.parametrize("place", ["initializer", "attribute", "subgraph", "sparse"])
@pytest.mark.parametrize("location", ["golden.json", "../secret", "/etc/hostname", "*/_ORT_MEM_ADDR_/*"])
def test_data_outside_the_model_file_is_refused(digits_package, place, location):
    made = digits_package(change=lambda folder: _move_out(folder / "model.onnx", place, location))
    with pytest.raises(BadRequest, match="data lies elsewhere"):
        opened(made)


def _move_out(path: Path, place: str, location: str) -> None:
    model = onnx.load_model(path)
    tensor = onnx.TensorProto(name="out", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    node = model.graph.node.add(op_type="Constant", output=["unused"])
    if place == "initializer":
        model.graph.initializer.append(tensor)
    elif place == "sparse":
        model.graph.sparse_initializer.add().values.CopyFrom(tensor)
    elif place == "attribute":
        node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
    else:
        node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g.initializer.append(tensor)
    path.write_bytes(model.SerializeToString())


@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(content):
    with contextlib.suppress(BadRequest):
        refuse_external_data(content, "model.onnx")


def test_deep_nesting_does_not_exhaust_the_stack():
    graph = b""
    for _ in range(3000):  # graph in attribute in node in graph
        for number in (6, 5, 1):
            graph = bytes([number << 3 | 2]) + _varint(len(graph)) + graph
    refuse_external_data(b"\x3a" + _varint(len(graph)) + graph, "model.onnx")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _replace_graph(path: Path, op_type: str, **attributes) -> None:
    """Let another operator make the answer, from the logits."""
    model = onnx.load_model(path)
    model.graph.node[-1].CopyFrom(onnx.helper.make_node(op_type, ["logits"], ["probabilities"], **attributes))
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("op_type", ["Exp", "Log"])
def test_an_answer_that_is_no_probability_never_leaves(digits_package, op_type):
    made = digits_package(change=lambda folder: _replace_graph(folder / "model.onnx", op_type))
    package = opened(made)
    with pytest.raises(DrydockError, match="must be 0 to 1"):
        package.predict(made.rows)


def test_a_wrong_golden_answer_is_refused(digits_package):
    def change(folder: Path) -> None:
        golden = json.loads((folder / "golden.json").read_text())
        golden["probabilities"][0] = golden["probabilities"][0][::-1]
        (folder / "golden.json").write_text(json.dumps(golden))

    with pytest.raises(IntegrityLost, match="golden answer differs"):
        opened(digits_package(change=change)).check_golden()


def test_a_graph_that_differs_from_its_signature_is_refused(digits_package, table_package):
    other = (table_package().folder / "model.onnx").read_bytes()
    made = digits_package(change=lambda folder: (folder / "model.onnx").write_bytes(other))
    with pytest.raises(BadRequest, match="its input is"):
        opened(made)


@pytest.mark.parametrize("rows", [[], "text", [[1.0] * 63], [["a"] * 64], [[17.0] * 64], [[float("nan")] * 64]])
def test_wrong_rows_are_a_bad_request(digits_package, rows):
    with pytest.raises(BadRequest):
        opened(digits_package()).predict(rows)


def test_signature_refuses_contradictions(digits_package):
    papers = json.loads((digits_package().folder / "signature.json").read_text())
    for change in (
        {"classes": ["a"]},
        {"format": 2},
        {"extra": 1},
        {"graph_input": papers["graph_input"] | {"shape": [-1, 63]}},
        {"graph_output": papers["graph_output"] | {"name": "logits"}},
    ):
        with pytest.raises(BadRequest, match=r"signature\.json"):
            Signature.parse(papers | change, "signature.json")


def test_golden_keeps_missing_numbers_as_null():
    golden = Golden(rows=[[float("nan"), 1.0]], probabilities=[[0.5, 0.5]])
    assert golden.rows == ((None, 1.0),)
    assert Golden.parse(golden.model_dump(mode="json"), "golden.json") == golden


def test_a_signed_package_stays_openable_after_it_is_signed_again(digits_package):
    made = digits_package()
    assert write_manifest(made.folder) == made.digest_sha256
    sign_folder(made.folder, made.keys)
    opened(made).check_golden()


def test_no_library_tells_its_maker(tmp_path):
    """ONNX Runtime would open a database under the user's cache at its import, and send from it."""
    code = (
        "import tasks.serve.package, onnxruntime, os; print(*sorted(n for n in os.environ if n.endswith('TELEMETRY')))"
    )
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["MLFLOW_DISABLE_TELEMETRY", "ORT_DISABLE_TELEMETRY"]
    assert list(tmp_path.rglob("*")) == []
