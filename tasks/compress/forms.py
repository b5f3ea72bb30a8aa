"""The network behind a package in further forms, for those who go on with it in torch: ``weights.safetensors`` under
the parameters' names, and ``network.pt2``, which ``torch.export.load`` reads without our code."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tasks.compress.network import Source, cause_of, example_of
from tasks.spec.compress import Form
from tasks.spec.errors import BadRequest

FOLDER = "network"


def write_forms(source: Source, forms: Iterable[Form], room: Path) -> None:
    """Write the forms that are asked for into ``network/`` of a room.

    Raises:
        BadRequest: the network can't be traced.
    """
    writers = {"safetensors": _weights, "torch-export": _program}
    for form in forms:
        (room / FOLDER).mkdir(exist_ok=True)
        writers[form](source, room / FOLDER)


def _weights(source: Source, folder: Path) -> None:
    from safetensors.torch import save_file

    state = {name: value.detach().contiguous() for name, value in source.body.state_dict().items()}
    save_file(state, folder / "weights.safetensors")


def _program(source: Source, folder: Path) -> None:
    """encoded input -> what the ONNX graph answers. It holds no pickle: the one that torch would write is of the
    inputs it was traced with, which nobody needs; and no paths of this machine."""
    import torch

    example, dynamic = example_of(source.exported, source.request)
    try:
        program: Any = torch.export.export(source.exported, (example,), dynamic_shapes=(dynamic,))
    except Exception as error:  # as of the ONNX export
        what = f"the network can't be exported by torch.export: {cause_of(error)}"
        raise BadRequest(f"{source.request.workload}: {what}; take it out of compress.also") from error
    program.example_inputs = None
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            node.meta.pop("stack_trace", None)
    torch.export.save(program, folder / "network.pt2")
