"""What the engine between hospitals costs beyond training and bytes: NVIDIA FLARE's bare exchange, and ours, in one deployment.

One server and three sites on this machine, mutual TLS, a model of ``--megabytes`` in both directions. The bare exchange is one
FLARE task a site and round with one numpy array (benchmarks/bare_exchange.py). Ours is federated averaging with one
training step a round; what sites report as training is subtracted.

    python benchmarks/flare.py --megabytes 10 --rounds 8
    python benchmarks/flare.py --megabytes 400 --rounds 3 --no-bare
"""

import argparse
import json
import os
import re
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'benchmarks'}"
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(ROOT))

from polyclinic.engines.flare import flare_processes
from polyclinic.engines.flare.client import site_setup
from polyclinic.engines.flare.client.reviews import APPROVED, Reviews
from polyclinic.engines.flare.protocol import flare_job
from polyclinic.engines.flare.protocol.paths import ServerFolder, SiteFolder
from polyclinic.engines.flare.protocol.run_request import RunRequest
from polyclinic.engines.flare.server import server_setup
from polyclinic.engines.flare.server.admin_api import AdminConnection
from polyclinic.engines.flare.server.job_queue import OVER, Queue

FEATURES = 64
SITES = ("site-1", "site-2", "site-3")


def deploy(root: Path, scheme: str, features: int) -> tuple[ServerFolder, dict[str, SiteFolder]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = ServerFolder(root / "server")
    server_setup.init(server, "benchmark", "localhost", port, "bench", scheme)
    homes, rng = {}, np.random.default_rng(0)
    for name in SITES:
        home = homes[name] = SiteFolder(root / name)
        _, table = server_setup.admit(server, site_setup.init(home, name, "bench"))
        data = root / "data" / name
        data.mkdir(parents=True)
        np.savez(data / "train.npz", inputs=rng.standard_normal((16, features), np.float32), targets=np.arange(16) % 2)
        site_setup.join(home, table, data)
        home.policy.write_text("[limits]\nmin_patients = 1\nmegabytes_per_round = 100000.0\n")
    return server, homes


class Watch(threading.Thread):
    """The most memory and the CPU time of processes, by a word on their command line."""

    def __init__(self, words: dict[str, str]) -> None:
        super().__init__(daemon=True)
        self.words, self.stop = words, threading.Event()
        self.peak: dict[str, dict[int, dict[str, int]]] = {name: {} for name in words}
        self.cpu: dict[str, dict[int, float]] = {name: {} for name in words}
        self.before: dict[int, float] = {}
        self.spent: list[tuple[float, float]] = []  # when, and the CPU seconds of all processes until then

    def between(self, begun: float, ended: float) -> float:
        """The CPU seconds of all processes between two moments."""
        until = [max((cpu for at, cpu in self.spent if at <= moment), default=0.0) for moment in (begun, ended)]
        return until[1] - until[0]

    def clear(self) -> None:
        """Clear all measurements; running processes are counted from now on."""
        self.peak = {name: {} for name in self.words}
        self.before = {pid: cpu for pids in self.cpu.values() for pid, cpu in pids.items()}
        self.cpu = {name: {} for name in self.words}

    def run(self) -> None:
        tick = os.sysconf("SC_CLK_TCK")
        every: dict[int, float] = {}
        while not self.stop.wait(0.1):
            for entry in Path("/proc").iterdir():
                if not entry.name.isdigit():
                    continue
                try:
                    line = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                    name = next((n for n, word in self.words.items() if re.search(word, line)), None)
                    if name is None:
                        continue
                    status = dict(re.findall(r"(VmHWM|RssAnon):\s+(\d+)", (entry / "status").read_text()))
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                kept = self.peak[name].setdefault(int(entry.name), {"all": 0, "anon": 0})
                kept["all"] = max(kept["all"], int(status.get("VmHWM", 0)) * 1024)
                kept["anon"] = max(kept["anon"], int(status.get("RssAnon", 0)) * 1024)
                every[int(entry.name)] = (int(fields[11]) + int(fields[12])) / tick
                self.cpu[name][int(entry.name)] = every[int(entry.name)]
            self.spent.append((time.time(), sum(every.values())))

    def result(self) -> dict[str, Any]:
        return {
            name: {
                "peak_mb": round(max((v["all"] for v in pids.values()), default=0) / 2**20),
                "peak_anonymous_mb": round(max((v["anon"] for v in pids.values()), default=0) / 2**20),
                "cpu_s": round(sum(cpu - self.before.get(pid, 0.0) for pid, cpu in self.cpu[name].items()), 2),
            }
            for name, pids in self.peak.items()
        }


class Found(NamedTuple):
    """Seconds of each round but the first, and when they began and ended."""

    seconds: list[float]
    begun: float
    ended: float


def bare(server: ServerFolder, homes: dict[str, SiteFolder], megabytes: float, rounds: int, root: Path) -> Found:
    """FLARE's own exchange."""
    for kit, allowed in [
        (server.kit, "bare_exchange.BareController"),
        *((h.kit, "bare_exchange.BareExecutor") for h in homes.values()),
    ]:
        path = kit / "local" / "resources.json"
        table = json.loads(path.read_text())
        table["class_allow_list"] = sorted({*table["class_allow_list"], allowed})
        path.write_text(json.dumps(table))
    report = root / f"bare-{time.monotonic_ns()}.json"
    folder = flare_job.write(root / "bare", RunRequest("bare", {"sites": list(SITES)}))
    config = folder / "app" / "config"
    table = json.loads((config / "config_fed_server.json").read_text())
    args = {"megabytes": megabytes, "rounds": rounds, "report": str(report)}
    table["workflows"] = [{"id": "bare", "path": "bare_exchange.BareController", "args": args}]
    (config / "config_fed_server.json").write_text(json.dumps(table))
    table = json.loads((config / "config_fed_client.json").read_text())
    table["executors"] = [{"tasks": ["bare"], "executor": {"path": "bare_exchange.BareExecutor", "args": {}}}]
    (config / "config_fed_client.json").write_text(json.dumps(table))
    console = AdminConnection(server.admin, root / "console.log")
    number = console.submit(folder)
    until = time.monotonic() + 600
    while not console.status(number).startswith("FINISHED") and time.monotonic() < until:
        time.sleep(0.5)
    console.close()
    found = json.loads(report.read_text())
    print(f"bare     server peak {found['server_bytes'] / 2**20:.0f} MB")
    return Found(found["seconds"][1:], found["ends"][0], found["ends"][-1])


def ours(
    server: ServerFolder, homes: dict[str, SiteFolder], features: int, width: int, depth: int, rounds: int
) -> tuple[Found, float]:
    """Ours, without what sites report as training; and the CPU seconds of one site's training in one round."""
    plan = {
        "kind": "classification",
        "network": "mlp",
        "inputs": [features],
        "outputs": 2,
        "method": "fedavg",
        "sites": list(SITES),
        "rounds": rounds,
        "network_options": {"width": width, "depth": depth},
        "training": {"steps": 1, "batch_size": 2, "lr": 1e-3},
    }
    server_setup.order(server, RunRequest("ours", plan))
    entry = Queue(server).get("ours")
    assert entry is not None
    for home in homes.values():  # what became of the order, with the sites' keys in it
        reviews = Reviews(home.reviews)
        reviews.offer(entry.what, (), {})
        reviews.decide("ours", APPROVED, "benchmark", "benchmark")
    queue, until = Queue(server), time.monotonic() + 1200
    while (entry := queue.get("ours")) and entry.state not in OVER and time.monotonic() < until:
        time.sleep(0.5)
    folder = server.run("ours")
    print(f"ours     {entry.state if entry else ''} {entry.why if entry else ''}")
    at = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    ends = [_seconds(e["time"]) for e in at if e["event"] == "checkpoint"][:rounds]
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    trained = [max(r["seconds"].values()) for r in records if r["kind"] == "round"]
    # The first round loads data and libraries at the sites, and is left out on both sides.
    seconds = [b - a - t for a, b, t in zip(ends, ends[1:], trained[1:], strict=False)]
    return Found(seconds, ends[0], ends[-1]), _training(RunRequest("ours", plan), features)


def _training(order: RunRequest, features: int) -> float:
    """The CPU seconds that one round of training takes in one process, with nothing around it."""
    from polyclinic.core.site import Site
    from polyclinic.data.examples import Examples

    torch.set_num_threads(1)
    plan = order.build_plan()
    method = plan.build_method()
    request = method.request(method.init(plan.build_task().first(0)))
    assert request is not None
    names = tuple(str(i) for i in range(16))
    site = Site(SITES[0], {"train": Examples(torch.randn(16, features), torch.arange(16) % 2, names, names)})
    method.site_update(request, {}, site)
    begun = time.process_time()
    for _ in range(5):
        method.site_update(request, {}, site)
    return (time.process_time() - begun) / 5


def _seconds(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--scheme", default="grpc")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-bare", action="store_true")
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    rounds = 4 if given.quick else given.rounds
    width = 256 if given.megabytes < 50 else 2048
    depth = max(1, round(given.megabytes * 2**20 / 4 / width**2))
    root = given.keep or Path(tempfile.mkdtemp(prefix="polyclinic-benchmark-"))
    server, homes = deploy(root, given.scheme, FEATURES)
    watch = Watch(
        {
            "server": rf"runner_process.*{re.escape(str(server.kit))}",
            "server parent": rf"server_train.*{re.escape(str(server.kit))}",
            "site": rf"worker_process.*{re.escape(str(root))}/site-",
            "site training": rf"trainer {re.escape(str(root))}/site-",
            "site parent": rf"client_train.*{re.escape(str(root))}/site-",
        }
    )
    try:
        server_setup.start(server)
        for home in homes.values():
            site_setup.start(home)
        until = time.monotonic() + 120
        while len(server_setup.status(server)["sites"]) < len(SITES) and time.monotonic() < until:
            time.sleep(0.5)
        watch.start()
        floors = [] if given.no_bare else [bare(server, homes, given.megabytes, rounds, root)]
        for name, found in (watch.result() if floors else {}).items():
            print(f"bare     {name:14} {found}")
        watch.clear()
        own, training = ours(server, homes, FEATURES, width, depth, rounds)
        used = watch.result()
        if not given.no_bare:  # once more, for the machine's load may have changed
            floors.append(bare(server, homes, given.megabytes, rounds, root))
        watch.stop.set()
        watch.join()
        print(f"load     {os.getloadavg()[0]:.1f}; {given.megabytes:g} MB, {len(SITES)} sites, {given.scheme}")
        cpu = []
        for name, found in (*(("bare", floor) for floor in floors), ("ours", own)):
            cpu.append(watch.between(found.begun, found.ended) / len(found.seconds) / len(SITES))
            print(
                f"{name:8} median {statistics.median(found.seconds):.2f} s a round, {cpu[-1]:.2f} CPU-seconds a site and "
                f"round; {[round(s, 2) for s in found.seconds]}"
            )
        if floors:
            floor = [s for one in floors for s in one.seconds]
            print(f"ratio    {statistics.median(own.seconds) / statistics.median(floor):.2f}")
            print(
                f"beyond   {cpu[-1] - statistics.mean(cpu[:-1]) - training:.2f} CPU-seconds per site and round, besides "
                f"{training:.2f} of training"
            )
        for name, found in used.items():
            print(f"ours     {name:14} {found}")
    finally:
        for home in homes.values():
            site_setup.stop(home)
        server_setup.stop(server)
        flare_processes.end(root)
        if not given.keep:
            shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
