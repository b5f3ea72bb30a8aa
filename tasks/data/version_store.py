"""The bytes of dataset revisions, kept by DVC: into its cache, to its remote and back. With ``version`` the only one
that runs DVC.

DVC locks the folder it works in, and mixes up two runs that add the same path. So every call works in a folder of its
own, which shares only the cache; objects in there are named by content and come by rename. Runs don't wait for each
other, and the lock of one that was killed lies in a folder that nobody opens again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tasks.spec.errors import IntegrityLost, TryAgain
from tasks.store.files import write_whole

DATA = "data.parquet"
POINTER = f"{DATA}.dvc"
# Analytics and the check for updates would ask the network. Never a link: what is checked out must not share its
# bytes with the cache.
CONFIG = """[core]
    analytics = false
    check_update = false
    no_scm = true
    site_cache_dir = "{site}"
[cache]
    type = "reflink,copy"
    dir = "{cache}"
"""
# DVC trusts what a remote gives unless told to verify; what arrives is held against its SHA-256 as well.
REMOTE = """['remote "store"']
    url = "{url}"
    verify = true
"""


class Remote(NamedTuple):
    """Where revisions are pushed to: a folder, or ``s3://bucket/prefix`` (credentials as Amazon's tools read them)."""

    url: str
    endpoint: str = ""


def keep(repository: Path, data: Path, scratch: Path, remote: Remote | None) -> str:
    """Bring a file's bytes into the cache, and to the remote where there is one; return DVC's pointer to them.

    Raises:
        TryAgain: the remote did not take them.
    """
    with _workspace(repository, scratch, remote) as dvc:
        work = scratch / DATA
        shutil.copyfile(data, work)
        dvc.add(str(work))
        pointer = (scratch / POINTER).read_text()
        if remote is not None:
            _push(dvc, remote)
    return pointer


def fetch(repository: Path, pointer: str, scratch: Path, remote: Remote | None) -> None:
    """Bring the bytes that a pointer names back into the cache, from the remote.

    Raises:
        IntegrityLost: there is no remote, or it hasn't the bytes.
    """
    missing = f"{object_path(repository, pointer)}: is not in the cache"
    if remote is None:
        raise IntegrityLost(f"{missing}; set DRYDOCK_DATASET_REMOTE to where it was pushed, or run the retrain again")
    with _workspace(repository, scratch, remote) as dvc:
        write_whole(scratch / POINTER, pointer)
        dvc.fetch(remote="store")
    if not object_path(repository, pointer).is_file():
        raise IntegrityLost(f"{missing}, and {remote.url} has it not; restore one of them from a backup")


def object_path(repository: Path, pointer: str) -> Path:
    """Return where the cache holds what a pointer names."""
    import yaml

    md5 = yaml.safe_load(pointer)["outs"][0]["md5"]
    return repository / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]


def _push(dvc: Any, remote: Remote) -> None:
    from dvc.exceptions import DvcException

    try:
        dvc.push(remote="store")
    except (DvcException, OSError) as error:
        raise TryAgain(f"{remote.url}: did not take the revision ({_line(error)}); it is pushed again") from error


@contextmanager
def _workspace(repository: Path, scratch: Path, remote: Remote | None) -> Iterator[Any]:
    """DVC in a folder of its own with the repository's cache; the folder is removed, or left to a killed attempt's
    room, which the next attempt empties."""
    # Read by GitPython and DVC at import: no git program is looked for, no usage statistics are sent.
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ["DVC_NO_ANALYTICS"] = "true"
    _prepare(repository, scratch, remote)
    import logging

    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc_objects.errors import ObjectFormatError

    logging.getLogger("dvc").setLevel(logging.CRITICAL)
    try:
        with Repo(str(scratch)) as dvc:
            yield dvc
    except (DvcException, ObjectFormatError, FileNotFoundError) as error:
        raise IntegrityLost(f"{repository}: DVC failed: {_line(error)}; run the step again") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _prepare(repository: Path, scratch: Path, remote: Remote | None) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / ".dvc").mkdir(parents=True)
    config = CONFIG.format(site=scratch / ".dvc" / "site", cache=repository / ".dvc" / "cache")
    if remote is not None:
        config += REMOTE.format(url=remote.url)
        config += f"    endpointurl = {remote.endpoint}\n" if remote.endpoint else ""
    write_whole(scratch / ".dvc" / "config", config)


def _line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return " ".join(f"{error} {cause if cause is not error else ''}".split())[:200]
