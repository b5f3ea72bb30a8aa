"""Hyper-parameter search: Optuna proposes a trial's values, and ends a trial that is worse than most.

A search is the digest of what is searched (``study_of``): its study is a journal under the home's ``searches/``, which
any number of trials may write at once. A trial trains in the room of the ``train`` step with its values, so the best
one is that step's finished result.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.spec.errors import BadRequest, Refused
from tasks.spec.requests import TrialRequest, TrialResult
from tasks.spec.search import Between, Search, tried
from tasks.spec.train import Train
from tasks.spec.value import sha256_of
from tasks.store.files import write_json

ASKED = "asked.json"
# So many trials are drawn at random, and none of them is ended early: there is nothing to compare with yet.
STARTUP = 4


class Pruned(Refused):
    """The trial was worse than most at the same epoch."""


Learn = Callable[[Train, Callable[[dict[str, float]], None]], Any]


def run_trial(request: TrialRequest, room: Path, studies: Path, learn: Learn) -> TrialResult:
    """Ask for values, train with them, tell what came of it. ``learn`` trains, and calls back with each line.

    Raises:
        DrydockError: what is no fault of the values: it may pass, or is ours.
    """
    import optuna

    study = study_of(request, studies)
    trial, values = _asked(study, request.search, room / ASKED)
    train = tried(request.train.train, values)
    metric = train.stopping.metric
    told = {"number": request.number, "values": values, "train": train}

    def heard(line: dict[str, float]) -> None:
        if "validation_loss" not in line:
            return
        cost = line["validation_loss"] if metric == "loss" else -line[f"validation_{metric}"]
        trial.report(cost, int(line["epoch"]))
        if trial.should_prune():
            raise Pruned(f"trial {request.number}: worse than most at epoch {int(line['epoch'])}")

    try:
        learnt = learn(train, heard)
    except Pruned as error:
        _tell(study, trial, None, optuna.trial.TrialState.PRUNED)
        return TrialResult(**told, state="pruned", why=str(error))
    except BadRequest as error:  # a learning rate at which it diverges, say: one trial's end, not the search's
        _tell(study, trial, None, optuna.trial.TrialState.FAIL)
        return TrialResult(**told, state="failed", why=str(error))
    _tell(study, trial, learnt.best_cost, optuna.trial.TrialState.COMPLETE)
    return TrialResult(
        **told, state="complete", validation_loss=learnt.validation_loss, cost=learnt.best_cost
    )


def study_of(request: TrialRequest, studies: Path) -> Any:
    """Return the study of a search, made when it is first asked for."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    name = f"{request.workload}-{sha256_of([request.search.fingerprint, request.train.fingerprint])[:12]}"
    studies.mkdir(parents=True, exist_ok=True)
    pruner = optuna.pruners.MedianPruner(STARTUP, n_warmup_steps=1) if request.search.prune else None
    return optuna.create_study(
        study_name=name,
        storage=JournalStorage(JournalFileBackend(str(studies / f"{name}.journal"))),
        sampler=optuna.samplers.TPESampler(
            n_startup_trials=STARTUP, seed=request.search.seed + request.number, constant_liar=True
        ),
        pruner=pruner or optuna.pruners.NopPruner(),
        load_if_exists=True,
    )


def _asked(study: Any, search: Search, path: Path) -> tuple[Any, dict[str, Any]]:
    """Return a trial and its values: what a killed attempt had asked for, or new ones."""
    import optuna

    if path.exists():
        asked = json.loads(path.read_text())
        trial = optuna.trial.Trial(study, study.trials[asked["trial"]]._trial_id)
    else:
        trial = study.ask()
    values = {name: _suggested(trial, name, what) for name, what in search.space.items()}
    write_json(path, {"trial": trial.number, "values": values})
    return trial, values


def _suggested(trial: Any, name: str, what: Any) -> Any:
    if not isinstance(what, Between):
        return trial.suggest_categorical(name, what.choices)
    if what.whole:
        return trial.suggest_int(name, int(what.low), int(what.high), log=what.log)
    return trial.suggest_float(name, what.low, what.high, log=what.log)


def _tell(study: Any, trial: Any, value: float | None, state: Any) -> None:
    """Tell a trial's end once; one that was told before stays as it was."""
    study.tell(trial, value, state=state, skip_if_finished=True)


def best_of(trials: list[dict[str, Any]]) -> Train:
    """Return what the best trial trained with: by ``train.stopping.metric``, as a training's best epoch.

    Raises:
        BadRequest: none came to its end; the message is the first one's.
    """
    complete = [TrialResult.parse(trial, "a trial's result") for trial in trials]
    found = [trial for trial in complete if trial.state == "complete"]
    if not found:
        raise BadRequest(f"search: none of {len(trials)} trials came to its end; the first: {complete[0].why}")
    return min(found, key=lambda trial: (trial.cost, trial.number)).train


