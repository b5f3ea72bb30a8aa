"""A language model from a text file to a served one: learnt, exported, measured, judged, registered, asked."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from serving import serving

pytestmark = pytest.mark.timeout(240)
FILE = """
name: tales
data:
  source: {kind: files, path: "tales.txt"}
  feature: {kind: text, max_tokens: 24, vocabulary: 320}
  label: {kind: next}
  clean: [{rule: trim, column: text}, {rule: drop_duplicates}]
  expectations: {max_shift: 1}
train:
  recipe: {kind: gpt, width: 32, heads: 2, layers: 2, feedforward: 64, dropout: 0}
  ranks: 2
  batch_size: 32
  optimiser: {name: adamw, learning_rate: 0.01, schedule: {kind: cosine, warmup_ratio: 0.1}}
  stopping: {max_epochs: 4, patience_epochs: 3}
compress: {objective: size, variants: [fp32, int8, int4], also: [safetensors, torch-export]}
evaluate: {slices: [{name: short, where: "label < 40"}]}
gate:
  rules:
    - {metric: perplexity, max: 8, min_samples: 50, bound: worse}
    - {metric: perplexity, slice: "slice:short", max: 12}
    - {metric: bits_per_character, against: champion, max_rise: 0.05}
    - {metric: bits_gain, min: -0.05, bound: worse}
"""
WORDS = (
    ("The", "A", "One"),
    ("red", "small", "quiet", "old", "hungry"),
    ("fox", "crow", "miller", "king", "tailor", "goose"),
    ("saw", "met", "fed", "lost"),
    ("the", "a", "no"),
    ("wolf", "bear", "baker", "queen", "mouse"),
    ("by the river.", "in the wood.", "at night.", "again."),
)


def drawn_tales() -> list[str]:
    """Sentences of which each word but the last is drawn from a few."""
    draw = np.random.default_rng(0)
    return [" ".join(words[draw.integers(len(words))] for words in WORDS) for _ in range(900)]


# What one of these sentences takes, told by whoever knows how they are drawn.
LEAST_BITS = sum(math.log2(len(words)) for words in WORDS)


def test_a_language_model_is_learnt_judged_registered_and_served(site, tmp_path):
    from tasks.local import run_local
    from tasks.serve.package import open_package
    from tasks.spec.load import load_workload

    folder = site.workload_folder("tales")
    folder.mkdir(parents=True)
    (folder / "workload.yaml").write_text(FILE)
    tales = drawn_tales()
    (folder / "tales.txt").write_text("\n".join([*tales, "", f"  {tales[0]}  "]))
    done = run_local(load_workload(site.workloads, "tales"), site, lambda line: None)

    cleaned = json.loads((Path(done["clean"]["room"]["uri"]) / "report.json").read_text())
    assert cleaned["rows_in"] == 901
    assert cleaned["rows_out"] == len(set(tales))
    report = json.loads((Path(done["validate_labels"]["room"]["uri"]) / "report.json").read_text())
    assert report["left_out"]["noise_ratio"] == "a text is its own label, and so never a wrong one"
    lines = [json.loads(x) for x in (Path(done["train"]["room"]["uri"]) / "history.jsonl").read_text().splitlines()]
    assert lines[-1]["validation_perplexity"] < lines[0]["validation_perplexity"]
    limits = (1e-4, 0.1, 0.1)
    differences = [made["parity_max_difference"] for made in done["compress"]]
    assert all(found < limit for found, limit in zip(differences, limits, strict=True)), differences
    assert done["judge"]["verdict"] == "pass", done["judge"]["summary"]

    rooms = [Path(found["room"]["uri"]) for found in done["evaluate"]]
    whole, int8, int4 = (measured(room) for room in rooms)
    perplexity = whole["perplexity", "overall"]
    assert 1 < perplexity["low"] <= perplexity["value"] <= perplexity["high"] < 8
    characters = np.mean([len(tale) for tale in set(tales)])
    assert 0.9 * LEAST_BITS < whole["bits_per_character", "overall"]["value"] * characters < 1.5 * LEAST_BITS
    assert ("perplexity", "slice:short") in whole
    assert whole["out_of_range", "overall"]["value"] == 1
    # int4 may cost a twentieth of perplexity, and is the smallest.
    assert int4["perplexity", "overall"]["value"] < 1.05 * perplexity["value"]
    sizes = [found["model_bytes", "overall"]["value"] for found in (whole, int8, int4)]
    assert sizes[2] < min(sizes[:2]), sizes
    # A network as small as this may be slower as int8, and is float then.
    assert (sizes[1] < sizes[0]) != ("fell back to fp32" in done["compress"][1]["note"]), sizes
    assert all((room / "texts.png").exists() for room in rooms)
    run = site.mlflow.get_run(done["train"]["run_id"])
    assert run.data.metrics["holdout.perplexity.fp32"] == perplexity["value"]
    kept = site.mlflow.list_artifacts(done["train"]["run_id"], f"network-{done['register']['package_sha256'][:12]}")
    assert [Path(found.path).name for found in kept] == ["network.pt2", "weights.safetensors"]
    version = site.mlflow.get_model_version("tales", done["register"]["version"])
    assert "| number | log_probability, from -20 to 0 |" in version.description
    assert "Labels: each text is its own." in version.description

    digest = done["register"]["package_sha256"]
    opened = open_package(site.packages / digest, digest, site.keys)
    opened.check_golden()
    said = served(site.packages / digest, site.keys, tmp_path)
    edge_answers(site.packages / digest, tmp_path, said)


def measured(room: Path) -> dict:
    return {(m["metric"], m["slice"]): m for m in json.loads((room / "measurements.json").read_text())}


def served(package: Path, keys: Path, base: Path) -> list[float]:
    """Ask a server of its own; return how likely a tale is, a jumbled one, one of a single piece, a long one."""
    with serving(package, keys, base / "log") as client:
        facts = client.get("/v2/models/tales").json()
        assert facts["outputs"][0] == {"name": "log_probability", "datatype": "FP32", "shape": [-1]}
        said = ask(client, ASKED)
        assert all(-20 <= value <= 0 for value in said)
        assert said[0] > -2 > said[1]
        alone = [ask(client, [text])[0] for text in ASKED]
        # int8 scales what it computes by the whole batch.
        assert alone == pytest.approx(said, abs=0.02)
        continues(client)
        response = client.post("/v2/models/tales/infer", json={"inputs": [tensor(["x" * 10_001])]})
        assert (response.status_code, response.json()["error"].count("\n")) == (400, 0)
    logged = [json.loads(line) for path in (base / "log").glob("*.jsonl") for line in path.read_text().splitlines()]
    assert [float(line["label"]) for line in logged[:4]] == pytest.approx(said, abs=1e-4)
    return said


ASKED = ["The old fox met a bear in the wood.", "wood. the in bear a met fox old The", "a", "The old fox " * 60]


def tensor(texts: list[str]) -> dict:
    return {"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": texts}


def ask(client: httpx.Client, texts: list[str]) -> list[float]:
    response = client.post("/v2/models/tales/infer", json={"inputs": [tensor(texts)]})
    assert response.status_code == 200, response.text
    output = response.json()["outputs"][0]
    assert (output["name"], output["shape"]) == ("log_probability", [len(texts)])
    return output["data"]


def continues(client: httpx.Client) -> None:
    """A tale goes on as tales do, to its end or as far as is asked; one that fills all places by nothing."""
    url, texts = "/v2/models/tales/infer", ["The old fox met", "A red crow saw a wolf by the", ASKED[3]]

    def told(most: object, asked: list[str], **more: object) -> httpx.Response:
        return client.post(url, json={"inputs": [tensor(asked)], "parameters": {"max_new_tokens": most}, **more})

    said = {item["name"]: item["data"] for item in told(20, texts).json()["outputs"]}
    assert list(said) == ["log_probability", "continuation"]
    first, second, none = said["continuation"]
    assert first.split()[0] in WORDS[4]
    assert (texts[0] + first).endswith(".")
    assert (second in (" river.", " wood."), none) == (True, "")
    alone = told(20, texts[:1], outputs=[{"name": "continuation"}]).json()["outputs"]
    assert [item["data"] for item in alone] == [[first]]
    (short,) = told(1, texts[:1], outputs=[{"name": "continuation"}]).json()["outputs"]
    assert first.startswith(short["data"][0])
    assert len(short["data"][0]) < len(first)
    assert len(told(0, texts).json()["outputs"]) == 1
    for odd in (-1, 257, 1.5, "many", True):
        response = told(odd, texts)
        assert (response.status_code, response.json()["error"]) == (
            400, f"max_new_tokens = {odd!r}, must be a whole number from 0 to 256",
        )  # fmt: skip


def edge_answers(package: Path, base: Path, said: list[float]) -> None:
    from tasks.compress.edge import write_bundle

    write_bundle(package, base / "edge")
    command = [sys.executable, "-I", str(base / "edge" / "run.py"), json.dumps(ASKED)]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False, env={"PATH": "/usr/bin"})
    found = [json.loads(line)["log_probability"] for line in done.stdout.splitlines()]
    assert found == pytest.approx(said, abs=0.02), done.stderr
