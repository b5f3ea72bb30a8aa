"""``python -m tasks.serve --package DIR --digest SHA --keys DIR --port N``: serve until SIGTERM."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tasks.spec.errors import BadRequest, DrydockError


class Parser(argparse.ArgumentParser):
    """A wrong argument is a bad request: one line and its exit code, like any other."""

    def error(self, message: str) -> NoReturn:
        raise BadRequest(f"{message}; see python -m tasks.serve --help")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        BadRequest: an unknown, missing or wrong argument.
    """
    parser = Parser(prog="python -m tasks.serve", description="Serve one model package.", allow_abbrev=False)
    parser.add_argument("--package", type=Path, required=True, help="the package's folder")
    parser.add_argument("--digest", type=_digest, required=True, help="the manifest digest it must have")
    parser.add_argument("--keys", type=Path, required=True, help="the folder with the public signing key")
    parser.add_argument("--port", type=_whole(0), required=True, help="0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--version", type=_version, help="the registry's version (default: the digest's start)")
    parser.add_argument("--max-batch-rows", type=_whole(1), default=64)
    parser.add_argument("--max-batch-ms", type=_whole(1), default=50, help="a batch shall not take longer")
    parser.add_argument("--max-body-bytes", type=_whole(1), default=4 << 20)
    parser.add_argument("--max-connections", type=_whole(1), default=2048, help="open at once; then 503")
    parser.add_argument("--max-queue", type=_whole(1), default=128, help="requests waiting; then 503")
    parser.add_argument("--cache-bytes", type=_whole(0), default=0, help="of answers kept (default: 0, none)")
    parser.add_argument("--threads", type=_whole(1), default=1, help="for one prediction")
    parser.add_argument("--drain-seconds", type=_number(0), default=1.0, help="answering on, not ready, after SIGTERM")
    parser.add_argument("--log-folder", type=Path, help="where predictions are logged (default: nowhere)")
    parser.add_argument("--log-ratio", type=_number(0, 1), default=1.0, help="the share of answers that is logged")
    parser.add_argument("--log-per-second", type=_whole(1), default=100, help="answers logged at most")
    parser.add_argument("--log-days", type=_whole(1), default=30, help="older files of the log are removed")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Open, check and warm the package, then listen: who can connect meets a model that is ready."""
    from tasks.serve.app import App
    from tasks.serve.batch import Batcher
    from tasks.serve.cache import Cache
    from tasks.serve.message import Limits
    from tasks.serve.metrics import Metrics
    from tasks.serve.package import open_package
    from tasks.serve.predictions import LogRules, PredictionLog
    from tasks.serve.server import bind, serve

    listener = bind(options.host, options.port)
    package = open_package(options.package, options.digest, options.keys, options.threads)
    batcher = Batcher(package, options.max_batch_rows, options.max_queue, options.max_batch_ms / 1000)
    batcher.warm_up()
    _give_back_memory()
    signature, version = package.signature, options.version or package.digest_sha256[:12]
    facts = {"sha256": package.digest_sha256, "workload": signature.workload, "version": version}
    metrics = Metrics(facts | {"variant": signature.variant}, signature.counted, lambda: batcher.depth)
    rules = LogRules(options.log_ratio, options.log_per_second, options.log_days)
    log = PredictionLog(options.log_folder, metrics.count_unlogged, rules) if options.log_folder else None
    limits = Limits(options.max_batch_rows, options.max_body_bytes, max_connections=options.max_connections)
    cache = Cache(package.digest_sha256, options.cache_bytes) if options.cache_bytes else None
    app = App(batcher, version, metrics, log, limits, cache)
    host, port = listener.getsockname()[:2]

    def say() -> None:
        sys.stdout.write(f"serving {signature.workload} version {version} on http://{host}:{port}\n")
        sys.stdout.flush()

    try:
        serve(app, listener, options.drain_seconds, limits, say)
    finally:
        batcher.close()
        if log:
            log.close()


def _give_back_memory() -> None:
    """Return what loading the model needed and freed: the C library would keep it (malloc_trim(3))."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def main(arguments: list[str] | None = None) -> int:
    """Return the process' exit code."""
    # One prediction uses the threads it was given; the tokenizer would take every core.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        run(parse(sys.argv[1:] if arguments is None else arguments))
    except DrydockError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return DrydockError.exit_code
    return 0


def _digest(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise argparse.ArgumentTypeError(f"{text!r}, must be 64 hex digits")
    return text


def _version(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", text):
        raise argparse.ArgumentTypeError(f"{text!r}, must be up to 64 letters, digits, dots and dashes")
    return text


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}, must be a whole number of {least} or more")
        return int(text)

    return read


def _number(least: float, most: float = math.inf) -> Callable[[str], float]:
    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if least <= float(text) <= most and math.isfinite(float(text)):
                return float(text)
        raise argparse.ArgumentTypeError(f"{text!r}, must be a number from {least:g} to {most:g}")

    return read


if __name__ == "__main__":
    sys.exit(main())
