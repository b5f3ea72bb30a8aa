"""The history of dataset revisions: a Git repository with a tag a revision, spoken by dulwich (no git program).

    <repository>/<workload>/data.parquet.dvc   DVC's pointer to the bytes
    <repository>/<workload>/dataset.json       the facts: schema, rows, splits, validation, labels, lineage, profile
    <repository>/<workload>/report.html        the data report
"""

from __future__ import annotations

import datetime as dt
import os
import shutil
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from tasks.spec.errors import IntegrityLost
from tasks.store.files import exclusive, write_whole

AUTHOR = b"Drydock <drydock@localhost>"
IGNORED = "/cache\n/tmp\n/site\n"


class Tag(NamedTuple):
    """One revision: its tag, the commit (hex) it names, when it was made, and the SHA-256 of its data."""

    name: str
    commit: bytes
    at: dt.datetime
    data_sha256: str


def tags(repository: Path) -> list[Tag]:
    """Return all revisions in the order they were committed; none where there is no repository."""
    if not (repository / ".git").is_dir():
        return []
    from dulwich.repo import Repo as Git

    with Git(str(repository)) as git:
        found = [_tag_of(git, ref) for ref in git.refs.keys(base=b"refs/tags/")]
        # From every tag: one that came from a remote need not be an ancestor of ours.
        # By ancestry: commits of one second have no order by time.
        walker = git.get_walker(include=[tag.commit for tag in found], order="topo") if found else ()
        order = {entry.commit.id: place for place, entry in enumerate(walker)}
    return sorted(found, key=lambda tag: (-order.get(tag.commit, -1), tag.at, tag.name))


def find(repository: Path, name: str) -> Tag | None:
    """Return one revision, or None."""
    if not (repository / ".git").is_dir():
        return None
    from dulwich.repo import Repo as Git

    with Git(str(repository)) as git:
        return _tag_of(git, name.encode()) if b"refs/tags/" + name.encode() in git.refs else None


def read_file(repository: Path, tag: Tag, path: str) -> bytes:
    """Return a file of a revision, as it was tagged.

    Raises:
        IntegrityLost: the history is damaged.
    """
    from dulwich.object_store import tree_lookup_path
    from dulwich.repo import Repo as Git

    with Git(str(repository)) as git:
        try:
            _, blob = tree_lookup_path(git.__getitem__, git[tag.commit].tree, path.encode())
            return git[blob].data
        except (KeyError, ValueError, zlib.error) as error:
            found = f"commit {tag.commit.decode()[:12]} has no readable {path}"
            raise IntegrityLost(f"{repository}: {found}; restore this folder from a backup") from error


def write_tag(repository: Path, name: str, files: dict[str, bytes], message: str) -> None:
    """Commit files and tag them; the tag is written last. A killed attempt is completed by the next.

    The lock is held for the commit alone, some milliseconds; the kernel releases it when its holder dies.
    """
    with exclusive(lock_of(repository)):
        set_up(repository)
        for path, content in files.items():
            write_whole(repository / path, content)
        commit = _commit(repository, sorted(files), name)
        _tag(repository, name, commit, message)


def adopt(repository: Path, name: str, bundle: bytes, where: str) -> None:
    """Take a revision's tag, and what it needs, from a Git bundle. ``where`` names it in a message.

    Raises:
        IntegrityLost: the bundle is damaged, or has no such tag.
    """
    import io

    from dulwich.bundle import read_bundle
    from dulwich.errors import ApplyDeltaError, ChecksumMismatch, ObjectFormatException
    from dulwich.repo import Repo as Git

    ref = b"refs/tags/" + name.encode()
    with exclusive(lock_of(repository)):
        set_up(repository)
        try:
            with Git(str(repository)) as git, read_bundle(io.BytesIO(bundle)) as read:
                read.store_objects(git.object_store)
                commit = git.get_peeled(ref) if ref in git.refs else git[read.references[ref]].object[1]
                # What the commit needs is here before anything names it.
                _ = git[git[commit].tree]
                if b"HEAD" not in git.refs.as_dict():
                    git.refs[b"refs/heads/master"] = commit
                git.refs[ref] = read.references[ref]
        except (KeyError, ValueError, AttributeError, EOFError, zlib.error, ObjectFormatException, ChecksumMismatch,
                ApplyDeltaError) as error:  # fmt: skip
            reason = " ".join(f"{type(error).__name__} {error}".split())[:120]
            raise IntegrityLost(f"{where}: is no whole history of {name} ({reason}); push it again") from None


def lock_of(repository: Path) -> Path:
    return repository.with_name(f".{repository.name}.lock")


def set_up(repository: Path) -> None:
    """Make the Git repository unless it is there; the caller holds the lock."""
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
    if not (repository / ".dvc" / ".gitignore").is_file():
        write_whole(repository / ".dvc" / ".gitignore", IGNORED)


def _tag_of(git: Any, name: bytes) -> Tag:
    ref = b"refs/tags/" + name
    commit = git.get_peeled(ref)
    message = getattr(git[git.refs[ref]], "message", b"").decode().strip()
    at = dt.datetime.fromtimestamp(git[commit].commit_time, dt.UTC)
    return Tag(name.decode(), commit, at, message.rpartition(" ")[2])


def _commit(repository: Path, paths: list[str], message: str) -> bytes:
    """Commit these files; return the commit, or HEAD where they are committed already."""
    from dulwich.repo import Repo as Git

    with Git(str(repository)) as git:
        work = git.get_worktree()
        work.stage([".dvc/.gitignore", *paths])
        head = git.refs.as_dict().get(b"HEAD")
        # A killed attempt may have committed and not tagged.
        if head is not None and git.open_index().commit(git.object_store) == git[head].tree:
            return head
        return work.commit(message=message.encode(), author=AUTHOR, committer=AUTHOR)


def _tag(repository: Path, name: str, commit: bytes, message: str) -> None:
    from dulwich import porcelain
    from dulwich.repo import Repo as Git

    with Git(str(repository)) as git:
        if b"refs/tags/" + name.encode() in git.refs:
            return
    porcelain.tag_create(
        str(repository), name.encode(), author=AUTHOR, message=message.encode(), annotated=True, objectish=commit
    )
