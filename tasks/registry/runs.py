"""Runs: one for each training, found again by its key, with curves as they grow."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tasks.registry.client import translated
from tasks.spec.errors import TryAgain

KEY = "drydock.key"
CURVES = ("train_loss", "validation_loss", "validation_accuracy", "samples_per_second")


def open_run(client: Any, workload: str, key: str, params: dict[str, Any], tags: dict[str, str]) -> str:
    """Return the id of the run of ``key``: the one that is there, or a new one with params and tags."""
    with translated(f"run of {workload}"):
        experiment = experiment_id(client, workload)
        found = client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", max_results=1)
        if found:
            return found[0].info.run_id
        name = f"{workload}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
        run = client.create_run(experiment, tags=tags | {KEY: key}, run_name=name)
        for name, value in params.items():
            client.log_param(run.info.run_id, name, str(value)[:500])
        return run.info.run_id


def experiment_id(client: Any, workload: str) -> str:
    """Return the workload's experiment; two runs may make it at once, one of them wins."""
    found = client.get_experiment_by_name(workload)
    if found is not None:
        return found.experiment_id
    from mlflow.exceptions import MlflowException

    try:
        return client.create_experiment(workload, tags={"mlflow.experimentKind": "custom_model_development"})
    except MlflowException:
        return client.get_experiment_by_name(workload).experiment_id


def log_dataset(client: Any, run_id: str, name: str, digest: str, uri: str) -> None:
    """Show the dataset revision as the run's input."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(name=name, digest=digest[:32], source_type="dvc", source=f'{{"uri": "{uri}"}}')
    with translated("the run's dataset"):
        client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


class Curves:
    """The run's curves. What MLflow does not take while training goes on is kept and sent later, in order."""

    def __init__(self, client: Any, run_id: str) -> None:
        self.client, self.run_id = client, run_id
        self.waiting: list[Any] = []
        self.retry_at = 0.0

    def log_epoch(self, line: dict[str, float]) -> None:
        """Add one epoch's line. The same line twice is one point: time, step and value are the same."""
        from mlflow.entities import Metric

        at, step = int(line["at_ms"]), int(line["epoch"])
        self.waiting += [Metric(name, float(line[name]), at, step) for name in CURVES]
        if time.monotonic() >= self.retry_at:
            try:
                self.flush()
            except TryAgain:
                # Training does not wait for MLflow: at the latest the close sends all of it.
                self.retry_at = time.monotonic() + 10

    def flush(self) -> None:
        """Send what waits.

        Raises:
            TryAgain: MLflow is down; everything is kept.
        """
        while self.waiting:
            with translated("the run's curves"):
                self.client.log_batch(self.run_id, metrics=self.waiting[:1000])
            del self.waiting[:1000]


def log_metrics(client: Any, run_id: str, metrics: dict[str, float]) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    with translated("the run's metrics"):
        client.log_batch(run_id, metrics=[Metric(name, float(value), now, 0) for name, value in metrics.items()])


def log_tags(client: Any, run_id: str, tags: dict[str, str]) -> None:
    with translated("the run's tags"):
        for name, value in tags.items():
            client.set_tag(run_id, name, value)


def log_folder(client: Any, run_id: str, folder: Path, under: str) -> None:
    """Log a folder's files as the run's artifacts."""
    with translated(f"artifacts {under}"):
        client.log_artifacts(run_id, str(folder), under)


def log_file(client: Any, run_id: str, path: Path, under: str) -> None:
    with translated(f"artifact {under}/{path.name}"):
        client.log_artifact(run_id, str(path), under)


def finish_run(client: Any, run_id: str, status: str = "FINISHED") -> None:
    with translated("the run's end"):
        client.set_terminated(run_id, status)
