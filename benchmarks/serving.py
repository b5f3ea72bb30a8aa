"""The inference server beside its ceilings and its peers: one core for the server, the other for the client.

M is an MLP, one row as v2 JSON; its ceiling is a bare echo that parses the same body. T is a MiniLM text
classifier, one sentence; its ceiling is ONNX Runtime alone at batch 1. Candidates take turns in short rounds, and
a share of the ceiling is the median of the rounds' own ratios: what disturbs the machine then disturbs all alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inference.candidates import GATEWAY, PEER_SCRIPTS, candidate_of, gateway, numeric_request, peer_of
from inference.install import build_models, install_peers
from inference.measure import Candidate, Measure, Seen, end, proportional_bytes, say
from inference.rows import CEILING, at_least, at_most, chart, middle, share

from tasks.site import Site
from tasks.spec.errors import BadRequest

INFERENCE = Path(__file__).parent / "inference"
CONNECTIONS = (1, 8, 64)
ROUNDS, SECONDS, TEXT_SECONDS = 5, 0.7, 2.0
COLD_STARTS, COLD_STARTS_OF_PEERS = 5, 3
# Percent of the ceiling that must be reached, by connections.
LIMITS = {"M": {8: 37, 64: 55}, "T": {1: 88, 8: 160, 64: 200}, "T int8": {1: 300}}
COLD_START_SECONDS, MEMORY_MB = 0.5, 200
OURS, INT8 = "ours", "ours int8"


def bench(site: Site) -> list[dict[str, Any]]:
    """Measure; return the rows, and print where the chart is.

    Raises:
        BadRequest: fewer than two cores.
        TryAgain: the text encoder can't be installed (no network and nothing cached).
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise BadRequest(f"bench serving: found {len(cores)} core, needs 2: one for the server, one for the client")
    with tempfile.TemporaryDirectory(prefix="drydock-bench-") as base, contextlib.ExitStack() as stack:
        models, peers = build_models(site), install_peers(site)
        measure = Measure(cores[0], cores[1], Path(base), stack)
        rows = numeric(measure, models, peers) + text(measure, models)
    say(f"chart: {chart(rows, CONNECTIONS, site.home / 'bench' / 'serving.png')}")
    return rows


def numeric(measure: Measure, models: Path, peers: Path | None) -> list[dict[str, Any]]:
    """The rows of M: shares of the ceiling, tails, cold starts, and what SIGTERM loses."""
    body = measure.base / "m.json"
    body.write_text(json.dumps(numeric_request(), separators=(",", ":")))
    ours = candidate_of(models, "bench-m", OURS, body, measure.base / "log")
    others = [] if peers is None else [peer_of(name, peers, models, body) for name in PEER_SCRIPTS]
    echo = Candidate(CEILING, (sys.executable, "-P", str(INFERENCE / "echo.py"), "{port}"), ours.path, body)
    cold = cold_starts(measure, [ours, *others])
    running = [measure.start(each) for each in (echo, ours, *others)]
    through = gateway(measure, running[1])
    seen = measure.rounds("M", [*running, *through], CONNECTIONS, ROUNDS, SECONDS)
    lost = {one.candidate.name: measure.lost_at_sigterm(one) for one in running[1:]}
    for one in [*running, *through]:  # what hangs after SIGTERM would take the core from T
        end(one.process)
    names = [one.candidate.name for one in running[2:]]
    rows = ceiling_rows(seen)
    rows += share_rows("M", seen, [OURS, *(one.candidate.name for one in through), *names])
    rows += processor_rows(seen, [OURS, *names]) + tail_rows(seen, names, bool(through))
    for name, seconds in cold.items():
        limit = COLD_START_SECONDS if name == OURS else None
        rows.append(at_most(f"M: {name}, cold start to the first answer, s", seconds, limit))
    for name, count in lost.items():
        rows.append(at_most(f"M: {name}, requests lost at SIGTERM under load", count, 0 if name == OURS else None))
    failed = sum(one["lost"] + one["refused"] for count in CONNECTIONS for one in seen[OURS, count])
    return [*rows, at_most("M: ours, requests refused or lost in all rounds", failed, 0)]


def text(measure: Measure, models: Path) -> list[dict[str, Any]]:
    """The rows of T: shares of ONNX Runtime alone, and memory after that load."""
    facts = json.loads((models / "packages.json").read_text())
    body = measure.base / "t.json"
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [facts["sentence"]]}
    body.write_text(json.dumps({"inputs": [tensor]}))
    alone = [str(models / "bench-t" / "model.onnx"), json.dumps(facts["ids"]), str(TEXT_SECONDS)]
    command = (sys.executable, "-P", str(INFERENCE / "alone.py"), *alone)
    fp32 = measure.start(candidate_of(models, "bench-t", OURS, body, measure.base / "log-t"))
    int8 = measure.start(candidate_of(models, "bench-t-int8", INT8, body, measure.base / "log-t8"))
    seen: Seen = {}
    for turn in range(ROUNDS):
        say(f"T: round {turn + 1} of {ROUNDS}")
        ceiling = json.loads(measure.on_server_core(command))
        for connections in CONNECTIONS:
            seen.setdefault((CEILING, connections), []).append(ceiling)
            seen.setdefault((OURS, connections), []).append(measure.load(fp32, connections, TEXT_SECONDS))
        seen.setdefault((INT8, 1), []).append(measure.load(int8, 1, TEXT_SECONDS))
    rows = [at_least("T: ceiling (ONNX Runtime alone), answers/s", middle(seen[CEILING, 1], "rate"), None)]
    rows += share_rows("T", seen, [OURS])
    percent = share(seen, INT8, 1)
    rows.append(at_least("T int8: ours, % of T's ceiling at 1", percent, LIMITS["T int8"][1]))
    for connections in CONNECTIONS:
        rows.append(at_most(f"T: ours, p99 ms at {connections}", middle(seen[OURS, connections], "p99_ms"), None))
    megabytes = proportional_bytes(fp32.process.pid) / 1e6
    return [*rows, at_most("T: ours, proportional memory after load, MB", megabytes, MEMORY_MB)]


def ceiling_rows(seen: Seen) -> list[dict[str, Any]]:
    """The ceiling itself, who bounded it, and how far it moved between the rounds (1: not at all)."""
    rows = []
    for connections in CONNECTIONS:
        all_of = seen[CEILING, connections]
        rows.append(at_least(f"M: ceiling (bare echo), requests/s at {connections}", middle(all_of, "rate"), None))
        # Near 100 the echo is the bound, well below it the client (or, at 1, the way between them).
        busy = 100 * middle(all_of, "server_busy")
        rows.append(at_least(f"M: ceiling, its core busy % at {connections}", busy, None))
        rates = [one["rate"] for one in all_of]
        rows.append(at_most(f"M: ceiling, largest / smallest round at {connections}", max(rates) / min(rates), None))
    return rows


def share_rows(model: str, seen: Seen, names: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        for connections in CONNECTIONS:
            limit = LIMITS[model].get(connections) if name == OURS else None
            percent = share(seen, name, connections)
            rows.append(at_least(f"{model}: {name}, % of ceiling at {connections}", percent, limit))
    return rows


def processor_rows(seen: Seen, names: Sequence[str]) -> list[dict[str, Any]]:
    """The same shares by the processor time that was used: what holds where others take part of the core."""
    pairs = [(name, connections) for name in names for connections in CONNECTIONS[1:]]
    shares = [
        (name, connections, share(seen, name, connections, "per_processor_second")) for name, connections in pairs
    ]
    return [at_least(f"M: {name}, by processor time, % at {count}", percent, None) for name, count, percent in shares]


def tail_rows(seen: Seen, peers: Sequence[str], gateway: bool) -> list[dict[str, Any]]:
    """p99 of M: ours must be below every peer's; Envoy's cost stands beside it."""
    rows = []
    for connections in CONNECTIONS[1:]:
        tails = {name: middle(seen[name, connections], "p99_ms") for name in peers}
        best = min(tails.values(), default=None)
        rows.append(at_most(f"M: ours, p99 ms at {connections}", middle(seen[OURS, connections], "p99_ms"), best))
        if gateway:
            tails[GATEWAY] = middle(seen[GATEWAY, connections], "p99_ms")
        rows += [at_most(f"M: {name}, p99 ms at {connections}", value, None) for name, value in tails.items()]
    return rows


def cold_starts(measure: Measure, candidates: Sequence[Candidate]) -> dict[str, float]:
    """Seconds from the start of the process to its first answer, the median; they take turns."""
    seconds: dict[str, list[float]] = {each.name: [] for each in candidates}
    for turn in range(COLD_STARTS):
        say(f"M: cold start {turn + 1} of {COLD_STARTS}")
        for each in candidates:
            if each.name == OURS or turn < COLD_STARTS_OF_PEERS:
                began = time.perf_counter()
                running = measure.start(each)
                seconds[each.name].append(time.perf_counter() - began)
                end(running.process)
    return {name: statistics.median(times) for name, times in seconds.items()}


if __name__ == "__main__":
    print(json.dumps(bench(Site()), indent=2))
