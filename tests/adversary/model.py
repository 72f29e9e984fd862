"""What a site may release, derived from the guarantees and not from the code: a small reference model.

The guarantees: nothing leaves that no person or policy allowed; only what the schedule of the approved order holds, each
place once and for one model; nothing that the site's policy forbids, when it leaves; a budget pays for every release;
and no two opened sums of one content differ by fewer sites than the minimum.
"""

import hashlib
import math
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

from scipy.optimize import brentq
from scipy.stats import norm

from polyclinic.core.aggregates import Reply
from polyclinic.engines.flare.protocol.run_request import RunRequest
from tests.adversary.server import Got, Sum

EVALUATIONS = ("score", "predict", "explain", "show")
SIZES = {"inputs": [4], "outputs": 2}


@dataclass(frozen=True)
class Policy:
    """The parts of a policy file that the model knows."""

    never: tuple[str, ...]
    gather: tuple[str, ...]
    secure: bool
    min_sites: int
    min_patients: int
    most_bytes: float
    automatically: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> "Policy":
        """The policy in the file ``text``."""
        table = tomllib.loads(text)
        allow, require, limits = table["allow"], table["require"], table["limits"]
        return cls(
            tuple(allow["never"]),
            tuple(allow["gather"]),
            require["secure"],
            require["min_sites"],
            limits["min_patients"],
            limits["megabytes_per_round"] * 1e6,
            tuple(table["approve"]["automatically"]),
        )


def in_schedule(order: RunRequest, job: str, round: int) -> bool:
    """Whether the run request, once approved, has this request: all of FedAvg's and FedProx's, and the scores it names."""
    rounds = int(order.plan["rounds"])
    after = 1 <= round <= rounds
    match job:
        case "describe":
            return order.mode == "survey" and round == 0
        case "train":
            return order.mode != "survey" and 0 <= round < rounds
        case "score/val":
            return order.score_every > 0 and after
        case "score/test":
            return bool(order.test) and after
        case "predict/test" | "predict/val":
            return order.test == "predict/test" and after
    return False


def part_of(approved: RunRequest, other: RunRequest) -> bool:
    """Whether who approved one order approved the other: another arm of the same study, and nothing else differs."""
    if not approved.study or approved.study != other.study:
        return False
    rules = [f.name for f in fields(RunRequest) if f.name not in ("run", "plan", "label", "mode", "study")]
    if any(getattr(approved, rule) != getattr(other, rule) for rule in rules):
        return False
    if other.mode == "survey":
        return True
    filled = {key: other.plan.get(key) for key in SIZES}
    named = {key: value for key, value in other.plan.items() if key not in SIZES}
    return filled == SIZES and any(arm == {"label": other.label, "plan": named} for arm in other.study["arms"])


@dataclass
class SiteModel:
    """What one site has promised, and what left it so far.

    Attributes:
        patients: How many patients it has, by role.
        policy: Its policy, now.
        shown: The orders that the person last saw under a name. ``approved``: those approved after they were shown.
        contents: What was answered, by run, round and job: hashes of requests. ``models``: of the models, by run and round.
        arms: Which run took a method run of a study. ``tested``: which round was tested, by run.
        sizes: The bytes of tensors that left, by run and round, and by content.
        rosters: Over which sites sums of one content were opened.
    """

    name: str
    patients: dict[str, int]
    policy: Policy
    shown: dict[str, list[RunRequest]] = field(default_factory=dict)
    approved: dict[str, RunRequest] = field(default_factory=dict)
    contents: dict[tuple[str, int, str], set[str]] = field(default_factory=dict)
    models: dict[tuple[str, int], set[str]] = field(default_factory=dict)
    arms: dict[tuple[str, str], str] = field(default_factory=dict)
    tested: dict[str, int] = field(default_factory=dict)
    sizes: dict[tuple[str, int], dict[str, int]] = field(default_factory=dict)
    rosters: dict[bytes, set[tuple[str, ...]]] = field(default_factory=dict)

    def sees(self, name: str, text: str, orders: list[RunRequest]) -> None:
        """Let the person read ``text``: the run requests whose hashes it contains."""
        self.shown[name] = [order for order in orders if order.hash[:16] in text]

    def approves(self, name: str) -> None:
        """The person approved what was shown under ``name``."""
        self.approved |= {order.hash: order for order in self.shown.get(name, [])}

    def refuses(self, name: str) -> None:
        """The person refused everything called ``name``, and so every part of the same study."""
        gone = [o for o in self.approved.values() if name in (o.run, o.study.get("name"))]
        self.approved = {
            key: o for key, o in self.approved.items() if o not in gone and not any(part_of(g, o) for g in gone)
        }

    def forgets(self, run: str) -> None:
        """The person lets a run begin anew."""
        self.contents = {key: value for key, value in self.contents.items() if key[0] != run}
        self.models = {key: value for key, value in self.models.items() if key[0] != run}
        self.sizes = {key: value for key, value in self.sizes.items() if key[0] != run}
        self.tested.pop(run, None)

    def allowed(self, order: RunRequest) -> bool:
        """Whether a person or the policy allowed ``order``, now."""
        if order.hash in self.approved or order.method_hash in self.policy.automatically:
            return True
        arm = self.arms.get((order.study.get("hash", ""), order.label))
        return arm in (None, order.run) and any(part_of(known, order) for known in self.approved.values())

    def wrong(self, got: Got) -> Iterator[str]:
        """Why a file that left must not have left: a sentence each. What left is counted from now on."""
        call, order = got.call, got.order
        if call.kind in ("hello", "end"):
            yield "a greeting has no file"
            return
        if not self.allowed(order):
            yield f"no person approved this order at {self.name} ({order.run}, {order.plan['rounds']} rounds, {order.label})"
        if order.study and order.mode != "survey":
            self.arms.setdefault((order.study["hash"], order.label), order.run)
        if call.kind == "secure":
            return
        if not in_schedule(order, call.job, call.round):
            yield f"the job {call.job!r} in round {call.round} is not in the schedule of {order.run}"
        yield from self._against_policy(got)
        yield from self._again(got)

    def _against_policy(self, got: Got) -> Iterator[str]:
        policy, job = self.policy, got.call.job
        verb, _, role = job.partition("/")
        scored = verb in EVALUATIONS
        if any(fnmatchcase(job, pattern) for pattern in policy.never):
            yield f"the policy never lets {job!r} run"
        if (count := self.patients.get(role if scored else "train", 0)) < policy.min_patients:
            yield f"{count} patients, and the policy asks for {policy.min_patients}"
        value = got.value
        numbers = isinstance(value, Reply)
        through_sum = any(step["name"] == "secure-sum" for step in got.order.plan.get("send", ()))
        if numbers and not scored and job != "describe" and (policy.secure or through_sum):
            yield "numbers left outside of a secure sum"
        if numbers:
            for part, stat in value.parts.items():
                if hasattr(stat, "items") and not any(fnmatchcase(part, pattern) for pattern in policy.gather):
                    yield f"{part!r} left apart from other sites'"
            sizes = self.sizes.setdefault((got.order.run, got.call.round), {})
            sizes[got.call.sha256] = value.nbytes
            if (total := sum(sizes.values())) > policy.most_bytes:
                yield f"{total} bytes of numbers left in round {got.call.round}, and the policy allows {policy.most_bytes:g}"

    def _again(self, got: Got) -> Iterator[str]:
        call, run = got.call, got.order.run
        contents = self.contents.setdefault((run, call.round, call.job), set())
        new = call.sha256 not in contents
        contents.add(call.sha256)
        if len(contents) > 1:
            yield f"{len(contents)} different requests for {call.job!r} in round {call.round} were answered"
        if new and call.job == "train" and run in self.tested:
            yield "it trained after the test was opened"
        if call.job.endswith("/test") and self.tested.setdefault(run, call.round) != call.round:
            yield f"the test was opened for the rounds {self.tested[run]} and {call.round}"

    def model(self, run: str, round: int, params: bytes) -> Iterator[str]:
        """Why a model must not have been answered in ``round``: another one was, there."""
        known = self.models.setdefault((run, round), set())
        known.add(hashlib.sha256(params).hexdigest())
        if len(known) > 1:
            yield f"{len(known)} different models were used in round {round} of {run}"

    def summed(self, tried: Sum, vector: Any) -> Iterator[str]:
        """Why a sum with this site's ``vector`` in it must not have been opened."""
        count, least = len(tried.roster), max(self.policy.min_sites, 3)
        if len(tried.alive) < max(least, -(-2 * count // 3)):
            yield f"a sum over {len(tried.alive)} of {count} sites was opened"
        if not vector.any():
            return
        rosters = self.rosters.setdefault(vector.numpy().tobytes(), set())
        rosters.add(tuple(sorted(tried.alive)))
        for one in rosters:
            for other in rosters:
                if one < other and len(set(one) ^ set(other)) < least:
                    yield f"one content was summed over {', '.join(one)} and over {', '.join(other)}"
        if len(rosters) > 2:
            yield f"one content was summed over {len(rosters)} rosters"


def least_epsilon(releases: int, multiplier: float, delta: float) -> float:
    """The exact ε of ``releases`` Gaussian mechanisms of sensitivity 1: no account may say less.

    Balle and Wang (2018), theorem 8: https://arxiv.org/abs/1805.06530
    """
    if not releases:
        return 0.0
    mu = math.sqrt(releases) / multiplier

    def excess(epsilon: float) -> float:
        first = norm.cdf(mu / 2 - epsilon / mu)
        return float(first - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu)) - delta)

    return 0.0 if excess(0.0) < 0 else float(brentq(excess, 0.0, 1e4))
