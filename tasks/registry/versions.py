"""Versions: a signed package registered file by file, its card, its tags, its aliases; and back again.

``mlflow.onnx`` rewrites the model file and breaks the digest, so the package is logged as it is, beside an
``MLmodel`` file that names our own loader.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from pydantic import Field

from tasks.registry.client import translated
from tasks.spec.errors import BadRequest, IntegrityLost
from tasks.spec.value import Value, sha256_of
from tasks.store.files import copy_folder
from tasks.store.manifest import verify
from tasks.store.sign import verify_folder_signature

CARD_CHARACTERS, CUT = 5000, "\n… (cut: this is as long as MLflow keeps; whole in the run's artifacts)"
PACKAGE_TAG = "drydock.package_sha256"
EVIDENCE_TAG = "drydock.evidence_sha256"
# Set by us when a person decided; REQUEST_TAG is what a person may set in MLflow's own page to ask for it.
DECISION_TAG = "drydock.decision"
REQUEST_TAG = "review"
# How its last rollout ended.
ROLLOUT_TAG = "drydock.rollout"


class Version(Value):
    """A registered version as the rest of Drydock sees it."""

    workload: str
    version: str
    package_sha256: str
    evidence_sha256: str
    run_id: str = ""
    tags: dict[str, str] = Field(default={})


def find(client: Any, workload: str, package_sha256: str) -> Version | None:
    """Return the version that holds this package, or None."""
    with translated(f"versions of {workload}"):
        found = client.search_model_versions(f"name = '{workload}' and tags.`{PACKAGE_TAG}` = '{package_sha256}'")
    return _version(min(found, key=lambda mv: int(mv.version))) if found else None


def get(client: Any, workload: str, version: str) -> Version:
    """Return one version.

    Raises:
        BadRequest: there is no such version; the message lists those there are.
    """
    known = list_versions(client, workload)
    for found in known:
        if found.version == version:
            return found
    names = ", ".join(v.version for v in known) or "none"
    raise BadRequest(f"{workload}: version {version!r} is not registered; registered: {names}")


def list_versions(client: Any, workload: str) -> list[Version]:
    """Return all versions, oldest first."""
    with translated(f"versions of {workload}"):
        found = client.search_model_versions(f"name = '{workload}'", max_results=1000)
    return sorted((_version(mv) for mv in found), key=lambda v: int(v.version))


def register(
    client: Any, workload: str, run_id: str, package: Path, card: str, tags: dict[str, str]
) -> Version:
    """Log the signed package under its run and create the version, tags and card in one call, last.

    A registration that was killed before leaves files under the run and no version; the next one overwrites
    them. The caller holds the workload's registration lock.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        copy_folder(package, folder / "package")
        _write_mlmodel(folder, run_id)
        with translated(f"the package of {workload}"):
            client.log_artifacts(run_id, str(folder), _artifacts(tags[PACKAGE_TAG]))
    with translated(f"a version of {workload}"):
        _ensure_model(client, workload)
        source = f"{client.get_run(run_id).info.artifact_uri}/{_artifacts(tags[PACKAGE_TAG])}"
        created = client.create_model_version(workload, source, run_id, tags=tags, description=fitting(card))
    return _version(created)


def renew(client: Any, version: Version, card: str, tags: dict[str, str]) -> Version:
    """Give a version the evidence by which its package was judged anew, and its card; that of evidence comes last.

    An approval of the evidence before counts no more: it binds to another digest.
    """
    with translated(f"version {version.version} of {version.workload}"):
        client.update_model_version(version.workload, version.version, description=fitting(card))
        for key in sorted(tags, key=lambda key: key == EVIDENCE_TAG):
            client.set_model_version_tag(version.workload, version.version, key, tags[key])
    delete_version_tag(client, version.workload, version.version, DECISION_TAG)
    with translated(f"version {version.version} of {version.workload}"):
        return _version(client.get_model_version(version.workload, version.version))


def fitting(card: str) -> str:
    """Return a card as long as MLflow's column for it: SQLite takes any length, PostgreSQL refuses it. Pure."""
    if len(card) <= CARD_CHARACTERS:
        return card
    return card[: CARD_CHARACTERS - len(CUT)] + CUT


def fetch(client: Any, version: Version, packages: Path, keys: Path) -> Path:
    """Return the folder of a version's package, verified; downloaded first where it is not at hand.

    Raises:
        IntegrityLost: what MLflow gave is not the package that was registered, or its signature is wrong.
    """
    final = packages / version.package_sha256
    if not final.is_dir():
        packages.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=packages, prefix=".fetch-") as scratch:
            downloaded = _downloaded(client, version, scratch, keys)
            if not final.is_dir():
                os.rename(downloaded, final)
    _verified(final, version, keys)
    return final


def check_stored(client: Any, version: Version, keys: Path) -> None:
    """Hold what MLflow keeps of a version against its digest and signature, whatever lies at hand.

    Raises:
        IntegrityLost: it is not the package that was registered: an upload that was cut, say.
    """
    with tempfile.TemporaryDirectory() as scratch:
        _downloaded(client, version, scratch, keys)


def _downloaded(client: Any, version: Version, scratch: str, keys: Path) -> Path:
    with translated(f"the package of {version.workload} version {version.version}"):
        under = f"{_artifacts(version.package_sha256)}/package"
        folder = Path(client.download_artifacts(version.run_id, under, scratch))
    _verified(folder, version, keys)
    return folder


def evidence_of(client: Any, version: Version) -> dict[str, Any]:
    """Return a version's evidence pack: it lies with the run's artifacts, and its digest is what approvals bind to.

    Raises:
        IntegrityLost: it is not the pack that the version's tags state.
    """
    name, folder = f"{version.workload} version {version.version}", papers(version.evidence_sha256)
    path = f"{folder}/evidence.json"
    with tempfile.TemporaryDirectory() as scratch, translated(f"the evidence of {version.workload}"):
        if path not in {item.path for item in client.list_artifacts(version.run_id, folder)}:
            raise IntegrityLost(f"{name}: its run has no evidence {version.evidence_sha256[:12]}")
        content = Path(client.download_artifacts(version.run_id, path, scratch)).read_bytes()
    try:
        pack: dict[str, Any] = json.loads(content)
    except ValueError:
        raise IntegrityLost(f"{name}: its evidence pack can't be read") from None
    digest = sha256_of(pack)
    if digest != version.evidence_sha256:
        wanted = version.evidence_sha256[:12]
        raise IntegrityLost(f"{name}: its evidence pack has digest {digest[:12]}, must be {wanted}")
    if pack.get("package_sha256") != version.package_sha256:
        raise IntegrityLost(f"{name}: its evidence is of package {str(pack.get('package_sha256'))[:12]}")
    return pack


def papers(evidence_sha256: str) -> str:
    """The folder under its run of a version's evidence and card: another for each evidence, so that none is changed."""
    return f"evidence-{evidence_sha256[:12]}"


def _artifacts(package_sha256: str) -> str:
    """The package's own folder under its run: one training may lead to several versions."""
    return f"model-{package_sha256[:12]}"


def _verified(folder: Path, version: Version, keys: Path) -> None:
    try:
        verify(folder, version.package_sha256)
        verify_folder_signature(folder, keys)
    except IntegrityLost as error:
        raise IntegrityLost(f"{version.workload} version {version.version}: {error}") from None


class Aliases:
    """The registry's aliases: they mirror the ledger, which calls this."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def get(self, workload: str) -> dict[str, str]:
        """Return alias -> version of one registered model; none registered: empty."""
        from mlflow.exceptions import MlflowException

        with translated(f"aliases of {workload}"):
            try:
                return dict(self.client.get_registered_model(workload).aliases)
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return {}
                raise

    def set(self, workload: str, alias: str, version: str | None) -> None:
        with translated(f"alias {alias} of {workload}"):
            if version is None:
                self.client.delete_registered_model_alias(workload, alias)
            else:
                self.client.set_registered_model_alias(workload, alias, version)


def set_version_tag(client: Any, workload: str, version: str, key: str, value: str) -> None:
    with translated(f"tag {key} of {workload} version {version}"):
        client.set_model_version_tag(workload, version, key, value)


def _ensure_model(client: Any, workload: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(workload, description=f"Versions of the workload {workload}.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _write_mlmodel(folder: Path, run_id: str) -> None:
    """Write the ``MLmodel`` file with which ``mlflow.pyfunc.load_model`` finds our loader."""
    from mlflow.models import Model

    model = Model(artifact_path="model", run_id=run_id)
    model.add_flavor("python_function", loader_module="tasks.registry.loader", data="package")
    model.save(str(folder / "MLmodel"))


def _version(mv: Any) -> Version:
    return Version(
        workload=mv.name,
        version=str(mv.version),
        package_sha256=mv.tags.get(PACKAGE_TAG, ""),
        evidence_sha256=mv.tags.get(EVIDENCE_TAG, ""),
        run_id=mv.run_id or "",
        tags=dict(mv.tags),
    )


def delete_version_tag(client: Any, workload: str, version: str, key: str) -> None:
    with translated(f"tag {key} of {workload} version {version}"):
        client.delete_model_version_tag(workload, version, key)
