"""Runs: one for each training, found again by its key, with curves as they grow."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tasks.registry.client import translated
from tasks.registry.efficiency import Factors, costs_of, efficiency_table, energy_of
from tasks.registry.tensorboard import EventFile
from tasks.spec.errors import TryAgain

KEY = "drydock.key"
# What a line says of its place; all else in it is a curve.
PLACE = ("epoch", "step", "at_ms", "ranks")
TABLE = "efficiency.json"


def open_run(client: Any, workload: str, key: str, params: dict[str, Any], tags: dict[str, str]) -> str:
    """Return the id of the run of ``key``: the one that is there, or a new one with params, which may be nested, and
    tags."""
    from mlflow.entities import Param

    with translated(f"run of {workload}"):
        experiment = experiment_id(client, workload)
        found = client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", max_results=1)
        if found:
            return found[0].info.run_id
        name = f"{workload}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
        run = client.create_run(experiment, tags=tags | {KEY: key}, run_name=name)
        told = [Param(name, str(value)[:500]) for name, value in flat(params).items()]
        client.log_batch(run.info.run_id, params=told)
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


def measured_runs(client: Any, workload: str) -> list[Any]:
    """Return the data (metrics, tags) of a workload's trainings that were measured to their end, newest first."""
    with translated(f"runs of {workload}"):
        experiment = client.get_experiment_by_name(workload)
        if experiment is None:
            return []
        found = client.search_runs([experiment.experiment_id], "metrics.energy_kwh >= 0", max_results=1000)
        return [run.data for run in found]


class Curves:
    """The run's curves, in MLflow and in TensorBoard's form under ``board``. What MLflow does not take while training
    goes on is kept and sent later, in order."""

    def __init__(self, client: Any, run_id: str, factors: Factors, board: Path) -> None:
        self.client, self.run_id, self.factors, self.board = client, run_id, factors, board
        self.waiting: list[Any] = []
        self.epochs: list[dict[str, float]] = []
        self.retry_at = 0.0
        self._events: EventFile | None = None

    def log_line(self, line: dict[str, float]) -> None:
        """Add a line of the history: an epoch's by its epoch, one from within an epoch by its step. The same line
        twice is one point: time, step and value are the same."""
        from mlflow.entities import Metric

        found, at = self._points(line), int(line["at_ms"])
        whole = "validation_loss" in line
        step = int(line["epoch"] if whole else line["step"])
        self.waiting += [Metric(name, value, at, step) for name, value in found.items()]
        self._events = self._events or EventFile(self.board / self.run_id)
        self._events.add(found, step, at / 1000)
        if whole:
            self.epochs.append(line)
        if time.monotonic() >= self.retry_at:
            try:
                self.flush()
            except TryAgain:
                # Training does not wait for MLflow: at the latest the close sends all of it.
                self.retry_at = time.monotonic() + 10

    def _points(self, line: dict[str, float]) -> dict[str, float]:
        """A line's values by the names of their curves."""
        values = {name: float(value) for name, value in line.items() if name not in PLACE}
        if "validation_loss" not in line:
            return {f"progress/{name}": value for name, value in values.items()}
        if "cpu_seconds" in line:
            values["energy_joules"] = energy_of(line, self.factors).joules
        return {f"system/{name}" if name.startswith("rank_") else name: value for name, value in values.items()}

    def close(self) -> None:
        """Send what waits, then the run's costs and its table of efficiency.

        Raises:
            TryAgain: MLflow is down; everything is kept.
        """
        self.flush()
        if not self.epochs:
            return
        log_metrics(self.client, self.run_id, costs_of(self.epochs, self.factors))
        source = energy_of(self.epochs[-1], self.factors).source
        log_tags(self.client, self.run_id, {"drydock.energy_source": source, "drydock.tensorboard": str(self.board)})
        with translated("the run's efficiency"):
            self.client.log_dict(self.run_id, efficiency_table(self.epochs, self.factors), TABLE)
            listed = json.dumps([{"path": TABLE, "type": "table"}])
            self.client.set_tag(self.run_id, "mlflow.loggedArtifacts", listed)

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


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested data as parameters: ``{"a": {"b": 1}}`` is ``{"a.b": 1}``. Pure."""
    found: dict[str, Any] = {}
    for name, value in data.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
