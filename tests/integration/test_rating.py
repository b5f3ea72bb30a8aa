"""Ratings from a file to a served model: learnt by factors, exported, measured, judged, registered, asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from serving import serving

pytestmark = pytest.mark.timeout(240)
INFER = "/v2/models/films/infer"
FILE = """
name: films
data:
  source: {kind: files, path: ratings.parquet}
  feature: {kind: ids, user: userId, item: movieId}
  label: {kind: number, column: rating, min: 0.5, max: 5}
  expectations: {max_shift: 1}
train:
  recipe: {kind: factors, width: 8}
  ranks: 2
  batch_size: 512
  optimiser: {learning_rate: 0.01, weight_decay: 0.0003}
  stopping: {max_epochs: 12, patience_epochs: 3}
compress: {objective: quality, variants: [fp32, fp16, int8]}
evaluate: {slices: [{name: often, where: "userId IN ('u1', 'u2', 'u3', 'u4', '1', '2', '3', '4')"}]}
gate:
  rules:
    - {metric: rmse, max: 0.98, min_samples: 100, bound: worse}
    - {metric: mae, max: 0.9}
    - {metric: rmse, slice: "perturbed:*", max: 1.5, severity: watch}
    - {metric: ndcg_at_10, min: 0.5, bound: worse}
    - {metric: rmse_gain, min: -0.02, bound: worse}
"""


def drawn_ratings() -> dict[str, list]:
    """Ratings of 120 users and 80 films that follow biases and two factors, to a half."""
    draw = np.random.default_rng(0)
    users, films = draw.normal(size=(120, 3)) * [0.4, 0.7, 0.7], draw.normal(size=(80, 3)) * [0.5, 0.7, 0.7]
    pairs = [(u, f) for u in range(120) for f in range(80) if draw.random() < 0.5]
    said = [3.3 + users[u, 0] + films[f, 0] + users[u, 1:] @ films[f, 1:] + draw.normal() * 0.3 for u, f in pairs]
    rating = (np.clip(np.round(2 * np.array(said)) / 2, 0.5, 5)).tolist()
    return {"userId": [f"u{u}" for u, _ in pairs], "movieId": [f for _, f in pairs], "rating": rating}


def test_ratings_are_learnt_judged_registered_and_served(site, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tasks.local import run_local
    from tasks.serve.package import open_package
    from tasks.spec.load import load_workload

    folder = site.workload_folder("films")
    folder.mkdir(parents=True)
    (folder / "workload.yaml").write_text(FILE)
    pq.write_table(pa.table(drawn_ratings()), folder / "ratings.parquet")
    done = run_local(load_workload(site.workloads, "films"), site, lambda line: None)

    report = json.loads((Path(done["validate_labels"]["room"]["uri"]) / "report.json").read_text())
    assert {"class_ratio", "noise_ratio"} <= report["left_out"].keys()
    last = json.loads((Path(done["train"]["room"]["uri"]) / "history.jsonl").read_text().splitlines()[-1])
    assert last["validation_rmse"] == pytest.approx(last["validation_loss"] ** 0.5, rel=1e-5)
    limits = (1e-4, 2e-2, 0.5)
    assert [made["parity_max_difference"] < limit for made, limit in zip(done["compress"], limits, strict=True)] == [
        True
    ] * 3
    assert done["judge"]["verdict"] == "pass", done["judge"]["summary"]
    taken = Path(done["evaluate"][0]["room"]["uri"])
    measured = {(m["metric"], m["slice"]): m for m in json.loads((taken / "measurements.json").read_text())}
    assert {("rmse", where) for where in ("overall", "slice:often", "perturbed:unknown-user")} <= measured.keys()
    error = measured["rmse", "overall"]
    assert error["low"] <= error["value"] <= error["high"]
    assert measured["mae", "overall"]["value"] < error["value"] < measured["rmse", "perturbed:unknown-user"]["value"]
    assert measured["out_of_range", "overall"]["value"] == 1
    assert 0.8 < measured["ndcg_at_10", "overall"]["value"] <= 1
    run = site.mlflow.get_run(done["train"]["run_id"])
    assert run.data.metrics["holdout.rmse.fp32"] == error["value"]
    version = site.mlflow.get_model_version("films", done["register"]["version"])
    assert "| number | rating, from 0.5 to 5 |" in version.description
    assert "likely errors are not estimated" in version.description

    package = site.packages / done["register"]["package_sha256"]
    opened = open_package(package, done["register"]["package_sha256"], site.keys)
    opened.check_golden()
    ratings = served(package, site.keys, tmp_path)
    edge_answers(package, tmp_path, ratings)
    against_itself(taken, measured)


def against_itself(room: Path, measured: dict) -> None:
    """A model gains nothing on itself, and what it gains on a worse one is the difference of their errors."""
    import pyarrow.parquet as pq

    from tasks.evaluate.paired import _rmse_gain

    table = pq.read_table(room / "predictions.parquet")
    true, said = (table.column(name).to_pylist() for name in ("label", "prediction"))
    assert _rmse_gain(said, said, true).value == 0
    mean = [float(np.mean(true))] * len(true)
    gain = _rmse_gain(said, mean, true)
    assert gain.value == pytest.approx(float(np.std(true)) - measured["rmse", "overall"]["value"])
    assert gain.low > 0


def served(package: Path, keys: Path, base: Path) -> list[float]:
    """Ask a server of its own for known and unknown ids, as texts and as numbers; return the ratings."""
    with serving(package, keys, base / "log", "--cache-bytes", "100000") as client:
        facts = client.get("/v2/models/films").json()
        assert [item["name"] for item in facts["inputs"]] == ["user", "item"]
        assert facts["outputs"] == [{"name": "rating", "datatype": "FP32", "shape": [-1]}]
        texts = tensors(["u1", "u1", "nobody", "nobody"], ["3", "no film", "3", "no film"])
        ratings = ask(client, texts)
        assert len(set(ratings)) == 4
        assert all(0.5 <= rating <= 5 for rating in ratings)
        mixed = [texts[0], texts[1] | {"datatype": "INT64", "data": [3, -1, 3, -1]}]
        assert ask(client, mixed) == ask(client, mixed[::-1]) == ratings
        alone = [ask(client, tensors([user], [item]))[0] for user, item in pairs_of(texts)]
        assert alone == pytest.approx(ratings, abs=1e-5)
        for odd, message in (
            (tensors(["u1"], ["3"])[:1], "inputs must be a list of 2 tensors: 'user' and 'item'"),
            (tensors(["u1"], ["3", "4"]), "user and item must be of the same shape"),
            (tensors([""], ["3"]), "user = '', must be a whole number or a text of 1 to 256 characters"),
            ([{**tensors([1], [3])[0], "datatype": "FP32"}, tensors([1], ["3"])[1]],
             "user.datatype = 'FP32', must be BYTES or INT64"),
        ):
            response = client.post(INFER, json={"inputs": odd})
            assert (response.status_code, response.json()["error"]) == (400, message)
        assert 'drydock_answers_total{label="3.2 to 3.65",replayed="false"}' in client.get("/metrics").text
    logged = [json.loads(line) for path in (base / "log").glob("*.jsonl") for line in path.read_text().splitlines()]
    assert [float(line["label"]) for line in logged[:4]] == pytest.approx(ratings, abs=1e-4)
    assert logged[0]["probability"] is None
    return ratings


def tensors(users: list, items: list) -> list[dict]:
    named = (("user", users), ("item", items))
    return [{"name": name, "datatype": "BYTES", "shape": [len(data)], "data": data} for name, data in named]


def pairs_of(told: list[dict]) -> list[tuple[str, str]]:
    return list(zip(*(tensor["data"] for tensor in told), strict=True))


def ask(client: httpx.Client, inputs: list[dict]) -> list[float]:
    response = client.post(INFER, json={"inputs": inputs})
    assert response.status_code == 200, response.text
    (output,) = response.json()["outputs"]
    assert (output["name"], output["shape"]) == ("rating", [len(output["data"])])
    return output["data"]


def edge_answers(package: Path, base: Path, ratings: list[float]) -> None:
    from tasks.compress.edge import write_bundle

    write_bundle(package, base / "edge")
    command = [sys.executable, "-I", str(base / "edge" / "run.py"), '[["u1", 3], ["nobody", "no film"]]']
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False, env={"PATH": "/usr/bin"})
    said = [json.loads(line)["rating"] for line in done.stdout.splitlines()]
    assert said == pytest.approx([ratings[0], ratings[3]], abs=1e-5), done.stderr


def test_a_number_is_learnt_from_a_table_too(tmp_path):
    """What ids have, a table with the recipe mlp has as well: whatever the number's unit."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tasks.compress.compress import compress
    from tasks.serve.package import open_package
    from tasks.spec.requests import CompressRequest, TrainRequest
    from tasks.store.room import Room
    from tasks.train.fit import fit

    draw = np.random.default_rng(0)
    x = draw.normal(size=(1200, 2))
    y = 200_000 + 30_000 * x[:, 0] - 50_000 * np.abs(x[:, 1])
    room = Room(tmp_path, "dataset")
    splits = ["train"] * 900 + ["validation"] * 150 + ["holdout"] * 150
    table = pa.table({"size": x[:, 0], "age": x[:, 1], "label": np.clip(y, 0, 500_000), "split": splits})
    pq.write_table(table, room.begin() / "data.parquet")
    common = {"workload": "homes", "dataset": room.publish({}).model_dump()}
    common |= {"feature": {"kind": "table", "columns": ["size", "age"]}}
    common |= {"label": {"kind": "number", "column": "price", "min": 0, "max": 500_000}}
    common |= {"train": {"recipe": {"kind": "mlp", "hidden": [32], "dropout": 0.0}, "ranks": 1, "batch_size": 32}}
    common["train"] |= {"optimiser": {"learning_rate": 0.01}, "stopping": {"max_epochs": 8}}
    trained = Room(tmp_path, "trained")
    learning = TrainRequest.parse(common | {"revision": "homes-000000000000"}, "train")
    done = fit(learning, trained.begin(), None, lambda line: None)
    assert json.loads((trained.path / "history.jsonl").read_text().splitlines()[-1])["validation_rmse"] < 60_000
    ref = trained.publish({"run_id": "none"} | done).model_dump()
    for variant, limit in (("fp32", 1e-4), ("int8", 0.1)):
        out = Room(tmp_path, variant).begin()
        asked = CompressRequest.parse(common | {"variant": variant, "trained": ref}, "compress")
        found = compress(asked, out, learn=None)
        assert found.parity_max_difference < limit
        package = open_package(out / "package", found.package_sha256, None)
        package.check_golden()
        assert package.predict([[0.0, 0.0]])[0, 0] == pytest.approx(200_000, rel=0.2)
        assert package.labels([[0.0, 0.0]], [4], np.array([[200_001.5]])) == ["200001.5"]
