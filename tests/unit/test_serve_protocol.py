"""The inference protocol as pure functions: what is read, what is refused in one line, what goes back."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tasks.serve.passport import Ulids, encode_ulid
from tasks.serve.protocol import Answer, InferRequest, Reader, read_infer, write_infer
from tasks.serve.tensors import write_bytes_tensor
from tasks.spec.errors import BadRequest
from tasks.spec.feature import ImageFeature, TableFeature, TextFeature, check_texts, encode

pytestmark = pytest.mark.timeout(60)

IMAGE = ImageFeature(kind="image", height=2, width=2, max_value=16)
TABLE = TableFeature(kind="table", columns=("a", "b"))
TEXT = TextFeature(kind="text", max_tokens=8)
PIXELS = {"name": "input", "shape": [2, 4], "datatype": "FP32", "data": [0, 1, 2, 3, 4, 5, 6, 7]}
TEXTS = {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a", "é"]}


def read(data, feature=IMAGE, json_bytes=None, max_rows=4) -> InferRequest:
    """Read a request and hold its rows to the feature, as the server does before it asks the model."""
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    request = read_infer(body, json_bytes, feature, max_rows)
    rows = check_texts(feature, request.rows) if feature.kind == "text" else encode(feature, request.rows)
    return request._replace(rows=rows)


def one(tensor=PIXELS, **changes):
    return {"inputs": [tensor | changes]}


@pytest.mark.parametrize("datatype", ["FP32", "UINT8", "INT64"])
@pytest.mark.parametrize("data", [list(range(8)), [[0, 1, 2, 3], [4, 5, 6, 7]]])
def test_numbers_are_read_flat_or_nested(datatype, data):
    rows = read(one(datatype=datatype, data=data)).rows
    assert rows.dtype == np.float32
    assert rows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_images_may_come_as_height_and_width():
    assert read(one(shape=[2, 2, 2], data=[[[0, 1], [2, 3]], [[4, 5], [6, 7]]])).rows.shape == (2, 4)


def test_null_is_a_missing_number():
    rows = read(one(shape=[1, 2], data=[None, 1]), TABLE).rows
    assert np.isnan(rows[0, 0])
    assert rows[0, 1] == 1


def test_texts_are_read():
    assert read(one(TEXTS), TEXT).rows == ["a", "é"]


def test_id_and_outputs_are_kept():
    request = read(one() | {"id": "7", "outputs": [{"name": "label"}]})
    assert (request.id, request.outputs) == ("7", {"label": False})
    assert read(one()).outputs == {"label": False, "probabilities": False}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b"3",
        b"{",
        b"\xff",
        b'{"a":1}',
        b"{}",
        b"[" * 100_000,
        b'{"inputs":' + b"[" * 100_000,
        b'{"inputs":[],"inputs":[]}',
        b'{"inputs":[{"name":"input","shape":[1,4],"datatype":"FP32","data":[NaN,1,1,1]}]}',
        b'{"inputs":[{"name":"input","shape":[1,4],"datatype":"FP32","data":[1e400,1,1,1]}]}',
        b'{"inputs":[{"name":"input","shape":[1,4],"datatype":"FP32","data":[-Infinity,1,1,1]}]}',
        b'{"inputs":[{"name":"input","shape":[1,4],"datatype":"FP32","data":[' + b"9" * 5000 + b",1,1,1]}]}",
    ],
)
def test_what_is_no_request_is_refused_in_one_line(body):
    with pytest.raises(BadRequest) as caught:
        read(body)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "pixels"},
        {"extra": 1},
        {"datatype": "BYTES"},
        {"datatype": "FP64"},
        {"datatype": None},
        {"data": None},
        {"datatype": "UINT8", "data": [256] * 8},
        {"datatype": "UINT8", "data": [-1] * 8},
        {"datatype": "INT64", "data": [0.5] * 8},
        {"data": ["1"] * 8},
        {"data": [True] * 8},
        {"data": [[1, 2, 3], [4]]},
        {"data": [1] * 7},
        {"data": [{}] * 8},
        {"data": []},
        {"data": {}},
        {"data": "12345678"},
        {"data": [10**400] * 8},
        {"data": [1e39] * 8},
        {"data": [[0, 1, 2, 3, 4, 5, 6, 7]]},
        {"data": [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]},
        {"shape": [2, 5]},
        {"shape": [8]},
        {"shape": [-1, 4]},
        {"shape": [0, 4], "data": []},
        {"shape": [5, 4], "data": [0] * 20},
        {"shape": [2**62, 4]},
        {"shape": [2.0, 4]},
        {"shape": [True, 4]},
        {"shape": None},
        {"shape": []},
        {"shape": "2,4"},
        {"shape": [2] + [1] * 10_000},
        {"parameters": 3},
        {"parameters": {"binary_data_size": 32}},
    ],
)
def test_a_lying_tensor_is_refused(changes):
    with pytest.raises(BadRequest) as caught:
        read(one(**changes))
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "changes",
    [
        {"data": [1, 2]},
        {"data": ["a"]},
        {"data": "ab"},
        {"data": ["a", None]},
        {"data": ["a", "\ud800"]},
        {"data": [["a"], ["b"]]},
        {"shape": [2, 1]},
        {"shape": [0], "data": []},
        {"datatype": "FP32"},
    ],
)
def test_lying_texts_are_refused(changes):
    with pytest.raises(BadRequest):
        read(one(TEXTS, **changes), TEXT)


@pytest.mark.parametrize(
    "more",
    [
        {"id": 3},
        {"extra": 1},
        {"parameters": []},
        {"outputs": [{"name": "logits"}]},
        {"outputs": {}},
        {"outputs": [{"name": "label"}] * 2},
        {"outputs": [3]},
        {"parameters": {"binary_data_output": "yes"}},
        {"inputs": []},
        {"inputs": [PIXELS, PIXELS]},
        {"inputs": [3]},
        {"inputs": [[]]},
    ],
)
def test_a_wrong_envelope_is_refused(more):
    with pytest.raises(BadRequest):
        read(one() | more)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


@given(field=st.sampled_from(["name", "shape", "datatype", "parameters", "data"]), value=json_values)
def test_no_value_of_a_tensor_field_is_our_fault(field, value):
    for tensor, feature in ((PIXELS, IMAGE), (TEXTS, TEXT)):
        try:
            request = read(one(tensor, **{field: value}), feature)
        except BadRequest:
            continue
        assert len(request.rows) == 2


@given(st.binary(max_size=200), st.integers(0, 220) | st.none())
def test_no_bytes_are_our_fault(body, json_bytes):
    with pytest.raises(BadRequest):
        read(body, json_bytes=json_bytes)


def outcome(read_body, body: bytes) -> list:
    try:
        request = read_body(body)
    except BadRequest:
        return ["refused"]
    return [request.id, request.outputs, np.asarray(request.rows, np.float64).tolist()]


@settings(deadline=None)
@given(st.booleans(), st.integers(0, 140), st.integers(0, 6), st.text('[]{},:"0123456789.\\e-Nadti ', max_size=6))
def test_what_is_read_by_its_frame_is_read_as_ever(has_id, start, length, change):
    """Whatever a client changes in a body whose frame is known: the quick way and the careful one agree."""
    reader = Reader(IMAGE, 4)
    usual = json.dumps(({"id": "a-1"} if has_id else {}) | one()).encode()
    assert outcome(lambda body: reader(body, None), usual) == outcome(
        lambda body: read_infer(body, None, IMAGE, 4), usual
    )
    changed = usual[:start] + change.encode() + usual[start + length :]
    wanted = outcome(lambda body: read_infer(body, None, IMAGE, 4), changed)
    for _ in range(2):
        assert outcome(lambda body: reader(body, None), changed) == wanted


@pytest.mark.parametrize(
    "tensor",
    [
        '"parameters":{"data":[0,1,2,3]},"d\\u0061ta":[]',
        '"parameters":{"binary_data_size":4},"data":[0,1,2,3]',
        '"data":[[0,1],[2,3]]',
        '"data":[1,[2,3],[],4]',
        '"data":[0,1,2]',
        '"data":["]",1,2,3]',
        '"data":[1,2,3,4,null]',
        '"data":[1,2,3,4],"id":"b"',
    ],
)
def test_a_frame_hides_nothing(tensor):
    body = f'{{"inputs":[{{"name":"input","shape":[1,4],"datatype":"FP32",{tensor}}}]}}'.encode()
    reader, wanted = Reader(IMAGE, 4), outcome(lambda body: read_infer(body, None, IMAGE, 4), body)
    assert [outcome(lambda body: reader(body, None), body) for _ in range(3)] == [wanted] * 3


def test_each_request_of_a_known_frame_keeps_its_own_id():
    reader = Reader(IMAGE, 4)
    for number in ("a", "b-2", None, "c:3"):
        body = json.dumps(({"id": number} if number else {}) | one(), separators=(",", ":")).encode()
        assert reader(body, None).id == number
    assert len(reader._frames) == 1, "the id is no part of the frame"


def binary_request(tensor, raw: bytes) -> tuple[bytes, int]:
    plain = {name: value for name, value in tensor.items() if name != "data"}
    head = json.dumps(one(plain | {"parameters": {"binary_data_size": len(raw)}})).encode()
    return head + raw, len(head)


@given(hnp.arrays(np.float32, (2, 4), elements=st.floats(0, 16, width=32)))
def test_binary_numbers_equal_json_numbers(array):
    body, head = binary_request(PIXELS, array.astype("<f4").tobytes())
    assert np.array_equal(read(body, json_bytes=head).rows, read(one(data=array.ravel().tolist())).rows)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=2, max_size=2))
def test_binary_texts_equal_json_texts(texts):
    body, head = binary_request(TEXTS, write_bytes_tensor(texts))
    assert read(body, TEXT, head).rows == texts


@given(st.binary(max_size=40))
def test_no_binary_texts_are_our_fault(raw):
    body, head = binary_request(TEXTS, raw)
    try:
        assert len(read(body, TEXT, head).rows) == 2
    except BadRequest as error:
        assert "text" in str(error)  # noqa: PT017  (either outcome is right)


@pytest.mark.parametrize("raw", [b"", b"123", bytes(28), bytes(36), np.full(8, np.inf, "<f4").tobytes()])
def test_lying_binary_is_refused(raw):
    body, head = binary_request(PIXELS, raw)
    with pytest.raises(BadRequest):
        read(body, json_bytes=head)
    with pytest.raises(BadRequest):
        read(body, json_bytes=head - 1)
    with pytest.raises(BadRequest):
        read(body, json_bytes=10**6)


def test_an_answer_in_json_and_in_binary_is_the_same():
    answer = Answer(["3", "ü"], np.array([[0.25, 0.75], [0.5, 0.5]], np.float32))
    body, head = write_infer(InferRequest("i", None, {"label": False, "probabilities": False}), answer, "m", "7")
    response = json.loads(body)
    assert head is None
    assert (response["id"], response["model_name"], response["model_version"]) == ("i", "m", "7")
    assert [output["data"] for output in response["outputs"]] == [["3", "ü"], [0.25, 0.75, 0.5, 0.5]]
    body, head = write_infer(InferRequest(None, None, {"probabilities": True, "label": True}), answer, "m", "7")
    sizes = [output["parameters"]["binary_data_size"] for output in json.loads(body[:head])["outputs"]]
    assert np.frombuffer(body[head : head + sizes[0]], "<f4").tolist() == [0.25, 0.75, 0.5, 0.5]
    assert body[head + sizes[0] :] == struct.pack("<I", 1) + b"3" + struct.pack("<I", 2) + "ü".encode()
    assert "id" not in json.loads(body[:head])


def test_ulids_sort_as_they_were_made():
    make = Ulids()
    made = [make() for _ in range(5000)]
    assert made == sorted(set(made))
    assert all(len(ulid) == 26 for ulid in made)


def test_a_ulid_is_written_as_others_do():
    # What python-ulid 4.1 makes of the same number.
    assert encode_ulid(0x0123456789ABCDEF0123456789ABCDEF) == "014D2PF2DBSQQG28T5CY4TQKFF"
