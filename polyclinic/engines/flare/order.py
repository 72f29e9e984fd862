"""An order: a plan, and how it is to be run between hospitals. Plain data: people can read, compare and refuse it.

Nothing here needs PyTorch, so that a site can hash an order before it builds anything of it.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyclinic.engines.flare.homes import BadHome, name

if TYPE_CHECKING:
    from polyclinic.engines.plan import Plan

MAX_ORDER = 2**18
COMPUTES = ("core", "tasks", "methods", "transforms", "data", "engines")


class BadOrder(ValueError):
    """An order that is not one. The message says which field and why."""


@dataclass(frozen=True)
class Order:
    """What the server wants to run.

    Attributes:
        run: The run's name. A run is ordered once; the same study again is another run, for it is another exposure.
        plan: The fields of ``engines.plan.Plan``.
        mode: ``rounds``, in lock-step; or ``buffered``, without waiting for everyone.
        cohort: How many sites a round asks; all by default.
        min_replies: How many usable replies an update needs.
        deadline: Seconds after which a site that has not answered is lost for a round.
        buffer: In buffered mode, how many answers one update takes. ``passes``: how often each site is asked.
        score_every: After every how many rounds sites score the model on their validation data; 0 for never.
        test: The job at the end, ``score/test`` or ``predict/test``; none where empty.
        identities: The sites' public keys for secure sums, by name.
        data: What sites are to do to their data before: the ``[data]`` table of the study, without where it lies.
        patience: Seconds to wait for sites that are away, or for people who have not yet approved.
    """

    run: str
    plan: dict[str, Any]
    mode: str = "rounds"
    cohort: int | None = None
    min_replies: int = 1
    deadline: float | None = None
    buffer: int = 1
    passes: int | None = None
    score_every: int = 0
    test: str = ""
    identities: dict[str, str] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    patience: float = 86400.0

    def to_json(self) -> str:
        """The order as canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Order":
        """The order in ``text``.

        Raises:
            BadOrder: Where it is not one.
        """
        if len(text) > MAX_ORDER:
            raise BadOrder(f"an order has at most {MAX_ORDER} characters")
        try:
            given = json.loads(text, parse_constant=_no_constant)
            return cls(**_checked(given))
        except (ValueError, RecursionError, TypeError) as error:
            raise error if isinstance(error, BadOrder) else BadOrder(str(error)) from None

    def build_plan(self) -> "Plan":
        """The plan, as an object.

        Raises:
            BadOrder: Where the plan is not one.
        """
        from polyclinic.engines.plan import Plan

        try:
            return Plan.from_json(json.dumps(self.plan))
        except (ValueError, TypeError) as error:
            raise BadOrder(f"the plan: {error}") from None

    @property
    def hash(self) -> str:
        """SHA-256 of the order, which names it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def method_hash(self) -> str:
        """SHA-256 of what runs at a site whenever this method runs: method, options, transforms, task, training, code.

        Not of the run's name, its sites, rounds and seed. A policy that approves it approves every such run.
        """
        same = {key: value for key, value in self.plan.items() if key not in ("sites", "rounds", "seed")}
        text = json.dumps({"plan": same, "data": self.data, "code": code_hash()}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _checked(given: Any) -> dict[str, Any]:
    """The fields of an order, if they are right."""
    if not isinstance(given, dict):
        raise BadOrder("an order is a table of fields")
    known = {f.name for f in fields(Order)}
    if odd := sorted(given.keys() - known):
        raise BadOrder(f"an order has no field {odd[0][:40]!r}")
    if missing := [key for key in ("run", "plan") if key not in given]:
        raise BadOrder(f"an order needs the field {missing[0]!r}")
    try:
        name(given["run"], "a run's name")
    except BadHome as error:
        raise BadOrder(str(error)) from None
    for key in ("plan", "data", "identities"):
        if not isinstance(given.get(key, {}), dict):
            raise BadOrder(f"the field {key!r} is a table")
    whole = {"cohort": True, "passes": True, "min_replies": False, "buffer": False, "score_every": False}
    for key, optional in whole.items():
        value, least = given.get(key, 1), 0 if key == "score_every" else 1
        if not (optional and value is None) and (type(value) is not int or not least <= value < 2**31):
            raise BadOrder(f"the field {key!r} is a whole number of at least {least}")
    for key, optional in (("deadline", True), ("patience", False)):
        value = given.get(key, 1.0)
        if not (optional and value is None) and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9
        ):
            raise BadOrder(f"the field {key!r} is a number of seconds above 0")
    if given.get("mode", "rounds") not in ("rounds", "buffered"):
        raise BadOrder(f"the field 'mode' is rounds or buffered, not {str(given['mode'])[:20]!r}")
    if given.get("test", "") not in ("", "score/test", "predict/test"):
        raise BadOrder(f"the field 'test' is score/test, predict/test or empty, not {str(given['test'])[:20]!r}")
    return given


def _no_constant(text: str) -> Any:
    raise BadOrder(f"{text} is no number here")


@cache
def code_hash() -> str:
    """SHA-256 of the source code that is installed here and computes, sends or checks: other bytes, another hash."""
    package = Path(__file__).parents[2]
    total = hashlib.sha256()
    for part in COMPUTES:
        for path in sorted((package / part).rglob("*.py")):
            content = path.read_bytes()
            total.update(f"{path.relative_to(package).as_posix()}\n{len(content)}\n".encode() + content)
    return total.hexdigest()
