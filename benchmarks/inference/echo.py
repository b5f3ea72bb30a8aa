"""``python echo.py PORT``: the least that a Python server can do with a request, the ceiling of M.

uvloop, httptools, simdjson: the body is parsed to float32, and a fixed answer goes back. No model, no checks.
"""

from __future__ import annotations

import asyncio
import sys

import httptools
import numpy as np
import simdjson
import uvloop

ANSWER = b'{"outputs":[{"name":"label","datatype":"BYTES","shape":[1],"data":["0"]}]}'
RESPONSE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER)
PARSER = simdjson.Parser()


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.body = transport, b""
        self.parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        data = PARSER.parse(self.body)["inputs"][0]["data"]
        np.frombuffer(data.as_buffer(of_type="d")).astype(np.float32)
        self.body = b""
        self.transport.write(RESPONSE)


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
