"""The model behind the server: one worker thread, a bounded queue before it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tasks.serve.package import Package
from tasks.serve.protocol import Answer
from tasks.spec.errors import TryAgain

WARM_UP_CALLS = 3


class Model:
    """Answers rows, one request at a time; the event loop stays free meanwhile."""

    def __init__(self, package: Package, max_queue: int) -> None:
        self.package = package
        self.max_queue = max_queue
        self.queued = 0
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def predict(self, rows: Any) -> Answer:
        """Return labels and probabilities.

        Raises:
            TryAgain: ``max_queue`` requests wait already.
            BadRequest, DrydockError: as ``Package.predict``.
        """
        self.refuse_if_full()
        self.queued += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, self._predict, rows)
        finally:
            self.queued -= 1

    def refuse_if_full(self) -> None:
        """Raise TryAgain where one request runs and ``max_queue`` wait."""
        if self.queued > self.max_queue:
            raise TryAgain(f"the queue is full: {self.max_queue} requests wait")

    def warm_up(self) -> None:
        """Let the runtime allocate, and hold the package to its golden sample.

        Raises:
            IntegrityLost: the golden answer differs.
        """
        for _ in range(WARM_UP_CALLS):
            self.package.check_golden()

    def close(self) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _predict(self, rows: Any) -> Answer:
        probabilities = self.package.predict(rows)
        classes = self.package.signature.classes
        return Answer([classes[k] for k in probabilities.argmax(axis=1)], probabilities)
