"""The rollouts of a home, one file a workload: the one under way, or the last one.

    <home>/rollouts/<workload>.json          replaced whole; readable by its owner only, for it holds a token
    <home>/rollouts/ended/<workload>.json    the last ones that ended, oldest first

Who changes one holds the workload's lease (``Ledger.lease``).
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from pydantic import ValidationError

from tasks.release.entries import lock_name
from tasks.release.rollout import RolloutState, abort
from tasks.spec.errors import IntegrityLost, TryAgain, from_os
from tasks.spec.value import explain
from tasks.store.files import write_json, write_whole

MAX_ENDED = 50


class RolloutActive(TryAgain):
    """Another rollout of the workload is under way."""


class Rollouts:
    """The store under ``home``."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "rollouts"

    def begin(self, state: RolloutState) -> RolloutState:
        """Keep a new rollout and return it; the same id again returns the one that is known.

        Raises:
            RolloutActive: another one is under way.
        """
        if known := self.find(state.workload, state.rollout_id):
            return known
        last = self.last(state.workload)
        if last and not last.ended:
            raise RolloutActive(
                f"{state.workload}: the rollout of version {last.candidate.version} by {last.actor} is under way "
                f"({last.phase}); wait for its end, or end it by ./drydock rollback {state.workload}"
            )
        if last:
            self._keep(last)
        self.save(state)
        return state

    def last(self, workload: str) -> RolloutState | None:
        """Return the rollout under way, or the last one; None where there never was one.

        Raises:
            IntegrityLost: its file can't be read.
        """
        path = self._path(workload)
        try:
            return RolloutState.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise from_os(error) from error
        except ValidationError as error:
            raise IntegrityLost(
                f"{path}: can't be read ({explain(error, RolloutState)}); remove it to end the rollout, "
                "the reconciler then puts the route back"
            ) from None

    def active(self, workload: str) -> RolloutState | None:
        """Return the rollout that owns the workload's route, or None. Raises as ``last`` does."""
        state = self.last(workload)
        return state if state and state.active else None

    def find(self, workload: str, rollout_id: str) -> RolloutState | None:
        """Return a rollout by its id, also one that ended; None where it is not known."""
        last = self.last(workload)
        found = (*self._ended(workload), *([last] if last else []))
        return next((state for state in found if state.rollout_id == rollout_id), None)

    def open_workloads(self) -> tuple[str, ...]:
        """Return the workloads with a rollout that is not over, or can't be read, by name."""
        return tuple(name for name in sorted(p.stem for p in self.folder.glob("*.json")) if not self._is_over(name))

    def save(self, state: RolloutState) -> None:
        """Replace the workload's file. Raises TryAgain where the disk is full."""
        try:
            write_whole(self._path(state.workload), state.model_dump_json(indent=1) + "\n", 0o600)
        except OSError as error:
            raise from_os(error) from error

    def abort(self, workload: str, why: str) -> RolloutState | None:
        """Send the traffic of a rollout under way back; return it, or None where there is none."""
        state = self.active(workload)
        if state is None:
            return None
        ended = abort(state, why, time.time())
        self.save(ended)
        return ended

    def _is_over(self, workload: str) -> bool:
        try:
            last = self.last(workload)
        except IntegrityLost:
            return False
        return last is None or last.ended

    def _ended(self, workload: str) -> list[RolloutState]:
        try:
            found = json.loads(self._path(workload, "ended").read_bytes())
            return [RolloutState.model_validate(item) for item in found]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError):
            # Old news: what serves does not hang on it.
            return []

    def _keep(self, state: RolloutState) -> None:
        kept = [other for other in self._ended(state.workload) if other.rollout_id != state.rollout_id]
        # What was counted is of no use any more, and its last edge is no JSON.
        states = [item.model_dump(mode="json", exclude={"sides"}) for item in (*kept, state)][-MAX_ENDED:]
        try:
            write_json(self._path(state.workload, "ended"), states, 0o600)
        except OSError as error:
            raise from_os(error) from error

    def _path(self, workload: str, *under: str) -> Path:
        return self.folder.joinpath(*under, f"{lock_name(workload)}.json")
