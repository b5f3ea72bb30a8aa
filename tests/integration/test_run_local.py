"""The whole retrain in one process, against the real GX, DVC, torch, ONNX Runtime and MLflow."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from tasks.local import run_local
from tasks.new import new_workload
from tasks.notify import resolve_secrets
from tasks.plan import RETRAIN
from tasks.registry import versions
from tasks.review import question
from tasks.spec.changes import changed
from tasks.spec.errors import BadRequest, Refused
from tasks.spec.load import load_workload
from tasks.store.events import read_events

pytestmark = pytest.mark.timeout(300)
DATA = Path(os.environ.get("DRYDOCK_TEST_DATA") or Path(__file__).parents[2].parent / "shared" / "data")


def shared(name: str) -> Path:
    """A file of the public data sets that do not ship with the repository."""
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not there; set DRYDOCK_TEST_DATA to the folder that has {name}")
    return path


def rooms(site: Any) -> dict[str, int]:
    """Every published room with the time of its manifest."""
    found = site.rooms.glob("*/[!.]*/manifest.json")
    return {str(path.parent.relative_to(site.rooms)): path.stat().st_mtime_ns for path in found}


def test_the_digits_go_from_the_source_to_a_registered_version(digits_run):
    assert list(digits_run.done) == [*RETRAIN[:8], "evaluate_champion", *RETRAIN[8:]]
    assert digits_run.done["evaluate_champion"] is None
    assert digits_run.done["judge"]["verdict"] == "pass"
    assert digits_run.done["register"] | {"room": None} == digits_run.done["register"] | {"room": None, "created": True}
    steps = [line.split()[0] for line in digits_run.said]
    assert steps == [*RETRAIN[:6], "compress", "compress", "evaluate", "evaluate", "judge", "register"]
    assert all("done" in line for line in digits_run.said)
    assert len(rooms(digits_run.site)) == 12


def test_a_second_run_recognises_every_step(digits_run):
    before, said, started = rooms(digits_run.site), [], time.monotonic()
    again = run_local(digits_run.workload, digits_run.site, said.append)
    seconds = time.monotonic() - started
    assert rooms(digits_run.site) == before
    assert again == digits_run.done
    assert seconds < 5
    assert len(versions.list_versions(digits_run.site.mlflow, "digits")) == 1


def test_a_changed_gate_runs_only_the_judge_and_its_refusal_is_kept(digits_run):
    before = rooms(digits_run.site)
    stricter = changed(digits_run.workload, {"min_accuracy": 1.0})
    for _ in range(2):
        with pytest.raises(Refused, match=r"the gate says fail: .*accuracy.*must be at least 1 "):
            run_local(stricter, digits_run.site, lambda line: None)
        added = set(rooms(digits_run.site)) - set(before)
        assert [name.split("/")[0] for name in added] == ["judge"]


def test_a_changed_serve_section_runs_nothing_anew(digits_run):
    before = rooms(digits_run.site)
    data = digits_run.workload.model_dump(mode="json")
    data["serve"]["replicas"] = 3
    run_local(type(digits_run.workload).parse(data, "x"), digits_run.site, lambda line: None)
    assert rooms(digits_run.site) == before


def test_no_work_in_progress_stays(digits_run):
    left = [path for path in digits_run.site.rooms.glob("*/.*") if not path.name.endswith(".lock")]
    assert left == []


# --- a workload of one's own --------------------------------------------------------------------------------


def boats(folder: Path, n: int = 500) -> Path:
    """A CSV whose label follows from its columns, with gaps, doubles and labels in odd spelling."""
    rng = np.random.default_rng(0)
    width, height, weight = rng.normal(3, 1, n), rng.normal(10, 3, n), rng.normal(500, 90, n)
    lines = ["width,height,weight,label"]
    for i, (a, b, c) in enumerate(zip(width, height, weight, strict=True)):
        label = "yes" if b + 2 * a > 16 else "no"
        lines.append(f"{'' if i % 41 == 0 else round(a, 3)},{b:.3f},{c:.1f},{label if i % 97 else ''}")
    lines += lines[1:6]
    path = folder / "data.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def edit(site: Any, name: str, **sections: Any) -> Any:
    """Merge sections into a workload's file, two levels deep, and load it."""
    path = site.workloads / name / "workload.yaml"
    data = yaml.safe_load(path.read_text())
    for section, values in sections.items():
        data[section] = data.get(section, {}) | values if isinstance(values, dict) else values
    path.write_text(yaml.safe_dump(data))
    return load_workload(site.workloads, name)


ONE = {"variants": ["fp32"]}
SMALL = {"stopping": {"max_epochs": 20, "patience_epochs": 20}, "ranks": 1, "batch_size": 16}


def test_a_new_table_workload_goes_end_to_end(site):
    path = new_workload(site, "boats", "table", own_model=False)
    boats(path.parent)
    workload = edit(site, "boats", train=SMALL | {"optimiser": {"learning_rate": 0.01}}, compress=ONE)
    done = run_local(workload, site, lambda line: None)
    assert done["register"]["version"] == "1"
    assert done["clean"]["dropped_rows"] >= 10
    assert done["judge"]["chosen"]["variant"] == "fp32"
    asked = question("boats", "1", site)
    assert asked.required
    assert not asked.approved


def test_a_new_workload_with_its_own_network(site):
    path = new_workload(site, "own", "table", own_model=True)
    boats(path.parent, 300)
    gate = {"rules": [{"metric": "accuracy", "min": 0.4}]}
    workload = edit(site, "own", train=SMALL, compress=ONE, gate=gate)
    first = run_local(workload, site, lambda line: None)
    assert first["register"]["created"]
    network = path.parent / "model.py"
    network.write_text(network.read_text() + "\n# changed\n")
    before = set(rooms(site))
    run_local(workload, site, lambda line: None)
    steps = {name.split("/")[0] for name in set(rooms(site)) - before}
    assert "train" in steps, "a changed model.py is another training"
    assert "clean" not in steps


# --- the shipped workloads on real data ---------------------------------------------------------------------


def test_mnist(site, tmp_path):
    """A tenth of the set: the shipped file's limits are for all of it, and are lowered."""
    gate = {"rules": [{"metric": "accuracy", "min": 0.85, "min_samples": 1000}]}
    audit = {"labels": {"max_audited_rows": 1000, "max_noise_ratio": 0.3}}
    workload = edit(site, "mnist", gate=gate, data=audit)
    assert workload.train.recipe.hidden == (512, 256, 128)
    table = pq.read_table(shared("mnist/train.parquet")).slice(0, 6000)
    pq.write_table(table.select(["pixels", "label"]), tmp_path / "mnist.parquet")
    asked = {"source_path": str(tmp_path / "mnist.parquet"), "max_epochs": 5}
    done = run_local(changed(workload, asked), site, lambda line: None)
    assert done["judge"]["verdict"] == "pass", done["judge"]["summary"]
    assert done["register"]["created"]


def test_sms_spam(site):
    asked = {"source_path": str(shared("sms_spam/sms.parquet")), "max_epochs": 4}
    audit = {"labels": {"max_audited_rows": 1500}}
    done = run_local(changed(edit(site, "sms-spam", data=audit), asked), site, lambda line: None)
    assert done["judge"]["verdict"] == "pass", done["judge"]["summary"]
    assert done["register"]["created"]


# --- what may be wrong --------------------------------------------------------------------------------------


def _csv(*rows: str) -> bytes:
    return "\n".join(["width,height,weight,label", *rows, ""]).encode()


GOOD = tuple(f"{i % 7},{i % 11}.5,{i},{'yes' if i % 2 else 'no'}" for i in range(200))
ONE_CLASS = tuple(f"{i % 7},{i % 11}.5,{i},no" for i in range(200))
NO_WIDTH = tuple(f"nan,{i % 11}.5,{i},{'yes' if i % 2 else 'no'}" for i in range(200))


@pytest.mark.parametrize(
    ("content", "failed", "kind", "words"),
    [
        (None, "ingest", BadRequest, ["data.csv", "is not there", "workload.yaml"]),
        (b"", "ingest", BadRequest, ["data.csv", "is empty"]),
        (_csv(), "ingest", BadRequest, ["data.csv", "no rows"]),
        (_csv(*GOOD).replace(b"label", b"target"), "ingest", BadRequest, ["label column 'label'", "target"]),
        (_csv(*GOOD).replace(b"weight,", b"mass,"), "ingest", BadRequest, ["'weight'", "mass"]),
        (_csv(*GOOD, "1,wide,3,no"), "ingest", BadRequest, ["'height'", "wide", "number"]),
        (_csv(*GOOD[:50]), "validate_data", Refused, ["data validation refused", "100"]),
        (_csv(*ONE_CLASS), "validate_labels", Refused, ["label validation refused"]),
        (_csv(*NO_WIDTH), "validate_data", Refused, ["data validation refused", "width"]),
    ],
)
def test_bad_data_is_one_line_and_the_step_that_met_it_publishes_no_result_of_use(site, content, failed, kind, words):
    path = new_workload(site, "boats", "table", own_model=False)
    if content is not None:
        (path.parent / "data.csv").write_bytes(content)
    workload = edit(site, "boats", train=SMALL)
    with pytest.raises(kind) as caught:
        run_local(workload, site, lambda line: None)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 600
    for word in words:
        assert word in line
    published = {name.split("/")[0] for name in rooms(site)}
    assert published <= set(RETRAIN[: RETRAIN.index(failed) + 1]), "a step after the one that failed ran"
    # A refusal is a result, with its evidence; an error publishes nothing.
    assert (failed in published) == (kind is Refused)
    assert not list(site.rooms.glob("*/.*/manifest.json"))


def test_an_unknown_recipe_is_refused_before_any_step(site):
    new_workload(site, "boats", "table", own_model=False)
    with pytest.raises(BadRequest, match=r"train\.recipe.*boosted.*mlp"):
        edit(site, "boats", train={"recipe": {"kind": "boosted"}})
    assert rooms(site) == {}


def test_an_own_network_that_is_not_there_is_told_before_the_training(site):
    path = new_workload(site, "own", "table", own_model=True)
    boats(path.parent, 300)
    workload = edit(site, "own", train=SMALL)
    (path.parent / "model.py").unlink()
    with pytest.raises(BadRequest, match=r"model\.py: is not there"):
        run_local(workload, site, lambda line: None)
    assert "train" not in {name.split("/")[0] for name in rooms(site)}


def test_a_secret_that_does_not_resolve_is_told_by_name(site):
    new_workload(site, "boats", "table", own_model=False)
    workload = edit(site, "boats", notify=[{"kind": "webhook", "url": "https://x/${secret:hook}"}])
    with pytest.raises(BadRequest, match="secret 'hook' does not resolve"):
        resolve_secrets(workload.notify[0].url, site)


def test_a_room_that_rotted_is_set_aside_and_made_again(site, digits_run):
    """The cleaned table of a finished run loses a byte: it is noticed, told, and never read by the next step."""
    shutil.copytree(digits_run.site.rooms, site.rooms)
    (room,) = site.rooms.glob("clean/[!.]*")
    content = bytearray((room / "data.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (room / "data.parquet").write_bytes(content)
    for name in ("validate_data", "validate_labels", "version"):
        shutil.rmtree(site.rooms / name)
    done = run_local(digits_run.workload, site, lambda line: None)
    assert done["clean"]["room"] == digits_run.done["clean"]["room"] | {"uri": str(room)}
    assert done["register"]["package_sha256"] == digits_run.done["register"]["package_sha256"]
    assert len(list(site.rooms.glob("clean/.*rotten*"))) == 1
    assert any("is made again" in event["message"] for event in read_events(site.home))
