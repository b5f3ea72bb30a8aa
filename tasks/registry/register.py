"""Register the chosen package: sign it, write its card, bind the evidence, create the version. Once a package; judged
anew, its version gets the new evidence, on which nobody has decided yet."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tasks.registry import runs, versions
from tasks.registry.card import render_card
from tasks.registry.holdout import keep_holdout, request_of
from tasks.serve.package import Package, open_package
from tasks.spec.privacy import Receipt
from tasks.spec.requests import RegisterRequest, RegisterResult, ValidateDataResult
from tasks.spec.value import sha256_of
from tasks.store.files import copy_folder, sha256_file, write_json
from tasks.store.manifest import verify
from tasks.store.room import open_room
from tasks.store.sign import key_id, sign_folder


def register_package(
    request: RegisterRequest, client: Any, packages: Path, keys: Path, root: Path, gateway: str
) -> RegisterResult:
    """Return the version of the chosen package, created unless it was registered before.

    Raises:
        IntegrityLost: the package or a room of its evidence changed since it was judged.
    """
    digest = request.chosen.package_sha256
    existing = versions.find(client, request.workload, digest)
    evidence = evidence_pack(request, keys)
    package = _keep_package(request, packages, keys)
    if existing and existing.evidence_sha256 == sha256_of(evidence):
        return _result(existing, created=False)
    opened = open_package(package, digest, keys)
    run_id = existing.run_id if existing else request.run_id
    papers = versions.papers(sha256_of(evidence))
    facts = _facts(request, opened, evidence, keys, gateway) | {"whole": f"#/runs/{run_id}/artifacts/{papers}/card.md"}
    card = render_card(root / "mlflow" / "card.md.j2", facts)
    with tempfile.TemporaryDirectory() as scratch:
        write_json(Path(scratch) / "evidence.json", evidence)
        (Path(scratch) / "card.md").write_text(card)
        for name in ("evidence.json", "card.md"):
            runs.log_file(client, run_id, Path(scratch) / name, papers)
    if existing:
        return _result(versions.renew(client, existing, card, _tags(request, evidence)), created=False)
    keep_holdout(client, request.run_id, request.dataset, opened.signature.feature, digest, packages)
    network = Path(request.chosen.package_uri).parent / "network"
    if network.is_dir():
        verify(network.parent)
        runs.log_folder(client, request.run_id, network, f"network-{digest[:12]}")
    created = versions.register(client, request.workload, request.run_id, package, card, _tags(request, evidence))
    return _result(created, created=True)


def is_registered(request: RegisterRequest, done: RegisterResult, client: Any) -> bool:
    """Whether the registry holds the version with this evidence: another run may have judged its package anew."""
    found = versions.find(client, request.workload, done.package_sha256)
    return found is not None and found.evidence_sha256 == done.evidence_sha256


def evidence_pack(request: RegisterRequest, keys: Path) -> dict[str, Any]:
    """Return what an approval binds to: digests of model, data, code, verdict and validations, and the gate's rules."""
    return {
        "package_sha256": request.chosen.package_sha256,
        "dataset_sha256": request.dataset.digest_sha256,
        "code_sha256": request.code_sha256,
        "rules": [rule.model_dump(mode="json") for rule in request.rules],
        "verdict_sha256": sha256_file(open_room(request.judged) / "verdict.json"),
        "validate_data_sha256": request.validate_data.digest_sha256,
        "validate_labels_sha256": request.validate_labels.digest_sha256,
        "key_id": key_id(keys),
    }


def _keep_package(request: RegisterRequest, packages: Path, keys: Path) -> Path:
    """Copy the package to where servers load it from, signed, whole or not at all."""
    digest = request.chosen.package_sha256
    final, working = packages / digest, packages / f".{digest}"
    if not final.is_dir():
        shutil.rmtree(working, ignore_errors=True)
        copy_folder(Path(request.chosen.package_uri), working)
        sign_folder(working, keys)
        open_package(working, digest, keys)
        os.rename(working, final)
    open_package(final, digest, keys)
    return final


def _facts(
    request: RegisterRequest, opened: Package, evidence: dict[str, Any], keys: Path, gateway: str
) -> dict[str, Any]:
    verdict = json.loads((open_room(request.judged) / "verdict.json").read_text())
    evaluation = open_room(request.chosen.evaluation)
    measured = json.loads((evaluation / "measurements.json").read_text())
    labels = json.loads((open_room(request.validate_labels) / "result.json").read_text())
    data = json.loads((open_room(request.validate_data) / "result.json").read_text())
    dataset = json.loads((open_room(request.dataset) / "result.json").read_text())
    receipt = json.loads((open_room(request.dataset) / "privacy.json").read_text())
    return {
        "workload": request.workload,
        "description": request.description,
        "variant": request.chosen.variant,
        "verdict": verdict["verdict"],
        "summary": verdict["summary"],
        "judged": verdict["judged"],
        "package_sha256": request.chosen.package_sha256,
        "evidence_sha256": sha256_of(evidence),
        "revision": request.revision,
        "dataset_sha256": request.dataset.digest_sha256,
        "run_id": request.run_id,
        "code_sha256": request.code_sha256,
        "classes": opened.signature.classes,
        "number": opened.signature.number,
        "key_id": key_id(keys),
        "evaluation": json.loads((evaluation / "result.json").read_text()),
        "measurements": measured,
        "energy": next(m for m in measured if m["metric"] == "joules_per_1000"),
        "rows": sum(dataset["rows_by_split"].values()),
        "rows_by_split": dataset["rows_by_split"],
        "expectations": ValidateDataResult.parse(data, "the validation").summary,
        "warnings": data["warned"],
        "privacy": Receipt.parse(receipt, "the receipt").summary,
        "run": f"#/runs/{request.run_id}/artifacts",
        "labels": "each text is its own" if opened.signature.tells_next else _labels(labels),
        "inputs": _inputs(opened),
        "gateway": gateway,
        "example": json.dumps(example_request(opened)),
    }


def _labels(found: dict[str, Any]) -> str:
    if found["noise_ratio"] is None:
        return f"numbers, {found['conflicts']} rows in conflict; likely errors are not estimated for numbers"
    return f"{found['suspects']} suspects, estimated noise {found['noise_ratio']:.2%}"


def example_request(package: Package) -> dict[str, Any]:
    """Return an Open Inference Protocol request that asks for the package's golden sample."""
    return request_of(package.signature.feature, package.golden.rows[0])


def _inputs(package: Package) -> str:
    feature = package.signature.feature
    if feature.kind == "tokens":
        return f"texts of at most {feature.max_chars} characters, whose words (by white space) are tagged each"
    if feature.kind == "text":
        return f"texts of at most {feature.max_chars} characters; tokens beyond {feature.max_tokens} are cut"
    if feature.kind == "image":
        return f"images of {feature.height} x {feature.width}, values 0 to {feature.max_value}"
    if feature.kind == "ids":
        return "ids of a user and an item; one that training did not see is answered as any other such"
    return f"the columns {', '.join(feature.columns)}"


def _tags(request: RegisterRequest, evidence: dict[str, Any]) -> dict[str, str]:
    measured = json.loads((open_room(request.chosen.evaluation) / "measurements.json").read_text())
    energy = next(m["value"] for m in measured if m["metric"] == "joules_per_1000")
    return {
        versions.PACKAGE_TAG: request.chosen.package_sha256,
        versions.EVIDENCE_TAG: sha256_of(evidence),
        "drydock.variant": request.chosen.variant,
        "drydock.dataset_revision": request.revision,
        "drydock.verdict": "pass",
        "drydock.why": request.summary[:500],
        "drydock.joules_per_1000": f"{energy:.4g}",
        "drydock.code_sha256": request.code_sha256,
    }


def _result(version: versions.Version, created: bool) -> RegisterResult:
    return RegisterResult(
        version=version.version,
        package_sha256=version.package_sha256,
        evidence_sha256=version.evidence_sha256,
        created=created,
    )
