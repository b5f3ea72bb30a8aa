"""Named entities from a file to a served model: trained, exported, measured, judged, registered, asked."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from serving import serving

from tasks.spec.entities import entities

pytestmark = pytest.mark.timeout(240)
PEOPLE, PLACES = ("Ann Lee", "Bob", "Eve Mary Poe", "Joe", "Kim"), ("Rome", "Oslo", "New York", "Lima", "Cork")
INFER = "/v2/models/names/infer"
CLASSES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
FILE = """
name: names
data:
  source: {kind: files, path: data.jsonl}
  feature: {kind: tokens, max_tokens: 12, vocabulary: 300}
  label: {column: tags, classes: [O, B-PER, I-PER, B-LOC, I-LOC]}
train:
  recipe: {kind: transformer, width: 32, heads: 2, layers: 2, feedforward: 64, dropout: 0.0}
  ranks: 2
  batch_size: 16
  accumulate: 2
  similar_lengths: true
  optimiser: {learning_rate: 0.01}
  stopping: {max_epochs: 5, patience_epochs: 5, metric: entity_f1}
compress:
  objective: quality
  variants: [fp32, int8, {kind: pruned, of: heads}, {kind: pruned, of: layers, then: int8}]
evaluate: {slices: [{name: long, where: "length(tokens) > 20"}]}
gate:
  rules:
    - {metric: entity_f1, min: 0.9, min_samples: 20, bound: worse}
    - {metric: f1, slice: "class:*", min: 0.8}
    - {metric: entity_f1, slice: "perturbed:*", min: 0.1, severity: watch}
    - {metric: entity_f1_gain, min: -0.02, bound: worse}
"""


def sentence(draw) -> tuple[list[str], list[str]]:
    who, where = draw.choice(PEOPLE).split(), draw.choice(PLACES).split()
    parts = [(who, "PER"), (["went", "to"], ""), (where, "LOC"), (["."], "")]
    words = [word for part, _ in parts for word in part]
    tags = [(("B-" if k == 0 else "I-") + kind if kind else "O") for part, kind in parts for k in range(len(part))]
    return words, tags


def test_names_are_learnt_judged_registered_and_served(site, tmp_path):
    from tasks.local import run_local
    from tasks.serve.package import open_package
    from tasks.spec.load import load_workload

    folder, draw = site.workload_folder("names"), np.random.default_rng(0)
    folder.mkdir(parents=True)
    (folder / "workload.yaml").write_text(FILE)
    rows = [([str(number), *words], ["O", *tags]) for number in range(500) for words, tags in [sentence(draw)]]
    lines = [json.dumps({"tokens": words, "tags": tags}) for words, tags in rows]
    (folder / "data.jsonl").write_text("\n".join(lines))
    done = run_local(load_workload(site.workloads, "names"), site, lambda line: None)

    room = Path(done["train"]["room"]["uri"])
    last = json.loads((room / "history.jsonl").read_text().splitlines()[-1])
    assert last["validation_entity_f1"] > 0.9
    assert done["train"]["best_epoch"] >= 1
    fp32, int8, heads, layers = done["compress"]
    assert max(fp32["parity_max_difference"], heads["parity_max_difference"]) < 1e-4
    assert max(int8["parity_max_difference"], layers["parity_max_difference"]) < 0.5
    assert [made["variant"] for made in (heads, layers)] == ["pruned-heads", "pruned-layers-int8"]
    assert heads["model_bytes"] < fp32["model_bytes"]
    assert layers["model_bytes"] < int8["model_bytes"]
    assert min(heads["agreement"], layers["agreement"]) > 0.9
    assert done["judge"]["verdict"] == "pass", done["judge"]["summary"]
    taken = Path(done["evaluate"][0]["room"]["uri"])
    measured = {(m["metric"], m["slice"]): m for m in json.loads((taken / "measurements.json").read_text())}
    assert {("entity_f1", where) for where in ("overall", "slice:long", "perturbed:typos")} <= measured.keys()
    assert measured["entity_f1", "overall"]["low"] <= measured["entity_f1", "overall"]["value"]
    assert {"class:PER", "class:LOC"} == {where for _, where in measured if where.startswith("class:")}
    run = site.mlflow.get_run(done["train"]["run_id"])
    assert run.data.metrics["holdout.entity_f1.fp32"] == measured["entity_f1", "overall"]["value"]
    version = site.mlflow.get_model_version("names", done["register"]["version"])
    assert "| PER | " in version.description
    assert "entity_f1" in version.description

    package = site.packages / done["register"]["package_sha256"]
    opened = open_package(package, done["register"]["package_sha256"], site.keys)
    opened.check_golden()
    holdout = [json.loads(line) for line in (package.parent / f"{package.name}.holdout.jsonl").read_text().splitlines()]
    texts = ["7 Eve Mary Poe went to New York .", "8 Bob went to Rome . " * 5, holdout[0]]
    label = served(package, site.keys, texts, tmp_path)
    assert entities(label[0].split()) == {("PER", 1, 4), ("LOC", 6, 8)}
    assert [len(tags.split()) for tags in label] == [len(text.split()) for text in texts]
    edge_answers(package, tmp_path, texts[0], label[0])


def served(package: Path, keys: Path, texts: list[str], base: Path) -> list[str]:
    """Ask a server of its own for all texts at once, and for each alone at the same time; return the labels."""
    with serving(package, keys, base / "log") as client:
        shapes = {item["name"]: item["shape"] for item in client.get("/v2/models/names").json()["outputs"]}
        assert shapes == {"label": [-1], "probabilities": [-1, 5]}
        together = ask(client, texts)
        with ThreadPoolExecutor(3) as pool:
            assert [label for [label] in pool.map(lambda text: ask(client, [text]), 20 * texts)] == 20 * together
        response = client.post(INFER, json=body([" "]))
        assert (response.status_code, response.json()["error"]) == (
            400, "tokens input: found ' ', must be one word or more",
        )  # fmt: skip
        assert 'drydock_answers_total{label="B-LOC",replayed="false"}' in client.get("/metrics").text
    logged = [json.loads(line) for path in (base / "log").glob("*.jsonl") for line in path.read_text().splitlines()]
    assert [line["label"] for line in logged[:3]] == together
    return together


def body(texts: list[str]) -> dict:
    return {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": texts}]}


def ask(client: httpx.Client, texts: list[str]) -> list[str]:
    response = client.post(INFER, json=body(texts))
    assert response.status_code == 200, response.text
    label, probabilities = response.json()["outputs"]
    assert probabilities["shape"] == [sum(len(text.split()) for text in texts), 5]
    best = np.array(probabilities["data"]).reshape(probabilities["shape"]).argmax(axis=1)
    assert " ".join(label["data"]).split() == [CLASSES[k] for k in best]
    return label["data"]


def edge_answers(package: Path, base: Path, text: str, label: str) -> None:
    from tasks.compress.edge import write_bundle

    write_bundle(package, base / "edge")
    command = [sys.executable, "-I", str(base / "edge" / "run.py"), text]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False, env={"PATH": "/usr/bin"})
    assert json.loads(done.stdout)["label"] == label, done.stderr
