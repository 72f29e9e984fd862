"""A hostile site against the real server side: it answers what it likes, and the round must go on without harm.

A new attack is a few lines: a function that changes what a site says, and the name of the site that says it::

    def heavy(said: Said) -> None:
        said.reply = Reply({part: WeightedMean(stat.total, 1e12) for part, stat in said.reply.parts.items()})

    end = run(tmp_path, small_order(), {"site-1": heavy})
    end.harmless(without="site-1")

What the site says is signed again with the site's own key, for a hostile hospital has one; ``said.signed = False`` leaves
the old signature, and ``said.table["signature"]`` can be anything.
"""

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from polyclinic.core import serialization as states
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.tree import Tree, norm, sub
from polyclinic.engines.flare.pki import site_keys
from polyclinic.engines.flare.protocol import shared_journals
from polyclinic.engines.flare.protocol.messages import Answer, Call
from polyclinic.engines.flare.protocol.paths import SiteFolder
from polyclinic.engines.flare.protocol.rpc import Delivery
from polyclinic.engines.flare.protocol.run_request import RunRequest
from tests.adversary.server import houses
from tests.support.local_deployment import LocalCarrier, approve, coordinator


class Said:
    """One answer of a hostile site, as the honest agent made it, to be changed.

    Attributes:
        call: What was asked. ``request``: the request's file, if it has one.
        table: The answer's fields. ``data``: its file.
        signed: Whether the site signs the answer again after the change.
        hashed: Whether the file's length and hash in the table are set after the change.
        also: Answers to be delivered besides, later: table and file.
    """

    def __init__(self, call: Call, request: Request | None, table: dict[str, Any], data: bytes) -> None:
        self.call, self.ask, self.table, self.data = call, request, table, data
        self.signed = self.hashed = True
        self.also: list[tuple[dict[str, Any], bytes]] = []

    @property
    def value(self) -> Any:
        """What the file holds."""
        return states.decode(self.data)

    @value.setter
    def value(self, value: Any) -> None:
        self.data = states.encode(value)

    @property
    def reply(self) -> Reply:
        """What the file holds, if it is a reply."""
        value = self.value
        assert isinstance(value, Reply)
        return value

    @reply.setter
    def reply(self, reply: Reply) -> None:
        self.value = reply


Attack = Callable[[Said], None]


class HostileCarrier(LocalCarrier):
    """Carries what hostile sites say instead of what their agents answered."""

    def __init__(
        self, homes: Mapping[str, SiteFolder], an: RunRequest, attacks: Mapping[str, Attack], kinds: tuple[str, ...]
    ) -> None:
        """``attacks`` by site; they change answers to the ``kinds`` of calls."""
        super().__init__(homes, an)
        self.attacks, self.kinds = dict(attacks), kinds
        self.later: deque[Delivery] = deque()
        self.received: list[tuple[Call, bytes]] = []
        self.asked: dict[str, Request] = {}

    def post(self, calls: Any, body: Path | None) -> None:
        """Keeps what is asked, so that an attack can be made of it."""
        if body is not None:
            value = states.decode(body.read_bytes())
            if isinstance(value, Request):
                self.asked |= {call.site: value for call in calls}
        super().post(calls, body)

    def arrived(self, seconds: float) -> Delivery | None:
        """What came, after the attacks."""
        if self.later:
            return self.later.popleft()
        before = len(self.calls)
        delivery = super().arrived(seconds)
        if delivery is None or len(self.calls) == before:
            return delivery
        call, text = self.calls[-1], str(delivery.text)
        path = self.homes[call.site].path / "hostile.part"
        table: dict[str, Any] = json.loads(text)
        data = b""
        if table["size"]:
            delivery.take(path, 2**40)
            data = path.read_bytes()
            path.unlink()
        self.received.append((call, data))
        said = Said(call, self.asked.get(call.site), table, data)
        if call.site in self.attacks and call.kind in self.kinds:
            self.attacks[call.site](said)
            for table, data in said.also:
                self.later.append(self._delivery(call.site, table, data))
            if said.hashed:
                said.table |= {
                    "size": len(said.data),
                    "sha256": hashlib.sha256(said.data).hexdigest() if said.data else "",
                }
            if said.signed:
                self._sign(call.site, said.table)
        return self._delivery(call.site, said.table, said.data)

    def _sign(self, site: str, table: dict[str, Any]) -> None:
        key = site_keys.load(self.homes[site].keys / "site.key")
        try:
            table["signature"] = shared_journals.sign(key, Answer(**table).signed)
        except TypeError:
            pass  # it has not even the form of an answer

    def _delivery(self, site: str, table: dict[str, Any], data: bytes) -> Delivery:
        def take(path: Path, limit: int) -> tuple[int, str]:
            if len(data) > limit:
                raise OSError(f"more than the {limit} bytes that were announced came")
            path.write_bytes(data)
            return len(data), hashlib.sha256(data).hexdigest()

        return Delivery(site, json.dumps(table), take)


@dataclass
class End:
    """How a run with hostile sites ended.

    Attributes:
        outcome: ``finished``, ``interrupted`` or ``failed``. ``why``: what the status says.
        model: The last model; None if there is none.
        lost: Who was lost in which round, and why.
        scores: The lines of scores and tests in the records.
        folder: The server's folder of the run.
        carrier: What carried the messages.
    """

    outcome: str
    why: str
    model: Tree | None
    lost: list[tuple[int, str, str]]
    scores: list[dict[str, Any]]
    folder: Path
    carrier: HostileCarrier

    def loses(self, site: str) -> None:
        """Asserts that the run finished, and that ``site`` was lost in every round, by name and with a reason."""
        assert self.outcome == "finished", f"one hostile site stopped the run: {self.outcome}: {self.why}"
        named = {round for round, who, why in self.lost if who == site and why}
        rounds = int(self.carrier.order.plan["rounds"])
        assert named == set(range(rounds)), f"{site} was lost in the rounds {sorted(named)} of {rounds}: {self.lost}"


def bounded(an: RunRequest) -> RunRequest:
    """``an`` with the bounds of weights and norms that a coordinator would have; the one place to adapt if the server
    gets them from a source other than its record of the sites."""
    return an


def run(
    root: Path,
    an: RunRequest,
    attacks: Mapping[str, Attack],
    kinds: tuple[str, ...] = ("do",),
    homes: Mapping[str, SiteFolder] | None = None,
    count: int = 3,
) -> End:
    """Runs ``an`` between sites that all approved it, of which those in ``attacks`` are hostile."""
    homes = homes or houses(root, count)
    an = bounded(an)
    for home in homes.values():
        approve(home, an)
    carrier = HostileCarrier(homes, an, attacks, kinds)
    folder = root / "server" / an.run
    try:
        outcome, why = coordinator(root, an, carrier).run(), ""
    except Exception as error:
        outcome, why = "raised", f"{type(error).__name__}: {error}"
    finally:
        carrier.close()
    status = json.loads((folder / "status.json").read_text())
    lines = [json.loads(line) for line in _lines(folder / "records.jsonl")]
    rounds = [line for line in lines if line["kind"] == "round"]
    model = states.load(folder / "model.safetensors") if (folder / "model.safetensors").exists() else None
    return End(
        outcome,
        why or status["why"],
        model,
        [(r["round"] - 1, s, w) for r in rounds for s, w in r["lost"].items()],
        [line for line in lines if line["kind"] in ("scores", "test")],
        folder,
        carrier,
    )


def silent(said: Said) -> None:
    """Says that it failed: what a run looks like without this site."""
    said.table["lost"], said.data = "failed: the disk is full", b""


def without(root: Path, an: RunRequest, site: str, count: int = 3) -> Tree:
    """The model of the same run in which ``site`` fails at every request. It is trained once for each run request."""
    key = (an.hash, site, count)
    if key not in _without:
        end = run(root / "without", an, {site: silent}, count=count)
        assert end.model is not None, end.why
        shutil.rmtree(root / "without" / "server")
        _without[key] = end.model
    return _without[key]


_without: dict[tuple[str, str, int], Tree] = {}


def same_model(one: Tree | None, other: Tree) -> bool:
    """Whether both models are equal to the bit."""
    return one is not None and one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in other)


def far(one: Tree | None, other: Tree) -> float:
    """The distance of two models in units of the second's norm; infinite where the first is none, or not finite."""
    if one is None or not all(bool(leaf.isfinite().all()) for leaf in one.values()):
        return float("inf")
    return norm(sub(one, other)) / max(norm(other), 1e-9)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def weighted(reply: Reply, weight: float) -> Reply:
    """``reply`` with the same values, of which each claims ``weight``."""
    return Reply(
        {
            part: replace(stat * (weight / stat.weight), weight=weight) if isinstance(stat, WeightedMean) else stat
            for part, stat in reply.parts.items()
        }
    )
