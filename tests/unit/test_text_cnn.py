"""Token dropout: what a step does not see of a text, and that an answer sees all of it."""

from __future__ import annotations

import pytest
import torch

from tasks.spec.recipe import TextCnn
from tasks.train.plain import TextCnnNet

pytestmark = pytest.mark.timeout(30)


def seen_of(network: TextCnnNet, tokens: torch.Tensor) -> torch.Tensor:
    """Return the tokens that the embedding is asked for."""
    seen: list[torch.Tensor] = []
    with network.embedding.register_forward_pre_hook(lambda module, asked: seen.append(asked[0])), torch.no_grad():
        network(tokens)
    return seen[0]


@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_so_large_a_share_of_the_pieces_is_padding_in_training_and_none_in_answers(ratio):
    torch.manual_seed(0)
    network = TextCnnNet(TextCnn(kind="text-cnn", token_dropout=ratio), 50, 2)
    tokens = torch.randint(1, 50, (100, 64))
    seen = seen_of(network.train(), tokens)
    assert (seen == 0).float().mean().item() == pytest.approx(ratio, abs=0.02)
    assert torch.equal(seen[seen != 0], tokens[seen != 0])
    assert torch.equal(seen_of(network.eval(), tokens), tokens)
