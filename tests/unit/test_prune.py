"""Units that nobody hears go and the answers stay; single weights go, and stay away while the rest is trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tasks.compress.network import Source
from tasks.compress.prune import LAYERS, NORMS, _loss, _tensors, prune
from tasks.spec.compress import Pruned, Sparse
from tasks.spec.errors import BadRequest
from tasks.spec.requests import CompressRequest
from tasks.train.loss import cross_entropy

pytestmark = pytest.mark.timeout(60)
UNITS, GOING = 8, (1, 4)


def pictures(norm: nn.Module, bias: bool) -> nn.Sequential:
    """[B, 64] -> [B, 10] by two convolutions of 8 x 8 pixels with a norm between."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, UNITS, 3, bias=bias), norm, nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(UNITS, 10, 3, bias=bias), nn.Flatten(),
    )  # fmt: skip


def signals(norm: nn.Module, bias: bool) -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 64)), nn.Conv1d(1, UNITS, 9, stride=5, bias=bias), norm, nn.Tanh(), nn.AvgPool1d(2),
        nn.Conv1d(UNITS, 10, 6, bias=bias), nn.Flatten(),
    )  # fmt: skip


def dense(norm: nn.Module, bias: bool) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, UNITS, bias=bias), norm, nn.GELU(), nn.Dropout(), nn.Linear(UNITS, 10))


NETWORKS = {
    "2d": lambda: pictures(nn.BatchNorm2d(UNITS), bias=False),
    "2d, bias": lambda: pictures(nn.BatchNorm2d(UNITS), bias=True),
    "2d, no scale": lambda: pictures(nn.BatchNorm2d(UNITS, affine=False), bias=True),
    "2d, no statistics": lambda: pictures(nn.BatchNorm2d(UNITS, track_running_stats=False), bias=True),
    "1d, no statistics": lambda: signals(nn.BatchNorm1d(UNITS, track_running_stats=False), bias=True),
    "1d": lambda: signals(nn.BatchNorm1d(UNITS), bias=False),
    "dense": lambda: dense(nn.BatchNorm1d(UNITS), bias=True),
    "no norm": lambda: pictures(nn.Identity(), bias=True),
}


@pytest.fixture
def source(train_request):
    """``source(body)``: a network as if it had been trained on the digits, and their table."""

    def make(body: nn.Module) -> tuple[Source, Path]:
        asked = train_request(batch_size=64)
        names = ("dataset", "feature", "label", "train")
        data = {name: getattr(asked, name).model_dump(mode="json") for name in names}
        more = {"workload": "digits", "variant": "fp32", "trained": asked.dataset.model_dump()}
        found = Source(CompressRequest.parse(data | more, "the test's request"), Path(), asked.train.recipe)
        found.__dict__["body"] = body.eval()
        return found, Path(asked.dataset.uri) / "data.parquet"

    return make


def drawn(name: str) -> nn.Sequential:
    """A network whose norms have seen something, and two units of which nobody hears."""
    torch.manual_seed(0)
    body = NETWORKS[name]().eval()
    first = next(module for module in body if isinstance(module, LAYERS))
    silent = [first.weight, *([] if first.bias is None else [first.bias])]
    for norm in (module for module in body if isinstance(module, NORMS)):
        if norm.running_mean is not None:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            norm.running_mean[list(GOING)] = 0
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.normal_(norm.bias)
            silent += [norm.weight, norm.bias]
    for parameter in silent:
        parameter.data[list(GOING)] = 0
    return body


@pytest.mark.parametrize("name", NETWORKS)
def test_units_that_nobody_hears_go_with_their_norms_and_the_answers_stay(source, monkeypatch, name):
    monkeypatch.setattr("tasks.compress.prune._train_on", lambda *asked: None)
    body = drawn(name)
    rows = torch.rand(16, 64)
    before = body(rows)
    prune(source(body)[0], Pruned(kind="pruned", ratio=len(GOING) / UNITS), source(body)[1])
    first, second = (module for module in body if isinstance(module, LAYERS))
    assert len(first.weight) == second.weight.shape[1] == UNITS - len(GOING)
    for norm in (module for module in body if isinstance(module, NORMS)):
        sizes = {len(tensor) for tensor in norm.state_dict().values() if tensor.ndim}
        assert sizes | {norm.num_features} == {UNITS - len(GOING)}
    assert torch.allclose(body(rows), before, atol=1e-5)


@pytest.mark.parametrize("name", ["2d", "1d, no statistics"])
def test_what_is_left_learns_on(source, name):
    """What was drawn knows no digits, and is better after two epochs."""
    torch.manual_seed(0)
    body = NETWORKS[name]()
    found, data = source(body)
    held = _tensors(found, data, "validation")
    before = _loss(body, cross_entropy(0.0), *held)
    prune(found, Pruned(kind="pruned", ratio=0.25, epochs=2), data)
    assert len(next(module for module in body if isinstance(module, LAYERS)).weight) == 6
    assert _loss(body, cross_entropy(0.0), *held) < 0.95 * before
    assert not body.training


def test_a_layer_that_a_sum_reads_too_keeps_its_units(source):
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x):
            return self.second(torch.relu(self.first(x)) + x)

    with pytest.raises(BadRequest, match="pruned: no layer of the network feeds one other layer alone"):
        prune(source(Residual())[0], Pruned(kind="pruned"), source(Residual())[1])


@pytest.mark.parametrize(("name", "ratio"), [("2d", 0.25), ("1d", 0.9), ("dense", 0.5)])
def test_single_weights_go_and_stay_away(source, name, ratio):
    body = NETWORKS[name]()
    found, data = source(body)
    sizes = {key: tensor.shape for key, tensor in body.state_dict().items()}
    before = {key: tensor.clone() for key, tensor in body.state_dict().items()}
    prune(found, Sparse(kind="sparse", ratio=ratio), data)
    assert {key: tensor.shape for key, tensor in body.state_dict().items()} == sizes, "no mask stays, nothing shrinks"
    for key, module in body.named_modules():
        if isinstance(module, LAYERS):
            gone = module.weight == 0
            assert gone.sum() == round(ratio * gone.numel())
            was = before[f"{key}.weight"].abs()
            assert was[gone].max() <= was[~gone].min(), "the least go"
            assert not torch.equal(module.weight[~gone], before[f"{key}.weight"][~gone]), "the rest is trained on"
