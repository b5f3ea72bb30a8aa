"""The pipeline on one page: step name -> function, in order.

    ingest -> clean -> validate_data -> validate_labels -> version -> (trial, of a search) -> train
           -> compress (each variant) -> evaluate (each candidate, and the champion) -> judge -> register

A step turns one request into one result and one room. It is keyed by its request and its code: the same key
again returns the finished result, and a killed one goes on in the folder it left. ``tasks.plan`` says what
each step is asked.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from tasks.notify import resolve_secrets
from tasks.site import Site
from tasks.spec import requests as r
from tasks.spec.errors import BadRequest, DrydockError, Inconclusive, IntegrityLost, Refused, TryAgain
from tasks.spec.train import Train
from tasks.spec.value import Value, sha256_of
from tasks.store.events import record_event
from tasks.store.files import exclusive, sha256_file
from tasks.store.room import Room, open_room

KEY_DIGITS = 32


def ingest(request: r.IngestRequest, room: Path, site: Site) -> r.IngestResult:
    from tasks.data.ingest import ingest
    from tasks.data.known import known_path
    from tasks.data.partitions import Partitions

    kept = Partitions(site.home / "partitions", request, code_sha256(("data",)))
    key = site.privacy_key if request.privacy.hashes else b""
    try:
        return ingest(request, room, lambda text: resolve_secrets(text, site), key, kept)
    except IntegrityLost:
        # Whatever the plan took for known, the next one reads.
        known_path(site.home, request.workload).unlink(missing_ok=True)
        raise


def clean(request: r.CleanRequest, room: Path, site: Site) -> r.CleanResult:
    from tasks.data.clean import clean
    from tasks.data.engine import Runs

    return clean(request, room, Runs(site.settings.data_memory_bytes, site.settings.spark_master))


def validate_data(request: r.ValidateDataRequest, room: Path, site: Site) -> r.ValidateDataResult:
    from tasks.data.expectations import validate_data

    return validate_data(request, room, site.suites, site.datasets)


def validate_labels(request: r.ValidateLabelsRequest, room: Path, site: Site) -> r.ValidateLabelsResult:
    from tasks.data.labels import validate_labels

    return validate_labels(request, room)


def version(request: r.VersionRequest, room: Path, site: Site) -> r.VersionResult:
    from tasks.data.version import version

    return version(request, room, site.datasets, site.dataset_remote)


def trial(request: r.TrialRequest, room: Path, site: Site) -> r.TrialResult:
    from tasks.search import run_trial

    def learn(section: Train, heard: Callable[[dict[str, float]], None]) -> Any:
        asked = request.train.model_copy(update={"train": section})
        return run_step("train", asked, site, heard=heard)

    return run_trial(request, room, site.home / "searches", learn)


def train(
    request: r.TrainRequest, room: Path, site: Site, heard: Callable[[dict[str, float]], None] = lambda line: None
) -> r.TrainResult:
    """``heard`` gets each line of the history, and may end the training by an error."""
    from tasks.registry import runs
    from tasks.search import Pruned
    from tasks.train.fit import fit

    run_id = runs.open_run(site.mlflow, request.workload, key_of("train", request), *_run_papers(request))
    dataset_uri = f"dvc:{site.datasets}@{request.revision}"
    runs.log_dataset(site.mlflow, run_id, request.revision, request.dataset.digest_sha256, dataset_uri)
    _log_data_report(request, run_id, site)
    curves = runs.Curves(site.mlflow, run_id, site.factors, site.home / "tensorboard" / request.workload)
    model_py = site.workload_folder(request.workload) / "model.py" if request.model_py_sha256 else None
    gang = _gang(request, site, gang_key(job_key("train", request)))
    encoder = site.encoder_folder(request.workload, request.train.recipe)

    def on_line(line: dict[str, float]) -> None:
        curves.log_line(line)
        heard(line)

    try:
        done = fit(request, room, model_py, on_line, gang, encoder)
    except TryAgain:
        raise
    except Pruned as error:
        runs.log_tags(site.mlflow, run_id, {"drydock.why": str(error)})
        runs.finish_run(site.mlflow, run_id, "KILLED")
        if gang:
            gang.cancel()
        shutil.rmtree(room)
        raise
    except DrydockError as error:
        runs.log_tags(site.mlflow, run_id, {"drydock.why": str(error)})
        runs.finish_run(site.mlflow, run_id, "FAILED")
        raise
    curves.close()
    runs.log_metrics(site.mlflow, run_id, {"train_seconds": done["train_seconds"], "parameters": done["parameters"]})
    return r.TrainResult(run_id=run_id, **done)


def _gang(request: r.TrainRequest, site: Site, key: str) -> Any:
    """Where the ranks run, as the gang of that key; None: as children of this process."""
    if site.settings.training_engine == "process":
        return None
    from tasks.gangs import Containers

    labels = {"workload": request.workload, "step": "train", "key": key}
    logs = site.home / "jobs" / key
    return Containers(site.training_engine, key, labels, logs, lambda line: record_event(site.home, "failure", line))


def _log_data_report(request: r.TrainRequest, run_id: str, site: Site) -> None:
    """The revision's report as the run's artifact, with a tag that leads to it."""
    from tasks.data.revisions import REPORT, file_of
    from tasks.registry import runs

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / REPORT
        path.write_bytes(file_of(site.datasets, request.revision, REPORT))
        runs.log_file(site.mlflow, run_id, path, "data")
    link = f"{site.settings.mlflow_url}/#/runs/{run_id}/artifacts/data/{REPORT}"
    runs.log_tags(site.mlflow, run_id, {"drydock.data_report": link})


def _run_papers(request: r.TrainRequest) -> tuple[dict[str, Any], dict[str, str]]:
    """The run's parameters (the train section) and tags."""
    params = request.train.model_dump(mode="json")
    tags = {"drydock.workload": request.workload, "drydock.dataset_revision": request.revision}
    return params, tags | {"drydock.dataset_sha256": request.dataset.digest_sha256}


def compress(request: r.CompressRequest, room: Path, site: Site) -> r.CompressResult:
    from tasks.compress.compress import compress
    from tasks.train.fit import fit

    def learn(asked: r.TrainRequest, folder: Path, amend: Callable[[Path], None]) -> None:
        """Train a variant's student where everything is trained; its own model.py, if it has one, is its teacher's."""
        model_py = open_room(request.trained) / "model.py" if asked.model_py_sha256 else None
        key = gang_key(f"{job_key('compress', request)}-{folder.name}")
        fit(asked, folder, model_py, lambda line: None, _gang(asked, site, key), amend=amend)

    return compress(request, room, learn)


def evaluate(request: r.EvaluateRequest, room: Path, site: Site) -> r.EvaluateResult:
    from tasks.evaluate.evaluate import evaluate

    return evaluate(request, room)


def judge(request: r.JudgeRequest, room: Path, site: Site) -> r.JudgeResult:
    from tasks.evaluate.compare import compare
    from tasks.registry import runs

    result = compare(request, room)
    for candidate in request.candidates:
        folder = open_room(candidate.evaluation)
        for path in (folder / "report.html", *sorted(folder.glob("*.png")), folder / "measurements.json"):
            runs.log_file(site.mlflow, request.run_id, path, f"evaluation/{candidate.variant}")
    for name in ("report.html", "pareto.png"):
        runs.log_file(site.mlflow, request.run_id, room / name, "evaluation")
    data, labels = open_room(request.validate_data), open_room(request.validate_labels)
    runs.log_folder(site.mlflow, request.run_id, data / "docs", "validation/data_docs")
    runs.log_file(site.mlflow, request.run_id, data / "validation.json", "validation")
    for name in ("report.json", "queue.html", "queue.csv"):
        runs.log_file(site.mlflow, request.run_id, labels / name, "validation/labels")
    runs.log_metrics(site.mlflow, request.run_id, json.loads((room / "metrics.json").read_text()))
    runs.log_tags(site.mlflow, request.run_id, {"drydock.verdict": result.verdict, "drydock.why": result.summary})
    runs.finish_run(site.mlflow, request.run_id, "FINISHED" if result.verdict == "pass" else "FAILED")
    return result


def register(request: r.RegisterRequest, room: Path, site: Site) -> r.RegisterResult:
    from tasks.registry.register import register_package
    from tasks.review import record_registration

    with exclusive(site.home / "locks" / f"register-{request.workload}.lock"):
        result = register_package(request, site.mlflow, site.packages, site.keys, site.root, site.settings.gateway_url)
        record_registration(request.workload, result, request.review_required, site, request.asked_by)
    return result


def _is_registered(request: r.RegisterRequest, done: r.RegisterResult, site: Site) -> bool:
    from tasks.registry.register import is_registered

    return is_registered(request, done, site.mlflow)


class Step(NamedTuple):
    """One step: what it takes and gives, its function, the packages its code lies in, when its result is a refusal,
    and whether what it did outside its room still holds; else it is done once more."""

    request: type[Value]
    result: type[Value]
    run: Callable[..., Any]
    code: tuple[str, ...]
    refusal: Callable[[Any], str | None] = lambda result: None
    holds: Callable[[Any, Any, Site], bool] = lambda request, result, site: True

STEPS: dict[str, Step] = {
    "ingest": Step(r.IngestRequest, r.IngestResult, ingest, ("data",)),
    "clean": Step(r.CleanRequest, r.CleanResult, clean, ("data",)),
    "validate_data": Step(
        r.ValidateDataRequest,
        r.ValidateDataResult,
        validate_data,
        ("data",),
        lambda done: None if done.success else "data validation refused: " + "; ".join(done.failed[:3]),
    ),
    "validate_labels": Step(
        r.ValidateLabelsRequest,
        r.ValidateLabelsResult,
        validate_labels,
        ("data", "gate"),
        lambda done: None if done.verdict.verdict == "pass" else _labels_refused(done),
    ),
    "version": Step(r.VersionRequest, r.VersionResult, version, ("data",)),
    "trial": Step(r.TrialRequest, r.TrialResult, trial, ("train",)),
    "train": Step(r.TrainRequest, r.TrainResult, train, ("train",)),
    "compress": Step(r.CompressRequest, r.CompressResult, compress, ("train", "compress", "serve")),
    "evaluate": Step(r.EvaluateRequest, r.EvaluateResult, evaluate, ("evaluate", "serve", "train")),
    "judge": Step(
        r.JudgeRequest,
        r.JudgeResult,
        judge,
        ("evaluate", "gate"),
        lambda done: None if done.verdict == "pass" else f"the gate says {done.verdict}: {done.summary}",
    ),
    "register": Step(r.RegisterRequest, r.RegisterResult, register, ("registry",), holds=_is_registered),
}


def _labels_refused(done: r.ValidateLabelsResult) -> str:
    place = f"; labels to look at: {done.room.uri}/queue.html" if done.room and done.suspects + done.conflicts else ""
    return f"label validation refused: {done.verdict.summary}{place}"


def run_step(name: str, request: Value, site: Site, **more: Any) -> Value:
    """Run one step, or return the finished result of its key. ``more``: what its function takes beside the request.

    Raises:
        Refused: the step's result says no; the result is kept, and its room can be read.
        DrydockError: as the step says. Nothing is published then.
    """
    step, room = _step(name), room_of(name, request, site)
    room.path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(room.lock):
        if not (_whole(room, site) and _holds(step, room, request, site)):
            result = step.run(request, room.begin(), site, **more)
            room.publish(result.model_dump(mode="json"))
    return _checked(step, room)


def finished(name: str, request: Value, site: Site, just_now: bool = False) -> Value | None:
    """Return the result of a request whose room is published, or None; unless that was just now, what was done outside
    it must hold too. Refusals raise as in ``run_step``."""
    step, room = _step(name), room_of(name, request, site)
    return _checked(step, room) if _whole(room, site) and (just_now or _holds(step, room, request, site)) else None


def _holds(step: Step, room: Room, request: Value, site: Site) -> bool:
    return step.holds(request, step.result.parse(room.result(), str(room.final)), site)


def _whole(room: Room, site: Site) -> bool:
    """Whether the room is published and its bytes are right; a rotten one is set aside, and made again."""
    if (ref := room.published()) is None:
        return False
    try:
        open_room(ref)
    except IntegrityLost as error:
        aside = room.set_aside()
        record_event(site.home, "failure", f"{error}; it is made again, the rotten one lies in {aside}")
        return False
    return True


def room_of(name: str, request: Value, site: Site) -> Room:
    return Room(site.rooms / name, key_of(name, request))


def key_of(name: str, request: Value) -> str:
    """Return the step's key: a digest of its name, its request and its code. Where things lie is no part of it."""
    asked = _without_places(request.model_dump(mode="json"))
    return sha256_of({"step": name, "request": asked, "code": code_sha256(_step(name).code)})[:KEY_DIGITS]


def job_key(step: str, request: Value) -> str:
    """Return the key of a step's job, and of the gang that it starts: short enough for a container's name."""
    return f"{step.replace('_', '-')}-{key_of(step, request)[:16]}"


def gang_key(key: str) -> str:
    """Return the key of the gang that the step of that key starts: both may run on one engine."""
    return f"{key}-gang"


def _without_places(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: _without_places(v) for k, v in data.items() if k != "uri" and not k.endswith("_uri")}
    return [_without_places(item) for item in data] if isinstance(data, list) else data


@lru_cache
def code_sha256(packages: tuple[str, ...]) -> str:
    """Return the digest of the sources that a step's result depends on."""
    root = Path(__file__).parent
    files = sorted(path for name in (*packages, "spec", "store") for path in (root / name).rglob("*.py"))
    return sha256_of({str(path.relative_to(root)): sha256_file(path) for path in files})


def parse_request(name: str, data: Any, where: str) -> Value:
    """Read a step's request from JSON data."""
    return _step(name).request.parse(data, where)


def _checked(step: Step, room: Room) -> Value:
    ref = room.published()
    assert ref is not None
    result = step.result.parse(room.result() | {"room": ref.model_dump()}, str(room.final))
    if reason := step.refusal(result):
        raise Inconclusive(reason) if "inconclusive" in verdict_of(result) else Refused(reason)
    return result


def verdict_of(result: Any) -> str:
    """The verdict of a gate's result: ``pass``, ``fail``, ``error``, ``inconclusive``; none of another step's."""
    found = getattr(result, "verdict", "")
    return str(getattr(found, "verdict", found))


def _step(name: str) -> Step:
    if name not in STEPS:
        raise BadRequest(f"step {name!r} is not there, must be one of {', '.join(STEPS)}")
    return STEPS[name]
