"""``python models.py ENCODER OUT``: write the signed packages that the serving benchmark asks.

M is an MLP 784-512-256-128-10 over images of 28 x 28, with drawn weights: what it answers costs the same.
T is a text classifier: the MiniLM encoder (6 layers, width 384) with mean pooling and a drawn linear head; its
graph takes any number of tokens, and the mask is the tokens that are not 0. T-int8 is T as compress quantises it.

B batch   T tokens   D width   H heads
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks.compress.store import quantise
from tasks.serve.package import open_package, write_package
from tasks.serve.signature import Golden, Signature
from tasks.spec.feature import ImageFeature, TextFeature
from tasks.store.files import write_json
from tasks.store.sign import make_key, sign_folder

MLP_WIDTHS = (784, 512, 256, 128, 10)
# Nine tokens: so short that one alone is bound by reading the weights, which is what batching saves.
SENTENCE = "The parcel came two days late."
ALIKE = ("How do I reset my password?", "I forgot my login and need a new one.")
APART = "The recipe needs two eggs and a cup of flour."
LAYER_NORM_EPSILON = 1e-12


def main(encoder: Path, out: Path) -> None:
    """Write ``keys/``, ``bench-m/``, ``bench-t/``, ``bench-t-int8/`` and ``packages.json`` (written last)."""
    out.mkdir(parents=True, exist_ok=True)
    make_key(out / "keys")
    digests = {"bench-m": write_mlp(out / "bench-m", out / "keys")}
    fp32 = out / "bench-t"
    digests["bench-t"] = write_minilm(encoder, fp32, out / "keys")
    digests["bench-t-int8"] = write_int8(fp32, out / "bench-t-int8", out / "keys")
    tokenizer = open_tokenizer(encoder)
    facts = {"digests": digests, "sentence": SENTENCE, "ids": tokenizer.encode(SENTENCE).ids}
    write_json(out / "packages.json", facts)


def write_mlp(folder: Path, keys: Path) -> str:
    """Write and sign M; return its digest."""
    from onnx import TensorProto, helper, numpy_helper

    draw, nodes, weights, source = np.random.default_rng(0), [], [], "input"
    for layer, (width, out) in enumerate(itertools.pairwise(MLP_WIDTHS)):
        values = draw.normal(scale=(2 / width) ** 0.5, size=(width, out)).astype(np.float32)
        weights += [numpy_helper.from_array(values, f"weight{layer}")]
        weights += [numpy_helper.from_array(np.zeros(out, np.float32), f"bias{layer}")]
        nodes.append(helper.make_node("Gemm", [source, f"weight{layer}", f"bias{layer}"], [f"sum{layer}"]))
        last = layer == len(MLP_WIDTHS) - 2
        source = "probabilities" if last else f"relu{layer}"
        nodes.append(helper.make_node("Softmax" if last else "Relu", [f"sum{layer}"], [source]))
    sides = (("input", MLP_WIDTHS[0]), ("probabilities", MLP_WIDTHS[-1]))
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size]) for name, size in sides]
    graph = helper.make_graph(nodes, "mlp", tensors[:1], tensors[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    folder.mkdir()
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    rows = draw.random((2, MLP_WIDTHS[0])).round(3).tolist()
    return finish(folder, ImageFeature(kind="image", height=28, width=28, max_value=1), rows, "fp32", keys)


def write_minilm(encoder: Path, folder: Path, keys: Path) -> str:
    """Write and sign T; return its digest."""
    folder.mkdir()
    network = MiniLM(encoder).eval()
    tokenizer = open_tokenizer(encoder)
    check(network, tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", min=2, max=512)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (torch.ones((2, 16), dtype=torch.int64),), str(folder / "model.onnx"), input_names=["input"],
            output_names=["probabilities"], dynamic_shapes=(dynamic,), dynamo=True, external_data=False,
            verbose=False,
        )  # fmt: skip
    return finish(folder, text_feature(), [SENTENCE, APART], "fp32", keys)


def write_int8(fp32: Path, folder: Path, keys: Path) -> str:
    folder.mkdir()
    quantise(fp32 / "model.onnx", folder / "model.onnx")
    (folder / "tokenizer.json").write_bytes((fp32 / "tokenizer.json").read_bytes())
    return finish(folder, text_feature(), [SENTENCE, APART], "int8", keys)


def finish(folder: Path, feature: Any, rows: list[Any], variant: str, keys: Path) -> str:
    """Write the papers, with the package's own answers as the golden sample, and sign; return the digest."""
    text = feature.kind == "text"
    num_classes = 2 if text else MLP_WIDTHS[-1]
    papers = {
        "workload": "bench-t" if text else "bench-m",
        "variant": variant,
        "classes": [str(k) for k in range(num_classes)],
        "feature": feature.model_dump(mode="json"),
        "graph_input": {"name": "input", "dtype": "int64" if text else "float32", "shape": [-1, *feature.shape]},
        "graph_output": {"name": "probabilities", "dtype": "float32", "shape": [-1, num_classes]},
    }
    signature = Signature.parse(papers, "signature.json")
    unknown = [[1 / num_classes] * num_classes] * len(rows)
    write_package(folder, signature, Golden(rows=rows, probabilities=unknown))
    answers = open_package(folder, None, None).predict(rows).tolist()
    # int8 activations are scaled by batch, so padding and neighbours move an answer a little.
    tolerance = 0.05 if variant == "int8" else 1e-3
    digest = write_package(folder, signature, Golden(rows=rows, probabilities=answers, tolerance=tolerance))
    sign_folder(folder, keys)
    return digest


def text_feature() -> TextFeature:
    return TextFeature(kind="text", max_tokens=128, vocabulary=30522, max_chars=2000)


def open_tokenizer(encoder: Path) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(encoder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class MiniLM(torch.nn.Module):
    """ids int64 [B, T] -> probabilities [B, 2]; BERT (Devlin et al. 2018) as MiniLM-L6 configures it."""

    def __init__(self, encoder: Path) -> None:
        super().__init__()
        from safetensors.torch import load_file

        config = json.loads((encoder / "config.json").read_text())
        self.num_layers, self.num_heads = config["num_hidden_layers"], config["num_attention_heads"]
        tensors = load_file(encoder / "model.safetensors")
        tensors.pop("embeddings.position_ids", None)
        for name, tensor in tensors.items():
            # [in, out], so that the exported product has a constant that can be quantised.
            dense = tensor.ndim == 2 and "embeddings" not in name
            self.register_buffer(name.replace(".", "_"), tensor.T.contiguous() if dense else tensor)
        draw = torch.Generator().manual_seed(0)
        self.register_buffer("head_weight", torch.randn((config["hidden_size"], 2), generator=draw))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.embed(ids) @ self.head_weight, dim=1)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T] -> [B, D], the mean over the tokens that are not padding, of length 1."""
        mask = (ids != 0).float()
        # Look-ups, which are exported as what can be quantised.
        look_up, places = torch.nn.functional.embedding, torch.arange(ids.shape[1])
        hidden = look_up(ids, self.embeddings_word_embeddings_weight)
        hidden = hidden + look_up(places, self.embeddings_position_embeddings_weight)
        hidden = self.normed(hidden + self.embeddings_token_type_embeddings_weight[0], "embeddings")
        bias = (1 - mask)[:, None, None, :] * -1e4
        for layer in range(self.num_layers):
            hidden = self.layer(f"encoder_layer_{layer}", hidden, bias)
        mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=1)

    def layer(self, name: str, hidden: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        attended = self.dense(self.attention(f"{name}_attention_self", hidden, bias), f"{name}_attention_output_dense")
        hidden = self.normed(hidden + attended, f"{name}_attention_output")
        inner = torch.nn.functional.gelu(self.dense(hidden, f"{name}_intermediate_dense"))
        return self.normed(hidden + self.dense(inner, f"{name}_output_dense"), f"{name}_output")

    def attention(self, name: str, hidden: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = hidden.shape
        shape = (batch, tokens, self.num_heads, width // self.num_heads)
        query, key, value = (
            self.dense(hidden, f"{name}_{part}").reshape(shape).transpose(1, 2) for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(2, 3) / (width // self.num_heads) ** 0.5 + bias
        return (torch.softmax(scores, dim=3) @ value).transpose(1, 2).reshape(batch, tokens, width)

    def dense(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        return hidden @ getattr(self, f"{name}_weight") + getattr(self, f"{name}_bias")

    def normed(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = getattr(self, f"{name}_LayerNorm_weight"), getattr(self, f"{name}_LayerNorm_bias")
        return torch.nn.functional.layer_norm(hidden, weight.shape, weight, bias, LAYER_NORM_EPSILON)


def check(network: MiniLM, tokenizer: Any) -> None:
    """Hold the encoder to what it was trained for: two ways to say one thing are close, another thing is not."""
    with torch.no_grad():
        one, same, other = (network.embed(torch.tensor([tokenizer.encode(s).ids])) for s in (*ALIKE, APART))
    alike, apart = float((one * same).sum()), float((one * other).sum())
    print(f"encoder: cosine {alike:.2f} of two alike, {apart:.2f} of two apart", file=sys.stderr, flush=True)
    if not alike > apart + 0.3:
        sys.exit(f"error: the encoder is built wrongly: cosine {alike:.2f} of alike, {apart:.2f} of apart")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
