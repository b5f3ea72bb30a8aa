"""The site a step works at: this machine's settings, and its stores and services, opened when first asked for."""

from __future__ import annotations

import secrets
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.spec.settings import Settings, resolve
from tasks.store.files import exclusive, write_whole
from tasks.store.sign import make_key

if TYPE_CHECKING:
    from tasks.data.version_store import Remote
    from tasks.release.gateway import Gateway
    from tasks.release.ledger import Ledger
    from tasks.release.rollouts import Rollouts


class Site:
    """Folders and clients of one instance. Nothing is opened before it is used."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or resolve()
        self.home = self.settings.home_path
        self.root = Path(self.settings.root)
        self.rooms = self.home / "rooms"
        self.packages = self.home / "packages"
        self.workloads = Path(self.settings.workloads)
        self.suites = self.root / "great_expectations" / "expectations"
        self.datasets = self.home / "datasets"
        self.corrections = self.home / "corrections"

    @cached_property
    def keys(self) -> Path:
        """The folder of the signing key, made on first use."""
        folder = self.home / "keys"
        with exclusive(self.home / "locks" / "keys.lock"):
            make_key(folder)
        return folder

    @cached_property
    def privacy_key(self) -> bytes:
        """The key that hashes personal data, made on first use; whoever has it can test guesses against a hash."""
        path = self.home / "private" / "privacy.key"
        with exclusive(self.home / "locks" / "privacy-key.lock"):
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                write_whole(path, secrets.token_bytes(32), mode=0o600)
        return path.read_bytes()

    @property
    def dataset_remote(self) -> Remote | None:
        """Where dataset revisions are pushed to; None: nowhere."""
        from tasks.data.version_store import Remote

        url = self.settings.dataset_remote
        return Remote(url, self.settings.dataset_remote_endpoint) if url else None

    @cached_property
    def mlflow(self) -> Any:
        from tasks.registry.client import connect

        return connect(self.settings.mlflow_url, self.settings.mlflow_seconds)

    @cached_property
    def ledger(self) -> Ledger:
        from tasks.release.ledger import Ledger

        database = self.settings.ledger_database
        return Ledger(self.home, Path(database).read_text().strip() if database else None, self.keys)

    @property
    def has_ledger(self) -> bool:
        """Whether there is one to look at; a look makes none."""
        return bool(self.settings.ledger_database) or (self.home / "ledger.db").exists()

    @cached_property
    def gateway(self) -> Gateway:
        from tasks.release.gateway import Gateway

        return Gateway(self.settings)

    @cached_property
    def rollouts(self) -> Rollouts:
        from tasks.release.rollouts import Rollouts

        return Rollouts(self.home)

    @cached_property
    def engine(self) -> Any:
        """The engine that steps and replicas run on."""
        return self._engine(self.settings.engine)

    @cached_property
    def training_engine(self) -> Any:
        """The engine that gangs run on; on the process engine they are children of the step that trains."""
        return self._engine(self.settings.training_engine)

    def _engine(self, name: str) -> Any:
        from tasks.engines import engine

        facts = {"url": self.settings.jobs_url, "token": self.settings.jobs_token} if name == "remote" else {}
        return engine(name, self.home, **facts)

    @property
    def factors(self) -> Any:
        """What energy is converted with."""
        from tasks.registry.efficiency import Factors

        found = self.settings
        return Factors(found.core_watts, found.co2_grams_per_kwh, found.price_per_kwh)

    def workload_folder(self, name: str) -> Path:
        return self.workloads / name

    def encoder_folder(self, workload: str, recipe: Any) -> Path | None:
        """The folder of a recipe's pretrained encoder; None where it has none."""
        return self.workload_folder(workload) / recipe.folder if recipe.kind == "pretrained" else None
