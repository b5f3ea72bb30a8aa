"""The registry against a real MLflow server: one version for a package, whatever dies, and every byte verified."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tasks.command.efficiency import efficiency_of, efficiency_text
from tasks.plan import request_for
from tasks.registry import runs, versions
from tasks.registry.client import connect
from tasks.registry.efficiency import Factors
from tasks.registry.register import is_registered, register_package
from tasks.spec.errors import BadRequest, IntegrityLost, TryAgain
from tasks.spec.requests import RegisterRequest
from tasks.spec.rules import Rule

pytestmark = pytest.mark.timeout(240)
CURVE = ("train_loss", "validation_loss", "validation_accuracy", "samples_per_second")
FACTORS = Factors(core_watts=10, co2_grams_per_kwh=400, price_per_kwh=0.25)

# Registers with the process killed at a named function of the registry.
KILLED = """
import os, signal, sys
from pathlib import Path
from tasks.registry import versions
from tasks.registry.client import connect
from tasks.registry.register import register_package
from tasks.spec.requests import RegisterRequest
setattr(versions, sys.argv[1], lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
request = RegisterRequest.model_validate_json(Path(sys.argv[2]).read_text())
register_package(request, connect(sys.argv[3]), *map(Path, sys.argv[4:7]), "http://gateway")
"""


@pytest.fixture(scope="module")
def request_of(digits_run) -> Any:
    """``request_of(name)``: the digits' register request, under another registered model's name."""
    request = request_for("register", digits_run.workload, digits_run.done, digits_run.site)
    return lambda name: RegisterRequest.model_validate(request.model_dump() | {"workload": name})


def register(request: RegisterRequest, site: Any, packages: Path) -> Any:
    return register_package(request, site.mlflow, packages, site.keys, site.root, "http://gateway")


def test_the_run_left_one_version_with_card_tags_and_a_signed_package(digits_run):
    site, registered = digits_run.site, digits_run.done["register"]
    found = versions.get(site.mlflow, "digits", registered["version"])
    assert found.package_sha256 == registered["package_sha256"]
    assert found.evidence_sha256 == registered["evidence_sha256"]
    assert found.run_id == digits_run.done["train"]["run_id"]
    assert found.tags["drydock.verdict"] == "pass"
    assert found.tags["drydock.dataset_revision"] == digits_run.done["version"]["revision"]
    card = site.mlflow.get_model_version("digits", registered["version"]).description
    for words in ("Pareto picture", "J for a thousand predictions", "perturbed:noise", "./drydock rollback digits"):
        assert words in card
    for words in ("digits", registered["package_sha256"][:12], found.tags["drydock.dataset_revision"], "accuracy"):
        assert words in card
    assert versions.fetch(site.mlflow, found, site.packages, site.keys).is_dir()
    links = re.findall(r"/artifacts/([^)]+)\)", card)
    assert len(links) == 7
    for path in links:
        folder, _, name = path.rpartition("/")
        assert name in {
            file.path.rpartition("/")[2] for file in site.mlflow.list_artifacts(found.run_id, folder)
        }, f"the card leads to {path}"
    report = site.mlflow.get_run(found.run_id).data.tags["drydock.data_report"]
    assert report.partition("/artifacts/")[2] in card


def test_the_run_in_mlflow_has_its_curves_papers_and_dataset(digits_run):
    client, run_id = digits_run.site.mlflow, digits_run.done["train"]["run_id"]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    epochs = digits_run.done["train"]["epochs"]
    for name in CURVE:
        assert [m.step for m in client.get_metric_history(run_id, name)] == list(range(1, epochs + 1))
    assert run.data.params["optimiser.learning_rate"] == "0.003"
    assert "holdout.accuracy.int8" in run.data.metrics
    assert run.inputs.dataset_inputs[0].dataset.name == digits_run.done["version"]["revision"]
    assert run.data.tags["drydock.verdict"] == "pass"
    listed = {item.path for item in client.list_artifacts(run_id)}
    digest = digits_run.done["register"]["package_sha256"][:12]
    papers = versions.papers(digits_run.done["register"]["evidence_sha256"])
    assert {"evaluation", "validation", f"model-{digest}", papers} <= listed


def test_registering_twice_is_one_version(digits_run, request_of, tmp_path):
    site = digits_run.site
    first = register(request_of("twice"), site, tmp_path)
    second = register(request_of("twice"), site, tmp_path)
    assert (first.created, second.created) == (True, False)
    assert first.version == second.version == "1"
    assert first.evidence_sha256 == second.evidence_sha256
    assert len(versions.list_versions(site.mlflow, "twice")) == 1


def test_a_package_that_is_judged_anew_keeps_its_version_and_gets_the_new_evidence(digits_run, request_of, tmp_path):
    site = digits_run.site
    first = register(request_of("anew"), site, tmp_path)
    versions.set_version_tag(site.mlflow, "anew", "1", versions.DECISION_TAG, "approved by rita")
    other = {"rules": (Rule(metric="macro_f1", min=0.5),), "description": "Passes the harder gate"}
    harder = request_of("anew").model_copy(update=other)
    second = register(harder, site, tmp_path)
    assert (second.version, second.created) == ("1", False)
    assert second.evidence_sha256 != first.evidence_sha256
    found = versions.get(site.mlflow, "anew", "1")
    assert found.evidence_sha256 == second.evidence_sha256
    assert [rule["metric"] for rule in versions.evidence_of(site.mlflow, found)["rules"]] == ["macro_f1"]
    assert versions.DECISION_TAG not in found.tags
    assert "Passes the harder gate" in site.mlflow.get_model_version("anew", "1").description
    # A step's result from before is no longer what the registry holds, so that step registers once more.
    assert is_registered(harder, second, site.mlflow)
    assert not is_registered(request_of("anew"), first, site.mlflow)


@pytest.mark.parametrize("where", ["_write_mlmodel", "_ensure_model"])
def test_a_killed_registration_leaves_no_version_and_the_next_makes_one(digits_run, request_of, tmp_path, where):
    """Killed before the package's files are logged, and between the files and the version."""
    site, name = digits_run.site, f"killed{where.replace('_', '-')}"
    (tmp_path / "request.json").write_text(request_of(name).model_dump_json())
    arguments = [where, tmp_path / "request.json", site.settings.mlflow_url, tmp_path / "p", site.keys, site.root]
    done = subprocess.run([sys.executable, "-P", "-c", KILLED, *map(str, arguments)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-1000:]
    assert versions.list_versions(site.mlflow, name) == []
    assert register(request_of(name), site, tmp_path / "p").created
    assert [found.version for found in versions.list_versions(site.mlflow, name)] == ["1"]


def test_a_package_that_is_not_at_hand_is_fetched_and_verified(digits_run, tmp_path):
    site = digits_run.site
    found = versions.get(site.mlflow, "digits", "1")
    folder = versions.fetch(site.mlflow, found, tmp_path, site.keys)
    assert folder == tmp_path / found.package_sha256
    original = site.packages / found.package_sha256
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in original.iterdir()}
    assert list(tmp_path.iterdir()) == [folder], "the download left something"


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "manifest.sig"])
def test_a_flipped_byte_in_mlflows_store_is_noticed(digits_run, tmp_path_factory, tmp_path, name):
    site = digits_run.site
    found = versions.get(site.mlflow, "digits", "1")
    stored = _stored(tmp_path_factory, found.run_id) / name
    before = stored.read_bytes()
    middle = len(before) // 2
    stored.write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
    try:
        with pytest.raises(IntegrityLost, match="digits version 1: "):
            versions.fetch(site.mlflow, found, tmp_path, site.keys)
        assert list(tmp_path.iterdir()) == [], "nothing unverified stays"
    finally:
        stored.write_bytes(before)
    assert versions.fetch(site.mlflow, found, tmp_path, site.keys)


def _stored(tmp_path_factory: Any, run_id: str) -> Path:
    """Where the MLflow server keeps a run's package."""
    artifacts = "mlflow-home[0-9]*/mlflow/artifacts"
    (found,) = tmp_path_factory.getbasetemp().glob(f"{artifacts}/*/{run_id}/artifacts/model-*/package")
    return found


def test_a_package_at_hand_that_changed_is_noticed(digits_run, tmp_path):
    site = digits_run.site
    found = versions.get(site.mlflow, "digits", "1")
    shutil.copytree(site.packages / found.package_sha256, tmp_path / found.package_sha256)
    (tmp_path / found.package_sha256 / "golden.json").write_text("{}")
    with pytest.raises(IntegrityLost, match=r"digits version 1: .*golden\.json"):
        versions.fetch(site.mlflow, found, tmp_path, site.keys)


def test_another_signer_is_refused(digits_run, tmp_path):
    from tasks.store.sign import make_key

    make_key(tmp_path / "other")
    site = digits_run.site
    with pytest.raises(IntegrityLost, match="signature does not verify"):
        versions.fetch(site.mlflow, versions.get(site.mlflow, "digits", "1"), tmp_path / "p", tmp_path / "other")


def test_evidence_that_changed_is_not_registered(digits_run, request_of, tmp_path):
    request = request_of("evidence")
    shutil.copytree(request.judged.uri, tmp_path / "judged")
    verdict = json.loads((tmp_path / "judged" / "verdict.json").read_text()) | {"verdict": "pass", "summary": "fine"}
    (tmp_path / "judged" / "verdict.json").write_text(json.dumps(verdict))
    harmed = request.model_copy(update={"judged": request.judged.model_copy(update={"uri": str(tmp_path / "judged")})})
    with pytest.raises(IntegrityLost):
        register(harmed, digits_run.site, tmp_path / "p")
    assert versions.list_versions(digits_run.site.mlflow, "evidence") == []


def test_mlflows_own_loader_asks_the_package_if_its_signer_is_known(digits_run, monkeypatch, tmp_path):
    import mlflow
    from sklearn.datasets import load_digits

    from tasks.store.sign import make_key

    mlflow.set_tracking_uri(digits_run.site.settings.mlflow_url)
    mlflow.set_registry_uri(digits_run.site.settings.mlflow_url)
    monkeypatch.setenv("DRYDOCK_KEYS", str(digits_run.site.keys))
    model = mlflow.pyfunc.load_model("models:/digits/1")
    rows = load_digits()
    answers = model.predict(rows.data[:100])
    assert sum(found == str(true) for found, true in zip(answers, rows.target, strict=False)) > 90
    make_key(tmp_path / "keys")
    monkeypatch.setenv("DRYDOCK_KEYS", str(tmp_path / "keys"))
    with pytest.raises(IntegrityLost, match="signature does not verify"):
        mlflow.pyfunc.load_model("models:/digits/1")
    monkeypatch.delenv("DRYDOCK_KEYS")
    monkeypatch.setenv("DRYDOCK_HOME", str(tmp_path / "no home"))
    with pytest.raises(BadRequest, match="DRYDOCK_KEYS must name the folder"):
        mlflow.pyfunc.load_model("models:/digits/1")


def test_aliases(digits_run, request_of, tmp_path):
    site = digits_run.site
    register(request_of("aliased"), site, tmp_path)
    aliases = versions.Aliases(site.mlflow)
    assert aliases.get("aliased") == {}
    assert aliases.get("nobody") == {}
    aliases.set("aliased", "champion", "1")
    aliases.set("aliased", "champion", "1")
    assert aliases.get("aliased") == {"champion": "1"}
    aliases.set("aliased", "champion", None)
    aliases.set("aliased", "champion", None)
    assert aliases.get("aliased") == {}
    with pytest.raises(BadRequest, match="alias champion of aliased"):
        aliases.set("aliased", "champion", "9")


def test_the_edge_bundle_answers_by_itself(digits_run, tmp_path):
    """Run isolated, from another folder, with no path of ours."""
    from tasks.compress.edge import write_bundle

    site = digits_run.site
    package = site.packages / digits_run.done["register"]["package_sha256"]
    write_bundle(package, tmp_path / "edge")
    rows = json.loads((package / "golden.json").read_text())
    command = [sys.executable, "-I", str(tmp_path / "edge" / "run.py"), json.dumps(rows["rows"])]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False, env={"PATH": "/usr/bin"})

    told = [json.loads(line) for line in run().stdout.splitlines()]
    assert [line["probability"] for line in told] == pytest.approx([max(p) for p in rows["probabilities"]], abs=1e-3)
    assert "tasks" not in (tmp_path / "edge" / "run.py").read_text()
    with pytest.raises(BadRequest, match="is there already"):
        write_bundle(package, tmp_path / "edge")
    command[-1] = "[[1, 2]]"
    done = run()
    assert (done.returncode, done.stderr) == (30, "error: found rows of 2 values, must be 64\n")
    (tmp_path / "edge" / "signature.json").write_text("{}")
    done = run()
    assert (done.returncode, done.stderr) == (40, "error: signature.json: its digest is not the one in SHA256SUMS\n")


def test_tags_of_a_version(digits_run, request_of, tmp_path):
    site = digits_run.site
    register(request_of("tagged"), site, tmp_path)
    versions.set_version_tag(site.mlflow, "tagged", "1", "review", "approve")
    assert versions.get(site.mlflow, "tagged", "1").tags["review"] == "approve"
    versions.delete_version_tag(site.mlflow, "tagged", "1", "review")
    assert "review" not in versions.get(site.mlflow, "tagged", "1").tags


def test_an_unknown_version_tells_those_there_are(digits_run):
    with pytest.raises(BadRequest, match="digits: version '7' is not registered; registered: 1"):
        versions.get(digits_run.site.mlflow, "digits", "7")
    with pytest.raises(BadRequest, match="nobody: version '1' is not registered; registered: none"):
        versions.get(digits_run.site.mlflow, "nobody", "1")
    assert versions.find(digits_run.site.mlflow, "digits", "0" * 64) is None


# --- runs ---------------------------------------------------------------------------------------------------


def test_a_run_is_found_again_by_its_key(site):
    first = runs.open_run(site.mlflow, "curves", "key1", {"a": 1, "long": "x" * 9000}, {"tag": "t"})
    assert runs.open_run(site.mlflow, "curves", "key1", {"a": 1}, {}) == first
    assert runs.open_run(site.mlflow, "curves", "key2", {}, {}) != first
    assert len(site.mlflow.get_run(first).data.params["long"]) == 500


def test_curves_that_are_replayed_are_logged_once(site, tmp_path):
    run_id = runs.open_run(site.mlflow, "curves", "replayed", {}, {})
    lines = [dict.fromkeys(CURVE, 0.5 / n) | {"epoch": n, "at_ms": 1_700_000_000_000 + n} for n in (1, 2, 3)]
    for _ in range(2):  # the second time is the attempt after a kill, which reads the same history
        curves = runs.Curves(site.mlflow, run_id, FACTORS, tmp_path)
        for line in lines:
            curves.log_line(line)
        curves.flush()
    for name in CURVE:
        history = site.mlflow.get_metric_history(run_id, name)
        assert [(m.step, m.value) for m in history] == [(epoch, 0.5 / epoch) for epoch in (1, 2, 3)]


def test_a_run_explains_itself(digits_run):
    run_id = digits_run.done["train"]["run_id"]
    client, epochs = digits_run.site.mlflow, digits_run.done["train"]["epochs"]
    names = {"learning_rate", "gradient_norm", "samples_per_second", "mfu", "data_wait_ratio", "wire_bytes"}
    names |= {"energy_joules", "system/rank_0/memory_bytes", "system/rank_1/cpu_busy_ratio"}
    for name in names:
        assert len(client.get_metric_history(run_id, name)) == epochs, name
    run = client.get_run(run_id).data
    assert 0 < run.metrics["mfu"] < 1
    assert 0 < run.metrics["cpu_busy_ratio"] < 1.2
    assert run.metrics["wire_bytes"] > 0
    joules = run.metrics["energy_kwh"] * 3.6e6
    assert run.metrics["co2_grams"] == pytest.approx(joules / 3.6e6 * 400)
    assert run.tags["drydock.energy_source"] in ("rapl", "estimate: processor seconds at 10 W a core")
    table = client._tracking_client._get_artifact_repo(run_id).download_artifacts("efficiency.json")
    assert json.loads(Path(table).read_text())["columns"] == ["of", "what", "value", "unit"]
    assert list((digits_run.site.home / "tensorboard" / "digits" / run_id).glob("events.out.tfevents.*"))
    fleet = efficiency_of(digits_run.site)["workloads"]
    assert [row["workload"] for row in fleet] == ["digits"]
    assert fleet[0]["energy_kwh"] > 0
    assert fleet[0]["mfu"] == run.metrics["mfu"]
    assert "digits" in efficiency_text({"workloads": fleet})


@pytest.fixture
def down() -> Any:
    """A client of an MLflow that is not there."""
    return connect("http://127.0.0.1:9")


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: runs.open_run(client, "digits", "k", {}, {}),
        lambda client: versions.find(client, "digits", "0" * 64),
        lambda client: versions.Aliases(client).set("digits", "champion", "1"),
        lambda client: runs.log_metrics(client, "r", {"m": 1.0}),
    ],
)
def test_where_mlflow_is_down_it_is_one_line_in_bounded_time(down, ask):
    started = time.monotonic()
    with pytest.raises(TryAgain, match="MLflow: ") as caught:
        ask(down)
    assert time.monotonic() - started < 15
    assert "\n" not in str(caught.value)
    assert "drydock logs mlflow" in str(caught.value)


def test_training_does_not_wait_for_an_mlflow_that_is_down_and_loses_nothing(down, site, tmp_path):
    run_id = runs.open_run(site.mlflow, "curves", "outage", {}, {})
    curves = runs.Curves(down, run_id, FACTORS, tmp_path)
    started = time.monotonic()
    for epoch in (1, 2, 3, 4):
        curves.log_line(dict.fromkeys(CURVE, 1.0) | {"epoch": epoch, "at_ms": 1_700_000_000_000 + epoch})
    assert time.monotonic() - started < 15, "only the first epoch may wait"
    with pytest.raises(TryAgain):
        curves.flush()
    curves.client = site.mlflow
    curves.flush()
    assert len(site.mlflow.get_metric_history(run_id, "train_loss")) == 4
