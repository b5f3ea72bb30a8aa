"""Fixtures that more than one folder of tests needs. Sections are by room; keep each room's together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import settings
from ports import free_port

# How long one example takes says nothing on a machine that others use too; each test has its own limit.
settings.register_profile("drydock", deadline=None)
settings.load_profile("drydock")

# --- serve: tiny signed model packages ---------------------------------------------------------------------


class SignedPackage(NamedTuple):
    """A package folder with its digest, the keys that signed it, and rows that it answers."""

    folder: Path
    digest_sha256: str
    keys: Path
    rows: list[Any]


MakePackage = Callable[..., SignedPackage]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder with a fresh signing key pair."""
    from tasks.store.sign import make_key

    make_key(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def digits_package(tmp_path: Path, keys: Path) -> MakePackage:
    """Make a tiny signed digits package: ``digits_package(name="a", seed=0, signer=None, change=None)``.

    ``seed`` draws the weights, so two seeds are two packages; ``signer`` is a folder of keys (default:
    ``keys``); ``change(folder)`` runs before the manifest is written.
    """
    from tasks.spec.feature import ImageFeature

    def make(name: str = "digits", seed: int = 0, signer: Path | None = None, change: Any = None) -> SignedPackage:
        feature = ImageFeature(kind="image", height=8, width=8, max_value=16)
        rows = _random_rows(seed, 3, 64, 16)
        model = _dense_model(64, 10, seed)
        return _finish(tmp_path / name, "digits", feature, 10, model, rows, signer or keys, change)

    return make


@pytest.fixture
def table_package(tmp_path: Path, keys: Path) -> MakePackage:
    """Make a tiny signed table package of three columns, whose graph fills missing values."""
    from tasks.spec.feature import TableFeature

    def make(name: str = "table", seed: int = 0) -> SignedPackage:
        feature = TableFeature(kind="table", columns=("age", "income", "visits"))
        rows = [[1.0, 2.0, 3.0], [None, 0.5, -2.0]]
        model = _dense_model(3, 2, seed, fill_missing=True)
        return _finish(tmp_path / name, "table", feature, 2, model, rows, keys)

    return make


@pytest.fixture
def text_package(tmp_path: Path, keys: Path) -> MakePackage:
    """Make a tiny signed text package: a real byte-pair tokenizer, Gather, mean, Gemm, softmax."""
    from tasks.spec.feature import TextFeature

    def make(name: str = "text", seed: int = 0) -> SignedPackage:
        feature = TextFeature(kind="text", max_tokens=8, vocabulary=300, max_chars=200)
        rows = ["free prize now", "see you at home"]
        folder = tmp_path / name
        folder.mkdir(parents=True)
        _train_tokenizer(300).save(str(folder / "tokenizer.json"))
        return _finish(folder, "text", feature, 2, _text_model(8, 300, 2, seed), rows, keys)

    return make


def _finish(
    folder: Path, workload: str, feature: Any, num_classes: int, model: Any, rows: list[Any], signer: Path,
    change: Any = None,
) -> SignedPackage:  # fmt: skip
    """Write model and papers, with the package's own answers as the golden sample, and sign."""
    from tasks.serve.package import open_package, write_package
    from tasks.serve.signature import Golden, Signature
    from tasks.store.manifest import write_manifest
    from tasks.store.sign import sign_folder

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    classes = [str(k) for k in range(num_classes)]
    dtype = "int64" if feature.kind == "text" else "float32"
    papers = {"format": 1, "workload": workload, "variant": "fp32", "classes": classes}
    papers["feature"] = feature.model_dump(mode="json")
    papers["graph_input"] = {"name": "input", "dtype": dtype, "shape": [-1, *feature.shape]}
    papers["graph_output"] = {"name": "probabilities", "dtype": "float32", "shape": [-1, num_classes]}
    signature = Signature.parse(papers, "signature.json")
    write_package(folder, signature, Golden(rows=rows, probabilities=[[1 / num_classes] * num_classes] * len(rows)))
    answers = open_package(folder, None, None).predict(rows)
    digest = write_package(folder, signature, Golden(rows=rows, probabilities=answers.tolist()))
    if change:
        change(folder)
        digest = write_manifest(folder)
    sign_folder(folder, signer)
    return SignedPackage(folder, digest, signer, rows)


def _random_rows(seed: int, num_rows: int, width: int, max_value: int) -> list[list[float]]:
    import numpy as np

    rows = np.random.default_rng(seed).integers(0, max_value + 1, (num_rows, width))
    return rows.astype(float).tolist()


def _dense_model(width: int, num_classes: int, seed: int, fill_missing: bool = False) -> Any:
    """[B, N] -> softmax(x W / 8), with NaN replaced by 0 first where asked."""
    from onnx import helper

    nodes, source = [], "input"
    if fill_missing:
        nodes = [helper.make_node("IsNaN", ["input"], ["missing"])]
        nodes += [helper.make_node("Where", ["missing", "zero", "input"], ["filled"])]
        source = "filled"
    nodes += [helper.make_node("Gemm", [source, "weight"], ["logits"], alpha=0.125)]
    nodes += [helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1)]
    arrays = {"weight": _weights(seed, (width, num_classes))}
    if fill_missing:
        arrays["zero"] = 0 * _weights(0, (1,))
    return _model(nodes, arrays, "FLOAT", width, num_classes)


def _text_model(tokens: int, vocabulary: int, num_classes: int, seed: int) -> Any:
    """[B, T] ids -> softmax(mean of embeddings W)."""
    import numpy as np
    from onnx import helper

    nodes = [
        helper.make_node("Gather", ["embedding", "input"], ["embedded"]),
        helper.make_node("ReduceMean", ["embedded", "axes"], ["pooled"], keepdims=0),
        helper.make_node("Gemm", ["pooled", "weight"], ["logits"], alpha=4.0),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    arrays = {"embedding": _weights(seed, (vocabulary, 16)), "weight": _weights(seed + 1, (16, num_classes))}
    return _model(nodes, arrays | {"axes": np.array([1], np.int64)}, "INT64", tokens, num_classes)


def _model(nodes: list[Any], arrays: dict[str, Any], dtype: str, width: int, num_classes: int) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", getattr(TensorProto, dtype), ["batch", width])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", num_classes])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _weights(seed: int, shape: tuple[int, ...]) -> Any:
    import numpy as np

    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _train_tokenizer(vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["[PAD]"], initial_alphabet=alphabet, show_progress=False
    )
    texts = ["free prize win cash now", "see you at home later", "call me when you can", "win a free phone"]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# --- train to register: datasets, trained rooms, a real MLflow ----------------------------------------------


class Trained(NamedTuple):
    """A published training room: its request, its folder and what ``fit`` returned."""

    request: Any
    ref: Any
    folder: Path
    done: dict[str, float]


@pytest.fixture(scope="session")
def digits_dataset(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A published dataset room (a RoomRef) of 1200 bundled digits, as the version step leaves it."""
    import numpy as np
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels, label = bunch.data[:1200].astype(np.uint8), bunch.target[:1200].astype(str)
    return publish_dataset(tmp_path_factory.mktemp("digits"), {"pixels": list(pixels)}, list(label))


def publish_dataset(base: Path, columns: dict[str, list[Any]], label: list[str]) -> Any:
    """Publish a dataset room: 70 % train, 15 % validation, 15 % holdout, by position."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tasks.store.room import Room

    n = len(label)
    split = ["train" if i % 20 < 14 else "validation" if i % 20 < 17 else "holdout" for i in range(n)]
    table = pa.table({"row_id": list(range(n)), **columns, "label": label, "split": split})
    room = Room(base, "dataset")
    pq.write_table(table, room.begin() / "data.parquet")
    return room.publish({"rows_by_split": {name: split.count(name) for name in sorted(set(split))}})


@pytest.fixture(scope="session")
def make_dataset(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``make_dataset(columns, label)``: publish a dataset room and return its RoomRef."""
    return lambda columns, label: publish_dataset(tmp_path_factory.mktemp("dataset"), columns, label)


@pytest.fixture(scope="session")
def train_request(digits_dataset: Any) -> Callable[..., Any]:
    """``train_request(dataset=, feature=, classes=, **train)``: a request, by default of the digits, with
    epochs long enough that a fault lands in the middle of the training."""
    from tasks.spec.requests import TrainRequest

    def make(dataset: Any = None, feature: Any = None, classes: Any = tuple(range(10)), **train: Any) -> Any:
        ref = (dataset or digits_dataset).model_dump()
        defaults = {"recipe": {"kind": "mlp", "hidden": [32]}, "batch_size": 8, "ranks": 1}
        defaults |= {"optimiser": {"learning_rate": 0.003}, "stopping": {"max_epochs": 10, "patience_epochs": 10}}
        data = {
            "workload": "digits",
            "dataset": ref,
            "revision": "digits-000000000000",
            "feature": feature or {"kind": "image", "height": 8, "width": 8, "max_value": 16},
            "label": {"classes": list(classes)},
            "train": defaults | train,
        }
        return TrainRequest.parse(data, "the test's request")

    return make


@pytest.fixture(scope="session")
def digits_trained(train_request: Any, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Digits trained without any disturbance by two ranks: the reference of other tests."""
    from tasks.store.room import Room
    from tasks.train.fit import fit

    request = train_request(ranks=2)
    room = Room(tmp_path_factory.mktemp("trained"), "digits")
    done = fit(request, room.begin(), None, lambda line: None)
    ref = room.publish({"run_id": "none"} | done)
    return Trained(request, ref, room.final, done)


@pytest.fixture(scope="session")
def mlflow_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server, started as ``drydock up`` starts it; its files lie in ``mlflow_home``."""
    import os
    import subprocess
    import time

    from tasks.site import Site
    from tasks.spec.settings import resolve
    from tasks.stack import _mlflow_command, _mlflow_environment

    home = tmp_path_factory.mktemp("mlflow-home")
    settings = resolve({"DRYDOCK_HOME": str(home)}, mlflow_port=free_port())
    (home / "mlflow").mkdir()
    with (home / "mlflow.log").open("wb") as log:
        server = subprocess.Popen(
            _mlflow_command(Site(settings)), env=os.environ | _mlflow_environment(), cwd=home, stdout=log,
            stderr=log, start_new_session=True,
        )  # fmt: skip
    until = time.monotonic() + 90
    try:
        while not _healthy(f"{settings.mlflow_url}/health"):
            assert server.poll() is None, (home / "mlflow.log").read_text()[-2000:]
            assert time.monotonic() < until, "MLflow did not start in 90 s"
            time.sleep(0.2)
        yield settings.mlflow_url
    finally:
        os.killpg(server.pid, 15)
        server.wait(20)


def _healthy(url: str) -> bool:
    import httpx

    try:
        return httpx.get(url, timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="session")
def make_site(mlflow_url: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``make_site()``: a Site with its own state and workloads folder (the shipped ones) and the real MLflow."""
    import shutil

    from tasks.site import Site
    from tasks.spec.settings import resolve

    def make() -> Any:
        home = tmp_path_factory.mktemp("site")
        shutil.copytree(Path(__file__).parents[1] / "workloads", home / "workloads")
        environ = {"DRYDOCK_HOME": str(home / "state"), "DRYDOCK_WORKLOADS": str(home / "workloads")}
        return Site(resolve(environ, mlflow_port=int(mlflow_url.rpartition(":")[2])))

    return make


@pytest.fixture
def site(make_site: Any) -> Any:
    """A Site of this test's own, with the session's MLflow."""
    return make_site()


class Run(NamedTuple):
    """A local run: its site, its workload, all results by step, and what it said."""

    site: Any
    workload: Any
    done: dict[str, Any]
    said: list[str]


@pytest.fixture(scope="session")
def digits_run(make_site: Any) -> Run:
    """The digits from the source to a registered version, by ``tasks.local.run_local``."""
    from tasks.local import run_local
    from tasks.spec.changes import changed
    from tasks.spec.load import load_workload

    site, said = make_site(), []
    workload = changed(load_workload(site.workloads, "digits"), {"max_epochs": 12})
    return Run(site, workload, run_local(workload, site, said.append), said)


# --- containers: a real Docker daemon, and images that are built on it --------------------------------------


@pytest.fixture(scope="session")
def docker_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Docker daemon: the one that answers, else one that is started for these tests."""
    import os
    import shutil
    import subprocess

    if _docker_answers():
        yield os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
        return
    if shutil.which("dockerd") is None or os.geteuid() != 0:
        pytest.skip("no Docker daemon answers, and none can be started: docker.io is not installed, or not as root")
    base = tmp_path_factory.mktemp("dockerd")
    with (base / "log").open("wb") as log:
        daemon = subprocess.Popen(["dockerd"], stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_until(_docker_answers, 60, lambda: (base / "log").read_text()[-2000:])
        yield "unix:///var/run/docker.sock"
    finally:
        daemon.terminate()
        daemon.wait(60)


def _docker_answers() -> bool:
    import subprocess

    try:
        return subprocess.run(["docker", "info"], capture_output=True, timeout=20, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _wait_until(true: Callable[[], bool], seconds: float, why: Callable[[], str]) -> None:
    import time

    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, why()
        time.sleep(0.2)


@pytest.fixture(scope="session")
def images_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state folder that images/build works in."""
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="session")
def build_images(docker_daemon: str, images_home: Path) -> Callable[..., dict[str, str]]:
    """``build_images("drydock/base", …)``: build images from this tree as images/README.md says, each once; return
    their digests by name. Where no registry answers, the base is made by debootstrap."""
    import json
    import os
    import shutil

    built: dict[str, str] = {}

    def build(*names: str) -> dict[str, str]:
        wanted = [name.removeprefix("drydock/") for name in ("drydock/base", *names) if name not in built]
        code, line = _run_build("build", *dict.fromkeys(wanted), home=images_home) if wanted else (0, "")
        if code == 20 and "base" in wanted:
            if os.geteuid() != 0 or not shutil.which("debootstrap"):
                pytest.skip(f"no base image: {line}; and debootstrap needs root and to be installed")
            assert _run_build("base/bootstrap", home=images_home) == (0, "")
            code, line = _run_build("build", *dict.fromkeys(wanted), home=images_home)
        assert code == 0, line
        built.update(json.loads((images_home / "images.json").read_text()))
        return built

    return build


def _run_build(script: str, *arguments: str, home: Path) -> tuple[int, str]:
    """Run a script of images/; return its exit code and, where it failed, its last line."""
    import os
    import subprocess

    command = [str(Path(__file__).parents[1] / "images" / script), *arguments]
    environment = os.environ | {"DRYDOCK_HOME": str(home)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=900)
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1] if done.returncode else ""


class JobService(NamedTuple):
    """A job service that answers: where, the file of its token, and the engine behind it."""

    url: str
    token: Path
    engine: Any


@pytest.fixture(scope="session")
def job_service(docker_daemon: str) -> Callable[..., Any]:
    """``with job_service(home, places=None) as served``: the job service over a Docker engine in ``home``; what it
    ran is removed at the end."""
    import contextlib
    import secrets
    import threading

    import uvicorn

    from tasks.engines.docker import DockerEngine
    from tasks.engines.jobserver import JobServer

    @contextlib.contextmanager
    def serve(home: Path, places: Any = None) -> Iterator[JobService]:
        home.mkdir(parents=True, exist_ok=True)
        token, port = home / "jobs-token", free_port()
        token.write_text(secrets.token_hex(24))
        engine = DockerEngine(home, places)
        app = JobServer(engine, token.read_text()).app()
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            _wait_until(lambda: server.started, 20, lambda: "the job service did not start")
            yield JobService(f"http://127.0.0.1:{port}", token, engine)
        finally:
            server.should_exit = True
            thread.join(20)
            engine.remove_all()

    return serve


@pytest.fixture(scope="session")
def allow_images(build_images: Callable[..., dict[str, str]]) -> Callable[..., None]:
    """``allow_images(home, "drydock/base")``: let a state folder run these images."""
    import json

    def allow(home: Path, *names: str) -> None:
        digests = build_images(*names)
        home.mkdir(parents=True, exist_ok=True)
        (home / "images.json").write_text(json.dumps({name: digests[name] for name in names}))

    return allow


# --- hosts: Docker daemons of the tests' own, in network namespaces ----------------------------------------


class Host(NamedTuple):
    """A Docker daemon in a network namespace of its own: another host, as far as containers can tell."""

    name: str
    ip: str
    folder: Path
    options: tuple[str, ...]
    processes: list[Any]

    @property
    def address(self) -> str:
        return f"unix://{self.folder}/docker.sock"

    def start(self) -> None:
        """Start its daemon, or start it again."""
        import subprocess

        _ip("link", "set", f"{self.name}-o", "up")
        for left in ("docker.pid", "exec/containerd/containerd.pid"):
            (self.folder / left).unlink(missing_ok=True)
        # `ip netns exec` would hide the cgroups, without which the daemon refuses to start.
        command = ["nsenter", f"--net=/var/run/netns/{self.name}", "dockerd", f"--data-root={self.folder}/data"]
        command += [f"--exec-root={self.folder}/exec", f"--pidfile={self.folder}/docker.pid", f"--host={self.address}"]
        with (self.folder / "log").open("ab") as log:
            self.processes.append(subprocess.Popen([*command, *self.options], stdout=log, stderr=log))
        why = (self.folder / "log").read_text
        _wait_until(lambda: self.docker("info", check=False) is not None, 60, lambda: why()[-2000:])

    def stop(self) -> None:
        """End its daemon, and with it its containers."""
        self.processes[-1].terminate()
        self.processes[-1].wait(60)

    def lose_power(self) -> None:
        """Cut its network, then kill its daemon and all that ran on it."""
        import contextlib
        import subprocess

        import psutil

        subprocess.run(["ip", "link", "set", f"{self.name}-o", "down"], check=False)
        for process in self._all():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for process in self.processes[-1:]:
            process.wait(60)

    def docker(self, *arguments: str, check: bool = True) -> str | None:
        import subprocess

        command = ["docker", "--host", self.address, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip() if done.returncode == 0 else None

    def _all(self) -> list[Any]:
        """Its daemon's processes and its containers': these are in namespaces of their own, but children of shims that
        name the daemon's folder."""
        import contextlib

        import psutil

        found = []
        for one in psutil.process_iter(["cmdline"]):
            if any(f"{self.folder}/" in part for part in one.info["cmdline"] or ()):
                found.append(one)
                with contextlib.suppress(psutil.NoSuchProcess):
                    found += one.children(recursive=True)
        return found


@pytest.fixture(scope="session")
def docker_hosts(build_images: Callable[..., dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``with docker_hosts("drydock/trainer", options=[(), ("--debug",)]) as hosts``: daemons that share no disk, on one
    network, each with the images; one a tuple of options."""
    import contextlib
    import os
    import secrets
    import shutil
    import subprocess

    @contextlib.contextmanager
    def make(*images: str, options: Any = ((),)) -> Iterator[list[Host]]:
        if os.geteuid() != 0 or not shutil.which("ip"):
            pytest.skip("no network namespace can be made: not root, or no iproute2")
        digests, bridge, made = build_images(*images), f"dd{secrets.token_hex(2)}", []
        # Another run of these tests may have its hosts on this machine.
        subnet = f"10.213.{secrets.randbelow(250)}"
        try:
            _network(bridge, subnet)
            for number, own in enumerate(options):
                folder = tmp_path_factory.mktemp("host")
                made.append(Host(f"{bridge}{number}", f"{subnet}.{number + 2}", folder, tuple(own), []))
                _namespace(bridge, made[-1])
                made[-1].start()
            _copy_images([digests[image] for image in images], made)
            yield made
        finally:
            for host in made:
                host.lose_power()
                subprocess.run(["ip", "netns", "delete", host.name], check=False)
                _unmount_below(host.folder)
                shutil.rmtree(host.folder, ignore_errors=True)
            subprocess.run(["ip", "link", "delete", bridge], check=False)
            _forwarding("-D", bridge)

    return make


@pytest.fixture(scope="session")
def swarm_of(docker_hosts: Any) -> Any:
    """``with swarm_of("drydock/base") as hosts``: a Swarm of two. The first host manages it, both work, and each has a
    GPU that is none: a generic resource."""
    import contextlib

    @contextlib.contextmanager
    def make(*images: str) -> Iterator[list[Host]]:
        # Swarm knows no-new-privileges from Docker 25 on.
        options = [("--no-new-privileges", f"--node-generic-resource=gpu=GPU-{name}") for name in ("a", "b")]
        with docker_hosts(*images, options=options) as made:
            first, second = made
            first.docker("swarm", "init", "--advertise-addr", first.ip, "--dispatcher-heartbeat", "2s")
            token = first.docker("swarm", "join-token", "--quiet", "worker")
            second.docker("swarm", "join", "--advertise-addr", second.ip, "--token", token, f"{first.ip}:2377")
            yield made

    return make


def _network(bridge: str, subnet: str) -> None:
    _ip("link", "add", bridge, "type", "bridge")
    _ip("addr", "add", f"{subnet}.1/24", "dev", bridge)
    _ip("link", "set", bridge, "up")
    _forwarding("-I", bridge)


def _forwarding(what: str, bridge: str) -> None:
    """Another daemon's rules drop what is forwarded, between two of one bridge too."""
    import subprocess

    subprocess.run(["iptables", what, "FORWARD", "-i", bridge, "-o", bridge, "-j", "ACCEPT"], check=False)


def _namespace(bridge: str, host: Host) -> None:
    _ip("netns", "add", host.name)
    _ip("link", "add", f"{host.name}-o", "type", "veth", "peer", "name", "eth0", "netns", host.name)
    _ip("link", "set", f"{host.name}-o", "master", bridge, "up")
    for words in (("addr", "add", f"{host.ip}/24", "dev", "eth0"), ("link", "set", "eth0", "up")):
        _ip("-n", host.name, *words)
    _ip("-n", host.name, "link", "set", "lo", "up")
    _ip("-n", host.name, "route", "add", "default", "via", f"{host.ip.rpartition('.')[0]}.1")


def _unmount_below(folder: Path) -> None:
    """What a daemon that was killed leaves: its own folder, each network's namespace."""
    import subprocess

    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    below = [point for point in reversed(points) if point.startswith(f"{folder}/")]
    if below:
        subprocess.run(["umount", "--lazy", *below], check=False)


def _ip(*arguments: str) -> None:
    import subprocess

    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _copy_images(digests: list[str], hosts: list[Host]) -> None:
    """Send images to hosts, side by side: they are saved once."""
    import subprocess

    loads = [
        subprocess.Popen(
            ["docker", "--host", host.address, "load", "--quiet"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        for host in hosts
    ]
    with subprocess.Popen(["docker", "save", *digests], stdout=subprocess.PIPE) as saved:
        while chunk := saved.stdout.read(1 << 20):
            for load in loads:
                load.stdin.write(chunk)
    for load in loads:
        load.stdin.close()
        assert load.wait(120) == 0
    assert saved.returncode == 0
