"""What each step is asked: requests from the workload and from what came before. No step is run here.

Everything that a request names is resolved to a digest first (source files, the champion, users' suites,
``model.py``), so a changed file at the same path is another request.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

from tasks.notify import resolve_secrets
from tasks.serve.package import open_package
from tasks.site import Site
from tasks.spec import requests as r
from tasks.spec.compress import Variant
from tasks.spec.errors import BadRequest
from tasks.spec.privacy import Receipt
from tasks.spec.train import Train
from tasks.spec.value import RoomRef, Value
from tasks.spec.workload import Workload
from tasks.steps import code_sha256
from tasks.store.files import sha256_file

# The steps of a retrain, in order; compress and evaluate run once for each variant.
RETRAIN = (
    "ingest",
    "clean",
    "validate_data",
    "validate_labels",
    "version",
    "train",
    "compress",
    "evaluate",
    "judge",
    "register",
)
Done = Mapping[str, Any]


def retrain_of(workload: Workload) -> tuple[str, ...]:
    """The steps of one workload: with a search, its trials come before the training."""
    before = RETRAIN.index("train")
    return (*RETRAIN[:before], "trial", *RETRAIN[before:]) if workload.search else RETRAIN


def ingest(workload: Workload, done: Done, site: Site, item: Any = None) -> Value:
    from tasks.data.ingest import resolve
    from tasks.data.known import Known, known_path
    from tasks.data.privacy import key_id

    data = workload.data
    folder = site.workload_folder(workload.name)
    known = Known(known_path(site.home, workload.name))
    return r.IngestRequest(
        workload=workload.name,
        source=data.source,
        files=resolve(data.source, folder, lambda text: resolve_secrets(text, site), site.datasets, known),
        feature=data.feature,
        label=data.label,
        split_column=data.split.column,
        columns=data.read_columns,
        made_columns=data.made_columns,
        bad_rows=data.bad_rows,
        privacy=data.privacy,
        privacy_key_id=key_id(site.privacy_key) if data.privacy.hashes else None,
    )


def clean(workload: Workload, done: Done, site: Site, item: Any = None) -> Value:
    data = workload.data
    return r.CleanRequest(
        workload=workload.name,
        raw=_room(done["ingest"]),
        feature=data.feature,
        label=data.label,
        rules=data.clean,
        split=data.split,
        keep=data.keep,
        corrections=_corrections(workload, site),
    )


def validate_data(workload: Workload, done: Done, site: Site, item: Any = None) -> Value:
    from tasks.data.expectations import suites_sha256
    from tasks.data.revisions import last_accepted

    data, cleaned = workload.data, done["clean"]
    unread = done["ingest"]["quarantined_rows"]
    # A revision of these very rows is no other one to compare with, unless each run must bring something new.
    apart = None if data.expectations.fresh else cleaned["room"]["digest_sha256"]
    return r.ValidateDataRequest(
        workload=workload.name,
        raw=_room(done["ingest"]),
        clean=_room(cleaned),
        rows_in=cleaned["rows_in"] + unread,
        dropped_rows=cleaned["dropped_rows"] + unread,
        feature=data.feature,
        label=data.label,
        split=data.split,
        expectations=data.expectations,
        suites_sha256=suites_sha256(site.suites, workload.name),
        sources=tuple(done["ingest"]["sources"]),
        previous=last_accepted(site.datasets, workload.name, apart),
        anonymity=data.privacy.anonymity,
        columns=tuple(data.columns),
        keep=data.keep,
        today=dt.datetime.now(dt.UTC).date().isoformat() if data.expectations.newest else None,
        made_columns=data.made_columns,
    )


def validate_labels(workload: Workload, done: Done, site: Site, item: Any = None) -> Value:
    data = workload.data
    return r.ValidateLabelsRequest(
        workload=workload.name,
        clean=_room(done["clean"]),
        feature=data.feature,
        label=data.label,
        rules=data.labels,
        corrections=_corrections(workload, site),
    )


def version(workload: Workload, done: Done, site: Site, item: Any = None) -> Value:
    return r.VersionRequest(
        workload=workload.name,
        feature=workload.data.feature,
        clean=_room(done["clean"]),
        validate_data=_room(done["validate_data"]),
        validate_labels=_room(done["validate_labels"]),
        corrections=_corrections(workload, site),
        sources=tuple(done["ingest"]["sources"]),
        privacy=Receipt.parse(done["ingest"]["privacy"], "the receipt"),
        augment=workload.data.augment,
    )


def trial(workload: Workload, done: Done, site: Site, item: Any = None) -> Value:
    """``item`` is the trial's number."""
    assert workload.search is not None
    request = _training(workload, workload.train, done, site)
    return r.TrialRequest(workload=workload.name, number=item, search=workload.search, train=request)


def train(workload: Workload, done: Done, site: Site, item: Any = None) -> Value:
    return _training(workload, _train_section(workload, done), done, site)


def _train_section(workload: Workload, done: Done) -> Train:
    """The section as the file has it, or as the best trial of its search had it."""
    from tasks.search import best_of

    return best_of(done["trial"]) if workload.search else workload.train


def _training(workload: Workload, section: Train, done: Done, site: Site) -> r.TrainRequest:
    return r.TrainRequest(
        workload=workload.name,
        dataset=_room(done["version"]),
        revision=done["version"]["revision"],
        feature=workload.data.feature,
        label=workload.data.label,
        train=section,
        model_py_sha256=_model_py(workload, site),
        encoder_sha256=_encoder(workload, site),
    )


def compress(workload: Workload, done: Done, site: Site, item: Any = None) -> Value:
    """``item`` is the variant's name."""
    variant = _variant(workload, item)
    several = len(getattr(variant, "students", ())) > 1
    return r.CompressRequest(
        workload=workload.name,
        variant=variant,
        objective=workload.compress.objective if several else None,
        trained=_room(done["train"]),
        dataset=_room(done["version"]),
        feature=workload.data.feature,
        label=workload.data.label,
        train=_train_section(workload, done),
        also=workload.compress.also,
    )


def evaluate(workload: Workload, done: Done, site: Site, item: Any = None) -> Value:
    """``item`` is the result of compress for one variant."""
    return _evaluation(workload, done, _package_uri(item), item["package_sha256"], site)


def evaluate_champion(workload: Workload, done: Done, site: Site, item: Any = None) -> Value | None:
    """The champion on the same holdout. The step is ``evaluate``.

    None where the ledger shows no champion, or where it reads other features or knows other classes than the
    workload's file by now: then there is nothing to compare on the same rows.
    """
    champion = site.ledger.champion(workload.name)
    if champion is None:
        return None
    folder = site.packages / champion.digest_sha256
    if not folder.is_dir():
        from tasks.registry import versions

        registered = versions.get(site.mlflow, workload.name, champion.version)
        folder = versions.fetch(site.mlflow, registered, site.packages, site.keys)
    signature = open_package(folder, champion.digest_sha256, site.keys).signature
    if signature.feature != workload.data.feature or not signature.is_for(workload.data.label):
        return None
    return _evaluation(workload, done, str(folder), champion.digest_sha256, site)


def _evaluation(workload: Workload, done: Done, uri: str, package_sha256: str, site: Site) -> Value:
    return r.EvaluateRequest(
        workload=workload.name,
        package_uri=uri,
        package_sha256=package_sha256,
        dataset=_room(done["version"]),
        label=workload.data.label,
        evaluate=workload.evaluate,
        core_watts=site.settings.core_watts,
        price_per_kwh=site.settings.price_per_kwh,
    )


def judge(workload: Workload, done: Done, site: Site, item: Any = None) -> Value:
    candidates = tuple(
        r.Candidate(
            variant=compressed["variant"],
            kind=_variant(workload, compressed["variant"]).kind,
            package_sha256=compressed["package_sha256"],
            package_uri=_package_uri(compressed),
            evaluation=_room(evaluated),
            note=compressed["note"],
        )
        for compressed, evaluated in zip(done["compress"], done["evaluate"], strict=True)
    )
    champion = done.get("evaluate_champion")
    if champion and champion["package_sha256"] in {candidate.package_sha256 for candidate in candidates}:
        # The run has made the champion again: there is nothing to compare, and the verdict is as it was.
        champion = None
    return r.JudgeRequest(
        workload=workload.name,
        run_id=done["train"]["run_id"],
        rules=workload.gate.rules,
        objective=workload.compress.objective,
        candidates=candidates,
        champion=_room(champion) if champion else None,
        validate_data=_room(done["validate_data"]),
        validate_labels=_room(done["validate_labels"]),
    )


def register(workload: Workload, done: Done, site: Site, item: Any = None) -> Value:
    judged = done["judge"]
    return r.RegisterRequest(
        workload=workload.name,
        description=workload.description,
        run_id=done["train"]["run_id"],
        revision=done["version"]["revision"],
        summary=judged["summary"],
        review_required=workload.review.required,
        code_sha256=code_sha256(("data", "train", "compress", "evaluate", "gate", "serve")),
        rules=workload.gate.rules,
        dataset=_room(done["version"]),
        chosen=r.Candidate.parse(judged["chosen"], "the verdict"),
        judged=_room(judged),
        validate_data=_room(done["validate_data"]),
        validate_labels=_room(done["validate_labels"]),
    )


def request_for(
    step: str, workload: Workload, done: Done, site: Site, item: Any = None, asked_by: tuple[str, ...] = ()
) -> Value | None:
    """Return the request of one step. ``done`` holds the results before it, by step, as plain data; ``asked_by`` who
    asked for the run, which registration keeps."""
    builders = {name: globals()[name] for name in (*RETRAIN, "trial", "evaluate_champion")}
    if step not in builders:
        raise BadRequest(f"step {step!r} is not part of a retrain: {', '.join(builders)}")
    request: Value | None = builders[step](workload, done, site, item)
    return request.model_copy(update={"asked_by": asked_by}) if isinstance(request, r.RegisterRequest) else request


def _room(result: dict[str, Any]) -> RoomRef:
    return RoomRef.parse(result["room"], "a result's room")


def _corrections(workload: Workload, site: Site) -> RoomRef | None:
    from tasks.data.corrections import newest

    return newest(site.corrections, workload.name)


def _variant(workload: Workload, name: str) -> Variant:
    for variant in workload.compress.variants:
        if variant.label == name:
            return variant
    known = ", ".join(workload.compress.labels)
    raise BadRequest(f"{workload.name}: compress.variants has no {name!r}, must be one of {known}")


def _package_uri(compressed: dict[str, Any]) -> str:
    return f"{compressed['room']['uri']}/package"


def _model_py(workload: Workload, site: Site) -> str | None:
    if workload.train.recipe.kind != "model.py":
        return None
    path = site.workload_folder(workload.name) / "model.py"
    if not path.is_file():
        raise BadRequest(f"{path}: is not there, train.recipe.kind 'model.py' needs it")
    return sha256_file(path)


def _encoder(workload: Workload, site: Site) -> str | None:
    from tasks.train.brought import encoder_sha256

    folder = site.encoder_folder(workload.name, workload.train.recipe)
    return encoder_sha256(folder) if folder else None
