"""Hospitals as real processes on this machine: made, started and stopped by the commands that people type."""

import io
import json
import os
import re
import resource
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import polyclinic
from polyclinic.cli import app
from polyclinic.core import serialization as states
from polyclinic.core.audit_log import verify
from polyclinic.core.execution import sample_sites
from polyclinic.core.rounds import train, train_async, undiscounted
from polyclinic.core.site import Site
from polyclinic.engines.flare import flare_processes
from polyclinic.engines.flare.client import site_setup
from polyclinic.engines.flare.client.reviews import APPROVED, Reviews
from polyclinic.engines.flare.client.run_memory import RunMemory
from polyclinic.engines.flare.protocol.paths import ServerFolder, SetupError, SiteFolder
from polyclinic.engines.flare.protocol.run_request import RunRequest
from polyclinic.engines.flare.server import server_setup
from polyclinic.engines.flare.server.job_queue import FINISHED, OVER, Queue
from polyclinic.engines.local.in_process import InProcess
from tests.conftest import little_sites
from tests.support.inside.sitecustomize import fixed
from tests.support.local_deployment import order, write_data

PATIENCE = 300.0
POLICY = '[allow]\ngather = ["*"]\n[limits]\nmin_patients = 2\n'
# By which words on its command line a process is known.
KINDS = {
    "training": r"client\.training_process",
    "site job": "worker_process",
    "site parent": "client_train",
    "site keeper": r"flare\.site_keeper",
    "server job": "runner_process",
    "server parent": "server_train",
    "supervisor": r"server\.supervisor",
}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def until(true: Callable[[], Any], what: str, patience: float = PATIENCE, pause: float = 0.1) -> Any:
    """What ``true`` returns, once it is something; machines are slow and patience is long."""
    end = time.monotonic() + patience
    while not (found := true()):
        if time.monotonic() > end:
            raise AssertionError(f"waited {patience:g} s in vain for {what}")
        time.sleep(pause)
    return found


class Hospitals:
    """One server and some sites, each in a folder of its own under ``root``."""

    def __init__(
        self,
        root: Path,
        count: int = 3,
        policy: str = POLICY,
        ports: dict[str, int] | None = None,
        sites: dict[str, Site] | None = None,
        **settings: int,
    ) -> None:
        """Makes them. ``ports``: where a site's way to the server begins, such as a proxy of a test. ``sites``: their
        data.
        """
        self.root, self.faults, self.port = root, root / "faults", free_port()
        self.faults.mkdir(parents=True)
        self.server, self.sites = ServerFolder(root / "server"), sites or little_sites(count=count)
        self.homes = {name: SiteFolder(root / name) for name in self.sites}
        inside = Path(__file__).parent / "inside"
        package = Path(polyclinic.__file__).parents[1]
        self.env = {
            **os.environ,
            "PYTHONPATH": f"{inside}:{package}",
            "POLYCLINIC_TEST_FAULTS": str(self.faults),
            "OMP_NUM_THREADS": "1",
        }
        said = self.command(
            "server",
            "init",
            "--project",
            "tests",
            "--host",
            "localhost",
            "--organization",
            "tests",
            "--port",
            str(self.port),
            home=self.server.path,
        )
        fingerprint = re.search(r"(?:[0-9a-f]{4}:){15}[0-9a-f]{4}", said)
        assert fingerprint
        text = self.server.settings.read_text()
        for key, value in settings.items():
            text = re.sub(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
        self.server.settings.write_text(text)
        for name, home in self.homes.items():
            write_data(root / "data" / name, self.sites[name])
            self.command("site", "init", "--name", name, "--organization", "hospital", home=home.path)
            self.command("server", "admit", str(home.path / f"{name}.request"), home=self.server.path)
            self.command(
                "site",
                "join",
                str(home.path / f"{name}.join"),
                "--data",
                str(root / "data" / name),
                "--fingerprint",
                fingerprint[0],
                home=home.path,
            )
            home.policy.write_text(policy)
            if ports and name in ports:
                config = home.kit / "startup" / "fed_client.json"
                config.write_text(config.read_text().replace(f":{self.port}", f":{ports[name]}"))

    # What people do ---------------------------------------------------------------------------------------------------

    def command(self, *words: str, home: Path, code: int = 0) -> str:
        """What ``polyclinic WORDS --home HOME`` prints, after checking how it ended. Without a process of its own."""
        said = io.StringIO()
        with mock.patch.dict(os.environ, self.env), redirect_stdout(said), redirect_stderr(said):
            try:
                app.app([*words, "--home", str(home)])
                ended: Any = 0
            except SystemExit as end:
                ended = end.code or 0
            except SetupError as error:
                ended = 2
                print(error)
        assert ended == code, f"{words}: {said.getvalue()}"
        return said.getvalue()

    def __enter__(self) -> "Hospitals":
        """Starts every site; whatever happens then, every site is stopped at the end."""
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Starts every site, and waits until every site is connected."""
        self.command("server", "start", "--background", home=self.server.path)
        for home in self.homes.values():
            self.command("site", "start", "--background", home=home.path)
        self.together()

    def together(self, sites: Sequence[str] = ()) -> None:
        """Waits until every site is connected, at this moment."""
        wanted, now = set(sites or self.homes), time.time()
        until(
            lambda: (
                server_setup.is_up(self.server)
                and set(server_setup.status(self.server)["sites"]) >= wanted
                and server_setup.status(self.server)["beat"] > now
            ),
            "all sites to connect",
        )

    def close(self) -> None:
        """Stops every site, by the commands; whatever stays is a mistake, and is ended."""
        for home in self.homes.values():
            with suppress(AssertionError):
                self.command("site", "stop", home=home.path)
        self.command("server", "stop", home=self.server.path)
        left = flare_processes.working_in(self.root)
        flare_processes.end(self.root)
        assert not left, f"{len(left)} processes stayed after everybody was stopped"

    def order(self, an: RunRequest, approve: bool = True) -> RunRequest:
        """Puts a run request into the queue, and approves what became of it at every site, before it comes there."""
        server_setup.order(self.server, an)
        made = Queue(self.server).get(an.run)
        assert made is not None
        for name in made.what.plan["sites"] if approve else ():
            reviews = Reviews(self.homes[name].reviews)
            reviews.offer(made.what, ())
            reviews.remember(reviews.subject(an.run))
            reviews.decide(an.run, APPROVED, "a person", "a test")
        return made.what

    # What can be seen -------------------------------------------------------------------------------------------------

    def finished(self, run: str, patience: float = PATIENCE) -> None:
        """Waits until a run is over, and checks that it ended well."""
        queue = Queue(self.server)
        until(
            lambda: (e := queue.get(run)) is not None and e.state in OVER, f"{run} to end ({self.tell(run)})", patience
        )
        entry = queue.get(run)
        assert entry is not None
        assert entry.state == FINISHED, f"{run} {entry.state}: {entry.why}"

    def tell(self, run: str) -> str:
        return f"{Queue(self.server).get(run)} {Queue(self.server).progress(run)}"

    def state(self, run: str) -> Any:
        """The server's state at the last checkpoint."""
        return states.load(self.server.run(run) / "checkpoint.safetensors").state

    def memory(self, run: str, site: str) -> Any:
        """What a site keeps of a run."""
        memory = RunMemory(self.homes[site].memory(run))
        last = memory.chain.links[-1].memory if memory.chain.links else ""
        return states.load(memory.folder / last) if last else {}

    def lost(self, run: str) -> list[tuple[int, str, str]]:
        """Who was lost in which round, and why, as the records say."""
        lines = (self.server.run(run) / "records.jsonl").read_text().splitlines()
        rounds = [json.loads(line) for line in lines]
        return [(r["round"], site, why) for r in rounds if r["kind"] == "round" for site, why in r["lost"].items()]

    def events(self, path: Path, run: str = "") -> list[str]:
        return [entry["event"] for entry in verify(path) if not run or entry.get("run", run) == run]

    def attempts(self, run: str) -> int:
        entry = Queue(self.server).get(run)
        return entry.attempt if entry else 0

    def journals_hold(self) -> None:
        """Every journal of every house is whole."""
        for path in [
            self.server.path / "journal.jsonl",
            *self.server.path.glob("runs/*/journal.jsonl"),
            *(h.journal for h in self.homes.values()),
        ]:
            assert list(verify(path)), path

    def pids(self, kind: str, site: str = "") -> list[int]:
        """The processes of a kind, in one house."""
        folder, found = self.homes[site].path if site else self.server.path, []
        for pid in flare_processes.working_in(folder):
            with suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
                if re.search(KINDS[kind], line.replace("\0", " ")) and flare_processes.alive(pid):
                    found.append(pid)
        return found

    # What goes wrong --------------------------------------------------------------------------------------------------

    def kill(self, kind: str, site: str = "") -> None:
        """kill -9"""
        for pid in until(lambda: self.pids(kind, site), f"a process of the kind {kind}"):
            os.kill(pid, signal.SIGKILL)

    def power_cut(self, site: str = "") -> None:
        """kill -9 of everything in one house, the server's or a site's, at once."""
        folder = self.homes[site].path if site else self.server.path
        while there := flare_processes.working_in(folder):
            for pid in there:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def die_at(self, argv: str, path: str, when: str, skip: int = 0) -> Path:
        """Asks the process with ``argv`` on its command line to die before or after it has written ``path``."""
        order = self.faults / f"{time.monotonic_ns()}.kill"
        beside = order.with_suffix(".part")
        beside.write_text(json.dumps({"argv": argv, "path": path, "when": when, "skip": skip}))
        beside.rename(order)
        return order.with_suffix(".done")

    def hold(self, round: int, *sites: str) -> None:
        """Lets sites work on a round until ``release``."""
        for site in sites:
            (self.faults / f"held-{site}-{round}").unlink(missing_ok=True)
            (self.faults / f"hold-{site}-{round}").touch()

    def held(self, round: int, *sites: str) -> None:
        """Waits until sites work on the round in which they are held."""
        for site in sites:
            until((self.faults / f"held-{site}-{round}").exists, f"{site} to work on round {round}")

    def release(self) -> None:
        for path in [*self.faults.glob("hold-*"), *self.faults.glob("held-*")]:
            path.unlink(missing_ok=True)

    def twist(self, site: str, how: str) -> None:
        (self.faults / f"twist-{site}").write_text(how)

    def full_disk(self, pids: Sequence[int], full: bool = True) -> None:
        """Lets writes of processes fail, as on a full disk, or work again."""
        for pid in pids:
            with suppress(ProcessLookupError):
                _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (0 if full else hard, hard))

    def start_site(self, site: str, **env: str) -> None:
        """Starts a site again, perhaps with something else in its environment."""
        before, self.env = self.env, {**self.env, **env}
        try:
            if not site_setup.is_up(self.homes[site]):
                self.command("site", "start", "--background", home=self.homes[site].path)
        finally:
            self.env = before

    def reset(self) -> None:
        """Whatever a test did, every site is there again."""
        for path in self.faults.iterdir():
            path.unlink()
        if not server_setup.is_up(self.server):
            self.command("server", "start", "--background", home=self.server.path)
        queue = Queue(self.server)
        for run, entry in queue.all().items():
            if entry.state not in OVER:
                queue.cancel(run)
                until(partial(_is_over, queue, run), f"{run} to be cancelled")
        for site in self.homes:
            self.start_site(site)
        self.together()


def _is_over(queue: Queue, run: str) -> bool:
    """Whether the queue holds ``run`` and it has ended."""
    entry = queue.get(run)
    return entry is not None and entry.state in OVER


def reference(an: RunRequest, sites: dict[str, Site] | None = None) -> tuple[Any, dict[str, Any]]:
    """The state and the sites' memory after the same run in this process, with noise that repeats."""
    plan = an.build_plan()
    method = plan.build_method()
    there = {
        n: Site(n, s.data, "cpu", plan.seed, fixed(n)) for n, s in (sites or little_sites()).items() if n in plan.sites
    }
    engine, state = InProcess(method, there, seed=plan.seed), method.init(plan.build_task().first(plan.seed))
    if an.mode == "buffered":
        steps = train_async(
            method,
            engine,
            state,
            updates=plan.rounds,
            buffer=an.buffer,
            passes=an.passes,
            discount=method.capabilities.discount or undiscounted,
        )
    else:
        size = an.sites_per_round or len(there)
        steps = train(
            method,
            engine,
            state,
            rounds=plan.rounds,
            min_replies=an.min_replies,
            sampler=lambda names, round: sample_sites(names, size, round, plan.seed),
        )
    for step in steps:
        state = step.state
    return state, engine.memory


def study(run: str, method: str = "scaffold", **how: Any) -> RunRequest:
    """A small order for real processes, whose sites need a while to load PyTorch."""
    return order(method, run=run, **{"patience": PATIENCE, **how})


torch.set_num_threads(1)
