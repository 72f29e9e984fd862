"""Workers share the GPUs of a machine; devices are checked before they are used. No GPU is needed."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from polyclinic.core.aggregates import PerSite, Reply
from polyclinic.core.method import Method, Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.engines.devices import chosen_device, worker_device
from polyclinic.engines.local.worker_pool import Workers
from polyclinic.errors import ConfigError
from tests.support.known import known


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)


def test_workers_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 3)
    assert [worker_device("cuda", i) for i in range(5)] == ["cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:1"]
    assert {worker_device("cuda:1", i) for i in range(3)} == {"cuda:1"}  # a chosen GPU is kept
    assert {worker_device("cpu", i) for i in range(3)} == {"cpu"}
    with_gpus(monkeypatch, 1)
    assert {worker_device("cuda", i) for i in range(3)} == {"cuda"}


@dataclass(frozen=True)
class Asked(Method[None]):
    """Each site replies with the index of its device."""

    def init(self, params: Any) -> None:
        """There is no state."""

    def request(self, state: None) -> Request:
        return Request(0, {})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        index = torch.tensor([torch.device(site.device).index or 0])
        return Reply({"device": PerSite({site.name: {"index": index}})}), memory

    def server_update(self, state: None, reply: Reply, server: Site) -> None:
        """There is no state."""


def test_a_worker_trains_its_sites_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 2)
    sites = {name: Site(name, {}, device="cuda") for name in ("a", "b")}
    with Workers(Asked(), sites, workers=2) as engine:
        engine.send(Request(0, {}), ["a", "b"])
        found = {arrival.site: arrival for arrival in engine.replies()}
    assert not [arrival.lost for arrival in found.values() if arrival.lost]
    index = {site: int(known(arrival.reply).gather("device")[site]["index"]) for site, arrival in found.items()}
    assert index == {"a": 0, "b": 1}


@pytest.mark.parametrize(
    ("name", "says"), [("cuda:2", "there are 2 GPUs here, cuda:0 to cuda:1"), ("gpu", "no device of")]
)
def test_a_device_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, says: str) -> None:
    with_gpus(monkeypatch, 2)
    assert chosen_device("auto") == "cuda"
    assert chosen_device("cuda:1") == "cuda:1"
    with pytest.raises(ConfigError, match=says):
        chosen_device(name)
    with_gpus(monkeypatch, 0)
    assert chosen_device("auto") == "cpu"
    with pytest.raises(ConfigError, match='"cuda": '):
        chosen_device("cuda")
