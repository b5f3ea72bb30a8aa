"""The edge bundle: a model with a runner of one file, for machines that have onnxruntime and numpy and nothing of ours.

    model.onnx  signature.json  bom.json  (texts: tokenizer.json)   as in the package
    manifest.json  manifest.sig                                     the package's, for whoever has the public key
    run.py                                                          the runner
    SHA256SUMS                                                      of all the others; written last
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tasks.spec.errors import BadRequest
from tasks.store.files import copy_folder, sha256_file, write_whole

SUMS, RUNNER = "SHA256SUMS", "run.py"


def write_bundle(package: Path, out: Path) -> str:
    """Write the bundle of a verified package to a new folder; return the digest of its SHA256SUMS.

    Raises:
        BadRequest: there is something at ``out`` already.
    """
    if out.exists():
        raise BadRequest(f"{out}: is there already; name a new folder")
    working = out.with_name(f".{out.name}.writing")
    shutil.rmtree(working, ignore_errors=True)
    copy_folder(package, working)
    shutil.copyfile(Path(__file__).with_name("runner.py"), working / RUNNER)
    lines = [f"{sha256_file(path)}  {path.name}\n" for path in sorted(working.iterdir())]
    write_whole(working / SUMS, "".join(lines))
    digest = sha256_file(working / SUMS)
    os.rename(working, out)
    return digest
