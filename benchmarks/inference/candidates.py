"""The servers that are compared: ours, ours behind Envoy, and the peers."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from inference.measure import START_SECONDS, Candidate, Measure, Running, free_port, say

from tasks.spec.errors import TryAgain

PEERS = Path(__file__).parents[1] / "peers"
PEER_SCRIPTS = {
    "FastAPI": "fastapi_uvicorn.py",
    "granian": "granian_rsgi.py",
    "mosec": "mosec_batching.py",
}
GATEWAY = "ours behind Envoy"


def numeric_request() -> dict[str, Any]:
    import numpy as np

    data = np.random.default_rng(1).random(784).round(3).tolist()
    return {"id": "a", "inputs": [{"name": "input", "shape": [1, 784], "datatype": "FP32", "data": data}]}


def candidate_of(models: Path, package: str, name: str, body: Path, log: Path) -> Candidate:
    """Our server as the platform starts it: a digest, keys, a prediction log."""
    digest = json.loads((models / "packages.json").read_text())["digests"][package]
    options = {"package": models / package, "digest": digest, "keys": models / "keys", "log-folder": log}
    arguments = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    workload = json.loads((models / package / "signature.json").read_text())["workload"]
    command = (sys.executable, "-P", "-m", "tasks.serve", *arguments, "--port", "{port}")
    return Candidate(name, command, f"/v2/models/{workload}/infer", body)


def peer_of(name: str, peers: Path, models: Path, body: Path) -> Candidate:
    command = (str(peers / "bin" / "python"), str(PEERS / PEER_SCRIPTS[name]), "{port}")
    environment = {"PEER_MODEL": str(models / "bench-m" / "model.onnx")}
    return Candidate(name, command, "/v2/models/bench-m/infer", body, environment)


def gateway(measure: Measure, running: Running) -> list[Running]:
    """Our running server behind an Envoy of its own, on the server's core; none where Envoy is not installed."""
    from tasks.release.gateway import Gateway, command
    from tasks.release.model import Backend, Route
    from tasks.spec.settings import resolve

    if not shutil.which(command(resolve({}, home=str(measure.base)))[0]):
        say("no Envoy here: its rows are left out")
        return []
    ports = {"gateway_port": free_port(), "gateway_admin_port": free_port()}
    own = Gateway(resolve({}, home=str(measure.base / "gateway"), **ports))
    own.prepare()
    process, until = measure.spawn(command(own.settings), {}), time.monotonic() + START_SECONDS
    while True:
        try:
            own.check()
            break
        except TryAgain:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
    backend = Backend(service="bench-m-one", endpoints=(f"127.0.0.1:{running.port}",))
    own.route("bench-m", Route(backends=(backend,)))
    return [Running(running.candidate._replace(name=GATEWAY), process, own.settings.gateway_port)]
