"""A real PostgreSQL and a real S3 store (SeaweedFS), each started for these tests on the loopback."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ports import free_port

from tasks.data import remote
from tasks.data.ingest import ingest, resolve
from tasks.data.known import Known
from tasks.spec.errors import BadRequest, IntegrityLost, TryAgain
from tasks.spec.feature import TableFeature, TextFeature
from tasks.spec.label import Label
from tasks.spec.requests import IngestRequest
from tasks.spec.source import S3Source, SqlSource

pytestmark = pytest.mark.timeout(120)
LABEL = Label(classes=("x", "y"))
TABLE = TableFeature(kind="table", columns=("a",))


def run(folder: Path, source, feature, secrets):
    files = resolve(source, folder, secrets)
    request = IngestRequest(workload="w", source=source, files=files, feature=feature, label=LABEL)
    result = ingest(request, folder / "room", secrets)
    return files, result, pq.read_table(folder / "room" / "raw.parquet")


# --- PostgreSQL ---------------------------------------------------------------------------------------------


def as_server() -> dict:
    """PostgreSQL refuses to run as root."""
    if os.getuid():
        return {}
    found = next((name for name in ("postgres", "nobody") if name in {user.pw_name for user in pwd.getpwall()}), None)
    return {"user": found, "env": os.environ | {"HOME": "/tmp"}}


@pytest.fixture(scope="module")
def postgres(tmp_path_factory) -> Iterator[str]:
    if shutil.which("initdb") is None:
        pytest.skip("PostgreSQL's initdb is not installed")
    base = Path("/tmp") / f"drydock-pg-{os.getpid()}"
    base.mkdir(mode=0o777)
    base.chmod(0o777)
    port, user = free_port(), as_server()
    data = base / "data"
    init = ["initdb", "-D", str(data), "-A", "trust", "-U", "me", "--no-sync", "-E", "UTF8"]
    subprocess.run(init, check=True, capture_output=True, cwd=base, **user)
    options = ["-p", str(port), "-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={base}"]
    command = ["postgres", "-D", str(data), *options, "-c", "fsync=off"]
    server = subprocess.Popen(command, cwd=base, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **user)
    url = f"postgresql+pg8000://me:secret-word@127.0.0.1:{port}/postgres"
    try:
        fill(url)
        yield url
    finally:
        server.terminate()
        server.wait(20)
        shutil.rmtree(base, ignore_errors=True)


def fill(url: str) -> None:
    import sqlalchemy as sa

    engine = sa.create_engine(url, poolclass=sa.NullPool)
    until = time.monotonic() + 30
    while True:
        try:
            with engine.begin() as connection:
                connection.exec_driver_sql(
                    "create table t as select i as id, (i * 1.25)::numeric as a, "
                    "case when i % 2 = 0 then 'x' else 'y' end as label, "
                    "case when i = 3 then null else 'größer ' || i end as words, now() as at "
                    "from generate_series(1, 30000) i"
                )
            return
        except sa.exc.SQLAlchemyError:
            assert time.monotonic() < until
            time.sleep(0.1)


def test_a_query_of_postgresql(tmp_path, postgres):
    secrets = {"${secret:warehouse}": postgres}.__getitem__
    source = SqlSource(kind="sql", url="${secret:warehouse}", query="select id, a, label from t order by id")
    _, result, table = run(tmp_path, source, TABLE, secrets)
    assert result.rows == 30_000
    assert table.column("a").to_pylist()[:2] == [1.25, 2.5]
    words = source.model_copy(update={"query": "select words, label from t where id < 5 order by id"})
    _, _, table = run(tmp_path, words, TextFeature(kind="text", column="words"), secrets)
    assert table.column("words").to_pylist() == ["größer 1", "größer 2", None, "größer 4"]
    wrong = source.model_copy(update={"query": "select nope from t order by id"})
    with pytest.raises(BadRequest, match="nope") as caught:
        run(tmp_path, wrong, TABLE, secrets)
    assert "secret-word" not in str(caught.value)
    away = {"${secret:warehouse}": postgres.replace("127.0.0.1", "127.0.0.2")}.__getitem__
    with pytest.raises(TryAgain) as caught:
        run(tmp_path, source, TABLE, away)
    assert "secret-word" not in str(caught.value)


# --- S3 -----------------------------------------------------------------------------------------------------


def weed() -> str | None:
    """SeaweedFS's program: that of the tests' own environment, or one on the path."""
    own = Path(sys.executable).parent / "weed"
    return str(own) if own.is_file() else shutil.which("weed")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[S3Source]:
    program = weed()
    if program is None:
        pytest.skip("SeaweedFS is not installed")
    base = tmp_path_factory.mktemp("s3")
    ports = {name: free_port() for name in ("master.port", "volume.port", "filer.port", "s3.port")}
    # Each server takes its port plus 10000 for gRPC unless told otherwise, which may be beyond the last one.
    ports |= {f"{name}.grpc": free_port() for name in ports}
    identity = {"name": "me", "credentials": [{"accessKey": "key", "secretKey": "secret-word"}], "actions": ["Admin"]}
    (base / "s3.json").write_text(json.dumps({"identities": [identity]}))
    flags = [f"-{name}={port}" for name, port in ports.items()]
    command = [program, "server", f"-dir={base}", "-ip=127.0.0.1", "-s3", f"-s3.config={base / 's3.json'}", *flags]
    log = (base / "log").open("wb")
    server = subprocess.Popen(command, cwd=base, stdout=log, stderr=log)
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"
    try:
        wait_for(endpoint, server, base / "log")
        source = S3Source(
            kind="s3", url="s3://lake/boats/", endpoint=endpoint, format="parquet",
            access_key="${secret:key}", secret_key="${secret:word}",
        )  # fmt: skip
        upload(source)
        yield source
    finally:
        # It takes its time to stop, and there is nothing to save.
        server.kill()
        server.wait(20)
        log.close()


def wait_for(endpoint: str, server: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + 60
    while True:
        assert server.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < until, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(endpoint, timeout=2)
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)
        else:
            return


SECRETS = {"${secret:key}": "key", "${secret:word}": "secret-word"}


def filesystem(source: S3Source):
    from pyarrow import fs

    host = source.endpoint.removeprefix("http://")
    return fs.S3FileSystem(
        access_key="key", secret_key="secret-word", endpoint_override=host, scheme="http", region="us-east-1",
        allow_bucket_creation=True,
    )  # fmt: skip


def upload(source: S3Source) -> None:
    store = filesystem(source)
    until = time.monotonic() + 60
    while True:
        try:
            store.create_dir("lake")
            for part in (2, 1):
                table = pa.table({"a": [float(part)] * 1000, "label": ["x", "y"] * 500})
                with store.open_output_stream(f"lake/boats/part{part}.parquet") as stream:
                    pq.write_table(table, stream)
            return
        except OSError:
            # The master takes some seconds to know its volumes.
            assert time.monotonic() < until
            time.sleep(0.5)


def test_objects_of_a_prefix_are_read_in_order(tmp_path, store):
    files, result, table = run(tmp_path, store, TABLE, SECRETS.__getitem__)
    assert [file.name for file in files] == [f"s3://lake/boats/part{part}.parquet" for part in (1, 2)]
    assert result.rows == 2000
    assert table.column("a").to_pylist()[::1999] == [1.0, 2.0]
    assert [path.name for path in (tmp_path / "room").iterdir()] == ["raw.parquet"]
    one = store.model_copy(update={"url": "s3://lake/boats/part2.parquet"})
    files, _, _ = run(tmp_path, one, TABLE, SECRETS.__getitem__)
    assert len(files) == 1


def test_an_object_is_not_fetched_for_a_plan_that_knows_it(tmp_path, store, monkeypatch):
    def plan():
        return resolve(store, tmp_path, SECRETS.__getitem__, known=Known(tmp_path / "known.json"))

    first = plan()
    assert not (tmp_path / "known.json").exists(), "the store's clock may differ: what is new is not trusted"
    monkeypatch.setattr(remote, "CLOCK_SECONDS", -60)
    assert plan() == first
    monkeypatch.setattr(remote, "_object", lambda *arguments: pytest.fail("an object was fetched"))
    assert plan() == first


def test_an_object_that_changed_since_the_plan_is_refused(tmp_path, store):
    secrets = SECRETS.__getitem__
    with filesystem(store).open_output_stream("lake/other/d.parquet") as stream:
        pq.write_table(pa.table({"a": [1.0], "label": ["x"]}), stream)
    source = store.model_copy(update={"url": "s3://lake/other/d.parquet"})
    plan = resolve(source, tmp_path, secrets)
    with filesystem(store).open_output_stream("lake/other/d.parquet") as stream:
        pq.write_table(pa.table({"a": [2.0], "label": ["x"]}), stream)
    request = IngestRequest(workload="w", source=source, files=plan, feature=TABLE, label=LABEL)
    with pytest.raises(IntegrityLost, match="start a new run"):
        ingest(request, tmp_path / "room", secrets)


def test_what_the_store_refuses_is_told_without_the_key(tmp_path, store):
    nowhere = store.model_copy(update={"url": "s3://lake/nothing/"})
    with pytest.raises(BadRequest, match="no object is there"):
        resolve(nowhere, tmp_path, SECRETS.__getitem__)
    wrong = {"${secret:key}": "key", "${secret:word}": "wrong-word"}.__getitem__
    with pytest.raises(BadRequest) as caught:
        resolve(store, tmp_path, wrong)
    assert "wrong-word" not in str(caught.value)
    away = store.model_copy(update={"endpoint": "http://127.0.0.1:9"})
    with pytest.raises(TryAgain):
        resolve(away, tmp_path, SECRETS.__getitem__)
