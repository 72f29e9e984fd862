"""Random servers against real sites: after each step, nothing may have left that ``model`` does not allow.

Each rule is something that a server does, or a person or a machine at a site. What hypothesis prints of a failure is
the shortest list of such steps that it found, with what came of each.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from polyclinic.core.audit_log import verify
from polyclinic.engines.flare.protocol.run_request import RunRequest
from polyclinic.privacy.ledger import Ledger
from tests.adversary.model import Policy, SiteModel, least_epsilon
from tests.adversary.server import LENIENT, SUM, Got, HostileServer, Sum, houses, secure_order, small_order, study

NAMES = ("site-0", "site-1", "site-2", "site-3")
NOISE, DELTA = 4.0, 1e-3
SHRINKING = 60  # seconds in which a shorter example is looked for, instead of 300
BUDGET = f'\n[privacy]\nepsilon = 2.0\ndelta = {DELTA}\nunit = "site"\n'
HIDDEN = [{"name": "clip", "bound": 1.0}, {"name": "gaussian", "multiplier": NOISE}]
OPEN = LENIENT.replace('never = ["predict/*", "show/*"]', "never = []").replace('"describe"]', '"describe", "predict"]')
POLICIES = {
    "usual": LENIENT,
    "open": OPEN,
    "no scores": LENIENT.replace('never = ["predict/*", "show/*"]', 'never = ["predict/*", "score/*", "show/*"]'),
    "secure": LENIENT.replace("secure = false", "secure = true"),
    "four sites": LENIENT.replace("min_sites = 3", "min_sites = 4"),
    "few bytes": LENIENT.replace("megabytes_per_round = 2000.0", "megabytes_per_round = 0.0001"),
    "many patients": LENIENT.replace("min_patients = 2", "min_patients = 100"),
}
ORDERS = ("plain", "longer", "predicting", "sum", "same sum", "arm", "same arm", "other arm", "big arm", "namesake")
CALLED = ("one", "two", "three", "spots", "s-1", "s-2", "s-3", "s-4", "z-1")
JOBS = (
    "train",
    "train",
    "score/val",
    "score/test",
    "score/train",
    "predict/test",
    "predict/train",
    "train ",
    "describe",
)

site = st.sampled_from(NAMES)
order = st.sampled_from(ORDERS)
job = st.sampled_from(JOBS)
mostly_agreed = st.sampled_from([*["agreed"] * 8, *ORDERS])  # "agreed": what people approved last
round = st.integers(0, 3)
content = st.integers(0, 2)
request = st.fixed_dictionaries(
    {
        "job": job,
        "round": round,
        "content": content,
        "number": st.sampled_from(["next", "next", "same", "far"]),
        "after": st.sampled_from(["last", "last", "start", "unknown"]),
        "confirm": st.booleans(),
        "kind": st.sampled_from(["do", "do", "look"]),
    }
)


def orders(homes: Any, budget: bool) -> dict[str, RunRequest]:
    """Everything that the server may offer, by what it is for."""
    uniform = {"options": {"uniform": True}}
    plan = {**uniform, "uplink": HIDDEN} if budget else {}
    summed = {**uniform, "uplink": [*(HIDDEN if budget else []), SUM]}
    arms = {"uplink": HIDDEN, "options": {"uniform": True}} if budget else {}
    return {
        "plain": small_order("one", NAMES, rounds=2, score_every=1, test="score/test", plan=plan),
        "longer": small_order("one", NAMES, rounds=50, score_every=1, test="score/test", plan=plan),
        "predicting": small_order("one", NAMES, rounds=2, score_every=1, test="predict/test", plan=plan),
        "sum": secure_order(homes, run="two", rounds=2, plan=summed),
        "same sum": secure_order(homes, run="three", rounds=2, plan=summed),
        "arm": study("s-1", arms=arms, plan={"sites": list(NAMES[:3])}),
        "same arm": study("s-2", arms=arms),
        "other arm": study("s-3", arms=arms, label="fedprox"),
        "big arm": study("s-4", arms=arms, label="fedprox", plan={"outputs": 20}),
        "namesake": study("z-1", rounds=40, arms=arms),
    }


def step(**strategies: Any) -> Callable[[Callable[..., None]], Any]:
    """A rule after which everything is checked; so the steps that are printed are those of the server and the
    people.
    """

    def decorate(function: Callable[..., None]) -> Any:
        @wraps(function)
        def run(self: "Sites", **chosen: Any) -> None:
            function(self, **chosen)
            self.check()

        decorated: Any = rule(**strategies)
        return decorated(run)

    return decorate


class Sites(RuleBasedStateMachine):
    """Four sites, a server that does anything, and the people who decide."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="machine-"))
        self.disk = mock.patch.object(os, "fsync", return_value=None)
        self.disk.start()
        self.seen = self.summed = 0
        self.asks: list[dict[str, Any]] = []
        self.released: dict[str, set[str]] = {name: set() for name in NAMES}

    def teardown(self) -> None:
        """Ends the agents and removes what they kept."""
        if hasattr(self, "server"):
            self.server.close()
        self.disk.stop()
        shutil.rmtree(self.root, ignore_errors=True)

    @initialize(budget=st.booleans(), agreed=st.sampled_from(["plain", "plain", "sum", "sum", "arm", "predicting"]))
    def begin(self, budget: bool, agreed: str) -> None:
        """Sites are set up, with a privacy budget or without; people at all of them read and approve one study."""
        self.tail = BUDGET if budget else ""
        self.budget = budget
        homes = houses(self.root, len(NAMES), LENIENT + self.tail)
        self.orders = orders(homes, budget)
        self.server = HostileServer(homes, self.orders["plain"], approved=False)
        self.models = {
            name: SiteModel(name, {"train": 12 + 5 * k, "val": 12, "test": 12, "unlabeled": 12}, Policy.of(LENIENT))
            for k, name in enumerate(NAMES)
        }
        for name in self.orders[agreed].plan["sites"]:
            self._agree(name, agreed)

    # The server ---------------------------------------------------------------------------------------------------------

    @step(site=site, order=order)
    def offer(self, site: str, order: str) -> None:
        """The server offers a study, perhaps under a name that was approved for another."""
        got = self.server.offer(self.orders[order], [site])[site]
        note(f"  -> {got.lost or 'may run'}")

    @step(site=site, order=mostly_agreed, requests=st.lists(request, min_size=1, max_size=5))
    def ask(self, site: str, order: str, requests: list[dict[str, Any]]) -> None:
        """The server asks one site for anything."""
        for one in requests:
            self._ask(site, {"order": self._named(order), **{k: one[k] for k in ("job", "round", "content")}}, one)

    @step(order=mostly_agreed, round=round, content=content)
    def ask_all_to_train(self, order: str, round: int, content: int) -> None:
        """The server asks all sites to train, as an honest one would."""
        for name in self.orders[self._named(order)].plan["sites"]:
            self._ask(name, {"order": self._named(order), "job": "train", "round": round, "content": content})

    @precondition(lambda self: self.asks)
    @step(
        which=st.integers(0, 5),
        changes=st.fixed_dictionaries({}, optional={"job": job, "order": order, "round": round, "content": content}),
        how=request,
    )
    def ask_again(self, which: int, changes: dict[str, Any], how: dict[str, Any]) -> None:
        """The server repeats one of its last requests under another number, perhaps with something changed."""
        earlier = {**self.asks[-1 - which % len(self.asks)], **changes}
        self._ask(earlier.pop("site"), earlier, how)

    @step(
        order=st.sampled_from(["sum", "sum", "same sum"]),
        job=st.sampled_from(["train", "train", "train ", "other"]),
        round=st.integers(0, 1),
        content=st.integers(0, 1),
        without=st.sampled_from(["nobody", "nobody", *NAMES]),
        lower=st.booleans(),
        lost=st.sampled_from(["nobody", "nobody", *NAMES]),
    )
    def add_up(self, order: str, job: str, round: int, content: int, without: str, lower: bool, lost: str) -> None:
        """The server runs a secure sum over a roster and with a threshold of its choice; a site may be left out
        later.
        """
        roster = tuple(name for name in NAMES if name != without)
        self.server.order = self.orders[order]
        tried = self.server.secure_sum(
            job, roster, 3 if lower else None, round=round, model=self.server.moved(0.1 * content), leave_out=[lost]
        )
        note(f"  -> {'opened over ' + ', '.join(tried.alive) if tried.opened else tried.problems}")

    # People and machines at the sites -----------------------------------------------------------------------------------

    @step(site=site, name=st.sampled_from(CALLED))
    def read(self, site: str, name: str) -> None:
        """A person reads what came under a name."""
        self._read(site, name)

    @step(site=site, name=st.sampled_from(CALLED))
    def approve(self, site: str, name: str) -> None:
        """A person approves what was read under a name."""
        self._approve(site, name)

    @step(site=site, order=order)
    def agree(self, site: str, order: str) -> None:
        """A study comes, and a person reads and approves it."""
        self._agree(site, order)

    @step(site=site, first=order, then=order)
    def change_before_approval(self, site: str, first: str, then: str) -> None:
        """A study comes and is read; then another comes; then the person approves what was read."""
        name = self.orders[first].study.get("name") or self.orders[first].run
        self.server.offer(self.orders[first], [site])
        self._read(site, name)
        self.server.offer(self.orders[then], [site])
        self._approve(site, name)

    @step(site=site, name=st.sampled_from(CALLED))
    def refuse(self, site: str, name: str) -> None:
        """A person refuses a study, or takes an approval back."""
        if self.server.people[site].refuses(name):
            self.models[site].refuses(name)

    @step(site=site, which=st.sampled_from([*POLICIES, "automatic"]))
    def change_policy(self, site: str, which: str) -> None:
        """A person edits the policy, which counts from the next message on."""
        plain = self.orders["plain"].method_hash
        text = POLICIES.get(which) or LENIENT.replace("automatically = []", f'automatically = ["{plain}"]')
        self.server.homes[site].policy.write_text(text + self.tail)
        self.models[site].policy = Policy.of(text)

    @step(site=site)
    def restart(self, site: str) -> None:
        """The site's machine reboots."""
        self.server.restart(site)

    @step(site=site, run=st.sampled_from(["one", "two", "s-1"]))
    def forget(self, site: str, run: str) -> None:
        """A person deletes the site's memory of a run, so that it may begin anew."""
        self.server.restart(site)
        if self.server.people[site].forgets(run):
            self.models[site].forgets(run)

    # What must hold -----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Nothing has left that must not have left, no sum shows a site, the budget paid, and journals are whole."""
        wrong = [f"{got}: {why}" for got in self._fresh() for why in self._wrong(got)]
        tried = self.server.sums[self.summed :]
        self.summed += len(tried)
        wrong += [why for one in tried if one.opened for why in self._rosters(one)]
        wrong += self.server.exposed() if tried else []
        wrong += list(self._unpaid())
        for home in self.server.homes.values():
            if home.journal.exists():
                list(verify(home.journal))
        if wrong:
            raise AssertionError("what must not happen:\n  " + "\n  ".join(wrong))

    def _unpaid(self) -> Iterator[str]:
        """Where the ledger counts less than the exact ε of the releases that the server has."""
        for name in NAMES if self.budget else ():
            spent = sum(Ledger(path).spent().epsilon for path in self.server.homes[name].ledgers.glob("*.jsonl"))
            least = least_epsilon(len(self.released[name]), NOISE, DELTA)
            if spent < least * 0.999:
                yield f"{name}: {len(self.released[name])} releases cost {least:.3f}, and {spent:.3f} was spent"

    def _wrong(self, got: Got) -> Iterator[str]:
        """Why a file must not have left: approvals, schedule, policy, one model a round, and journals that name it."""
        yield from self.models[got.site].wrong(got)
        yield from self._model(got)
        yield from self._unwritten(got)

    # Helpers ------------------------------------------------------------------------------------------------------------

    def _agree(self, site: str, order: str) -> None:
        run, self.agreed = self.orders[order].run, order
        self.server.offer(self.orders[order], [site])
        self._read(site, run)
        self._approve(site, run)

    def _read(self, site: str, name: str) -> None:
        self.models[site].sees(name, self.server.people[site].reads(name), list(self.orders.values()))

    def _approve(self, site: str, name: str) -> None:
        good = self.server.people[site].approves(name)
        note(f"  -> {'approved' if good else 'not approved'}")
        if good:
            self.models[site].approves(name)

    def _named(self, order: str) -> str:
        return self.agreed if order == "agreed" else order

    def _ask(self, site: str, what: dict[str, Any], how: Mapping[str, Any] = {}) -> None:
        """One request. ``what``: the content, of which the site's own rules depend; ``how``: the message around it."""
        self.server.order = self.orders[what["order"]]
        self.asks.append({"site": site, **what})
        last = self.server._last.get((site, self.server.order.run), 0)
        numbers = {"next": self.server.number + 1, "same": max(self.server.number, 1), "far": self.server.number + 10}
        number = numbers[how.get("number", "next")]
        after = {"last": last, "start": 0, "unknown": max(last - 1, 0)}[how.get("after", "last")]
        self.server.number = max(self.server.number, number)
        got = self.server.ask(
            site,
            what["job"],
            self.server.moved(0.1 * what["content"]),
            round=what["round"],
            number=number,
            after=min(after, number - 1),
            confirmed=min(after, number - 1) if how.get("confirm") else 0,
            kind=how.get("kind", "do") if what["job"].startswith(("score", "predict")) else "do",
        )
        note(f"  -> {got}")

    def _fresh(self) -> Iterator[Got]:
        """What left since the last time, counted as releases where it holds numbers of training patients."""
        fresh = self.server.loot[self.seen :]
        self.seen += len(fresh)
        for got in fresh:
            if got.call.stage == "mask":
                vector = self.server.vectors.get((got.site, got.order.run, got.call.number))
                if vector is not None:
                    self.released[got.site].add(vector.numpy().tobytes().hex())
            elif got.call.kind == "do" and got.call.job == "train" and type(got.value).__name__ == "Reply":
                self.released[got.site].add(got.sha256)
            yield got

    def _model(self, got: Got) -> Iterator[str]:
        """Why the model that the site was sent must not have been used in its round."""
        asked = next((a for a in reversed(self.asks) if a["site"] == got.site), None)
        if (
            got.call.kind in ("do", "look")
            and asked
            and asked["job"] == got.call.job
            and self.orders[asked["order"]] is got.order
        ):
            yield from self.models[got.site].model(got.order.run, got.call.round, str(asked["content"]).encode())

    def _unwritten(self, got: Got) -> Iterator[str]:
        """Why the site's journal does not say that the file left."""
        entries = self.server.journal(got.site)
        if got.call.kind == "secure":
            named = any(
                (e.get("number"), e.get("stage"), e.get("bytes")) == (got.call.number, got.call.stage, len(got.data))
                for e in entries
            )
        else:
            named = any(e.get("reply") == got.sha256 for e in entries)
        if not named:
            yield "the journal does not name it"

    def _rosters(self, tried: Sum) -> Iterator[str]:
        assert tried.order is not None
        for name in tried.alive:
            vector = self.server.vectors.get((name, tried.order.run, tried.number))
            if vector is not None:
                yield from self.models[name].summed(tried, vector)


QUICK = settings(
    max_examples=15,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)


def run(how: settings) -> None:
    """Runs the machine, and does not look for the shortest example for minutes."""
    with mock.patch("hypothesis.internal.conjecture.engine.MAX_SHRINKING_SECONDS", SHRINKING):
        run_state_machine_as_test(Sites, settings=how)


def test_nothing_leaves_that_the_promises_do_not_allow() -> None:
    """15 random servers of 12 steps."""
    run(QUICK)


@pytest.mark.slow
def test_nothing_leaves_that_the_promises_do_not_allow_at_length() -> None:
    """Many servers, of more steps."""
    run(settings(QUICK, max_examples=150, stateful_step_count=30))
