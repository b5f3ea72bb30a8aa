"""The store: whole files, manifests that notice any byte, rooms that are whole or not there, signatures, events."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.spec.errors import BadRequest, IntegrityLost, TryAgain
from tasks.spec.value import RoomRef, canonical_json
from tasks.store import manifest
from tasks.store.events import read_events, record_event
from tasks.store.files import exclusive, sha256_file, write_whole
from tasks.store.manifest import digest_of, verify, write_manifest
from tasks.store.room import Room, open_room
from tasks.store.sign import (
    key_id,
    list_keys,
    make_key,
    revoke_key,
    rotate_key,
    sign_folder,
    verify_folder_signature,
)

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of a few files, one below another folder."""
    (tmp_path / "f" / "sub").mkdir(parents=True)
    (tmp_path / "f" / "model.bin").write_bytes(random.Random(0).randbytes(2000))
    (tmp_path / "f" / "sub" / "a.txt").write_text("tiny\n")
    (tmp_path / "f" / "empty").write_bytes(b"")
    return tmp_path / "f"


# --- manifests ----------------------------------------------------------------------------------------------


def test_a_whole_folder_verifies_and_its_digest_depends_on_content_alone(folder, tmp_path):
    digest = write_manifest(folder)
    assert verify(folder) == verify(folder, digest) == digest_of(folder) == digest
    assert write_manifest(folder) == digest
    shutil.copytree(folder, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "model.bin").touch()
    assert verify(tmp_path / "elsewhere", digest) == digest


def test_any_flipped_byte_is_noticed(folder):
    digest = write_manifest(folder)
    draw = random.Random(1)
    paths = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    places = [(path, draw.randrange(path.stat().st_size)) for path in draw.choices(paths, k=200)]
    assert {path.name for path, _ in places} == {"model.bin", "a.txt", "manifest.json"}
    for path, offset in places:
        before = path.read_bytes()
        flipped = bytes([before[offset] ^ draw.randrange(1, 256)])
        path.write_bytes(before[:offset] + flipped + before[offset + 1 :])
        with pytest.raises(IntegrityLost):
            verify(folder, digest)
        path.write_bytes(before)
    assert verify(folder, digest)


def _truncate(folder):
    (folder / "model.bin").write_bytes((folder / "model.bin").read_bytes()[:-1])


def _link(folder):
    (folder / "sub" / "a.txt").rename(folder.parent / "a.txt")
    (folder / "sub" / "a.txt").symlink_to(folder.parent / "a.txt")


def _link_folder(folder):
    (folder / "sub").rename(folder.parent / "moved")
    (folder / "sub").symlink_to(folder.parent / "moved")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_truncate, "model.bin has digest another size"),
        (lambda f: (f / "sub" / "new").write_text(""), "sub/new is not in its manifest"),
        (lambda f: (f / "empty").unlink(), "empty is missing"),
        (lambda f: (f / "model.bin").rename(f / "other.bin"), "other.bin is not in its manifest"),
        (_link, "sub/a.txt is not a plain file"),
        (_link_folder, "sub is not a plain file"),
        (lambda f: os.mkfifo(f / "pipe"), "pipe is not a plain file"),
        (lambda f: (f / "manifest.json").unlink(), "has no manifest.json, so it is not whole"),
        (lambda f: (f / "manifest.json").write_text("{}"), "its digest is"),
        (lambda f: (f / "sub" / "manifest.json").write_text("{}"), "sub/manifest.json is not in its manifest"),
    ],
)
def test_what_else_can_change_is_noticed_and_named(folder, harm, words):
    digest = write_manifest(folder)
    harm(folder)
    with pytest.raises(IntegrityLost, match=words):
        verify(folder, digest)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"files": 1}', b'{"files": {"a": 1}}', b"\xff", b'{"files'])
def test_a_manifest_that_is_none_is_integrity_lost(folder, content):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(IntegrityLost, match=r"can't be read"):
        verify(folder)


def test_a_manifest_that_names_a_file_outside_is_refused(folder, tmp_path):
    (tmp_path / "outside").write_text("x")
    entry = {"bytes": 1, "sha256": sha256_file(tmp_path / "outside")}
    files = json.loads(_manifest_text(folder))["files"] | {"../outside": entry}
    (folder / "manifest.json").write_bytes(canonical_json({"files": files, "format": 1}))
    with pytest.raises(IntegrityLost, match=r"\.\./outside is missing"):
        verify(folder)


def _manifest_text(folder: Path) -> bytes:
    write_manifest(folder)
    return (folder / manifest.NAME).read_bytes()


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20).filter(
    lambda name: name not in (".", "..", manifest.NAME, manifest.SIGNATURE) and len(name.encode()) < 200
)


@given(files=st.dictionaries(NAMES, st.binary(max_size=50), max_size=5))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_names_and_contents(tmp_path, files):
    folder = tmp_path / "any"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    assert verify(folder, write_manifest(folder))


# --- whole files --------------------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from tasks.store.files import write_whole
path, n = Path(sys.argv[1]), int(sys.argv[2])
while True:
    n += 1
    write_whole(path, f"{n}\\n" * 40_000)
    print(n, flush=True)
"""


def test_a_killed_writer_leaves_the_old_or_the_new_file_whole(tmp_path):
    path, last = tmp_path / "pointer", 0
    path.write_text("0\n" * 40_000)
    draw = random.Random(2)
    for _ in range(8):
        command = [sys.executable, "-P", "-c", WRITER, str(path), str(last)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout
            writer.stdout.readline()
            time.sleep(draw.uniform(0, 0.03))
            writer.kill()
            written = [last, *(int(line) for line in writer.stdout.read().split())]
        lines = set(path.read_text().split())
        assert len(lines) == 1, "neither the old nor the new"
        assert path.stat().st_size == 40_000 * (len(lines.copy().pop()) + 1)
        last = int(lines.pop())
        assert last >= written[-1]


def test_a_file_has_its_mode_and_no_temporary_stays(tmp_path):
    write_whole(tmp_path / "deep" / "key", "secret", mode=0o600)
    assert (tmp_path / "deep" / "key").stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path / "deep") == ["key"]
    (tmp_path / "folder" / "in it").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        write_whole(tmp_path / "folder", "x")
    assert sorted(os.listdir(tmp_path)) == ["deep", "folder"]


def test_a_lock_is_held_by_one_and_freed_when_its_holder_is_killed(tmp_path):
    lock = tmp_path / "x.lock"
    code = (
        "import sys, time; from pathlib import Path; from tasks.store.files import exclusive\n"
        "with exclusive(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-P", "-c", code, str(lock)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        with pytest.raises(TryAgain, match=r"x\.lock: held"), exclusive(lock, wait=False):
            pass
        holder.send_signal(signal.SIGKILL)
    with exclusive(lock, wait=False):
        pass


# --- rooms --------------------------------------------------------------------------------------------------


def test_a_room_is_published_whole_and_found_again(tmp_path):
    room = Room(tmp_path, "k1")
    (room.begin() / "data").write_text("42")
    assert room.published() is None
    ref = room.publish({"rows": 1})
    assert room.published() == ref
    assert room.result() == {"rows": 1}
    assert (open_room(ref) / "data").read_text() == "42"
    assert sorted(os.listdir(tmp_path)) == ["k1"]


def test_what_a_killed_attempt_left_stays_for_the_next_one(tmp_path):
    (Room(tmp_path, "k1").begin() / "checkpoint").write_text("7")
    assert (Room(tmp_path, "k1").begin() / "checkpoint").read_text() == "7"
    Room(tmp_path, "k1").discard()
    assert not list(Room(tmp_path, "k1").begin().iterdir())


@pytest.mark.parametrize("stop", ["write_manifest", "os.rename"])
def test_a_publish_that_is_killed_halfway_published_nothing_and_the_next_one_does(tmp_path, stop):
    """The child is killed right before the manifest is written, or right before the folder is moved."""
    code = (
        "import os, signal, sys; from pathlib import Path; import tasks.store.room as m\n"
        "def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"m.{stop} = die\n"
        "room = m.Room(Path(sys.argv[1]), 'k1'); (room.begin() / 'data').write_text('42'); room.publish({})"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    room = Room(tmp_path, "k1")
    assert room.published() is None
    assert (room.begin() / "data").read_text() == "42"
    assert open_room(room.publish({}))


def test_a_folder_without_a_manifest_under_the_final_name_is_no_room(tmp_path):
    (tmp_path / "k1").mkdir()
    (tmp_path / "k1" / "half").write_text("x")
    room = Room(tmp_path, "k1")
    assert room.published() is None
    room.begin()
    assert not (open_room(room.publish({})) / "half").exists()


def test_a_room_that_is_gone_or_changed_is_refused(tmp_path):
    room = Room(tmp_path, "k1")
    (room.begin() / "data").write_text("42")
    ref = room.publish({})
    with pytest.raises(IntegrityLost, match="must be 0000"):
        open_room(RoomRef(uri=ref.uri, digest_sha256="0" * 64))
    (room.final / "data").write_text("43")
    with pytest.raises(IntegrityLost, match="data has digest"):
        open_room(ref)
    shutil.rmtree(room.final)
    with pytest.raises(IntegrityLost, match="the room is gone"):
        open_room(ref)


# --- signatures ---------------------------------------------------------------------------------------------


@pytest.fixture
def signed(folder: Path, keys: Path) -> Path:
    write_manifest(folder)
    sign_folder(folder, keys)
    return folder


def test_a_signature_verifies_and_is_no_part_of_the_manifest(signed, keys):
    verify_folder_signature(signed, keys)
    assert verify(signed)
    assert (keys / "signing.pem").stat().st_mode & 0o777 == 0o600


def test_another_key_is_refused(signed, tmp_path):
    make_key(tmp_path / "other")
    with pytest.raises(IntegrityLost, match="does not verify"):
        verify_folder_signature(signed, tmp_path / "other")


def test_a_key_is_made_once(keys):
    before = (keys / "signing.pub").read_bytes()
    make_key(keys)
    assert (keys / "signing.pub").read_bytes() == before


@pytest.mark.parametrize(
    "harm",
    [
        lambda f: (f / "manifest.json").write_bytes((f / "manifest.json").read_bytes().replace(b"2000", b"2001")),
        lambda f: (f / "manifest.json").unlink(),
        lambda f: (f / "manifest.sig").unlink(),
        lambda f: (f / "manifest.sig").write_text("{}"),
        lambda f: (f / "manifest.sig").write_text("no json"),
        lambda f: (f / "manifest.sig").write_bytes(b"\xff\xfe"),
        lambda f: (f / "manifest.sig").write_text('{"ed25519": "AAAA"}'),
        lambda f: (f / "manifest.sig").write_text('{"ed25519": "é"}'),
        lambda f: (f / "manifest.sig").write_text('{"ed25519": 3}'),
        lambda f: (f / "manifest.sig").write_text("[]"),
    ],
)
def test_a_tampered_signature_is_refused(signed, keys, harm):
    harm(signed)
    with pytest.raises(IntegrityLost):
        verify_folder_signature(signed, keys)


def _flips(whole: bytes):
    """The same bytes with one bit of one of them turned over, for each byte in turn."""
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        yield changed


def test_every_bit_of_a_manifest_counts_though_no_digest_is_expected(folder):
    write_manifest(folder)
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for changed in _flips(whole):
        path.write_bytes(changed)
        with pytest.raises(IntegrityLost):
            verify(folder)
    path.write_bytes(whole + b" ")
    with pytest.raises(IntegrityLost, match=r"manifest\.json can't be read"):
        verify(folder)


def test_every_bit_of_the_signature_file_counts(signed, keys):
    """It is the one file that the manifest does not list: its key id, spaces and base64's last bits count too."""
    path = signed / "manifest.sig"
    whole = path.read_bytes()
    for changed in _flips(whole):
        path.write_bytes(changed)
        with pytest.raises(IntegrityLost):
            verify_folder_signature(signed, keys)
    path.write_bytes(whole + b"\n")
    with pytest.raises(IntegrityLost, match=r"manifest\.sig is not as key"):
        verify_folder_signature(signed, keys)
    path.write_bytes(whole)
    verify_folder_signature(signed, keys)


def test_after_a_rotation_old_signatures_verify_and_new_ones_are_by_the_new_key(signed, keys):
    old = key_id(keys)
    new = rotate_key(keys)
    assert list_keys(keys) == {old: "retired", new: "signs"}
    verify_folder_signature(signed, keys)
    sign_folder(signed, keys)
    assert json.loads((signed / "manifest.sig").read_text())["key_id"] == new
    (keys / "retired" / f"{old}.pub").unlink()
    verify_folder_signature(signed, keys)


def test_what_a_revoked_key_signed_is_refused_and_says_so(signed, keys):
    old = key_id(keys)
    with pytest.raises(BadRequest, match=f"key {old} is the one that signs; replace it first"):
        revoke_key(keys, old)
    with pytest.raises(BadRequest, match="key 'abc' is not a retired one, must be one of none"):
        revoke_key(keys, "abc")
    rotate_key(keys)
    revoke_key(keys, old)
    assert list_keys(keys)[old] == "revoked"
    with pytest.raises(IntegrityLost, match=f"was signed by key {old}, which is revoked"):
        verify_folder_signature(signed, keys)


@pytest.mark.parametrize("written", ["signing.pub", "signing.pem"])
def test_a_rotation_that_was_cut_signs_nothing_wrong_and_can_be_repeated(signed, keys, tmp_path, written):
    """A crash between the two halves leaves two that don't belong together."""
    make_key(tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / written, keys / written)
    with pytest.raises(IntegrityLost, match="are of two keys; run drydock keys rotate"):
        sign_folder(signed, keys)
    rotate_key(keys)
    sign_folder(signed, keys)
    verify_folder_signature(signed, keys)


def test_openssl_verifies_what_we_sign(signed, keys, tmp_path):
    """As docs/signing.md tells anyone who does not trust our code."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    signature = json.loads((signed / "manifest.sig").read_text())["ed25519"]
    (tmp_path / "sig").write_bytes(base64.b64decode(signature))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(keys / "signing.pub"), "-rawin", "-in"]
    for content, code in ((signed / "manifest.json", 0), (signed / "manifest.sig", 1)):
        done = subprocess.run([*command, str(content), "-sigfile", str(tmp_path / "sig")], capture_output=True)
        assert done.returncode == code, done.stderr


# --- events -------------------------------------------------------------------------------------------------


def test_events_of_many_writers_are_whole_lines(tmp_path):
    code = (
        "import sys; from pathlib import Path; from tasks.store.events import record_event\n"
        "for n in range(100): record_event(Path(sys.argv[1]), 'kind', 'é' * 500, writer=sys.argv[2], n=n)"
    )
    writers = [
        subprocess.Popen([sys.executable, "-P", "-c", code, str(tmp_path), str(w)]) for w in range(2)
    ]
    threads = [
        threading.Thread(target=lambda w=w: [record_event(tmp_path, "kind", "x", writer=w, n=n) for n in range(100)])
        for w in ("a", "b")
    ]
    for thread in threads:
        thread.start()
    for each in (*threads, *writers):
        each.join() if isinstance(each, threading.Thread) else each.wait(30)
    found = read_events(tmp_path, last=1000)
    assert len(found) == 400
    assert len({(event["writer"], event["n"]) for event in found}) == 400


@given(message=st.text())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_message_is_it_is_one_event(tmp_path, message):
    record_event(tmp_path, "kind", message)
    assert read_events(tmp_path, last=1)[0]["message"] == message


def test_a_line_that_a_crash_cut_is_left_out(tmp_path):
    assert read_events(tmp_path) == []
    record_event(tmp_path, "kind", "one")
    with (tmp_path / "events.jsonl").open("ab") as stream:
        stream.write('{"at": "2026", "message": "é'.encode()[:-1] + b"\n")
    record_event(tmp_path, "kind", "two", file="a\udcff")
    assert [event["message"] for event in read_events(tmp_path)] == ["one", "two"]
