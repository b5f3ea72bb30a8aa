"""Keep each dataset version under a Git tag, its bytes in DVC. The only one that runs DVC.

    <repository>/                      Git and DVC, made on first use
    <repository>/<workload>/data.parquet.dvc, dataset.json, .gitignore
    <repository>/.dvc/cache/           the bytes, by content

Git is spoken by dulwich, so no ``git`` program is needed. DVC hands out a corrupted object without a word
(it trusts every object of mode 0444), so what it gives back is held against the cleaned room's manifest.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.data.table import SPLITS, empty_room, read_table
from tasks.spec.errors import IntegrityLost, TryAgain
from tasks.spec.requests import VersionRequest, VersionResult
from tasks.store.files import exclusive, sha256_file, write_json, write_whole
from tasks.store.manifest import NAME as MANIFEST
from tasks.store.room import open_room

DATA = "data.parquet"
POINTER = f"{DATA}.dvc"
FACTS = "dataset.json"
TAG_DIGITS = 12
AUTHOR = b"Drydock <drydock@localhost>"
# Analytics and the check for updates would ask the network. Never a link: what is checked out must not share
# its bytes with the cache.
CONFIG = """[core]
    analytics = false
    check_update = false
    autostage = false
[cache]
    type = "reflink,copy"
"""


def version(request: VersionRequest, room: Path, repository: Path) -> VersionResult:
    """Tag the cleaned table as a dataset revision, check the revision out and write it into ``room``.

    The same data again has the same tag and makes no new commit. The tag is written last, after the object
    in the cache was read and found right.

    Raises:
        IntegrityLost: the cleaned room changed, or DVC's cache gives back other bytes; the message says how
            to repair it from the cleaned room, which is whole.
        TryAgain: another program holds DVC's own lock.
    """
    cleaned = open_room(request.clean)
    digest = json.loads((cleaned / MANIFEST).read_bytes())["files"][DATA]["sha256"]
    tag = f"{request.workload}-{digest[:TAG_DIGITS]}"
    # A DVC repository waits 3 s for its lock and mixes up two runs that add the same path: one at a time.
    with exclusive(repository.with_name(f".{repository.name}.lock")), _translated(repository):
        _set_up(repository)
        _keep(request, repository, cleaned / DATA, digest, tag)
        empty_room(room)
        _check_out(repository, tag, request.workload, digest, room / DATA)
    return _result(room / DATA, tag, digest)


def _result(data: Path, tag: str, digest: str) -> VersionResult:
    table = read_table(data, ["label", "split"])
    splits = {name: 0 for name in SPLITS} | _counts(table.column("split"))
    classes = dict(sorted(_counts(table.column("label")).items()))
    return VersionResult(revision=tag, data_sha256=digest, rows_by_split=splits, class_counts=classes)


def _counts(column: Any) -> dict[str, int]:
    return {str(item["values"]): item["counts"] for item in column.value_counts().to_pylist()}


def _set_up(repository: Path) -> None:
    """Make the Git and DVC repository unless it is there; the caller holds the lock."""
    from dulwich.repo import Repo as Git

    git = repository / ".git"
    if not git.is_dir():
        # Made aside and moved: a killed attempt never leaves half a repository under the name.
        aside = repository / ".making"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        Git.init(str(aside)).close()
        os.rename(aside / ".git", git)
        aside.rmdir()
    for stale in git.rglob("*.lock"):
        # We hold the repository's lock, so the one who made this was killed.
        stale.unlink()
    dvc = repository / ".dvc"
    if not (dvc / "config").is_file():
        write_whole(dvc / ".gitignore", "/config.local\n/tmp\n/cache\n/site\n")
        write_whole(dvc / "config", CONFIG)


def _keep(request: VersionRequest, repository: Path, data: Path, digest: str, tag: str) -> None:
    """Bring the bytes into the cache, then the pointer into Git, then the tag."""
    known = _tagged(repository, tag)
    if known is not None and _object_path(repository, known, request.workload).is_file():
        return
    folder = repository / request.workload
    _add(repository, folder, data)
    object_path = _object_in(repository, (folder / POINTER).read_text())
    _hold(object_path, object_path, digest)
    if known is not None:
        # The object had gone from the cache; the tag that names it stands.
        return
    write_json(folder / FACTS, _facts(request, digest))
    _tag(repository, tag, _commit(repository, request.workload, tag), digest)


def _facts(request: VersionRequest, digest: str) -> dict[str, Any]:
    """What the revision comes from: digests of the rooms it was cleaned and validated in."""
    rooms = {
        "clean": request.clean.digest_sha256,
        "validate_data": request.validate_data.digest_sha256,
        "validate_labels": request.validate_labels.digest_sha256,
    }
    return {"workload": request.workload, "data_sha256": digest, "rooms": rooms}


def _add(repository: Path, folder: Path, data: Path) -> None:
    """Copy the file into the working folder, have DVC take it into its cache, and remove the copy."""
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / DATA
    work.unlink(missing_ok=True)
    shutil.copyfile(data, work)
    with _dvc(repository) as dvc:
        dvc.add(str(work))
    work.unlink()
    write_whole(folder / ".gitignore", f"/{DATA}\n")


def check_out(repository: Path, tag: str, out: Path) -> None:
    """Write a tagged revision's data to ``out``, held against the digest that its tag states.

    Raises:
        IntegrityLost: DVC gave other bytes. TryAgain: DVC or Git failed.
    """
    with _translated(repository):
        _check_out(repository, tag, tag.rpartition("-")[0], tagged_sha256(repository, tag), out)


def tagged_sha256(repository: Path, tag: str) -> str:
    """Return the SHA-256 that a revision's tag states."""
    from dulwich.repo import Repo as Git

    with Git(str(repository)) as git:
        return git[git.refs[b"refs/tags/" + tag.encode()]].message.decode().strip().rpartition(" ")[2]


def _check_out(repository: Path, tag: str, workload: str, digest: str, out: Path) -> None:
    with _dvc(repository, rev=tag) as dvc:
        dvc.dvcfs.get_file(f"/{workload}/{DATA}", str(out))
    out.chmod(0o644)
    known = _tagged(repository, tag)
    assert known is not None
    _hold(out, _object_path(repository, known, workload), digest)


def _hold(found: Path, object_path: Path, digest: str) -> None:
    if (got := sha256_file(found)) != digest:
        raise IntegrityLost(
            f"{object_path}: DVC's cache holds digest {got[:12]}, must be {digest[:12]}; remove this object "
            "and run the step again, which writes it anew from the cleaned room (that one is whole)"
        )


def _tagged(repository: Path, tag: str) -> bytes | None:
    """Return the commit (hex) that a tag names, or None."""
    from dulwich.repo import Repo as Git

    with Git(str(repository)) as git:
        name = b"refs/tags/" + tag.encode()
        return git.get_peeled(name) if name in git.refs else None


def _object_path(repository: Path, commit: bytes, workload: str) -> Path:
    """Where the cache holds the data of a revision, by the pointer that the revision's tree has."""
    from dulwich.object_store import tree_lookup_path
    from dulwich.repo import Repo as Git

    with Git(str(repository)) as git:
        path = f"{workload}/{POINTER}".encode()
        try:
            _, blob = tree_lookup_path(git.__getitem__, git[commit].tree, path)
            return _object_in(repository, git[blob].data.decode())
        except (KeyError, ValueError, zlib.error) as error:
            found = f"commit {commit.decode()[:12]} has no readable {workload}/{POINTER}"
            raise IntegrityLost(f"{repository}: {found}; restore this folder from a backup") from error


def _object_in(repository: Path, pointer: str) -> Path:
    import yaml

    md5 = yaml.safe_load(pointer)["outs"][0]["md5"]
    return repository / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]


def _commit(repository: Path, workload: str, tag: str) -> bytes:
    """Commit the pointer and the facts; return the commit, or HEAD where they are committed already."""
    from dulwich.repo import Repo as Git

    own = [f"{workload}/{name}" for name in (POINTER, FACTS, ".gitignore")]
    with Git(str(repository)) as git:
        work = git.get_worktree()
        work.stage([".dvc/config", ".dvc/.gitignore", *own])
        head = git.refs.as_dict().get(b"HEAD")
        # A killed attempt may have committed and not tagged.
        if head is not None and git.open_index().commit(git.object_store) == git[head].tree:
            return head
        return work.commit(message=tag.encode(), author=AUTHOR, committer=AUTHOR)


def _tag(repository: Path, tag: str, commit: bytes, digest: str) -> None:
    from dulwich import porcelain

    porcelain.tag_create(
        str(repository),
        tag.encode(),
        author=AUTHOR,
        message=f"{DATA} sha256 {digest}".encode(),
        annotated=True,
        objectish=commit,
    )


@contextmanager
def _dvc(repository: Path, rev: str | None = None) -> Iterator[Any]:
    """DVC on the working folder, or on a revision as it was tagged."""
    import logging

    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.ERROR)
    # DVC's default is a folder for the whole machine, where another user's rights may stop us.
    site = {"core": {"site_cache_dir": str(repository / ".dvc" / "site")}}
    with Repo(str(repository), rev=rev, config=site) as dvc:
        yield dvc


@contextmanager
def _translated(repository: Path) -> Iterator[None]:
    """DVC's errors as ours."""
    # Read by GitPython and DVC at import: no git program is looked for, no usage statistics are sent.
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ["DVC_NO_ANALYTICS"] = "true"
    from dvc.exceptions import DvcException
    from dvc.lock import LockError

    try:
        yield
    except LockError as error:
        raise TryAgain(f"{repository}: another program holds DVC's lock ({error}); try again") from None
    except (DvcException, FileNotFoundError) as error:
        reason = f"DVC can't give the revision: {str(error)[:200]}"
        raise IntegrityLost(f"{repository}: {reason}; run the step again") from error
