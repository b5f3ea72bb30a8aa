"""What ranks send is made smaller where the link is slow, and there alone: ``gradients: auto`` measures it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("tc"), reason="a slow link needs root and tc"),
]
# A network of 2.7 M parameters, 11 MB of gradients.
ASKED = {"recipe": {"kind": "mlp", "hidden": [2048, 1200], "dropout": 0.0}, "batch_size": 128, "ranks": 2}
ASKED |= {"parallel": "ddp", "stopping": {"max_epochs": 2, "patience_epochs": 2}}
FIT = """
    import json, sys
    from pathlib import Path
    from tasks.spec.requests import TrainRequest
    from tasks.train.fit import fit
    request = TrainRequest.parse(json.loads(Path(sys.argv[1]).read_text()), "the test's request")
    fit(request, Path(sys.argv[2]), None, lambda line: None)
"""


def trained(request, folder: Path, link: str = "") -> str:
    """Train in a network of its own, whose loopback has that queue; return what the ranks printed."""
    (asked := folder.with_suffix(".json")).write_text(request.model_dump_json())
    slow = f"tc qdisc add dev lo root {link} && " if link else ""
    line = f'ip link set lo up && {slow}exec "$0" -c "$1" "$2" "$3"'
    command = ["unshare", "--net", "sh", "-c", line, sys.executable, textwrap.dedent(FIT), str(asked), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def rate(folder: Path) -> float:
    return json.loads((folder / "history.jsonl").read_text().splitlines()[-1])["samples_per_second"]


def test_a_slow_link_is_sent_less_and_a_fast_one_all(train_request, tmp_path):
    link = "tbf rate 300mbit burst 256kb latency 400ms"
    said = trained(train_request(**ASKED, gradients="auto"), tmp_path / "slow", link)
    assert re.search(r"auto: ddp (powersgd|fp16|bf16), of measured rows/s", said), said
    trained(train_request(**ASKED), tmp_path / "plain", link)
    assert rate(tmp_path / "slow") > 1.3 * rate(tmp_path / "plain")
    # Others' work may disturb so short a measurement once.
    fast = (trained(train_request(**ASKED, gradients="auto"), tmp_path / f"fast-{turn}") for turn in range(3))
    assert any("auto: ddp fp32, of measured rows/s" in said for said in fast)
