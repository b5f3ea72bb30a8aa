"""The application over a real package and a real socket: routes, limits, headers, queue, cache, drain and the log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from tasks.serve.app import App
from tasks.serve.batch import CHEAP_TURNS, LONE_SECONDS, Batcher
from tasks.serve.cache import ENTRY_BYTES, Cache
from tasks.serve.http import Connections
from tasks.serve.message import Limits
from tasks.serve.metrics import Metrics
from tasks.serve.package import open_package
from tasks.serve.predictions import LogRules, PredictionLog
from tasks.serve.protocol import Answer

pytestmark = pytest.mark.timeout(60)
PASSPORT = re.compile(r"[0-9a-f]{64}\.[0-9A-HJKMNP-TV-Z]{26}")
INFER = "/v2/models/digits/infer"


class Served:
    """An application on a socket of its own, in a thread with its own event loop, and a client that speaks to it."""

    def __init__(self, made, log=None, max_queue=8, cache_bytes=0, cheap=True, **limits) -> None:
        self.batcher = Batcher(open_package(made.folder, made.digest_sha256, made.keys), 64, max_queue, 1.0)
        self.batcher.cheap = cheap
        if not cheap:
            self.batcher._seconds_per_unit = 2 * LONE_SECONDS
        classes = self.batcher.package.signature.classes
        self.metrics = Metrics({"sha256": made.digest_sha256}, classes, lambda: self.batcher.depth)
        self.cache = Cache(made.digest_sha256, cache_bytes)
        self.app = App(self.batcher, "7", self.metrics, log, Limits(**limits), self.cache)
        self.connections = Connections(self.app, Limits(**limits))
        self.loop, self.ready = asyncio.new_event_loop(), threading.Event()
        threading.Thread(target=lambda: self.loop.run_until_complete(self._run()), daemon=True).start()
        assert self.ready.wait(10)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=20)

    async def _run(self) -> None:
        self.done = asyncio.Event()
        server = await self.loop.create_server(self.connections, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self.ready.set()
        while not self.done.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.done.wait(), 0.05)
            self.connections.tick()
        server.close()

    def close(self) -> None:
        self.client.close()
        self.loop.call_soon_threadsafe(self.done.set)
        self.batcher.close()

    def __call__(self, method: str, path: str, **arguments) -> httpx.Response:
        return self.client.request(method, path, **arguments)


@pytest.fixture
def serve():
    """``serve(made, ...)``: a ``Served``, closed at the end of the test."""
    with contextlib.ExitStack() as stack:

        def make(*arguments, **more) -> Served:
            served = Served(*arguments, **more)
            stack.callback(served.close)
            return served

        yield make


@pytest.fixture
def digits(digits_package):
    return digits_package()


def body(rows, **more):
    data = np.asarray(rows).ravel().tolist()
    tensor = {"name": "input", "shape": [len(rows), 64], "datatype": "FP32", "data": data}
    return {"inputs": [tensor]} | more


def test_metadata_and_health(digits, serve):
    served = serve(digits)
    assert served("GET", "/v2/health/live").json() == {"live": True}
    assert served("GET", "/v2/health/ready").json() == {"ready": True}
    assert served("GET", "/v2/models/digits/ready").json() == {"name": "digits", "ready": True}
    assert served("GET", "/v2").json()["extensions"] == ["binary_tensor_data"]
    metadata = served("GET", "/v2/models/digits").json()
    assert metadata == served("GET", "/v2/models/digits/versions/7").json()
    assert metadata["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 64]}]
    assert metadata["parameters"]["package_sha256"] == digits.digest_sha256


@pytest.mark.parametrize("path", ["/v2/models/digits/infer", "/v2/models/digits/versions/7/infer"])
def test_infer_answers_with_passport(digits, path, serve):
    response = serve(digits)("POST", path, json=body(digits.rows, id="q"))
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


def test_infer_in_binary(digits, serve):
    raw = np.asarray(digits.rows, "<f4").tobytes()
    tensor = {
        "name": "input",
        "shape": [3, 64],
        "datatype": "FP32",
        "parameters": {"binary_data_size": len(raw)},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    response = serve(digits)("POST", "/v2/models/digits/infer", content=head + raw, headers=headers)
    assert response.headers["content-type"] == "application/octet-stream"
    end = int(response.headers["inference-header-content-length"])
    size = json.loads(response.content[:end])["outputs"][1]["parameters"]["binary_data_size"]
    found = np.frombuffer(response.content[-size:], "<f4").reshape(3, 10)
    assert np.array_equal(found, open_package(digits.folder, None, None).predict(digits.rows))


def test_texts_and_tables(text_package, table_package, serve):
    made = text_package()
    tensor = {"name": "text", "shape": [2], "datatype": "BYTES", "data": made.rows}
    answer = serve(made)("POST", "/v2/models/text/infer", json={"inputs": [tensor]}).json()
    assert len(answer["outputs"][0]["data"]) == 2
    tensor["data"] = ["x" * 300, ""]
    response = serve(made)("POST", "/v2/models/text/infer", json={"inputs": [tensor]})
    assert (response.status_code, "300 characters" in response.json()["error"]) == (400, True)
    made = table_package()
    tensor = {"name": "input", "shape": [2, 3], "datatype": "FP32", "data": made.rows}
    assert serve(made)("POST", "/v2/models/table/infer", json={"inputs": [tensor]}).status_code == 200


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
def test_routes_that_are_not_there(digits, method, path, status, serve):
    response = serve(digits)(method, path)
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
def test_bad_requests_are_one_line_and_counted(digits, content, headers, serve):
    served = serve(digits)
    response = served("POST", "/v2/models/digits/infer", content=content, headers=headers)
    assert response.status_code == 400
    assert list(response.json()) == ["error"]
    assert b"\n" not in response.content
    assert b'drydock_requests_total{code="400"} 1.0' in served.metrics.text()


def test_body_limits(digits, serve):
    served = serve(digits, max_body_bytes=1000, body_seconds=0.2)

    def chunks(pause: float):
        for _ in range(30):
            time.sleep(pause)
            yield b" " * 100

    infer = "/v2/models/digits/infer"
    assert served("POST", infer, content=b" " * 1001).status_code == 413
    assert served("POST", infer, content=chunks(0)).status_code == 413
    assert served("POST", infer, content=chunks(0.05)).status_code == 408
    assert served("POST", infer, content=b"{}", headers={"content-encoding": "gzip"}).status_code == 415
    assert served("POST", infer, content=b" " * 1000).status_code == 400


def dear(served, seconds=0.1) -> Served:
    """Let each batch of a model take its time, in the thread."""
    answer = served.batcher.package.answer

    def slow(rows):
        time.sleep(seconds)
        return answer(rows)

    served.batcher.package.answer = slow
    return served


def at_once(served, num_requests, **arguments) -> list[httpx.Response]:
    url = f"http://127.0.0.1:{served.port}{INFER}"
    with ThreadPoolExecutor(num_requests) as pool:
        return list(pool.map(lambda _: httpx.post(url, timeout=20, **arguments), range(num_requests)))


def test_what_waits_for_a_cheap_model_is_bounded_too(digits, serve):
    batcher = serve(digits, max_queue=3, cheap=True).batcher
    batcher._queue.extend([(None, 1, 64)] * 3)
    assert not batcher.full, "they are answered at the end of this turn"
    batcher._queue.extend([(None, 1, 64)] * (3 * CHEAP_TURNS - 3))
    assert batcher.full
    batcher._queue.clear()


def test_a_full_queue_says_when_to_come_again(digits, serve):
    served = dear(serve(digits, max_queue=1, cheap=False, max_batch_rows=3), 0.5)
    responses = at_once(served, 12, json=body(digits.rows))
    refused = [response for response in responses if response.status_code == 503]
    assert {response.status_code for response in responses} == {200, 503}
    assert all(response.headers["retry-after"] == "1" for response in refused)
    assert served("POST", INFER, json=body(digits.rows)).status_code == 200
    assert b"drydock_queue_depth 0.0" in served.metrics.text()


def test_what_waits_for_a_dear_model_becomes_one_batch(digits, serve):
    served = serve(digits, max_queue=50, cheap=False)
    batcher, answer = served.batcher, served.batcher.package.answer

    def answer_once_all_are_there(rows):
        until = time.monotonic() + 20
        while batcher.depth < 20 and not sum(served.metrics.batch_rows.counts) and time.monotonic() < until:
            time.sleep(0.01)
        return answer(rows)

    batcher.package.answer = answer_once_all_are_there
    batcher._max_seconds = 60.0  # that first batch takes as long as the clients need
    responses = at_once(served, 20, json=body(digits.rows[:1]))
    assert {response.status_code for response in responses} == {200}
    assert sum(served.metrics.batch_rows.counts) <= 2  # of 20


def test_a_lone_request_is_answered_where_it_was_read_unless_that_takes_long(digits, serve):
    served = serve(digits, cheap=False)
    answer, threads = served.batcher.package.answer, []
    served.batcher.package.answer = lambda rows: threads.append(threading.current_thread().name) or answer(rows)
    for seconds in (2 * LONE_SECONDS, LONE_SECONDS / 2):
        served.batcher._seconds_per_unit = seconds
        assert served("POST", INFER, json=body(digits.rows[:1])).status_code == 200
    assert [name.startswith("model") for name in threads] == [True, False]


def test_an_answer_does_not_depend_on_its_neighbours(digits, serve):
    served = dear(serve(digits, max_queue=50, cheap=False))
    alone = [served("POST", INFER, json=body([row])).json()["outputs"] for row in digits.rows]
    wrong = [[17.0] * 64]
    url = f"http://127.0.0.1:{served.port}{INFER}"
    with ThreadPoolExecutor(12) as pool:
        ask = lambda rows: httpx.post(url, json=body(rows), timeout=20)  # noqa: E731
        found = list(pool.map(ask, [[row] for row in digits.rows * 3] + [wrong] * 3))
    for response, wanted in zip(found[:9], alone * 3, strict=True):
        label, probabilities = response.json()["outputs"]
        assert label == wanted[0]
        assert np.allclose(probabilities["data"], wanted[1]["data"], atol=1e-6)
    assert [response.status_code for response in found[9:]] == [400] * 3
    assert max(i for i, count in enumerate(served.metrics.batch_rows.counts) if count) > 1  # there was a batch


def test_only_the_culprit_of_a_failed_batch_fails(digits_package, serve):
    made = digits_package(change=fail_above_its_sum)
    served = serve(made, max_queue=50, cheap=False)
    answer = served.batcher.package.answer
    served.batcher.package.answer = lambda rows: (time.sleep(0.1), answer(rows))[1]
    good, bad = [[0.0] * 64], [[16.0] * 64]
    url = f"http://127.0.0.1:{served.port}{INFER}"
    with ThreadPoolExecutor(8) as pool:
        ask = lambda rows: httpx.post(url, json=body(rows), timeout=20)  # noqa: E731
        found = list(pool.map(ask, [good, good, bad, good, good, bad]))
    assert [response.status_code for response in found] == [200, 200, 500, 200, 200, 500]


def fail_above_its_sum(folder) -> None:
    """Let the graph answer NaN for bright images, and what it did for dark ones."""
    import onnx

    model = onnx.load_model(folder / "model.onnx")
    model.graph.node[-1].output[0] = "soft"
    arrays = {"axes": np.array([1], np.int64), "most": np.array(1000, np.float32)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    make = onnx.helper.make_node
    model.graph.node.extend(
        [
            make("ReduceSum", ["input", "axes"], ["sum"]),
            make("Sub", ["most", "sum"], ["room"]),
            make("Sqrt", ["room"], ["root"]),
            make("Sub", ["root", "root"], ["nothing"]),
            make("Add", ["soft", "nothing"], ["probabilities"]),
        ]
    )
    golden = json.loads((folder / "golden.json").read_text())
    package = open_package_of(model, folder)
    golden |= {"rows": [[0.0] * 64], "probabilities": package}
    (folder / "golden.json").write_text(json.dumps(golden))


def open_package_of(model, folder):
    import onnxruntime

    (folder / "model.onnx").write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"input": np.zeros((1, 64), np.float32)})[0].tolist()


def test_a_hit_of_the_cache_has_a_passport_of_its_own(digits, serve):
    served = serve(digits, cache_bytes=10_000)
    first, second = (served("POST", INFER, json=body(digits.rows)) for _ in range(2))
    assert first.json() == second.json()
    assert first.headers["x-drydock-passport"] != second.headers["x-drydock-passport"]
    assert b"drydock_cache_hits_total 1.0" in served.metrics.text()
    assert b"drydock_cache_misses_total 1.0" in served.metrics.text()
    assert served("POST", INFER, json=body([[17.0] * 64])).status_code == 400
    assert served("POST", INFER, json=body([[17.0] * 64])).status_code == 400


def test_the_cache_is_bounded_and_forgets_the_oldest():
    cache, answer = Cache("a", 3 * (ENTRY_BYTES + 40)), np.zeros((1, 10), np.float32)
    keys = [cache.key(np.full((1, 4), number)) for number in range(5)]
    for key in keys[:3]:
        cache.put(key, answer)
    assert cache.get(keys[0]) is not None
    cache.put(keys[3], answer)
    assert [cache.get(key) is not None for key in keys] == [True, False, True, True, False]
    assert cache.num_bytes <= 3 * (ENTRY_BYTES + 40)
    assert Cache("b", 9).key(["x"]) != cache.key(["x"])
    assert cache.key(["a", "b"]) != cache.key(["ab"])
    assert cache.key(np.zeros((1, 8), np.uint8)) != cache.key(np.zeros((1, 1), np.float64))


def test_draining_is_not_ready_but_answers_and_closes(digits, serve):
    served = serve(digits)
    served.app.draining = served.connections.draining = True
    assert served("GET", "/v2/health/ready").status_code == 503
    assert served("GET", "/v2/models/digits/ready").status_code == 503
    assert served("GET", "/v2/health/live").status_code == 200
    response = served("POST", "/v2/models/digits/infer", json=body(digits.rows))
    assert (response.status_code, response.headers["connection"]) == (200, "close")


def test_an_answer_that_is_no_probability_is_a_500_in_one_line(digits_package, serve):
    import onnx

    def change(folder) -> None:
        model = onnx.load_model(folder / "model.onnx")
        model.graph.node[-1].CopyFrom(onnx.helper.make_node("Sqrt", ["logits"], ["probabilities"]))
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    made = digits_package(change=change)
    response = serve(made)("POST", "/v2/models/digits/infer", json=body(made.rows))
    assert response.status_code == 500
    assert "nan" in response.json()["error"]


def test_metrics_count(digits, serve):
    served = serve(digits)
    served("POST", "/v2/models/digits/infer", json=body(digits.rows))
    text = served("GET", "/metrics").text
    assert 'drydock_requests_total{code="200"} 1.0' in text
    assert "drydock_rows_total 3.0" in text
    assert "drydock_request_seconds_count 1.0" in text
    assert f'drydock_package_info{{sha256="{digits.digest_sha256}"}} 1.0' in text


def test_predictions_are_logged_without_inputs(digits, tmp_path, serve):
    log = PredictionLog(tmp_path / "log", on_drop=pytest.fail)
    response = serve(digits, log)("POST", "/v2/models/digits/infer", json=body(digits.rows))
    log.close()
    (path,) = (tmp_path / "log").glob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["label"] for line in lines] == response.json()["outputs"][0]["data"]
    assert {line["passport"] for line in lines} == {response.headers["x-drydock-passport"]}
    assert [sorted(line) for line in lines] == [["at", "label", "passport", "probability", "row"]] * 3


def logged(folder) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def test_replays_are_marked_in_the_log(digits, serve, tmp_path):
    log = PredictionLog(tmp_path, on_drop=pytest.fail)
    served = serve(digits, log)
    served("POST", INFER, json=body(digits.rows[:1]), headers={"x-drydock-replayed": "1"})
    served("POST", INFER, json=body(digits.rows[:1]))
    log.close()
    assert [line.get("replayed") for line in logged(tmp_path)] == [True, None]


def test_the_log_takes_so_many_a_second_and_counts_the_others(tmp_path):
    dropped = []
    log = PredictionLog(tmp_path, lambda: dropped.append(1), LogRules(per_second=10))
    time.sleep(1.02 - time.time() % 1)  # all in one second of the clock
    for number in range(50):
        log.record(f"p{number}", ANSWER)
    log.close()
    assert [line["passport"] for line in logged(tmp_path)] == [f"p{number}" for number in range(10)]
    assert len(dropped) == 40


ANSWER = Answer(["3"], np.array([[0.25, 0.75]], np.float32))


def test_the_log_is_bounded(tmp_path):
    rules = LogRules(per_second=10_000, max_file_bytes=2000, max_files=3)
    log = PredictionLog(tmp_path, on_drop=pytest.fail, rules=rules)
    for number in range(200):
        log.record(f"p{number}", ANSWER)
        if number % 5 == 0:
            time.sleep(0.002)
    log.close()
    paths = sorted(tmp_path.glob("*.jsonl"))
    assert len(paths) <= 3
    assert '"p199"' in paths[-1].read_text()


def test_the_log_forgets_files_older_than_the_declared_days(tmp_path):
    for name, days in (("00A.jsonl", 31), ("00B.jsonl", 29)):
        (tmp_path / name).write_text("{}\n")
        os.utime(tmp_path / name, (time.time() - days * 86_400,) * 2)
    log = PredictionLog(tmp_path, on_drop=pytest.fail, rules=LogRules(days=30))
    log.record("p", ANSWER)
    log.close()
    assert sorted(path.name for path in tmp_path.glob("00*.jsonl")) == ["00B.jsonl"]


def test_a_log_that_cannot_write_drops_and_counts(tmp_path):
    dropped = []
    log = PredictionLog(tmp_path / "log", on_drop=lambda: dropped.append(1))
    (tmp_path / "log").rmdir()
    (tmp_path / "log").write_text("now a file")
    log.record("p", ANSWER)
    log.close()
    assert dropped == [1]


def test_answers_are_counted_by_class(digits, serve):
    served = serve(digits)
    found = served("POST", INFER, json=body(digits.rows)).json()["outputs"][0]["data"]
    text = served("GET", "/metrics").text
    for label in {*found, "0"}:
        assert f'drydock_answers_total{{label="{label}",replayed="false"}} {found.count(label)}.0' in text
        assert f'drydock_answers_total{{label="{label}",replayed="true"}} 0.0' in text
    assert 'drydock_batch_rows_bucket{le="4.0"} 1.0' in text


def test_texts_pad_to_the_longest_where_the_graph_takes_any_width(text_package):
    from tasks.spec.feature import TextFeature, encode

    package = open_package(text_package().folder, None, None)
    feature, tokenizer = TextFeature(kind="text", max_tokens=8), package.tokenizer
    assert encode(feature, ["a", "ab c"], tokenizer).shape == (2, 8)
    narrow = encode(feature, ["a", "free prize"], tokenizer, pad_to_longest=True)
    assert np.array_equal(narrow, encode(feature, ["a", "free prize"], tokenizer)[:, : narrow.shape[1]])
    assert narrow.shape[1] < 8
    assert encode(feature, [""], tokenizer, pad_to_longest=True).shape == (1, 1)
    assert encode(feature, ["word " * 50], tokenizer, pad_to_longest=True).shape == (1, 8)
