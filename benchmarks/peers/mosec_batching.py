"""mosec with dynamic batching: its Rust front end in one process, the model's worker in another."""

from __future__ import annotations

import sys

import numpy as np
from model import PATH, Model, read, write
from mosec import Server, ValidationError, Worker

MAX_BATCH_ROWS, MAX_WAIT_MS = 64, 1


class Infer(Worker):
    resp_mime_type = "application/json"

    def __init__(self) -> None:
        self._model = Model()

    def deserialize(self, data: bytes) -> np.ndarray:
        try:
            return read(data)
        except ValueError as error:
            raise ValidationError(str(error)) from error

    def forward(self, data: list[np.ndarray]) -> list[np.ndarray]:
        answers = self._model.predict(np.concatenate(data))
        return np.split(answers, np.cumsum([len(rows) for rows in data])[:-1])

    def serialize(self, data: np.ndarray) -> bytes:
        return write(data)


if __name__ == "__main__":
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", sys.argv[1], "--log-level", "error"]
    server = Server()
    server.append_worker(Infer, num=1, max_batch_size=MAX_BATCH_ROWS, max_wait_time=MAX_WAIT_MS, route=PATH)
    server.run()
