"""A hostile server against the real site agents, in one process: it asks for what it likes and keeps whatever it gets.

A new attack is a few lines::

    server = HostileServer(houses(tmp_path), small_order())     # sites exist, the run request was read and approved at each
    got = server.ask("site-0", "score/train", {"head.weight": ..., "head.bias": ...})
    refused(got)

``server.loot`` holds every file that left a site. ``Person`` is what a person at a site does, by the commands of the
command line, so that nothing here depends on how an approval is stored.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from polyclinic.cli import app
from polyclinic.core import serialization as states
from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.tree import Tree, Trees
from polyclinic.engines.flare.client.site_agent import SiteAgent, take_in
from polyclinic.engines.flare.protocol import tensor_file
from polyclinic.engines.flare.protocol.messages import VERSION, Answer, Call
from polyclinic.engines.flare.protocol.paths import SetupError, SiteFolder
from polyclinic.engines.flare.protocol.run_request import RunRequest, survey_plan
from polyclinic.engines.policy import site_policy as policies
from polyclinic.secure_aggregation import vector_of
from polyclinic.secure_aggregation.server import SecureServer
from polyclinic.secure_aggregation.session_keys import ProtocolError, Session, default_threshold
from tests.conftest import little_sites
from tests.support.local_deployment import TRAINING, Inline, identities, make_site, order

LENIENT = policies.DEFAULT.replace("min_patients = 10", "min_patients = 2")
SUM = {"name": "secure-sum", "limit": 64.0, "bits": 20}
STAGES = ("advertise", "share", "mask", "agree", "reveal")


# Sites and orders -----------------------------------------------------------------------------------------------------


def houses(root: Path, count: int = 3, policy: str = LENIENT, shape: tuple[int, ...] = (4,)) -> dict[str, SiteFolder]:
    """``count`` sites with little data of ``shape``: 12, 17, 22, ... training patients, one example each."""
    return {name: make_site(root / name, name, site, policy) for name, site in little_sites(shape, count).items()}


def small_order(
    run: str = "run-1", sites: Sequence[str] = ("site-0", "site-1", "site-2"), method: str = "fedavg", **changes: Any
) -> RunRequest:
    """A run request for a linear model of four inputs. Changes of the plan go in ``plan``."""
    plan = {"network": "mlp", "network_options": {"depth": 0}, "inputs": [4], **changes.pop("plan", {})}
    return order(method, run=run, sites=sites, plan=plan, **changes)


def secure_order(homes: Mapping[str, SiteFolder], method: str = "fedavg", **changes: Any) -> RunRequest:
    """A run request whose replies go through a secure sum over all of ``homes``."""
    options = {"options": {"uniform": True}} if method == "fedavg" else {}
    plan = {"uplink": [SUM], **options, **changes.pop("plan", {})}
    return small_order(sites=tuple(homes), method=method, plan=plan, identities=identities(homes), **changes)


def study(
    run: str,
    name: str = "spots",
    lr: float = 0.05,
    rounds: int = 3,
    label: str = "fedavg",
    arms: Mapping[str, Any] | None = None,
    **changes: Any,
) -> RunRequest:
    """One arm of a study of two, FedAvg and FedProx. What the sites' data say, the method runs leave open.

    Args:
        arms: Further fields of all method runs' plans. ``changes``: to the run request; in ``plan``, to this method run's plan only.
    """
    training = {**TRAINING, "lr": lr}
    both = {
        method: small_order(method=method, rounds=rounds, plan={**(arms or {}), "training": training}).plan
        for method in ("fedavg", "fedprox")
    }
    known = [
        {"label": method, "plan": {key: value for key, value in plan.items() if key not in ("inputs", "outputs")}}
        for method, plan in both.items()
    ]
    plan = {**both[label], **changes.pop("plan", {})}
    return RunRequest(
        run,
        plan,
        **{"patience": 5.0, "label": label, "study": {"name": name, "hash": "ab" * 32, "arms": known}, **changes},
    )


def survey(run: str, of: RunRequest) -> RunRequest:
    """The survey of the study that ``of`` is a method run of."""
    return replace(of, run=run, mode="survey", plan=survey_plan(list(of.plan["sites"])), label="")


# A person at a site -----------------------------------------------------------------------------------------------------


class Person:
    """Somebody at a hospital who reads and decides, with the commands that people type."""

    def __init__(self, home: SiteFolder) -> None:
        self.home = home

    def types(self, *words: str) -> tuple[bool, str]:
        """Types ``polyclinic site WORDS``: whether it succeeded, and what it printed."""
        said = io.StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            try:
                app.app(["site", *words, "--home", str(self.home.path)])
                good = True
            except SystemExit as end:
                good = not end.code
            except (SetupError, ValueError) as error:
                good = False
                print(error)
        return good, said.getvalue()

    def reads(self, name: str) -> str:
        """What the review of a run or a study shows."""
        return self.types("review", name)[1]

    def approves(self, name: str) -> bool:
        """Approves what was last read under ``name``; whether that was accepted."""
        return self.types("approve", name, "--reason", "IRB 26-114")[0]

    def refuses(self, name: str) -> bool:
        """Refuses it, or takes an approval back."""
        return self.types("refuse", name, "--reason", "no")[0]

    def forgets(self, run: str) -> bool:
        """Deletes the site's memory of a run."""
        return self.types("forget", run, "--yes")[0]


# What comes back --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Got:
    """One call and what came of it.

    Attributes:
        call: What was asked, and ``order`` under which order.
        answer: The answer. ``data``: its file; empty if nothing left the site.
    """

    call: Call
    order: RunRequest
    answer: Answer
    data: bytes = b""

    @property
    def site(self) -> str:
        """Who was asked."""
        return self.call.site

    @property
    def lost(self) -> str:
        """Why nothing left; empty where something did, or nothing was to leave."""
        return self.answer.lost

    @property
    def left(self) -> bool:
        """Whether a file left the site."""
        return bool(self.data)

    @property
    def sha256(self) -> str:
        """The hash of what left."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def value(self) -> Any:
        """What the file holds."""
        return states.decode(self.data)

    @property
    def reply(self) -> Reply:
        """What the file holds, if it is a reply."""
        value = self.value
        assert isinstance(value, Reply), f"{type(value).__name__} instead of a reply"
        return value

    def of_site(self, part: str) -> Tree:
        """What the site sent apart from others as ``part``."""
        return self.reply.gather(part)[self.site]

    def __str__(self) -> str:
        what = f"{len(self.data)} bytes left" if self.left else (self.lost or "nothing to send")
        return f"{self.site} {self.call.kind} {self.call.job} round {self.call.round}: {what}"


def refused(got: Got, about: str = "") -> None:
    """Assert that nothing left, and that the site refused it by decision rather than by failing."""
    assert not got.left, f"left the site: {got}"
    assert got.lost.startswith(("refused", "waits for")), f"not refused: {got}"
    assert about.lower() in got.lost.lower(), f"refused, but says nothing of {about!r}: {got}"


def answered(got: Got) -> Got:
    """Asserts that an honest request was answered, which a test needs before it can say that another was not."""
    assert got.left, f"the honest request was not answered: {got}"
    return got


def nothing_left(server: "HostileServer") -> None:
    """Asserts that every call since the study was approved was refused; names those that were not."""
    left = [str(got) for got in server.loot]
    assert not left, f"{len(left)} answers left: " + "; ".join(left)
    asked = [got for got in server.heard if got.call.kind not in ("hello", "end")]
    assert asked, "nothing was asked, so that nothing was shown"


def nobody_exposed(server: "HostileServer") -> None:
    """Asserts that no site's vector follows from the sums that were opened."""
    found = server.exposed()
    assert not found, "recovered to the bit: " + "; ".join(found)
    assert any(tried.opened for tried in server.sums), "no sum was opened, so that nothing was shown"


@dataclass
class Sum:
    """One attempt at a secure sum.

    Attributes:
        total: The opened sum, shape [size], int32; None where it was not opened.
        roster: The sites of the session. ``alive``: those whose vectors are in the sum.
        problems: Why sites, or the honest half of the protocol, gave nothing, by site.
        number: Under which message, and ``order`` of which run.
    """

    roster: tuple[str, ...]
    alive: tuple[str, ...] = ()
    total: Tensor | None = None
    problems: dict[str, str] = field(default_factory=dict)
    number: int = 0
    order: RunRequest | None = None

    @property
    def opened(self) -> bool:
        """Whether the server has the sum."""
        return self.total is not None


# The server -------------------------------------------------------------------------------------------------------------


class HostileServer:
    """A server that says what it likes to the real agents of ``homes``.

    Attributes:
        loot: Every answer that brought a file. ``heard``: every answer.
        sums: Every secure sum that was tried.
        vectors: What sites put into secure sums, by site, run and message: what no server sees.
    """

    def __init__(self, homes: Mapping[str, SiteFolder], order: RunRequest, approved: bool = True) -> None:
        """Offers ``order`` to every site; if ``approved``, people there read and approve it."""
        self.homes, self.order = dict(homes), order
        self.people = {name: Person(home) for name, home in homes.items()}
        self.loot: list[Got] = []
        self.heard: list[Got] = []
        self.sums: list[Sum] = []
        self.vectors: dict[tuple[str, str, int], Tensor] = {}
        self.number = 0
        self._desks: dict[tuple[str, str], SiteAgent] = {}
        self._requests: dict[str, Request] = {}
        self._last: dict[tuple[str, str], int] = {}
        self.offer(order)
        if approved:
            self.approved(order)

    def approved(self, order: RunRequest, sites: Sequence[str] = ()) -> "HostileServer":
        """Lets people at ``sites``, or everywhere, read and approve ``order``; and checks that it may run there."""
        for name in sites or self.homes:
            if not self.offer(order, [name])[name].lost:
                continue
            self.people[name].reads(order.run)
            self.people[name].approves(order.run)
            hello = self.offer(order, [name])[name]
            assert not hello.lost, f"the honest order may not run: {hello}"
        return self

    def agent(self, site: str) -> SiteAgent:
        """The agent of a site for the present run request."""
        key = (site, self.order.run)
        if key in self._desks and self._desks[key].order.to_json() != self.order.to_json():
            self._desks.pop(key).close()
        if key not in self._desks:
            self._desks[key] = SiteAgent(self.homes[site], self.order)
            self._desks[key].trainer = Inline(self.homes[site], self.order.run)  # type: ignore[assignment]
        return self._desks[key]

    def restart(self, site: str) -> None:
        """The site's machine reboots."""
        for key in [key for key in self._desks if key[0] == site]:
            self._desks.pop(key).close()

    def close(self) -> None:
        """Ends every agent."""
        for site in self.homes:
            self.restart(site)

    # Asking -------------------------------------------------------------------------------------------------------------

    def offer(self, order: RunRequest, sites: Sequence[str] = ()) -> dict[str, Got]:
        """Begins a job with ``order`` at ``sites``, or everywhere, and greets; from now on it is the present run request."""
        self.order = order
        return {name: self.call(name, "hello") for name in sites or self.homes}

    @property
    def request(self) -> Request:
        """What an honest server asks first under the present run request."""
        if self.order.hash not in self._requests:
            plan = self.order.build_plan()
            method = plan.build_method()
            asked = method.request(method.init(plan.build_task().first(plan.seed)))
            assert asked is not None
            self._requests[self.order.hash] = asked
        return self._requests[self.order.hash]

    @property
    def model(self) -> Tree:
        """The first model of the present run request."""
        return self.order.build_plan().build_task().first(self.order.build_plan().seed)

    def moved(self, by: float) -> Tree:
        """The first model with ``by`` added to each number: another content, of the same form."""
        return {name: leaf + by if leaf.is_floating_point() else leaf for name, leaf in self.model.items()}

    def ask(
        self,
        site: str,
        job: str | None = None,
        model: Tree | None = None,
        *,
        round: int = 0,
        secure: bool | None = None,
        trees: Trees | None = None,
        **call: Any,
    ) -> Got:
        """Asks ``site`` for ``job``.

        Args:
            job: Any text; that of the first honest request by default.
            model: The parameters; the first ones by default.
            secure: Whether the reply is for a secure sum; as in the honest request by default, and not for scores.
            trees: All that is sent, instead of the honest request's with another model.
            call: Fields of the call, such as ``number``, ``after``, ``confirmed``, ``keep``, ``kind`` or ``stage``.
        """
        honest = self.request
        job = honest.job if job is None else job
        evaluates = job.partition("/")[0] in ("score", "predict", "explain", "show")
        sent = dict(honest.trees if trees is None else trees)
        if model is not None:
            sent["params"] = model
        asked = replace(
            honest,
            round=round,
            job=job,
            trees=sent,
            secure=(honest.secure and not evaluates) if secure is None else secure,
        )
        key = (site, self.order.run)
        given = {"kind": "do", "after": self._last.get(key, 0), **call}
        got = self.call(site, value=asked, round=round, job=job, **given)
        if got.left and got.call.kind == "do":
            self._last[key] = got.call.number
            if asked.secure:
                self._look_into(got)
        return got

    def call(self, site: str, kind: str, value: Any = None, *, number: int | None = None, **changes: Any) -> Got:
        """Make one call of any kind with any fields; ``value`` is its file."""
        agent = self.agent(site)
        if number is None:
            self.number += 1
            number = self.number
        size, sha256, body = 0, "", None
        if value is not None:
            path = agent.memory.folder / "received"
            size, sha256 = tensor_file.write(path, value, durable=False)
            body = take_in(agent.memory, path, number)
        given = {
            "version": VERSION,
            "run": self.order.run,
            "number": number,
            "site": site,
            "size": size,
            "sha256": sha256,
            "kind": kind,
            "order": self.order.hash,
            **changes,
        }
        call = Call(**{name: given.get(name, nothing) for name, nothing in _nothing().items()})
        call = Call.from_json(call.to_json())
        answer, file = agent.answer(call, body)
        got = Got(call, self.order, Answer.from_json(answer.to_json()), file.read_bytes() if file else b"")
        self.heard.append(got)
        if got.left:
            self.loot.append(got)
        return got

    def everyone(self, job: str | None = None, sites: Sequence[str] = (), **how: Any) -> dict[str, Got]:
        """Asks all sites of the present run request the same, in one message."""
        self.number += 1
        return {name: self.ask(name, job, number=self.number, **how) for name in sites or self.order.plan["sites"]}

    def _look_into(self, got: Got) -> None:
        """Records what the site is about to add to a sum, from its own disk."""
        folder = self.homes[got.site].memory(self.order.run)
        path = folder / f"{got.call.number}.reply"
        if not path.exists():
            path = max(folder.glob("*.reply"), key=lambda p: p.stat().st_mtime_ns)
        self.vectors[got.site, self.order.run, got.call.number] = vector_of(states.decode(path.read_bytes())).clone()

    # Secure sums --------------------------------------------------------------------------------------------------------

    def secure_sum(
        self,
        job: str | None = None,
        roster: Sequence[str] = (),
        threshold: int | None = None,
        *,
        round: int = 0,
        leave_out: Sequence[str] = (),
        alive: Mapping[str, Sequence[str]] | None = None,
        order_of_stages: Sequence[str] = STAGES,
        twist: Callable[[str, dict[str, Any]], dict[str, Any]] | None = None,
        model: Tree | None = None,
        trees: Trees | None = None,
        **session: Any,
    ) -> Sum:
        """Asks for ``job`` and runs a secure sum of the replies.

        Args:
            roster: Which sites; all by default. ``threshold``: the session's; two thirds by default.
            leave_out: Sites whose masked vector is not asked for.
            alive: The false list of arrived sites sent to each site.
            order_of_stages: The stages that are requested, in this order. One that comes out of order is asked with what
                was gathered until then.
            twist: May change what is sent in a stage: from the stage and the bodies by site.
            session: Fields of the session to change, such as ``round`` or ``identities``.
        """
        names = tuple(sorted(roster or self.order.plan["sites"]))
        tried = Sum(names, order=self.order)
        self.sums.append(tried)
        replies = self.everyone(job, names, round=round, model=model, trees=trees)
        number = tried.number = self.number
        tried.problems |= {name: got.lost for name, got in replies.items() if not got.left}
        if tried.problems:
            return tried
        layout = replies[names[0]].value
        size = sum(numbers_in(leaf) for tags in layout.values() for leaf in tags.values())
        given = {
            "id": os.urandom(16).hex(),
            "round": round,
            "size": size,
            "threshold": threshold or default_threshold(len(names)),
            "identities": {name: self.order.identities.get(name, "") for name in names},
            **session,
        }
        try:
            self._open(
                tried,
                session_of(**given),
                replies[names[0]].call.job,
                round,
                number,
                leave_out,
                alive,
                order_of_stages,
                twist,
            )
        except ProtocolError as error:
            tried.problems.setdefault("server", str(error))
        return tried

    def _open(
        self,
        tried: Sum,
        session: Session,
        job: str,
        round: int,
        number: int,
        leave_out: Sequence[str],
        alive: Mapping[str, Sequence[str]] | None,
        order_of_stages: Sequence[str],
        twist: Callable[[str, dict[str, Any]], dict[str, Any]] | None,
    ) -> None:
        server = SecureServer(session)
        bodies: dict[str, Any] = dict.fromkeys(tried.roster, session)
        for stage in order_of_stages:
            if stage == "mask":
                bodies = {name: body for name, body in bodies.items() if name not in leave_out}
            bodies = twist(stage, bodies) if twist else bodies
            heard = []
            for name, body in bodies.items():
                got = self.call(name, "secure", body, job=job, round=round, stage=stage, number=number)
                if got.left:
                    heard.append(got.value)
                else:
                    tried.problems[name] = f"{stage}: {got.lost}"
            match stage:
                case "advertise":
                    adverts = server.adverts(heard)
                    bodies = dict.fromkeys([a.site for a in adverts], adverts)
                case "share":
                    bodies = dict(server.shares(heard))
                case "mask":
                    tried.alive = server.masked(heard)
                    bodies = {name: tuple((alive or {}).get(name, tried.alive)) for name in tried.alive}
                case "agree":
                    agreed = server.agreed(heard)
                    bodies = dict.fromkeys([a.site for a in agreed], agreed)
                case "reveal":
                    tried.total = server.reveals(heard).clone()

    def exposed(self) -> list[str]:
        """The sites whose own vector follows, to the bit, from two sums that were opened: a sentence each."""
        opened = [s for s in self.sums if s.total is not None]
        found = []
        for i, one in enumerate(opened):
            for other in opened[:i]:
                if one.total.shape != other.total.shape:  # type: ignore[union-attr]
                    continue
                difference = one.total - other.total  # type: ignore[operator]
                for (site, *_), vector in self.vectors.items():
                    same = vector.shape == difference.shape and bool(vector.any())
                    if same and (torch.equal(difference, vector) or torch.equal(-difference, vector)):
                        found.append(
                            f"{site}: the sum over {', '.join(one.alive)} less that over {', '.join(other.alive)}"
                        )
        return sorted(set(found))

    # What was spent and written -------------------------------------------------------------------------------------------

    def journal(self, site: str) -> list[dict[str, Any]]:
        """The entries of a site's journal, without checking their chain."""
        path = self.homes[site].journal
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@cache
def _nothing() -> dict[str, Any]:
    """The fields of a call, each empty."""
    hints = get_type_hints(Call)
    return {f.name: hints[f.name]() for f in fields(Call)}


def session_of(**given: Any) -> Session:
    """A session with any fields, also those that an honest end would refuse to write."""
    session = object.__new__(Session)
    for name, value in given.items():
        object.__setattr__(session, name, value)
    return session


def numbers_in(tag: Tensor) -> int:
    """Return the number of values that a layout's tag describes: its first axis is empty, the others are the shape."""
    count = 1
    for side in tag.shape[1:]:
        count *= side
    return count


_watched: list[tuple[Path, list[Path]]] = []
_hooked = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watched and isinstance(arguments[0], str | bytes | os.PathLike):
        path = Path(os.fsdecode(arguments[0])).absolute()
        for folder, found in _watched:
            if path.is_relative_to(folder):
                found.append(path)


@contextmanager
def opened_in(folder: Path) -> Iterator[list[Path]]:
    """The files below ``folder`` that this process opens meanwhile, by whatever way."""
    import sys

    global _hooked
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    found: list[Path] = []
    _watched.append((folder.absolute(), found))
    try:
        yield found
    finally:
        _watched.remove((folder.absolute(), found))
