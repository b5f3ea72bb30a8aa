"""The torch network behind a package: as it was trained, or a smaller one made of it; and its ONNX export."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.serve.signature import NEXT_PIECE, sides_of
from tasks.spec.compress import Distilled, Pruned, Sparse
from tasks.spec.errors import BadRequest, DrydockError
from tasks.spec.feature import VOCABULARIES, encode
from tasks.spec.ids import KnownIds
from tasks.spec.requests import CompressRequest, TrainRequest
from tasks.spec.tokens import ask_words, words_of
from tasks.spec.train import Recipe
from tasks.train.prepare import load_stats

if TYPE_CHECKING:
    import numpy as np
    import torch

BATCH_ROWS = 256
# Trains in a folder, on the engines that train everything; what was prepared may be changed first.
Learn = Callable[[TrainRequest, Path, Callable[[Path], None]], None]


class Source:
    """A trained network: the folder that training left (weights, tokenizer, statistics) and its recipe."""

    def __init__(self, request: CompressRequest, folder: Path, recipe: Recipe) -> None:
        self.request, self.folder, self.recipe = request, folder, recipe
        self.note = ""  # how it came to be taken

    @cached_property
    def body(self) -> Any:
        """encoded input -> logits [B, K], of tagged words [B, K, T], in evaluation mode."""
        from safetensors.torch import load_file

        from tasks.train.recipes import build

        feature, num_outputs = self.request.feature, self.request.label.num_outputs
        body = build(self.recipe, feature, num_outputs, load_stats(self.folder), self.folder)
        body.load_state_dict(load_file(self.folder / "weights.safetensors"))
        return body.eval()

    @cached_property
    def network(self) -> Any:
        """encoded input -> probabilities, as the body's logits: with softmax behind it; or numbers in their range, of
        texts whose next piece is told their mean log-probability."""
        import torch

        from tasks.train.gpt import LogProbability

        label = self.request.label
        last = torch.nn.Hardtanh(label.number.min, label.number.max) if label.number else torch.nn.Softmax(dim=1)
        first = LogProbability(self.body) if label.kind == "next" else self.body
        return torch.nn.Sequential(first, last).eval()

    @property
    def exported(self) -> Any:
        """What the graph is made of: the network, or one that tells the next piece beside its number."""
        from tasks.train.gpt import Told

        label = self.request.label
        if label.kind != "next":
            return self.network
        return Told(self.network[0], label.number.min, label.number.max).eval()

    @cached_property
    def tokenizer(self) -> Any:
        name = VOCABULARIES.get(self.request.feature.holds)
        if name is None:
            return None
        if self.request.feature.holds == "ids":
            return KnownIds.parse((self.folder / name).read_text(encoding="utf-8"), name)
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.folder / name))

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.body.parameters())


def smaller(teacher: Source, data: Path, room: Path, learn: Learn) -> Source:
    """Return the network that the variant asks for: the teacher itself, or one made of it.

    Raises:
        BadRequest: it can't be made smaller this way.
    """
    variant = teacher.request.variant
    if isinstance(variant, Distilled):
        from tasks.compress.distil import distil

        return distil(teacher, variant, data, room / "student", learn)
    if not isinstance(variant, Pruned | Sparse):
        return teacher
    from tasks.compress.prune import prune

    made = Source(teacher.request, teacher.folder, teacher.recipe)
    prune(made, variant, data)
    return made


def answers_of(source: Source, rows: Any) -> np.ndarray:
    """Ask the network rows in client form; return probabilities [B, K], of tagged words [W, K]; or numbers [B, 1].

    Raises:
        DrydockError: it answers what is no number.
    """
    import numpy as np
    import torch

    def run(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return torch.cat([source.network(part) for part in torch.from_numpy(x).split(BATCH_ROWS)]).numpy()

    feature = source.request.feature
    if feature.kind == "tokens":
        answers = ask_words(feature, words_of(feature, rows), source.tokenizer, run)
    else:
        answers = run(encode(feature, rows, source.tokenizer))
    if not np.isfinite(answers).all():
        raise DrydockError(f"{source.request.workload}: the trained network answers what is no number")
    return answers


def export(network: Any, request: CompressRequest, path: Path) -> None:
    """Export to one ONNX file: input [B, N] -> probabilities [B, K] (tagged words: [B, K, T]), B dynamic; of an
    encoder, the tokens too.

    Raises:
        BadRequest: the network can't be traced, or uses an operator that ONNX lacks.
    """
    import torch
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    example, dynamic = example_of(network, request)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                (example,),
                input_names=["input"],
                output_names=output_names(request),
                dynamic_shapes=(dynamic,),
                dynamo=True,
                verbose=False,
            )
            # Where each node was made: files and lines of this machine, which would be in every package's digest.
            ClearMetadataAndDocStringPass()(program.model)
            program.save(path, external_data=False)
    except Exception as error:  # the exporter's own kinds are private, and the network's may be any
        raise BadRequest(f"{request.workload}: the network can't be exported to ONNX: {cause_of(error)}") from error


def output_names(request: CompressRequest) -> list[str]:
    answer = sides_of(request.feature, len(request.label.names))[1].name
    return [answer, NEXT_PIECE.name] if request.label.kind == "next" else [answer]


def example_of(network: Any, request: CompressRequest) -> tuple[torch.Tensor, dict[int, Any]]:
    """Return an input to trace a network with, [2, N], and which of its dimensions may be any."""
    import torch

    dtype = torch.int64 if request.feature.holds in VOCABULARIES else torch.float32
    dynamic = {0: torch.export.Dim("batch")}
    if getattr(network, "any_width", False) or getattr(network[0], "any_width", False):
        # Served texts are padded to the longest of their batch, no further.
        dynamic[1] = torch.export.Dim("tokens", min=1, max=request.feature.max_tokens)
    return torch.zeros((2, *request.feature.shape), dtype=dtype), dynamic


def cause_of(error: BaseException) -> str:
    """The innermost cause in one line: the exporter wraps it in advice of many."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return f"{type(error).__name__}: {lines[0][:300]}"
