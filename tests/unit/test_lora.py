"""Low-rank parts end in the weights that they change, and nobody else's names are taken for theirs."""

from __future__ import annotations

import pytest
import torch

from tasks.train.encoder import LORA_SCALE, merged

pytestmark = pytest.mark.timeout(30)


def test_each_part_is_added_to_its_weight_and_gone():
    torch.manual_seed(0)
    weight, up, down = torch.randn(4, 3), torch.randn(4, 2), torch.randn(2, 3)
    found = merged({"query.weight": weight, "query.up": up, "query.down": down, "head.weight": weight})
    assert set(found) == {"query.weight", "head.weight"}
    assert torch.allclose(found["query.weight"], weight + LORA_SCALE * up @ down)
    assert found["head.weight"] is weight


def test_a_networks_own_down_and_up_stay():
    names = ("gate.down", "gate.up", "lift.down", "lift.weight")
    own = {name: torch.ones(2) for name in names}
    assert merged(own) == own
