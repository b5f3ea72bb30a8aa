"""The DAG files as Airflow parses them: fast, light, the pipeline in order, and one broken file harms no other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(180)
ROOT = Path(__file__).parents[2]
PARSE_SECONDS = 1.0
HEAVY = ("torch", "mlflow", "great_expectations", "pandas", "sklearn", "onnxruntime", "matplotlib", "dvc")

PARSE = """
import json, runpy, sys, time
from pathlib import Path
import airflow.sdk
started = time.process_time()  # a busy machine takes no more of it
for path in sorted(Path(sys.argv[1]).glob("*.py")):
    runpy.run_path(str(path))
print(json.dumps({"seconds": time.process_time() - started, "loaded": sorted(sys.modules)}))
"""

DESCRIBE = """
import json, logging, sys
from airflow.dag_processing.dagbag import DagBag
from airflow.serialization.serialized_objects import DagSerialization

bag = DagBag(sys.argv[1])

def task(task):
    names = ("pool", "pool_slots", "trigger_rule", "retries", "priority_weight")
    facts = {name: getattr(task, name) for name in names}
    facts |= {"upstream": sorted(task.upstream_task_ids), "mapped": task.is_mapped}
    facts["on_failure"] = [type(callback).__name__ for callback in task.on_failure_callback or ()]
    facts["outlets"] = [outlet.uri for outlet in task.outlets or ()]
    return facts

def refused(dag, name, value):
    try:
        dag.params.get_param(name).resolve(value)
    except Exception as error:
        return type(error).__name__
    return None

def describe(dag):
    stored = json.loads(json.dumps(DagSerialization.to_dict(dag)))
    back = DagSerialization.from_dict(stored)
    return {
        "tasks": {t.task_id: task(t) for t in dag.tasks},
        "order": [t.task_id for t in dag.topological_sort()],
        "params": {name: dag.params.get_param(name).schema for name in dag.params},
        "defaults": {name: dag.params.get_param(name).value for name in dag.params},
        "description": dag.description, "doc": dag.doc_md, "tags": sorted(dag.tags), "max_runs": dag.max_active_runs,
        "stored": {
            "edges": {t.task_id: sorted(t.upstream_task_ids) for t in back.task_dict.values()},
            "slots": {t.task_id: t.pool_slots for t in back.task_dict.values()},
            "params": {name: param.value for name, param in back.params.items()},
            "doc": back.doc_md,
        },
    }

TRIED = json.loads(sys.argv[2])
print(json.dumps({
    "errors": bag.import_errors,
    "dags": {name: describe(dag) for name, dag in bag.dags.items()},
    "refused": [refused(bag.dags[name], param, value) for name, param, value in TRIED],
}, default=str))
"""

EXECUTE = """
import json, sys
from tasks.orchestrate.operator import PlanOperator
try:
    given = PlanOperator(task_id="plan", workload=sys.argv[1]).execute({"params": json.loads(sys.argv[2])})
    print(json.dumps({"epochs": given["train"]["stopping"]["max_epochs"]}))
except Exception as error:
    print(json.dumps({"kind": type(error).__name__, "text": str(error)}))
"""


def python(code: str, home: Path, *arguments: str, **environment: str) -> Any:
    """Run code with an Airflow of its own; return the JSON of its last line."""
    own = {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
        "DRYDOCK_HOME": str(home / "drydock"),
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DRYDOCK_", "AIRFLOW_"))}
    command = [sys.executable, "-P", "-c", code, *arguments]
    done = subprocess.run(
        command, cwd=home, env=kept | own | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


TRIED = [
    ("retrain_digits", "max_epochs", "3"),
    ("retrain_digits", "max_epochs", 0),
    ("retrain_digits", "batch_size", 1.5),
    ("retrain_digits", "objective", "cheap"),
    ("retrain_digits", "min_accuracy", 2),
    ("retrain_digits", "review", "no"),
    ("retrain_mnist", "source_path", 3),
    ("rollback", "workload", "boats"),
    ("rollback", "reason", ""),
    ("rollback", "reason", None),
    ("release_digits", "version", 3),
]
TAKEN = [
    ("retrain_digits", "max_epochs", 3),
    ("retrain_digits", "max_epochs", None),
    ("retrain_digits", "min_accuracy", 0.97),
    ("retrain_mnist", "source_path", "/data/train.parquet"),
    ("rollback", "to", "3"),
]


@pytest.fixture(scope="module")
def parsed(tmp_path_factory) -> dict[str, Any]:
    """What Airflow finds in dags/ with the shipped workloads."""
    return python(DESCRIBE, tmp_path_factory.mktemp("airflow"), str(ROOT / "dags"), json.dumps(TRIED + TAKEN))


def test_all_files_parse_fast_and_load_nothing_heavy(tmp_path):
    found = python(PARSE, tmp_path, str(ROOT / "dags"))
    print(f"all DAG files parse in {found['seconds']:.2f} s beyond import airflow.sdk")
    assert found["seconds"] < PARSE_SECONDS
    assert not set(HEAVY) & set(found["loaded"])


def test_every_workload_has_its_dags(parsed):
    names = [path.parent.name for path in (ROOT / "workloads").glob("*/workload.yaml")]
    expected = {f"{kind}_{name}" for name in names for kind in ("retrain", "release")} | {"rollback"}
    assert set(parsed["dags"]) == expected
    assert parsed["errors"] == {}


def test_the_retrain_is_the_pipeline(parsed):
    tasks = parsed["dags"]["retrain_digits"]["tasks"]
    assert {name: task["upstream"] for name, task in tasks.items()} == {
        "plan": [],
        "ingest": ["plan"],
        "clean": ["ingest"],
        "validate_data": ["clean"],
        "validate_labels": ["clean"],
        "version": ["validate_data", "validate_labels"],
        "train": ["version"],
        "compress": ["train"],
        "evaluate": ["compress"],
        "evaluate_champion": ["version"],
        "judge": ["evaluate", "evaluate_champion"],
        "register": ["judge"],
    }
    assert [name for name, task in tasks.items() if task["mapped"]] == ["compress", "evaluate"]


def test_the_order_is_that_of_the_steps(parsed):
    from tasks.plan import RETRAIN
    from tasks.steps import STEPS

    order = parsed["dags"]["retrain_digits"]["order"]
    assert list(RETRAIN) == [name for name in STEPS if name != "trial"]
    places = [order.index(step) for step in RETRAIN if step not in ("validate_labels",)]
    assert places == sorted(places)


def test_a_skipped_champion_does_not_skip_the_gate(parsed):
    tasks = parsed["dags"]["retrain_digits"]["tasks"]
    assert tasks["judge"]["trigger_rule"] == "none_failed"
    assert {task["trigger_rule"] for name, task in tasks.items() if name != "judge"} == {"all_success"}


@pytest.mark.parametrize("name", ["digits", "mnist", "sms-spam"])
def test_a_gang_takes_a_slot_for_each_rank(parsed, name):
    from tasks.spec.load import load_workload

    workload = load_workload(ROOT / "workloads", name)
    tasks = parsed["dags"][f"retrain_{name}"]["tasks"]
    assert (tasks["train"]["pool"], tasks["train"]["pool_slots"]) == ("training", workload.train.world_size)
    assert {task["pool"] for step, task in tasks.items() if step != "train"} == {"default_pool"}


def test_the_release_is_its_five_steps_and_is_triggered_by_the_registered_version(parsed):
    release, register = parsed["dags"]["release_digits"], parsed["dags"]["retrain_digits"]["tasks"]["register"]
    steps = ["review", "preflight", "start", "ready", "shadow", "canary", "promote", "bake", "retire"]
    assert release["order"] == steps
    assert register["outlets"] == ["drydock://models/digits"]
    # One that bakes or waits for a person holds up no other; the ledger serialises the switches (ADR 0008).
    assert release["max_runs"] == 16
    assert release["tasks"]["promote"]["priority_weight"] > register["priority_weight"]


def test_every_task_retries_and_tells_of_its_failure(parsed):
    for dag in parsed["dags"].values():
        for task in dag["tasks"].values():
            assert task["retries"] >= 1
            assert task["on_failure"] == ["DrydockNotifier"]


def test_what_is_stored_is_what_was_written(parsed):
    for name, dag in parsed["dags"].items():
        assert dag["stored"] == {
            "edges": {task: facts["upstream"] for task, facts in dag["tasks"].items()},
            "slots": {task: facts["pool_slots"] for task, facts in dag["tasks"].items()},
            "params": dag["defaults"],
            "doc": dag["doc"],
        }, name


def test_every_dag_is_described(parsed):
    for name, dag in parsed["dags"].items():
        assert len(dag["description"]) > 10, name
        assert "###" in dag["doc"]
        assert dag["tags"]
    assert "accuracy" in parsed["dags"]["retrain_digits"]["doc"]


def test_the_trigger_form_is_typed_and_refuses_a_wrong_value(parsed):
    assert parsed["refused"][: len(TRIED)] == ["ParamValidationError"] * len(TRIED)
    assert parsed["refused"][len(TRIED) :] == [None] * len(TAKEN)


def test_the_form_has_the_parameters_that_a_run_may_change(parsed):
    from tasks.spec.changes import FIELDS, TIGHTENING

    digits, mnist = parsed["dags"]["retrain_digits"]["params"], parsed["dags"]["retrain_mnist"]["params"]
    assert set(mnist) == {*FIELDS, *TIGHTENING}
    assert set(digits) == set(mnist) - {"source_path"}
    assert all("type" in schema or "enum" in schema for schema in mnist.values())


@pytest.fixture(scope="module")
def half_broken(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A workloads folder with one right file and several wrong ones; what Airflow finds then."""
    home = tmp_path_factory.mktemp("broken")
    shutil.copytree(ROOT / "workloads" / "digits", home / "workloads" / "digits")
    text = (ROOT / "workloads" / "digits" / "workload.yaml").read_text()
    wrong = {
        "typo": text.replace("train:", "trian:"),
        "noyaml": "name: [",
        "cron": text.replace("name: digits\n", "name: cron\nschedule: 61 * * * *\n", 1),
        "Bad Name": text,
        "x" * 200: text,
    }
    for name, content in wrong.items():
        (home / "workloads" / name).mkdir()
        (home / "workloads" / name / "workload.yaml").write_text(content)
    workloads = str(home / "workloads")
    return home, python(DESCRIBE, home, str(ROOT / "dags"), "[]", DRYDOCK_WORKLOADS=workloads)


def test_a_broken_file_keeps_a_dag_that_tells_why_and_the_others_stay(half_broken):
    dags = half_broken[1]["dags"]
    assert half_broken[1]["errors"] == {}
    assert {"retrain_digits", "release_digits", "rollback"} <= set(dags)
    assert len(dags["retrain_digits"]["tasks"]) == 12
    for name, words in (("typo", "trian"), ("noyaml", "readable YAML"), ("cron", "61 * * * *")):
        assert list(dags[f"retrain_{name}"]["tasks"]) == ["plan"]
        assert words in dags[f"retrain_{name}"]["description"]
        assert "broken" in dags[f"retrain_{name}"]["tags"]
        assert f"release_{name}" not in dags
    for folder in ("Bad Name", "x" * 200):
        assert any("broken" in dag["tags"] and folder in dag["description"] for dag in dags.values())


@pytest.mark.parametrize(
    ("name", "params", "kind", "words"),
    [
        ("typo", {}, "AirflowFailException", "trian"),
        ("digits", {"review": None, "max_epochs": 0}, "AirflowFailException", "max_epochs = 0"),
        ("digits", {"ranks": 64}, "AirflowFailException", "must be at most 2"),
    ],
)
def test_the_plan_fails_without_a_retry_on_what_stays_wrong(half_broken, name, params, kind, words):
    home, environment = half_broken[0], {"DRYDOCK_WORKLOADS": str(half_broken[0] / "workloads")}
    found = python(EXECUTE, home, name, json.dumps(params), **environment, DRYDOCK_TRAINING_SLOTS="2")
    assert found["kind"] == kind
    assert words in found["text"]


def test_the_plan_pins_the_workload_with_the_runs_parameters(tmp_path):
    assert python(EXECUTE, tmp_path, "digits", '{"max_epochs": 3}') == {"epochs": 3}


def test_no_workload_at_all_is_no_error(tmp_path):
    (tmp_path / "workloads").mkdir()
    found = python(DESCRIBE, tmp_path, str(ROOT / "dags"), "[]", DRYDOCK_WORKLOADS=str(tmp_path / "workloads"))
    assert found == {"errors": {}, "dags": {}, "refused": []}


AS_A_TASK = """
import json, runpy, sys
from airflow.sdk.definitions._internal.dag_parsing_context import _airflow_parsing_context_manager
with _airflow_parsing_context_manager(dag_id=sys.argv[2], task_id="any"):
    found = runpy.run_path(sys.argv[1])
    print(json.dumps([workload.name for workload in found["declared"]()] if "declared" in found else found["names"]()))
"""


@pytest.mark.parametrize(
    ("file", "dag_id", "names"),
    [
        ("retrain.py", "retrain_digits", ["digits"]),
        ("release.py", "release_sms-spam", ["sms-spam"]),
        ("rollback.py", "rollback", ["digits", "mnist", "sms-spam"]),
    ],
)
def test_a_task_parses_the_workload_of_its_dag_alone(file: str, dag_id: str, names: list[str], tmp_path: Path) -> None:
    environment = os.environ | {"AIRFLOW_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", AS_A_TASK, str(ROOT / "dags" / file), dag_id]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout.splitlines()[-1]) == names
