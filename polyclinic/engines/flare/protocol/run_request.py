"""An order: a plan, and how it is to be run between hospitals. Plain data: people can read, compare and refuse it.

Nothing here needs PyTorch, so that a site can hash an order before it builds anything of it.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyclinic.core.syntax_hash import combined, hash_of_source
from polyclinic.engines.flare.protocol.paths import SetupError, name
from polyclinic.errors import ConfigError
from polyclinic.methods.plugins import Package, methods_in, packages_of

if TYPE_CHECKING:
    from polyclinic.engines.plan import Plan

MAX_ORDER = 2**18
LABEL = re.compile(r"([a-z0-9][a-z0-9.+-]{0,40})?")
OF_DATA = ("inputs", "outputs")
PLACEHOLDER: Mapping[str, Any] = {"inputs": [1, 16, 16], "outputs": 2}
"""Stands in for what only the sites' data can say, to see whether a method can be built at all."""
COMPUTES = ("core", "learning", "methods", "privacy", "compression", "secure_aggregation", "attacks", "data", "engines")


class InvalidRunRequest(ConfigError):
    """An order that is not one. The message says which field and why."""


@dataclass(frozen=True)
class RunRequest:
    """What the server wants to run.

    Attributes:
        run: The run's name. A run is ordered once; the same study again is another run, for it is another exposure.
        plan: The fields of ``engines.plan.Plan``.
        mode: ``rounds``, in lock-step; ``buffered``, without waiting for everyone; or ``survey``, which trains nothing
            and asks each site what its data are.
        sites_per_round: How many sites a round asks; all by default.
        min_replies: How many usable replies an update needs.
        deadline: Seconds after which a site that has not answered is lost for a round, a survey, or scores. What the
            coordinator queues always has one: that of the study, or ``answer_within`` of server.toml.
        buffer: In buffered mode, how many answers one update takes. ``passes``: how often each site is asked.
        score_every: After every how many rounds sites score the model on their validation data; 0 for never.
        test: The job at the end, ``score/test`` or ``predict/test``; none where empty.
        identities: The sites' public keys for secure sums, by name.
        data: What sites are to do to their data before: the ``[data]`` table of the study, without where it lies.
        patience: Seconds to wait for sites that are away, or for people who have not yet approved.
        label: What records call the method; its name where empty.
        external: Sites that nobody trains on, and that are scored like the others.
        best: Which round's model is tested: ``{"metric": "auc", "higher": True}``, by its mean over the sites that
            train; the last round's where empty.
        study: The study that the run is part of: ``name``, ``hash`` and ``arms``, each with ``label``, ``plan`` without
            what only the sites' data can say, and ``external`` where it has such sites. A person approves them
            together.
    """

    run: str
    plan: dict[str, Any]
    mode: str = "rounds"
    sites_per_round: int | None = None
    min_replies: int = 1
    deadline: float | None = None
    buffer: int = 1
    passes: int | None = None
    score_every: int = 0
    test: str = ""
    identities: dict[str, str] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    patience: float = 86400.0
    label: str = ""
    external: tuple[str, ...] = ()
    best: dict[str, Any] = field(default_factory=dict)
    study: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The order as canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "RunRequest":
        """The order in ``text``.

        Raises:
            InvalidRunRequest: Where it is not one.
        """
        if len(text) > MAX_ORDER:
            raise InvalidRunRequest(f"an order has at most {MAX_ORDER} characters")
        try:
            given = json.loads(text, parse_constant=_no_constant)
            return cls(**_checked(given))
        except (ValueError, RecursionError, TypeError) as error:
            raise error if isinstance(error, InvalidRunRequest) else InvalidRunRequest(str(error)) from None

    def build_plan(self) -> "Plan":
        """The plan, as an object.

        Raises:
            InvalidRunRequest: Where the plan is not one.
        """
        from polyclinic.engines.plan import Plan

        try:
            return Plan.from_json(json.dumps(self.plan))
        except (ValueError, TypeError) as error:
            raise InvalidRunRequest(f"the plan: {error}") from None

    @property
    def everyone(self) -> tuple[str, ...]:
        """The sites that train and those that are only scored."""
        return (*self.plan["sites"], *self.external)

    @property
    def rehearsal(self) -> bool:
        """Whether sites train on imaginary data, and no file of a hospital is read."""
        return self.data.get("rehearsal") is True

    @property
    def arms(self) -> list[dict[str, Any]]:
        """The arms of the study that this is part of; none where it is part of none."""
        found: list[dict[str, Any]] = self.study.get("arms", [])
        return found

    @property
    def arm(self) -> dict[str, Any] | None:
        """The arm of the study that this run is, if it is one."""
        return next((arm for arm in self.arms if self.mode != "survey" and self._is(arm)), None)

    @property
    def of_study(self) -> bool:
        """Whether this is a part of the study that it names, and nothing besides."""
        if self.mode != "survey":
            return self.arm is not None
        sites = dict.fromkeys(site for arm in self.arms for site in arm["plan"].get("sites", ()))
        outside = {site for arm in self.arms for site in arm.get("external", ())}
        asked = (self.plan, self.label, set(self.external))
        return bool(self.study) and asked == (survey_plan(list(sites)), "", outside)

    @property
    def study_key(self) -> str:
        """SHA-256 of what all parts of one study share; empty for a run that is not part of a study."""
        if not self.of_study:
            return ""
        own: dict[str, Any] = {"run": "", "plan": {}, "label": "", "external": ()}
        common = replace(self, **own, mode=self.mode.replace("survey", "rounds"))
        return common.hash

    @property
    def part(self) -> str:
        """Which part of its study this is: ``survey``, or a hash of the arm. One approval covers each part once."""
        return "survey" if self.mode == "survey" else _digest(self.arm)

    @property
    def filled(self) -> tuple[str, ...]:
        """What the plan says and its arm did not, because only the sites' data can say it."""
        arm = self.arm
        return tuple(key for key in OF_DATA if key not in arm["plan"]) if arm else ()

    @property
    def packages(self) -> tuple[Package, ...]:
        """The installed packages that provide the methods that this order or its study names, as they are now."""
        plans = [self.plan, *(arm["plan"] for arm in self.arms)]
        return packages_of({method for plan in plans for method in methods_in(plan)})

    @property
    def hash(self) -> str:
        """SHA-256 of the order, which names it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def method_hash(self) -> str:
        """SHA-256 of what runs at a site whenever this method runs: method, options, transforms, task, training, code.

        Code is Polyclinic's, and that of the packages that provide the method. Not of the run's name, its sites, rounds
        and seed. A policy that approves it approves every such run.
        """
        same = {key: value for key, value in self.plan.items() if key not in ("sites", "rounds", "seed")}
        packages = packages_of(methods_in(self.plan))
        return _digest({"plan": same, "data": self.data, "code": code_hash(), "packages": packages})

    def _is(self, arm: Mapping[str, Any]) -> bool:
        return (
            _fills(self.plan, arm["plan"])
            and self.label == arm["label"]
            and self.external == tuple(arm.get("external", ()))
        )


def survey_plan(sites: Sequence[str]) -> dict[str, Any]:
    """The plan of a survey: a shape that holds nothing, for nothing is trained."""
    return {
        "kind": "classification",
        "network": "mlp",
        "inputs": [1],
        "outputs": 2,
        "method": "fedavg",
        "sites": list(sites),
        "rounds": 1,
    }


def _fills(plan: Mapping[str, Any], arm: Mapping[str, Any]) -> bool:
    """Whether ``plan`` is ``arm``, and where the arm does not say what an example is, the plan does."""
    return {key: value for key, value in plan.items() if key in arm or key not in OF_DATA} == arm


def _checked(given: Any) -> dict[str, Any]:
    """The fields of an order, if they are right."""
    if not isinstance(given, dict):
        raise InvalidRunRequest("an order is a table of fields")
    known = {f.name for f in fields(RunRequest)}
    if odd := sorted(given.keys() - known):
        raise InvalidRunRequest(
            f"an order has no field {odd[0][:40]!r} here: was it written by another version of polyclinic?"
        )
    if missing := [key for key in ("run", "plan") if key not in given]:
        raise InvalidRunRequest(f"an order needs the field {missing[0]!r}")
    try:
        name(given["run"], "a run's name")
    except SetupError as error:
        raise InvalidRunRequest(str(error)) from None
    for key in ("plan", "data", "identities", "best", "study"):
        if not isinstance(given.get(key, {}), dict):
            raise InvalidRunRequest(f"the field {key!r} is a table")
    given["external"] = _names(given.get("external", ()))
    sites = given["plan"].get("sites", [])
    if not isinstance(sites, list) or not all(isinstance(site, str) for site in sites):
        raise InvalidRunRequest("the plan's field 'sites' is a list of names")
    if both := set(sites) & set(given["external"]):
        raise InvalidRunRequest(f"{sorted(both)[0]!r} both trains and does not (external)")
    if not isinstance(given.get("label", ""), str) or not LABEL.fullmatch(given.get("label", "")):
        raise InvalidRunRequest("the field 'label' is at most 40 small letters, digits, dots, plus signs and hyphens")
    _check_best(given.get("best", {}))
    _check_study(given.get("study", {}))
    whole = {"sites_per_round": True, "passes": True, "min_replies": False, "buffer": False, "score_every": False}
    for key, optional in whole.items():
        value, least = given.get(key, 1), 0 if key == "score_every" else 1
        if not (optional and value is None) and (type(value) is not int or not least <= value < 2**31):
            raise InvalidRunRequest(f"the field {key!r} is a whole number of at least {least}")
    for key, optional in (("deadline", True), ("patience", False)):
        value = given.get(key, 1.0)
        if not (optional and value is None) and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9
        ):
            raise InvalidRunRequest(f"the field {key!r} is a number of seconds above 0")
    if given.get("mode", "rounds") not in ("rounds", "buffered", "survey"):
        raise InvalidRunRequest(f"the field 'mode' is rounds, buffered or survey, not {str(given['mode'])[:20]!r}")
    if given["external"] and given.get("mode") == "buffered":
        raise InvalidRunRequest("in buffered mode every site trains: leave 'external' out")
    if given.get("test", "") not in ("", "score/test", "predict/test"):
        raise InvalidRunRequest(
            f"the field 'test' is score/test, predict/test or empty, not {str(given['test'])[:20]!r}"
        )
    return given


def _names(given: Any) -> tuple[str, ...]:
    if not isinstance(given, list | tuple):
        raise InvalidRunRequest("the field 'external' is a list of names, and so are an arm's sites")
    try:
        return tuple(name(site) for site in given)
    except SetupError as error:
        raise InvalidRunRequest(str(error)) from None


def _check_best(best: Mapping[str, Any]) -> None:
    if best and (best.keys() != {"metric", "higher"} or type(best["higher"]) is not bool or not _text(best["metric"])):
        raise InvalidRunRequest("the field 'best' names a metric and whether higher is better")


def _check_study(study: Mapping[str, Any]) -> None:
    if not study:
        return
    arms = study.get("arms")
    if study.keys() != {"name", "hash", "arms"} or not _text(study["hash"]) or not isinstance(arms, list):
        raise InvalidRunRequest("the field 'study' holds a name, a hash and arms")
    try:
        name(study["name"], "a study's name")
    except SetupError as error:
        raise InvalidRunRequest(str(error)) from None
    for arm in arms:
        if not isinstance(arm, dict) or arm.keys() - {"external"} != {"label", "plan"}:
            raise InvalidRunRequest(
                "each arm of a study holds a label and a plan, and external sites where it has some"
            )
        if not isinstance(arm["plan"], dict):
            raise InvalidRunRequest("an arm's plan is a table")
        for names in (arm.get("external", ()), arm["plan"].get("sites", ())):
            _names(names)
        if not isinstance(arm["label"], str) or not LABEL.fullmatch(arm["label"]) or not arm["label"]:
            raise InvalidRunRequest("an arm's label is not one")
        if not isinstance(arm["plan"].get("method"), str):
            raise InvalidRunRequest("an arm's plan names no method")


def _text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 100 and value.isprintable()


def _digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of ``value``."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _no_constant(text: str) -> Any:
    raise InvalidRunRequest(f"{text} is no number here")


@cache
def code_hash() -> str:
    """SHA-256 of Polyclinic's code as it was when this process first asked: the code that this process runs.

    A file that is changed on the disk afterwards changes ``code_on_disk``, and not what runs here.
    """
    return code_on_disk()


def code_on_disk() -> str:
    """SHA-256 of the source code that is installed here now and computes, sends or checks.

    It covers what runs, and neither names and places of files nor comments and docstrings: see ``core.syntax_hash``.
    """
    package = Path(__file__).parents[3]
    files = [path for part in COMPUTES for path in sorted((package / part).rglob("*.py"))]
    stats = [(str(path), path.stat()) for path in files]
    return combined(_hash_of(path, stat.st_ctime_ns, stat.st_size) for path, stat in stats)


@lru_cache(maxsize=4096)
def _hash_of(path: str, ctime_ns: int, size: int) -> str:
    """The hash of one file, which is read again only when it was written since."""
    return hash_of_source(Path(path).read_bytes())
