"""The launcher of one node's ranks: ``python -m tasks.train.gang [options] FOLDER``.

torch's elastic agent (what ``torchrun`` runs) with three things of our own:

- its ranks are forked from this process, which has imported all that a rank needs, so a restarted gang is back in
  a second and not in the five that imports take;
- a rank that makes no step in time is killed by a watchdog (``tasks.train.watch``), so a hung rank is a dead one;
- it ends with the process that started it.

Nodes meet at ``--rendezvous``: a file where there is one node, else ``host:port`` of the first one.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from tasks.spec.errors import DrydockError
from tasks.train.fence import Fence, own_attempt
from tasks.train.inputs import check_inputs
from tasks.train.parent import die_with_parent, parent_of_others
from tasks.train.watch import Watchdog

# Into how many micro-batches each rank divides its share of a batch; what a run that was out of memory tries.
ACCUMULATE = "DRYDOCK_ACCUMULATE"
ENVIRONMENT = {
    # With Gloo on torch 2.13 restarted ranks read the dead rank's address from the shared store and hang.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    # The agent asks whether there are GPUs; asked in the usual way CUDA is begun here, and no fork may use it then.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    # What makes matrix products on a GPU the same each time.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
MAX_RESTARTS = 3
# From SIGTERM to SIGKILL of a rank; a rank has nothing to save that its last checkpoint has not.
SHUTDOWN_SECONDS = 1
MONITOR_SECONDS = 0.1
# Two lost beats of three: a slow node is not a dead one.
KEEP_ALIVE = {"keep_alive_interval": 3, "keep_alive_max_attempt": 3, "last_call_timeout": 5}


def main(arguments: list[str]) -> int:
    """Run the ranks of this node to their end; return the exit code of the first one that failed, else 0."""
    options = _parse(arguments)
    die_with_parent()
    try:
        begin(options.folder)
    except DrydockError as error:
        print(error, file=sys.stderr)  # noqa: T201 - its log is all that a launcher has
        return error.exit_code
    os.environ.update(ENVIRONMENT | parent_of_others())
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    from tasks.train.rank import work

    _import_what_ranks_need()
    watchdog = Watchdog(options.ranks)
    watchdog.start()
    # Its agent notes each rank's exception in files, for as long as it runs; left to itself it keeps them for ever.
    with tempfile.TemporaryDirectory(prefix="drydock-gang-") as notes:
        try:
            elastic_launch(_config(options, notes), work)(str(options.folder), options.nodes, watchdog)
        except ChildFailedError as failed:
            return _exit_code(failed)
    return 0


def begin(folder: Path) -> None:
    """Claim the folder for this attempt, drop the error of the one before, and check what was brought.

    Raises:
        Fenced: a newer attempt works here. IntegrityLost: an input is not what was prepared.
    """
    if Fence(folder, own_attempt()).claim():
        (folder / "error.json").unlink(missing_ok=True)
    check_inputs(folder)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tasks.train.gang")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--ranks", type=int, required=True, help="on each node")
    parser.add_argument("--rendezvous", required=True, help="a file, or host:port")
    parser.add_argument("--restarts", type=int, default=MAX_RESTARTS, help="of all ranks together")
    return parser.parse_args(arguments)


def _config(options: argparse.Namespace, notes: str) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    by_file = {} if options.nodes > 1 else {"store_type": "file"}
    # A file of this attempt's own: an older one that wakes up would wait in it for a place, for ever.
    meeting = options.rendezvous if options.nodes > 1 else f"{options.rendezvous}-{own_attempt()}"
    return LaunchConfig(
        min_nodes=options.nodes,
        max_nodes=options.nodes,
        nproc_per_node=options.ranks,
        run_id="gang",
        role="rank",
        rdzv_backend="c10d",
        rdzv_endpoint=meeting,
        rdzv_configs=KEEP_ALIVE | by_file,
        max_restarts=options.restarts,
        monitor_interval=MONITOR_SECONDS,
        start_method="fork",
        shutdown_timeout=SHUTDOWN_SECONDS,
        logs_specs=DefaultLogsSpecs(log_dir=notes),
    )


def _import_what_ranks_need() -> None:
    """Import what torch itself imports late: when a model is first wrapped, an optimiser first made."""
    of_torch = ("_dynamo", "nn.parallel.distributed", "optim", "utils.flop_counter")
    for name in ("safetensors.torch", *(f"torch.{part}" for part in of_torch)):
        import_module(name)


def _exit_code(failed: Any) -> int:
    """The first failure's exit code; a signal shows as 128 + its number."""
    code = failed.get_first_failure()[1].exitcode
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
