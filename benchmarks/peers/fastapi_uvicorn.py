"""FastAPI on uvicorn, tuned: uvloop, httptools, orjson, no response model, the model called in the event loop."""

from __future__ import annotations

import sys

import uvicorn
from fastapi import FastAPI, Request, Response
from model import PATH, Model, read, write

app = FastAPI(openapi_url=None)
MODEL = Model()


@app.post(PATH)
async def infer(request: Request) -> Response:
    try:
        rows = read(await request.body())
    except ValueError as error:
        return Response(str(error), 400)
    return Response(write(MODEL.predict(rows)), media_type="application/json")


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), loop="uvloop", http="httptools", access_log=False, log_level="error")
