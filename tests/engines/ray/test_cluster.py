"""The Ray engine: the same bits as in process, on two nodes, after workers and nodes die; nothing left behind.

The cluster is started by the test: two nodes on this machine, each with its own object store.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

from polyclinic.core.audit_log import verify
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.data.examples import DataError, Examples
from polyclinic.engines.local.in_process import InProcess
from polyclinic.engines.plan import Plan, build_method
from polyclinic.engines.ray import cluster
from polyclinic.engines.ray.site_actors import RaySites, decode_data, encode_data, kill
from polyclinic.studies.config.schema import EngineSpec
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.records import time_profile
from polyclinic.studies.run.cluster_runs import SHARED
from polyclinic.studies.run.run_directory import Stopped
from polyclinic.studies.run.scheduler import run as run_study
from polyclinic.testing import equal
from tests.support.small_runs import facts, go, npz, study, tensors

METHODS = ("fedavg", "fedprox", "scaffold", "fedbn", "feddyn", "ditto", "krum", "ifca", "mime", "fedadam")


def examples(seed: int, n: int) -> Examples:
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (n,), generator=rng)
    y[:2] = torch.tensor([0, 1])
    names = tuple(f"{seed}-{i}" for i in range(n))
    return Examples(torch.randn(n, 1, 8, 8, generator=rng) + y.view(-1, 1, 1, 1), y, names, names)


def small_sites(count: int = 4) -> dict[str, Site]:
    return {
        f"site-{k}": Site(f"site-{k}", {"train": examples(k, 16 + 4 * k), "val": examples(100 + k, 8)})
        for k in range(count)
    }


def plan(method: str = "fedavg", sites: int = 4, **training: Any) -> Plan:
    return Plan(
        "classification",
        "cnn",
        (1, 8, 8),
        2,
        method,
        tuple(small_sites(sites)),
        3,
        network_options={"width": 4, "depth": 2},
        training={"batch_size": 8, "lr": 0.05, **training},
    )


def run(plan: Plan, engine: Any, rounds: int = 3) -> tuple[Any, list[dict[str, str]]]:
    method = plan.build_method()
    state, lost = method.init(method.task.first(0)), []
    for step in train(method, engine, state, rounds=rounds):
        state = step.state
        lost.append(dict(step.lost))
    return state, lost


def test_data_return_as_they_were_sent() -> None:
    data = {
        "train": examples(0, 5),
        "val": Examples(
            torch.zeros(2, 3, dtype=torch.uint8),
            torch.tensor([0.5, 1.0])[:, None],
            ("a", "b"),
            ("c", "d"),
            positions=torch.tensor([0.0, 1.0]),
        ),
    }
    back = decode_data(encode_data("lyon", data))
    for role, given in data.items():
        for name, value in vars(given).items():
            found = getattr(back[role], name)
            assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value


def test_data_keep_their_order_in_memory() -> None:
    """Images with one channel may be stored as channels last or channels first; PyTorch chooses its kernels by that."""
    one_channel = torch.arange(128.0).view(2, 8, 8)[:, None]
    channels_last = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    for images in (one_channel, channels_last):
        data = {"train": Examples(images, torch.tensor([0, 1]), ("a", "b"), ("c", "d"))}
        back = decode_data(encode_data("lyon", data))["train"].inputs
        assert torch.equal(back, images)
        assert back.stride() == images.stride()


def test_data_that_stay_on_disk_are_refused_with_the_remedy() -> None:
    with pytest.raises(DataError, match=r'site lyon: its data stay on disk.*parallel = "arms"'):
        encode_data("lyon", {"train": [1, 2, 3]})


def test_another_installation_is_refused_by_name() -> None:
    other = json.loads(cluster.installation()) | {"torch": "2.0.0"}
    with pytest.raises(cluster.ClusterError, match=r"the machine node-7 has torch 2\.0\.0 instead of"):
        cluster.require_same_installation(json.dumps(other), "node-7")
    cluster.require_same_installation(cluster.installation(), "node-7")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"address": "auto"}, 'address and gpus are for kind = "ray"'),
        ({"workers": 300}, "at most 256"),
        ({"kind": "ray", "gpus": 0.5}, 'set device = "cuda"'),
    ],
)
def test_engine_options_that_do_not_fit_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        EngineSpec(**given)


class Refusing:
    """What ``connected`` uses of Ray: a cluster that refuses every process."""

    def is_initialized(self) -> bool:
        return False

    def init(self, **_: Any) -> None:
        raise RuntimeError(
            "Version mismatch: The cluster was started with:\n    Ray: 2.1\nThis process with:\n    Ray: 2.2"
        )


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "ray", Refusing)
    monkeypatch.setattr(cluster, "ANSWER", 0.5)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_USE_TLS", raising=False)


def refusal(address: str) -> str:
    """The error of a connection to ``address``, which comes within seconds."""
    begun = time.monotonic()
    with pytest.raises(cluster.ClusterError) as caught, cluster.connected(address):
        pass
    assert time.monotonic() - begun < 5
    return str(caught.value)


@contextmanager
def listener(answer: bytes | None) -> Iterator[str]:
    """The address of a process that gives one ``answer``, or none."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                received = b""
                while len(received) < 33:  # the preface and empty settings
                    received += connection.recv(64)
                assert received.startswith(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
                if answer is None:
                    connection.recv(1)
                else:
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join(timeout=60)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, "no answer within 0.5 s"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "what answers there is not Ray"),
        (b"", "what answers there is not Ray"),
    ],
)
def test_a_program_that_is_not_ray_is_noticed_within_seconds(refusing: None, answer: bytes | None, says: str) -> None:
    """Ray itself waits for minutes, and ends the process."""
    with listener(answer) as address:
        assert f"no Ray cluster can be reached at {address} ({says}): start one with" in refusal(address)


def test_other_versions_of_a_cluster_are_named_with_the_remedy(refusing: None) -> None:
    with listener(b"\0\0\6\4\0\0\0\0\0") as address:
        message = refusal(address)
    assert "(Version mismatch: The cluster was started with: Ray: 2.1 This process with: Ray: 2.2)" in message
    assert message.endswith("install the same versions of Ray and Python on every machine of the cluster")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:x", "127.0.0.1:99999", "[::1]:1"])
def test_an_address_where_nothing_listens_is_refused_at_once(refusing: None, address: str) -> None:
    assert f"no Ray cluster can be reached at {address} (" in refusal(address)
    assert "mismatch" not in refusal(address)


def test_a_cluster_that_the_environment_names_is_named(refusing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert "no Ray cluster can be reached at 127.0.0.1:1 (RAY_ADDRESS) (" in refusal("auto")


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    """A cluster of two nodes with one core each, to which this process is connected."""
    pytest.importorskip("ray", reason='needs pip install "polyclinic[ray]"')
    cluster.ray()
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    with cluster.connected(nodes.address):
        yield nodes
    nodes.shutdown()


@pytest.mark.slow
@pytest.mark.deploy
@pytest.mark.parametrize("name", METHODS)
def test_two_nodes_give_the_bits_of_one_process(two_nodes: Any, name: str) -> None:
    described = plan(name)
    reference = InProcess(described.build_method(), small_sites())
    expected = run(described, reference)[0]
    with RaySites(build_method, described.to_json(), small_sites(), workers=2) as engine:
        state, lost = run(described, engine)
        assert not any(lost)
        assert equal(state, expected)
        assert equal(engine.memory, reference.memory)


@pytest.mark.slow
@pytest.mark.deploy
def test_a_run_resumes_with_the_same_bits(two_nodes: Any) -> None:
    described = plan("scaffold")
    expected = run(described, InProcess(described.build_method(), small_sites()))[0]
    with RaySites(build_method, described.to_json(), small_sites(), workers=2) as engine:
        state, _ = run(described, engine, rounds=2)
        memory = engine.memory
    method = described.build_method()
    with RaySites(build_method, described.to_json(), small_sites(), memory, workers=1) as engine:
        for step in train(method, engine, state, rounds=3):
            state = step.state
    assert equal(state, expected)


def worker_pids(name: str = "SiteWorker") -> list[int]:
    """Processes of the engine's workers on this machine."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"ray::{name}".encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.deploy
def test_workers_serve_one_run_after_the_other_and_keep_nothing(two_nodes: Any) -> None:
    """The second run has other data at the same sites, another method and another seed; then one worker has died."""
    first, second = plan("scaffold"), plan("fedbn", lr=0.02)
    sites = {f"site-{k}": Site(f"site-{k}", {"train": examples(50 + k, 24)}, seed=7) for k in range(4)}
    expected = run(second, InProcess(second.build_method(), sites))[0]
    idle: list[Any] = []
    with RaySites(build_method, first.to_json(), small_sites(), workers=2, idle=idle) as engine:
        run(first, engine)
    pids = worker_pids()
    assert (len(idle), len(pids)) == (2, 2)
    for _ in range(2):
        with RaySites(build_method, second.to_json(), sites, workers=2, seed=7, idle=idle) as engine:
            assert not idle
            state, lost = run(second, engine)
            assert not any(lost)
            assert equal(state, expected)
            used = worker_pids()
        assert (len(idle), len({*used} & {*pids})) == (2, len(pids))
        os.kill(pids.pop(), signal.SIGKILL)
    kill(idle)
    until = time.monotonic() + 60
    while worker_pids() and time.monotonic() < until:
        time.sleep(0.1)
    assert not worker_pids()


@pytest.mark.slow
@pytest.mark.deploy
def test_killed_workers_change_nothing(two_nodes: Any) -> None:
    described = plan("fedbn", epochs=150)
    expected = run(described, InProcess(described.build_method(), small_sites()), 6)[0]
    killed = list[int]()
    with RaySites(build_method, described.to_json(), small_sites(), workers=2) as engine:
        stop = threading.Event()

        def kill() -> None:
            while len(killed) < 2 and not stop.wait(0.7):
                if pids := worker_pids():
                    os.kill(pids[0], signal.SIGKILL)
                    killed.append(pids[0])

        thread = threading.Thread(target=kill)
        thread.start()
        state, lost = run(described, engine, 6)
        stop.set()
        thread.join()
    assert killed
    assert not any(lost)
    assert equal(state, expected)


@pytest.mark.slow
@pytest.mark.deploy
def test_a_node_that_dies_costs_time_only(two_nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    node = two_nodes.add_node(num_cpus=1)
    described = plan("scaffold", epochs=400)
    expected = run(described, InProcess(described.build_method(), small_sites()), 4)[0]
    with RaySites(build_method, described.to_json(), small_sites(), workers=3) as engine:
        assert len(engine._workers) == 3
        monkeypatch.setattr("polyclinic.engines.ray.site_actors.START", 10.0)  # there is no room for a third worker
        timer = threading.Timer(1.0, lambda: two_nodes.remove_node(node, allow_graceful=False))
        timer.start()
        state, lost = run(described, engine, 4)
        timer.join()
        assert len(engine._workers) == 2
    assert not any(lost)
    assert equal(state, expected)


@pytest.mark.slow
@pytest.mark.deploy
def test_a_late_site_is_lost_and_the_round_goes_on(two_nodes: Any) -> None:
    described = plan("fedavg", 2)
    sites = small_sites(2)
    sites["site-1"] = Site("site-1", {"train": examples(1, 20_000)})
    with RaySites(build_method, described.to_json(), sites, workers=2) as engine:
        method = described.build_method()
        state = method.init(method.task.first(0))
        step = next(train(method, engine, state, rounds=1, deadline=1.0))
    assert list(step.lost) == ["site-1"]
    assert "no answer within 1 s" in step.lost["site-1"]


def on_ray(folder: Path, parallel: str) -> str:
    return study(folder, "ray").replace('kind = "ray"', f'kind = "ray"\nparallel = "{parallel}"\nworkers = 2')


@pytest.fixture(scope="module")
def on_one_machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and the run of a study of them in one process."""
    folder = tmp_path_factory.mktemp("study")
    npz(folder)
    go(study(folder), folder / "in-process")
    return folder


@pytest.mark.slow
@pytest.mark.deploy
@pytest.mark.parametrize("parallel", ["arms", "sites"])
def test_a_study_over_two_nodes_has_the_bits_of_one_machine(
    two_nodes: Any, on_one_machine: Path, parallel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[bool] = []

    def recorded(engine: Any, own: set[str], start: Any = RaySites._start) -> Any:
        worker = start(engine, own)
        used.append(worker.used)
        return worker

    monkeypatch.setattr(RaySites, "_start", recorded)
    go(on_ray(on_one_machine, parallel), on_one_machine / parallel)
    assert used.count(False) == (2 if parallel == "sites" else 0)  # the workers of the first method run serve all
    assert any(used) == (parallel == "sites")
    assert equal(tensors(on_one_machine / parallel), tensors(on_one_machine / "in-process"))
    assert facts(on_one_machine / parallel) == facts(on_one_machine / "in-process")
    assert sum(1 for _ in verify(on_one_machine / parallel / "journal.jsonl")) > 10
    assert not (on_one_machine / parallel / SHARED).exists()


@pytest.mark.slow
@pytest.mark.deploy
@pytest.mark.parametrize("parallel", ["arms", "sites"])
def test_a_profile_shows_where_the_time_went_on_two_nodes(two_nodes: Any, on_one_machine: Path, parallel: str) -> None:
    """Whole method runs are measured by their workers, side by side; sites by the workers that hold them."""
    text, path = on_ray(on_one_machine, parallel), on_one_machine / f"profile-{parallel}"
    begun = time.perf_counter()
    list(run_study(parse(text), text, path, profile=True))
    whole = time.perf_counter() - begun
    assert facts(path) == facts(on_one_machine / "in-process")
    found = time_profile.collect(path, whole, 0.0)
    jobs = [p.name for p in (path / "arms").iterdir()]
    assert len(found["method_runs"]) == len(jobs) > 2
    for one in found["method_runs"]:
        assert all(one["phases"][phase] > 0 for phase in ("training", "merging", "evaluation", "saving"))
        assert sum(one["phases"].values()) < whole
        assert sum(one["sites"].values()) > 0
    starting = sum(one["phases"]["starting"] for one in found["method_runs"])
    if parallel == "sites":
        assert {one["engine"] for one in found["method_runs"]} == {"ray"}
        assert found["workers"] == []
        assert starting > 1.0  # each method run starts its workers
        assert time_profile.table(found)[-1] == time_profile.NOT_SPLIT
    else:
        assert {one["engine"] for one in found["method_runs"]} == {"in-process"}
        assert 1 <= len(found["workers"]) <= 2
        assert all(worker["starting"] > 0.1 and worker["reading"] > 0 for worker in found["workers"])
        assert starting < 1.0
        assert " of the cluster executed whole method runs" in time_profile.table(found)[-1]


@pytest.mark.slow
@pytest.mark.deploy
def test_the_command_shows_the_profile_of_a_local_cluster(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason='needs pip install "polyclinic[ray]"')
    npz(tmp_path)
    text = on_ray(tmp_path, "sites").split("[[methods]]")[0].replace('kind = "ray"', 'kind = "ray"\naddress = "local"')
    text = text.replace("seeds = [0, 1]", "seeds = [0]").replace("rounds = 4", "rounds = 2")
    (tmp_path / "s.toml").write_text(text + '[[methods]]\nname = "fedavg"\n')
    words = [sys.executable, "-m", "polyclinic", "run", "s.toml", "--profile"]
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:1"}  # a local cluster is none that runs elsewhere
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").glob("small-*")
    profile = json.loads((folder / "profile.json").read_text())
    assert profile["cluster"] > 0.5  # Ray was started
    (one,) = profile["method_runs"]
    inside = sum(one["phases"].values()) + sum(profile[part] for part in ("cluster", "reading", "report", "baselines"))
    assert 0.7 * profile["seconds"] < inside <= 1.01 * profile["seconds"]
    assert " s: cluster " in done.stdout
    assert "training over workers contains messages" in " ".join(done.stdout.split())
    page = unescape((folder / "report" / "report.html").read_text())
    assert "connecting to the cluster" in page
    assert time_profile.NOT_SPLIT in page


@pytest.mark.slow
@pytest.mark.deploy
def test_a_killed_worker_continues_its_method_run_from_the_checkpoint(two_nodes: Any, on_one_machine: Path) -> None:
    text, path, killed = on_ray(on_one_machine, "arms"), on_one_machine / "killed", 0
    for event in run_study(parse(text), text, path):
        if event.what == "round" and event.round == 2 and killed < 2:
            os.kill(worker_pids("Runner")[0], signal.SIGKILL)
            killed += 1
    assert killed == 2
    assert equal(tensors(path), tensors(on_one_machine / "in-process"))


@pytest.mark.slow
@pytest.mark.deploy
def test_a_node_that_dies_costs_whole_method_runs_time_only(
    two_nodes: Any, on_one_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that receives the events is on the machine of the run, whatever room other machines have."""
    from ray.util import scheduling_strategies

    pinned, original = list[str](), scheduling_strategies.NodeAffinitySchedulingStrategy

    def recorded(node_id: str, soft: bool) -> Any:
        pinned.append(node_id)
        return original(node_id, soft)

    monkeypatch.setattr(scheduling_strategies, "NodeAffinitySchedulingStrategy", recorded)
    node = two_nodes.add_node(num_cpus=1)
    text, path, alive = (
        on_ray(on_one_machine, "arms").replace("workers = 2", "workers = 3"),
        on_one_machine / "node",
        True,
    )
    for event in run_study(parse(text), text, path):
        if event.what == "round" and alive:
            two_nodes.remove_node(node, allow_graceful=False)
            alive = False
    assert pinned == [two_nodes.head_node.node_id]
    assert equal(tensors(path), tensors(on_one_machine / "in-process"))


@pytest.mark.slow
@pytest.mark.deploy
def test_a_stopped_study_resumes_on_the_cluster(two_nodes: Any, on_one_machine: Path) -> None:
    text, path = on_ray(on_one_machine, "arms"), on_one_machine / "stopped"
    events = run_study(parse(text), text, path)
    next(event for event in events if event.what == "round")
    (path / "stop").touch()
    with pytest.raises(Stopped):
        list(events)
    go(text, path, resume=True)
    assert equal(tensors(path), tensors(on_one_machine / "in-process"))


@pytest.mark.slow
@pytest.mark.deploy
def test_a_cluster_that_is_not_there_is_named_with_the_remedy(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason='needs pip install "polyclinic[ray]"')
    script = "from polyclinic.engines.ray.cluster import connected\nwith connected('127.0.0.1:1'): pass"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"RAY_gcs_rpc_server_reconnect_timeout_s": "3"},
        check=False,
    )
    assert "no Ray cluster can be reached at 127.0.0.1:1" in done.stderr
