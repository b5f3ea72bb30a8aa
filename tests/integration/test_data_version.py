"""The real DVC and Git (by dulwich): revisions, repeats, corruption, kills, and no git program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dulwich.repo import Repo as Git

from tasks.data.version import version
from tasks.spec.errors import IntegrityLost
from tasks.spec.requests import VersionRequest
from tasks.spec.value import RoomRef
from tasks.store.files import sha256_file
from tasks.store.manifest import write_manifest

pytestmark = pytest.mark.timeout(120)
CHILD = """
import sys
from pathlib import Path
from tasks.data.version import version
from tasks.spec.requests import VersionRequest
request = VersionRequest.model_validate_json(sys.argv[1])
print(version(request, Path(sys.argv[2]), Path(sys.argv[3])).revision, flush=True)
"""


def request_for(folder: Path, workload: str = "w", rows: int = 30, first: int = 0) -> VersionRequest:
    room = folder / f"clean-{rows}-{first}"
    room.mkdir(parents=True, exist_ok=True)
    columns = {
        "row_id": [str(index) for index in range(rows)],
        "text": [f"text {first + index}" for index in range(rows)],
        "label": ["xy"[index % 2] for index in range(rows)],
        "split": [("train", "validation", "holdout")[index % 3] for index in range(rows)],
    }
    pq.write_table(pa.table(columns), room / "data.parquet")
    ref = RoomRef(uri=str(room), digest_sha256=write_manifest(room))
    return VersionRequest(workload=workload, clean=ref, validate_data=ref, validate_labels=ref)


def tags(repository: Path) -> list[str]:
    with Git(str(repository)) as git:
        return sorted(name.decode() for name in git.refs.as_dict(b"refs/tags"))


def commits(repository: Path) -> int:
    with Git(str(repository)) as git:
        return sum(1 for _ in git.get_walker())


def objects(repository: Path) -> list[Path]:
    cache = repository / ".dvc" / "cache" / "files" / "md5"
    return sorted(path for path in cache.rglob("*") if path.is_file())


def flip(path: Path) -> None:
    mode = path.stat().st_mode
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(mode)


def test_a_version_is_a_tag_and_what_dvc_gave_back(tmp_path):
    request, room, repository = request_for(tmp_path), tmp_path / "room", tmp_path / "datasets"
    (room / "half").mkdir(parents=True)
    result = version(request, room, repository)
    digest = sha256_file(Path(request.clean.uri) / "data.parquet")
    assert result.revision == f"w-{digest[:12]}"
    assert result.data_sha256 == digest == sha256_file(room / "data.parquet")
    assert result.rows_by_split == {"train": 10, "validation": 10, "holdout": 10}
    assert result.class_counts == {"x": 15, "y": 15}
    assert [path.name for path in room.iterdir()] == ["data.parquet"]
    (stored,) = objects(repository)
    assert stored.stat().st_ino != (room / "data.parquet").stat().st_ino, "no bytes shared with the cache"
    facts = json.loads((repository / "w" / "dataset.json").read_text())
    assert facts["rooms"]["clean"] == request.clean.digest_sha256
    assert not (repository / "w" / "data.parquet").exists()


def test_the_same_data_again_is_the_same_revision_and_no_commit(tmp_path):
    repository = tmp_path / "datasets"
    first = version(request_for(tmp_path), tmp_path / "room", repository)
    assert version(request_for(tmp_path), tmp_path / "again", repository) == first
    assert (len(tags(repository)), commits(repository)) == (1, 1)
    other = version(request_for(tmp_path, first=5), tmp_path / "other", repository)
    assert version(request_for(tmp_path), tmp_path / "back", repository) == first
    same_bytes = version(request_for(tmp_path, workload="v"), tmp_path / "v", repository)
    assert tags(repository) == sorted([first.revision, other.revision, same_bytes.revision])
    assert commits(repository) == 3
    assert len(objects(repository)) == 2


def test_a_flipped_byte_in_the_cache_is_refused_and_repaired_as_the_message_says(tmp_path):
    request, repository = request_for(tmp_path), tmp_path / "datasets"
    first = version(request, tmp_path / "room", repository)
    (stored,) = objects(repository)
    assert stored.stat().st_mode & 0o777 == 0o444
    flip(stored)
    for workload in ("w", "v"):
        with pytest.raises(IntegrityLost, match="remove this object and run the step again") as caught:
            version(request.model_copy(update={"workload": workload}), tmp_path / "room", repository)
        assert str(stored) in str(caught.value)
    assert tags(repository) == [first.revision], "no tag names bytes that are not there"
    stored.unlink()
    assert version(request, tmp_path / "room", repository) == first
    assert commits(repository) == 1


def test_a_changed_cleaned_room_is_refused(tmp_path):
    request = request_for(tmp_path)
    flip(Path(request.clean.uri) / "data.parquet")
    with pytest.raises(IntegrityLost):
        version(request, tmp_path / "room", tmp_path / "datasets")
    assert not (tmp_path / "datasets").exists()


def test_a_damaged_history_is_refused(tmp_path):
    request, repository = request_for(tmp_path), tmp_path / "datasets"
    version(request, tmp_path / "room", repository)
    with Git(str(repository)) as git:
        tree = git[git.head()].tree.decode()
    (repository / ".git" / "objects" / tree[:2] / tree[2:]).unlink()
    with pytest.raises(IntegrityLost, match="restore this folder"):
        version(request, tmp_path / "room", repository)


def test_no_git_program_is_needed_and_nothing_is_printed(tmp_path):
    request = request_for(tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "GIT_PYTHON_REFRESH"}
    home = tmp_path / "home"
    home.mkdir()
    environment |= {"PATH": str(home), "HOME": str(home), "PYTHONWARNINGS": "ignore"}
    folders = [str(tmp_path / "room"), str(tmp_path / "d")]
    command = [sys.executable, "-c", CHILD, request.model_dump_json(), *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == tags(tmp_path / "d")
    assert done.stderr == ""
    assert list(home.iterdir()) == [], "nothing of the user's is touched"


def test_two_workloads_at_once_do_not_mix(tmp_path):
    repository = tmp_path / "datasets"
    requests = [request_for(tmp_path, workload=f"w{index}", first=index) for index in range(4)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda r: version(r, tmp_path / r.workload, repository), requests))
    for request, result in zip(requests, results, strict=True):
        assert result.data_sha256 == sha256_file(tmp_path / request.workload / "data.parquet")
    assert tags(repository) == sorted(result.revision for result in results)


def test_a_killed_attempt_is_completed_by_the_next(tmp_path):
    request, repository, room = request_for(tmp_path, rows=200_000), tmp_path / "datasets", tmp_path / "room"
    command = [sys.executable, "-c", CHILD, request.model_dump_json(), str(room), str(repository)]
    marks = [".git", f"{request.workload}/data.parquet", f"{request.workload}/data.parquet.dvc", ".git/index"]
    killed = 0
    for mark in marks:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while child.poll() is None and not (repository / mark).exists():
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
    assert killed, "at least one attempt was killed"
    for stale in (".git/index.lock", ".git/refs/heads/master.lock"):
        (repository / stale).touch()
    began = time.monotonic()
    result = version(request, room, repository)
    assert time.monotonic() - began < 5
    assert tags(repository) == [result.revision]
    assert commits(repository) == 1
    assert sha256_file(room / "data.parquet") == result.data_sha256


def test_a_commit_without_its_tag_gets_the_tag(tmp_path):
    request, repository = request_for(tmp_path), tmp_path / "datasets"
    result = version(request, tmp_path / "room", repository)
    with Git(str(repository)) as git:
        git.refs.remove_if_equals(f"refs/tags/{result.revision}".encode(), None)
    assert version(request, tmp_path / "room", repository) == result
    assert (tags(repository), commits(repository)) == ([result.revision], 1)
