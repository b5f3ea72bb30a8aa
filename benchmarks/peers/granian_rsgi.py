"""granian with its own interface, RSGI: one worker, one runtime thread, uvloop, the model called in the loop."""

from __future__ import annotations

import os
import sys

from granian import Granian
from granian.constants import Interfaces, Loops
from model import PATH, Model, read, write

JSON = [("content-type", "application/json")]
# The worker is another process, which imports this file anew; its parent needs no model.
MODEL = Model() if os.environ.get("PEER_WORKER") else None


async def app(scope, protocol) -> None:
    if scope.path != PATH or scope.method != "POST":
        return protocol.response_empty(404, [])
    try:
        rows = read(await protocol())
    except ValueError as error:
        return protocol.response_str(400, [], str(error))
    return protocol.response_bytes(200, JSON, write(MODEL.predict(rows)))


if __name__ == "__main__":
    os.environ["PEER_WORKER"] = "1"
    Granian(
        "granian_rsgi:app", port=int(sys.argv[1]), interface=Interfaces.RSGI, workers=1, loop=Loops.uvloop,
        runtime_threads=1, websockets=False, log_enabled=False,
    ).serve()  # fmt: skip
