"""The ASGI application over a real package: routes, limits, headers, queue, drain and the prediction log."""

from __future__ import annotations

import asyncio
import json
import re
import time

import httpx
import numpy as np
import pytest

from tasks.serve.app import App, Limits
from tasks.serve.metrics import Metrics
from tasks.serve.model import Model
from tasks.serve.package import open_package
from tasks.serve.predictions import PredictionLog
from tasks.serve.protocol import Answer

pytestmark = pytest.mark.timeout(60)
PASSPORT = re.compile(r"[0-9a-f]{64}\.[0-9A-HJKMNP-TV-Z]{26}")


class Served:
    """An application and a client that speaks to it without a socket."""

    def __init__(self, made, log=None, max_queue=8, **limits) -> None:
        self.model = Model(open_package(made.folder, made.digest_sha256, made.keys), max_queue)
        self.metrics = Metrics({"sha256": made.digest_sha256}, lambda: self.model.queued)
        self.app = App(self.model, "7", self.metrics, log, Limits(**limits))

    def __call__(self, method: str, path: str, **arguments) -> httpx.Response:
        return asyncio.run(self.ask((method, path, arguments)))[0]

    async def ask(self, *requests) -> list[httpx.Response]:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await asyncio.gather(*(client.request(m, p, **arguments) for m, p, arguments in requests))


@pytest.fixture
def digits(digits_package):
    return digits_package()


def body(rows, **more):
    data = np.asarray(rows).ravel().tolist()
    tensor = {"name": "input", "shape": [len(rows), 64], "datatype": "FP32", "data": data}
    return {"inputs": [tensor]} | more


def test_metadata_and_health(digits):
    served = Served(digits)
    assert served("GET", "/v2/health/live").json() == {"live": True}
    assert served("GET", "/v2/health/ready").json() == {"ready": True}
    assert served("GET", "/v2/models/digits/ready").json() == {"name": "digits", "ready": True}
    assert served("GET", "/v2").json()["extensions"] == ["binary_tensor_data"]
    metadata = served("GET", "/v2/models/digits").json()
    assert metadata == served("GET", "/v2/models/digits/versions/7").json()
    assert metadata["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 64]}]
    assert metadata["parameters"]["package_sha256"] == digits.digest_sha256


@pytest.mark.parametrize("path", ["/v2/models/digits/infer", "/v2/models/digits/versions/7/infer"])
def test_infer_answers_with_passport(digits, path):
    response = Served(digits)("POST", path, json=body(digits.rows, id="q"))
    assert response.status_code == 200
    answer = response.json()
    label, probabilities = answer["outputs"]
    assert answer["id"] == "q"
    assert probabilities["shape"] == [3, 10]
    wanted = open_package(digits.folder, None, None).predict(digits.rows)
    assert np.allclose(probabilities["data"], wanted.ravel())
    assert label["data"] == [str(k) for k in wanted.argmax(axis=1)]
    assert PASSPORT.fullmatch(response.headers["x-drydock-passport"])
    assert response.headers["x-drydock-passport"].startswith(digits.digest_sha256)
    assert response.headers["x-drydock-version"] == "7"


def test_infer_in_binary(digits):
    raw = np.asarray(digits.rows, "<f4").tobytes()
    tensor = {
        "name": "input",
        "shape": [3, 64],
        "datatype": "FP32",
        "parameters": {"binary_data_size": len(raw)},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    response = Served(digits)("POST", "/v2/models/digits/infer", content=head + raw, headers=headers)
    assert response.headers["content-type"] == "application/octet-stream"
    end = int(response.headers["inference-header-content-length"])
    size = json.loads(response.content[:end])["outputs"][1]["parameters"]["binary_data_size"]
    found = np.frombuffer(response.content[-size:], "<f4").reshape(3, 10)
    assert np.array_equal(found, open_package(digits.folder, None, None).predict(digits.rows))


def test_texts_and_tables(text_package, table_package):
    made = text_package()
    tensor = {"name": "text", "shape": [2], "datatype": "BYTES", "data": made.rows}
    answer = Served(made)("POST", "/v2/models/text/infer", json={"inputs": [tensor]}).json()
    assert len(answer["outputs"][0]["data"]) == 2
    tensor["data"] = ["x" * 300, ""]
    response = Served(made)("POST", "/v2/models/text/infer", json={"inputs": [tensor]})
    assert (response.status_code, "300 characters" in response.json()["error"]) == (400, True)
    made = table_package()
    tensor = {"name": "input", "shape": [2, 3], "datatype": "FP32", "data": made.rows}
    assert Served(made)("POST", "/v2/models/table/infer", json={"inputs": [tensor]}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v2/", 404),
        ("GET", "//v2", 404),
        ("GET", "/v2/models/fraud", 404),
        ("POST", "/v2/models/fraud/infer", 404),
        ("POST", "/v2/models/digits/versions/8/infer", 404),
        ("GET", "/v2/models/digits/infer", 405),
        ("POST", "/v2/health/live", 405),
        ("PUT", "/v2", 405),
        ("PATCH", "/v2", 405),
        ("DELETE", "/v2/models/digits", 405),
        ("POST", "/v2/models/digits/infer%00", 404),
    ],
)
def test_routes_that_are_not_there(digits, method, path, status):
    response = Served(digits)(method, path)
    assert response.status_code == status
    assert list(response.json()) == ["error"]
    assert (status == 405) == ("allow" in response.headers)


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"", {}),
        (b"[" * 100_000, {}),
        (b"null", {}),
        (b"{}", {"Inference-Header-Content-Length": "-1"}),
        (b"{}", {"Inference-Header-Content-Length": "9" * 5000}),
        (json.dumps(body([[17.0] * 64])).encode(), {}),
        (json.dumps(body([[None] * 64])).encode(), {}),
        (json.dumps(body([[0.0] * 64] * 65)).encode(), {}),
    ],
)
def test_bad_requests_are_one_line_and_counted(digits, content, headers):
    served = Served(digits)
    response = served("POST", "/v2/models/digits/infer", content=content, headers=headers)
    assert response.status_code == 400
    assert list(response.json()) == ["error"]
    assert b"\n" not in response.content
    assert b'drydock_requests_total{code="400"} 1.0' in served.metrics.text()


def test_body_limits(digits):
    served = Served(digits, max_body_bytes=1000, body_seconds=0.2)

    async def chunks(pause: float):
        for _ in range(30):
            await asyncio.sleep(pause)
            yield b" " * 100

    infer = "/v2/models/digits/infer"
    assert served("POST", infer, content=b" " * 1001).status_code == 413
    assert served("POST", infer, content=chunks(0)).status_code == 413
    assert served("POST", infer, content=chunks(0.05)).status_code == 408
    assert served("POST", infer, content=b"{}", headers={"content-encoding": "gzip"}).status_code == 415
    assert served("POST", infer, content=b" " * 1000).status_code == 400


def test_a_full_queue_says_when_to_come_again(digits):
    served = Served(digits, max_queue=1)
    request = ("POST", "/v2/models/digits/infer", {"json": body(digits.rows)})
    responses = asyncio.run(served.ask(*[request] * 40))
    refused = [response for response in responses if response.status_code == 503]
    assert {response.status_code for response in responses} == {200, 503}
    assert all(response.headers["retry-after"] == "1" for response in refused)
    assert served("POST", *request[1:2], **request[2]).status_code == 200
    assert b"drydock_queue_depth 0.0" in served.metrics.text()


def test_draining_is_not_ready_but_answers_and_closes(digits):
    served = Served(digits)
    served.app.draining = True
    assert served("GET", "/v2/health/ready").status_code == 503
    assert served("GET", "/v2/models/digits/ready").status_code == 503
    assert served("GET", "/v2/health/live").status_code == 200
    response = served("POST", "/v2/models/digits/infer", json=body(digits.rows))
    assert (response.status_code, response.headers["connection"]) == (200, "close")


def test_an_answer_that_is_no_probability_is_a_500_in_one_line(digits_package):
    import onnx

    def change(folder) -> None:
        model = onnx.load_model(folder / "model.onnx")
        model.graph.node[-1].CopyFrom(onnx.helper.make_node("Sqrt", ["logits"], ["probabilities"]))
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    made = digits_package(change=change)
    response = Served(made)("POST", "/v2/models/digits/infer", json=body(made.rows))
    assert response.status_code == 500
    assert "nan" in response.json()["error"]


def test_metrics_count(digits):
    served = Served(digits)
    served("POST", "/v2/models/digits/infer", json=body(digits.rows))
    text = served("GET", "/metrics").text
    assert 'drydock_requests_total{code="200"} 1.0' in text
    assert "drydock_rows_total 3.0" in text
    assert "drydock_request_seconds_count 1.0" in text
    assert f'drydock_package_info{{sha256="{digits.digest_sha256}"}} 1.0' in text


def test_predictions_are_logged_without_inputs(digits, tmp_path):
    log = PredictionLog(tmp_path / "log", on_drop=pytest.fail)
    response = Served(digits, log)("POST", "/v2/models/digits/infer", json=body(digits.rows))
    log.close()
    (path,) = (tmp_path / "log").glob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["label"] for line in lines] == response.json()["outputs"][0]["data"]
    assert {line["passport"] for line in lines} == {response.headers["x-drydock-passport"]}
    assert [sorted(line) for line in lines] == [["at", "label", "passport", "probability", "row"]] * 3


def test_the_log_is_bounded(tmp_path):
    log = PredictionLog(tmp_path, on_drop=pytest.fail, max_file_bytes=2000, max_files=3)
    answer = Answer(["3"], np.array([[0.25, 0.75]], np.float32))
    for number in range(200):
        log.record(f"p{number}", answer)
        if number % 5 == 0:
            time.sleep(0.002)
    log.close()
    paths = sorted(tmp_path.glob("*.jsonl"))
    assert len(paths) <= 3
    assert '"p199"' in paths[-1].read_text()


def test_a_log_that_cannot_write_drops_and_counts(tmp_path):
    dropped = []
    log = PredictionLog(tmp_path / "log", on_drop=lambda: dropped.append(1))
    (tmp_path / "log").rmdir()
    (tmp_path / "log").write_text("now a file")
    log.record("p", Answer(["3"], np.array([[0.25, 0.75]], np.float32)))
    log.close()
    assert dropped == [1]
