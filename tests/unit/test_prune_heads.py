"""Which heads and layers of an encoder matter: those that can't be seen go first."""

from __future__ import annotations

import pytest
import torch

from tasks.compress.heads import head_importance, layer_influence, remove_parts
from tasks.spec.compress import Pruned
from tasks.spec.errors import BadRequest
from tasks.train.encoder import Encoder, Sizes

pytestmark = pytest.mark.timeout(30)
HEADS, LAYERS, WIDTH = 4, 3, 16


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    found = Encoder(Sizes(50, 8, WIDTH, HEADS, LAYERS, 32), 3, dropout=0.0).eval()
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return found


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(1, 50, (12, 8))
    tokens[:, 6:] = 0
    return tokens, torch.randint(0, 3, (12,))


def silence(encoder: Encoder, layer: int, head: int) -> None:
    """Let nothing of what a head says be heard."""
    size = WIDTH // HEADS
    encoder.layers[layer].attention.out.weight.data[:, head * size : (head + 1) * size] = 0


def test_heads_that_nobody_hears_go_and_the_answers_stay(encoder, rows):
    for layer, head in ((0, 1), (1, 3), (2, 0)):
        silence(encoder, layer, head)
    importance = head_importance(encoder, *rows)
    assert [found.argmin().item() for found in importance] == [1, 3, 0]
    assert all((found > 0).sum() == HEADS - 1 for found in importance)
    before, size = encoder(rows[0]), sum(p.numel() for p in encoder.parameters())
    remove_parts(encoder, Pruned(kind="pruned", of="heads", ratio=0.25), *rows)
    assert torch.allclose(encoder(rows[0]), before, atol=1e-5)
    assert [layer.attention.query.weight.shape for layer in encoder.layers] == [(12, 16)] * LAYERS
    assert sum(p.numel() for p in encoder.parameters()) == size - LAYERS * (4 * 4 * WIDTH + 3 * 4)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_the_layer_that_changes_least_goes(encoder, rows):
    quiet = encoder.layers[1]
    for part in (quiet.attention.out, quiet.outer):
        torch.nn.init.zeros_(part.weight)
        torch.nn.init.zeros_(part.bias)
    assert layer_influence(encoder, rows[0]).argmin().item() == 1
    left = [encoder.layers[0], encoder.layers[2]]
    remove_parts(encoder, Pruned(kind="pruned", of="layers", ratio=0.4), *rows)
    assert list(encoder.layers) == left


@pytest.mark.parametrize("of", ["heads", "layers"])
def test_what_cannot_be_removed_is_one_line(encoder, rows, of):
    with pytest.raises(BadRequest, match=f"pruned-{of}: ratio = 0.1 of [34] {of} removes none"):
        remove_parts(encoder, Pruned(kind="pruned", of=of, ratio=0.1), *rows)
    with pytest.raises(BadRequest, match=f"pruned-{of}: the network has no {of}; use of: units"):
        remove_parts(torch.nn.Linear(2, 2), Pruned(kind="pruned", of=of), *rows)
