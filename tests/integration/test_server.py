"""The server as a process: started, asked over HTTP, drained under load, and refusing packages."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tasks.store.sign import make_key

pytestmark = pytest.mark.timeout(90)
START_SECONDS = 30
INFER = "/v2/models/digits/infer"


def command(made, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "tasks.serve", "--package", str(made.folder), "--digest", made.digest_sha256,
        "--keys", str(made.keys), "--port", "0", *more,
    ]  # fmt: skip


class Running:
    def __init__(self, process: subprocess.Popen, line: str) -> None:
        self.process, self.line = process, line
        self.url = line.split()[-1]
        self.client = httpx.Client(base_url=self.url, timeout=20)

    def infer(self, rows) -> httpx.Response:
        return self.client.post(INFER, json=body(rows))


@contextlib.contextmanager
def running(made, *more: str) -> Iterator[Running]:
    process = subprocess.Popen(command(made, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        readable, _, _ = select.select([process.stdout], [], [], START_SECONDS)
        line = process.stdout.readline() if readable else ""
        assert line, f"the server did not start: {process.stderr.read() if process.poll() else 'no line'}"
        server = Running(process, line)
        yield server
        server.client.close()
    finally:
        process.kill()
        process.communicate()


def body(rows) -> dict:
    data = np.asarray(rows).ravel().tolist()
    return {"inputs": [{"name": "input", "shape": [len(rows), 64], "datatype": "FP32", "data": data}]}


def refused(made, *more: str) -> tuple[int, str]:
    done = subprocess.run(command(made, *more), capture_output=True, text=True, timeout=START_SECONDS)
    assert done.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    return done.returncode, done.stderr


def test_a_package_is_served(digits_package, tmp_path):
    made = digits_package()
    with running(made, "--version", "7", "--log-folder", str(tmp_path / "log")) as server:
        assert server.line.startswith("serving digits version 7 on http://127.0.0.1:")
        assert server.client.get("/v2/health/ready").json() == {"ready": True}
        response = server.infer(made.rows)
        assert response.status_code == 200
        golden = json.loads((made.folder / "golden.json").read_text())["probabilities"]
        assert np.allclose(response.json()["outputs"][1]["data"], np.ravel(golden), atol=1e-5)
        assert server.client.get("/v2/models/fraud").status_code == 404
        assert f'sha256="{made.digest_sha256}"' in server.client.get("/metrics").text
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        assert server.process.stderr.read() == ""
    (log,) = (tmp_path / "log").glob("*.jsonl")
    assert json.loads(log.read_text().splitlines()[0])["passport"] == response.headers["x-drydock-passport"]


def test_hostile_clients_do_no_harm(digits_package):
    made = digits_package()
    with running(made, "--max-body-bytes", "100000") as server:
        for content, status in (
            (b"x" * 100_001, 413),
            (b"x" * 20_000_000, 413),
            (iter([b"x" * 65536] * 50), 413),
            (b"[" * 100_000, 400),
            (b'{"inputs":[],"inputs":[]}', 400),
        ):
            assert server.client.post(INFER, content=content).status_code == status
        for raw in (
            b"GARBAGE\r\n\r\n",
            b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            b"\0" * 99,
        ):
            assert _raw(server.url, raw).startswith(b"HTTP/1.1 400"), raw
        with connected(server.url) as early:
            early.sendall(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\nhalf" % INFER.encode())
        assert server.infer(made.rows).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        assert "Traceback" not in server.process.stderr.read()


def connected(url: str) -> socket.socket:
    address = httpx.URL(url)
    return socket.create_connection((address.host, address.port), timeout=10)


def _raw(url: str, content: bytes) -> bytes:
    with connected(url) as sock:
        sock.sendall(content)
        return sock.recv(4096)


class Caller(threading.Thread):
    """Calls as a gateway does: keeps its connection while it may, and stops where the server is not ready."""

    def __init__(self, url: str, rows) -> None:
        super().__init__(daemon=True)
        self.url, self.content = url, json.dumps(body(rows)).encode()
        self.answered, self.wrong = 0, []

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=20) as client:
            while True:
                try:
                    response = client.post(INFER, content=self.content)
                except httpx.HTTPError as error:
                    self.wrong.append(repr(error))
                    return
                if response.status_code != 200:
                    self.wrong.append(response.text)
                    return
                self.answered += 1
                if response.headers.get("connection") == "close":
                    return


def test_a_drain_under_load_fails_no_request(digits_package):
    made = digits_package()
    with running(made, "--drain-seconds", "0.7") as server:
        callers = [Caller(server.url, made.rows * size) for size in (1, 1, 5, 20)]
        for caller in callers:
            caller.start()
        time.sleep(1)
        told_at = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert httpx.get(f"{server.url}/v2/health/ready").status_code == 503
        assert httpx.post(f"{server.url}{INFER}", json=body(made.rows)).status_code == 200
        for caller in callers:
            caller.join(10)
        assert server.process.wait(10) == 0
        assert time.monotonic() - told_at < 10
        assert [caller.wrong for caller in callers] == [[]] * 4
        assert all(caller.answered > 3 for caller in callers)


def test_a_request_in_flight_is_answered_though_its_body_comes_after_sigterm(digits_package):
    made = digits_package()
    content = json.dumps(body(made.rows)).encode()
    with running(made, "--drain-seconds", "0.2") as server:
        with connected(server.url) as sock:
            head = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (
                INFER.encode(),
                len(content),
            )
            sock.sendall(head + content[:10])
            time.sleep(0.2)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.6)
            sock.sendall(content[10:])
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        assert server.process.wait(10) == 0


def test_a_client_that_never_ends_does_not_hold_the_drain(digits_package):
    with running(digits_package(), "--drain-seconds", "0.2") as server, connected(server.url) as sock:
        sock.sendall(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\nhalf" % INFER.encode())
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(15) == 0


def _flip(made, _tmp_path: Path) -> None:
    content = bytearray((made.folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (made.folder / "model.onnx").write_bytes(content)


def _add(made, _tmp_path: Path) -> None:
    (made.folder / "extra.pkl").write_bytes(b"cos\nsystem\n.")


def _link(made, tmp_path: Path) -> None:
    (made.folder / "model.onnx").rename(tmp_path / "elsewhere.onnx")
    os.symlink(tmp_path / "elsewhere.onnx", made.folder / "model.onnx")


def _unsign(made, _tmp_path: Path) -> None:
    (made.folder / "manifest.sig").unlink()


@pytest.mark.parametrize("harm", [_flip, _add, _link, _unsign])
def test_a_harmed_package_is_refused(digits_package, tmp_path, harm):
    made = digits_package()
    harm(made, tmp_path)
    assert refused(made)[0] == 40


def test_another_signer_and_another_package_are_refused(digits_package, tmp_path):
    made, other = digits_package("one", seed=1), digits_package("two", seed=2)
    code, line = refused(made._replace(digest_sha256=other.digest_sha256))
    assert (code, other.digest_sha256[:12] in line) == (40, True)
    make_key(tmp_path / "stranger")
    assert refused(digits_package("three", signer=tmp_path / "stranger")._replace(keys=made.keys))[0] == 40


def test_a_wrong_golden_answer_is_refused(digits_package):
    def change(folder: Path) -> None:
        golden = json.loads((folder / "golden.json").read_text())
        golden["probabilities"].reverse()
        (folder / "golden.json").write_text(json.dumps(golden))

    code, line = refused(digits_package(change=change))
    assert (code, "golden answer differs" in line) == (40, True)


def test_a_listed_and_signed_pickle_is_refused(digits_package):
    made = digits_package(change=lambda folder: (folder / "model.pkl").write_bytes(b"cos\nsystem\n."))
    code, line = refused(made)
    assert (code, "model.pkl is not part of a model package" in line) == (30, True)


def test_wrong_arguments_are_one_line(digits_package):
    made = digits_package()
    assert refused(made, "--max-queue", "0")[0] == 30
    assert refused(made, "--what")[0] == 30
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, line = refused(made, "--port", str(taken.getsockname()[1]))
    assert (code, "--port" in line) == (20, True)


def test_the_server_imports_only_what_its_extra_installs(digits_package):
    made = digits_package()
    forbidden = ["torch", "mlflow", "airflow", "pyarrow", "sklearn", "onnx", "httpx", "great_expectations"]
    code = (
        "import sys; from pathlib import Path; import tasks.serve.__main__, tasks.serve.server;"
        f"from tasks.serve.package import open_package; open_package(Path({str(made.folder)!r}), None, None);"
        f"print([name for name in {forbidden} if name in sys.modules],"
        " sorted({n.split('.')[1] for n in sys.modules if n.startswith('tasks.')}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout == "[] ['serve', 'spec', 'store']\n", done.stderr
