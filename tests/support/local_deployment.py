"""Sites in folders, and a carrier that walks between them: the whole exchange without FLARE and without processes."""

import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from polyclinic.core.atomic import write_private
from polyclinic.core.site import Site
from polyclinic.engines.flare.client.reviews import APPROVED, Reviews
from polyclinic.engines.flare.client.site_agent import SiteAgent, take_in
from polyclinic.engines.flare.client.training_process import TrainingProcess
from polyclinic.engines.flare.client.training_worker import Training
from polyclinic.engines.flare.pki import site_keys
from polyclinic.engines.flare.protocol import shared_journals
from polyclinic.engines.flare.protocol.expected_signers import Signers, signer
from polyclinic.engines.flare.protocol.messages import Answer, BadMessage, Call
from polyclinic.engines.flare.protocol.paths import ServerFolder, SiteFolder, hash_of, private_folder, toml
from polyclinic.engines.flare.protocol.rpc import Delivery, Ended
from polyclinic.engines.flare.protocol.run_request import RunRequest
from polyclinic.engines.flare.server.run_coordinator import RunCoordinator
from polyclinic.engines.policy import site_policy as policies
from tests.conftest import little_sites

TRAINING = {"epochs": 1, "batch_size": 8, "lr": 0.05}
_keys: dict[str, Path] = {}


def order(
    method: str = "fedavg",
    run: str = "run-1",
    sites: Sequence[str] = ("site-0", "site-1", "site-2"),
    rounds: int = 3,
    **changes: Any,
) -> RunRequest:
    """A small order; ``changes`` of the plan go in ``plan``."""
    plan = {
        "kind": "classification",
        "network": "cnn",
        "inputs": [1, 8, 8],
        "outputs": 2,
        "method": method,
        "sites": list(sites),
        "rounds": rounds,
        "seed": 3,
        "network_options": {"width": 4, "depth": 2},
        "training": TRAINING,
        **changes.pop("plan", {}),
    }
    return RunRequest(run, plan, **{"patience": 5.0, **changes})


def write_settings(server: ServerFolder) -> None:
    """The settings of a server, as after `server init`."""
    about: dict[str, str | int] = {"project": "tests", "host": "localhost", "port": 8002, "organization": "x"}
    server.settings.write_text(toml({**about, "scheme": "grpc"}))


def write_data(folder: Path, site: Site) -> None:
    """A site's data as a hospital keeps it."""
    folder.mkdir(parents=True, exist_ok=True)
    for role, rows in site.data.items():
        np.savez(folder / f"{role}.npz", inputs=rows.x.numpy(), targets=rows.y.numpy())


def make_site(path: Path, name: str, site: Site, policy: str = policies.DEFAULT) -> SiteFolder:
    """A site's folder, with data and policy, as after `site init` and `site join`. Keys are made once and copied."""
    home = SiteFolder(path)
    private_folder(path)
    write_data(path / "data", site)
    write_private(home.settings, f'site = "{name}"\ndata = "{path / "data"}"\n')
    write_private(home.policy, policy)
    if "keys" not in _keys or not _keys["keys"].exists():
        site_keys.make(home.keys)
        _keys["keys"] = home.keys
    else:
        shutil.copytree(_keys["keys"], home.keys)
        write_private(home.keys / "secure.key", Ed25519PrivateKey.generate().private_bytes_raw().hex())
    return home


def identities(homes: Mapping[str, SiteFolder]) -> dict[str, str]:
    """The sites' public keys for secure sums."""
    return {
        name: site_keys.load_secure(home.keys / "secure.key").public_key().public_bytes_raw().hex()
        for name, home in homes.items()
    }


def approve(home: SiteFolder, an: RunRequest) -> None:
    """What a person at the site does, once the run request has come: reads it, and approves what was shown."""
    Reviews(home.reviews).offer(an, ())
    read_and_approve(home, an.run)


def read_and_approve(home: SiteFolder, name: str, reason: str = "because") -> None:
    """Read the current content under ``name``, and approve exactly that."""
    reviews = Reviews(home.reviews)
    reviews.remember(reviews.subject(name))
    reviews.decide(name, APPROVED, "a person", reason)


class Inline:
    """A training process that is none."""

    pid = 0

    def __init__(self, home: SiteFolder, run: str) -> None:
        self.home, self.run = home, run
        self.training: Training | None = None

    def do(self, command: Mapping[str, Any], deadline: float | None = None) -> dict[str, Any]:
        self.training = self.training or Training(self.home, self.run)
        return self.training.do(dict(command))

    def close(self) -> None:
        self.training = None


class LocalCarrier:
    """Carries messages within this process, in the order in which they were posted.

    ``tamper`` may change a call before it arrives; ``lose`` says whether a site never answers a call.
    """

    def __init__(
        self,
        homes: Mapping[str, SiteFolder],
        an: RunRequest,
        tamper: Callable[[Call], Call] = lambda call: call,
        lose: Callable[[Call], bool] = lambda call: False,
        crash: Callable[[Call], bool] = lambda call: False,
    ) -> None:
        self.homes, self.order, self.tamper, self.lose, self.crash = homes, an, tamper, lose, crash
        self.agents: dict[str, SiteAgent] = {}
        self.queue: deque[tuple[Call, Path | None]] = deque()
        self.calls: list[Call] = []
        self.idle = 0

    def agent(self, name: str) -> SiteAgent:
        if name not in self.agents:
            self.agents[name] = SiteAgent(self.homes[name], self.order)
            self.agents[name].trainer = cast(TrainingProcess, Inline(self.homes[name], self.order.run))
        return self.agents[name]

    def restart(self, name: str) -> None:
        """The site's machine reboots."""
        if name in self.agents:
            self.agents.pop(name).close()

    def post(self, calls: Sequence[Call], body: Path | None) -> None:
        self.queue.extend((call, body) for call in calls)

    def arrived(self, seconds: float) -> Delivery | None:
        if not self.queue:
            self.idle += 1
            if self.idle > 3000:
                raise Ended("no site has answered for long: does the test lose a message and set no deadline?")
            time.sleep(0.002)
            return None
        self.idle = 0
        call, body = self.queue.popleft()
        if self.crash(call):
            raise Ended("the server crashed")
        if self.lose(call):
            return None
        call = self.tamper(call)
        self.calls.append(call)
        agent = self.agent(call.site)
        if (refusal := agent.before(call)) is not None:
            return Delivery(call.site, refusal.to_json(), _nothing)
        if body is not None:
            copy = agent.memory.folder / "received"
            shutil.copy(body, copy)
            body = take_in(agent.memory, copy, call.number)
        answer, file = agent.answer(call, body)

        def take(path: Path, limit: int) -> tuple[int, str]:
            assert file is not None
            shutil.copy(file, path)
            return hash_of(path)

        return Delivery(call.site, answer.to_json(), take)

    def away(self, site: str) -> bool:
        return False

    def drop(self, site: str) -> None:
        self.queue = deque((call, body) for call, body in self.queue if call.site != site)

    def close(self) -> None:
        for agent in self.agents.values():
            agent.close()


def _nothing(path: Path, limit: int) -> tuple[int, str]:
    raise OSError("no file came")


def admitted(root: Path, homes: Mapping[str, SiteFolder]) -> Signers:
    """The server's record of the sites' keys, as after `server admit`."""
    until = datetime.now(UTC) + timedelta(days=100)
    entries = {
        name: {"revoked": "", "signers": [signer(site_keys.load(home.keys / "site.key").public_key(), until)]}
        for name, home in homes.items()
    }
    (root / "admitted.json").write_text(json.dumps(entries))
    return Signers(root / "admitted.json")


def signed_again(delivery: Delivery, home: SiteFolder) -> Delivery:
    """``delivery``, signed by the key of the site in ``home``, as a hostile site signs what it makes up."""
    try:
        answer = Answer.from_json(delivery.text)
    except BadMessage:
        return delivery
    signature = shared_journals.sign(site_keys.load(home.keys / "site.key"), answer.signed)
    return delivery._replace(text=replace(answer, signature=signature).to_json())


def hospital(
    root: Path, count: int = 3, policy: str = policies.DEFAULT.replace("min_patients = 10", "min_patients = 2")
) -> dict[str, SiteFolder]:
    """``count`` site folders with little data."""
    return {name: make_site(root / name, name, site, policy) for name, site in little_sites(count=count).items()}


def coordinator(root: Path, an: RunRequest, carrier: LocalCarrier, **how: Any) -> RunCoordinator:
    signers = admitted(root, carrier.homes)
    return RunCoordinator(an, carrier, root / "server" / an.run, tuple(carrier.homes), poll=0.0, signers=signers, **how)


def same_tensors(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
