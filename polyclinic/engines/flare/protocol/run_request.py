"""Run request: a plan and how to run it between hospitals, as plain data that people can read, compare and refuse.

Requires no PyTorch, so that a site can hash a run request before it builds anything from it.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyclinic.core.plugin_packages import Package
from polyclinic.core.syntax_hash import combined
from polyclinic.engines.flare.protocol.paths import SetupError, name
from polyclinic.engines.flare.protocol.source_hashes import hashes_of
from polyclinic.errors import ConfigError
from polyclinic.methods.plugins import packages_in

if TYPE_CHECKING:
    from polyclinic.engines.plan import Plan

MAX_ORDER = 2**18
HASH = re.compile(r"[0-9a-f]{64}")
WEIGHTS_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
LABEL = re.compile(r"([a-z0-9][a-z0-9.+-]{0,40})?")
OF_DATA = ("inputs", "outputs")
PLACEHOLDER: Mapping[str, Any] = {"inputs": [1, 16, 16], "outputs": 2}
"""Values for what only the sites' data determine, used to check that a method can be built."""
COMPUTES = ("core", "learning", "methods", "privacy", "compression", "secure_aggregation", "attacks", "data", "engines")


class InvalidRunRequest(ConfigError):
    """Invalid run request. The message names the field and the reason."""


@dataclass(frozen=True)
class RunRequest:
    """Run that the server requests from the sites.

    Attributes:
        run: Name of the run. A run is requested once; repeating a study is another run, because it discloses data
            again.
        plan: The fields of ``engines.plan.Plan``.
        mode: ``rounds`` (synchronous), ``buffered`` (asynchronous) or ``survey``, which trains nothing and requests
            each site's data description.
        sites_per_round: Number of sites called in a round; all by default.
        min_replies: Number of usable replies that an update needs.
        deadline: Seconds after which a site that has not answered is lost for a round, a survey, or scores. Queued runs
            always have one: that of the study, or ``answer_within`` of server.toml.
        buffer: In buffered mode, number of answers per update. ``passes``: how often each site is called.
        score_every: Number of rounds between two scorings of the model on the sites' validation data; 0 for never.
        test: The job at the end, ``score/test`` or ``predict/test``; empty for none.
        identities: The sites' public keys for secure sums, by name.
        data: Requested preprocessing and split: the ``[data]`` table of the study, without paths.
        patience: Seconds to wait for sites that are away, or for people who have not yet approved.
        label: Name of the method in the records; empty for the method's own.
        external: Sites that are scored like the others but not trained on.
        best: Selection of the tested round: ``{"metric": "auc", "higher": True}``, by its mean over the sites that
            train; empty for the last round.
        study: The study that the run is part of: ``name``, ``hash`` and ``arms`` (its method runs), each with
            ``label``, ``plan`` without what only the sites' data determine, and ``external`` if it has such sites. A
            person approves them together.
        weights: The start weights that the server sends once to sites without them: ``sha256`` and ``bytes`` of the
            file, and ``name``, ``license`` and ``source`` as the server states them; empty if it sends none.
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
    weights: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the run request as canonical JSON."""
        table = asdict(self)
        if not self.weights:  # run requests without them keep their hash
            del table["weights"]
        return json.dumps(table, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "RunRequest":
        """Parse a run request.

        Raises:
            InvalidRunRequest: If ``text`` is not a valid run request.
        """
        if len(text) > MAX_ORDER:
            raise InvalidRunRequest(f"a run request has at most {MAX_ORDER} characters")
        try:
            given = json.loads(text, parse_constant=_no_constant)
            return cls(**_checked(given))
        except (ValueError, RecursionError, TypeError) as error:
            raise error if isinstance(error, InvalidRunRequest) else InvalidRunRequest(str(error)) from None

    def build_plan(self) -> "Plan":
        """Return the plan as an object.

        Raises:
            InvalidRunRequest: If the plan is invalid.
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
        """Whether sites train on synthetic data, without reading any file of a hospital."""
        return self.data.get("rehearsal") is True

    @property
    def arms(self) -> list[dict[str, Any]]:
        """The method runs of the study that this request is part of; empty if it is part of none."""
        arms: list[dict[str, Any]] = self.study.get("arms", [])
        return arms

    @property
    def arm(self) -> dict[str, Any] | None:
        """The method run of the study that this request describes, or None."""
        return next((arm for arm in self.arms if self.mode != "survey" and self._is(arm)), None)

    @property
    def of_study(self) -> bool:
        """Whether this request is exactly a part of the study that it names."""
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
        """Part of the study: ``survey``, or a hash of the method run. One approval covers each part once."""
        return "survey" if self.mode == "survey" else _digest(self.arm)

    @property
    def filled(self) -> tuple[str, ...]:
        """Keys that the plan adds to its method run because only the sites' data determine them."""
        arm = self.arm
        return tuple(key for key in OF_DATA if key not in arm["plan"]) if arm else ()

    @property
    def packages(self) -> tuple[Package, ...]:
        """The installed packages that provide what this request or its study names, in their current versions."""
        return packages_in(self.plan, *(arm["plan"] for arm in self.arms))

    @property
    def hash(self) -> str:
        """SHA-256 of the run request, which identifies it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def method_hash(self) -> str:
        """SHA-256 of what runs at a site whenever this method runs: method, options, transforms, task, training, code.

        Covers the code of Polyclinic and of the packages that provide its parts, but not the run's name, sites, rounds
        and seed. A policy that approves this hash approves every such run.
        """
        same = {key: value for key, value in self.plan.items() if key not in ("sites", "rounds", "seed")}
        packages = packages_in(self.plan)
        return _digest({"plan": same, "data": self.data, "code": code_hash(), "packages": packages})

    def _is(self, arm: Mapping[str, Any]) -> bool:
        return (
            _fills(self.plan, arm["plan"])
            and self.label == arm["label"]
            and self.external == tuple(arm.get("external", ()))
        )


def survey_plan(sites: Sequence[str]) -> dict[str, Any]:
    """Return the plan of a survey, with placeholder shapes because nothing is trained."""
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
    """Return whether ``plan`` equals ``arm`` except for the data-dependent keys that the arm leaves out."""
    return {key: value for key, value in plan.items() if key in arm or key not in OF_DATA} == arm


def _checked(given: Any) -> dict[str, Any]:
    """Return the fields of a run request after validation."""
    if not isinstance(given, dict):
        raise InvalidRunRequest("a run request is a table of fields")
    known = {f.name for f in fields(RunRequest)}
    if odd := sorted(given.keys() - known):
        raise InvalidRunRequest(
            f"a run request has no field {odd[0][:40]!r} here: was it written by another version of polyclinic?"
        )
    if missing := [key for key in ("run", "plan") if key not in given]:
        raise InvalidRunRequest(f"a run request needs the field {missing[0]!r}")
    try:
        name(given["run"], "a run's name")
    except SetupError as error:
        raise InvalidRunRequest(str(error)) from None
    for key in ("plan", "data", "identities", "best", "study", "weights"):
        if not isinstance(given.get(key, {}), dict):
            raise InvalidRunRequest(f"the field {key!r} must be a table")
    given["external"] = _names(given.get("external", ()))
    sites = given["plan"].get("sites", [])
    if not isinstance(sites, list) or not all(isinstance(site, str) for site in sites):
        raise InvalidRunRequest("the plan's field 'sites' must be a list of names")
    if both := set(sites) & set(given["external"]):
        raise InvalidRunRequest(f"{sorted(both)[0]!r} both trains and does not (external)")
    if not isinstance(given.get("label", ""), str) or not LABEL.fullmatch(given.get("label", "")):
        raise InvalidRunRequest(
            "the field 'label' must be at most 40 lowercase letters, digits, dots, plus signs and hyphens"
        )
    _check_best(given.get("best", {}))
    _check_study(given.get("study", {}))
    _check_weights(given.get("weights", {}))
    integers = {"sites_per_round": True, "passes": True, "min_replies": False, "buffer": False, "score_every": False}
    for key, optional in integers.items():
        value, least = given.get(key, 1), 0 if key == "score_every" else 1
        if not (optional and value is None) and (type(value) is not int or not least <= value < 2**31):
            raise InvalidRunRequest(f"the field {key!r} must be an integer of at least {least}")
    for key, optional in (("deadline", True), ("patience", False)):
        value = given.get(key, 1.0)
        if not (optional and value is None) and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9
        ):
            raise InvalidRunRequest(f"the field {key!r} must be a number of seconds above 0")
    if given.get("mode", "rounds") not in ("rounds", "buffered", "survey"):
        raise InvalidRunRequest(f"the field 'mode' must be rounds, buffered or survey, not {str(given['mode'])[:20]!r}")
    if given["external"] and given.get("mode") == "buffered":
        raise InvalidRunRequest("in buffered mode every site trains: leave 'external' out")
    if given.get("test", "") not in ("", "score/test", "predict/test"):
        raise InvalidRunRequest(
            f"the field 'test' must be score/test, predict/test or empty, not {str(given['test'])[:20]!r}"
        )
    return given


def _names(given: Any) -> tuple[str, ...]:
    if not isinstance(given, list | tuple):
        raise InvalidRunRequest("the field 'external' and the sites of each method run must be lists of names")
    try:
        return tuple(name(site) for site in given)
    except SetupError as error:
        raise InvalidRunRequest(str(error)) from None


def _check_best(best: Mapping[str, Any]) -> None:
    if best and (best.keys() != {"metric", "higher"} or type(best["higher"]) is not bool or not _text(best["metric"])):
        raise InvalidRunRequest("the field 'best' must name a metric and whether higher is better")


def _check_study(study: Mapping[str, Any]) -> None:
    if not study:
        return
    arms = study.get("arms")
    if study.keys() != {"name", "hash", "arms"} or not _text(study["hash"]) or not isinstance(arms, list):
        raise InvalidRunRequest("the field 'study' must contain a name, a hash and arms")
    try:
        name(study["name"], "a study's name")
    except SetupError as error:
        raise InvalidRunRequest(str(error)) from None
    for arm in arms:
        if not isinstance(arm, dict) or arm.keys() - {"external"} != {"label", "plan"}:
            raise InvalidRunRequest(
                "each of a study's arms must contain a label and a plan, and external sites if it has any"
            )
        if not isinstance(arm["plan"], dict):
            raise InvalidRunRequest("the plan of each of a study's arms must be a table")
        for names in (arm.get("external", ()), arm["plan"].get("sites", ())):
            _names(names)
        if not isinstance(arm["label"], str) or not LABEL.fullmatch(arm["label"]) or not arm["label"]:
            raise InvalidRunRequest("one of the study's arms has an invalid label")
        if not isinstance(arm["plan"].get("method"), str):
            raise InvalidRunRequest("the plan of one of the study's arms names no method")


def _check_weights(weights: Mapping[str, Any]) -> None:
    if not weights:
        return
    if weights.keys() != {"sha256", "bytes", "name", "license", "source"}:
        raise InvalidRunRequest("the field 'weights' must contain sha256, bytes, name, license and source")
    if not isinstance(weights["sha256"], str) or not HASH.fullmatch(weights["sha256"]):
        raise InvalidRunRequest("the field 'weights': sha256 must be 64 lowercase hexadecimal digits")
    if type(weights["bytes"]) is not int or not 0 < weights["bytes"] < 2**40:
        raise InvalidRunRequest("the field 'weights': bytes must be an integer above 0")
    if not isinstance(weights["name"], str) or not WEIGHTS_NAME.fullmatch(weights["name"]):
        raise InvalidRunRequest(
            "the field 'weights': name must be at most 63 lowercase letters, digits, dots, hyphens and underscores"
        )
    if not _text(weights["license"]) or not (weights["source"] == "" or _text(weights["source"])):
        raise InvalidRunRequest(
            "the field 'weights': license and source must be printable texts of at most 100 characters"
        )


def _text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 100 and value.isprintable()


def _digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of ``value``."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _no_constant(text: str) -> Any:
    raise InvalidRunRequest(f"{text} is not a valid number")


@cache
def code_hash() -> str:
    """SHA-256 of Polyclinic's code at the first call in this process, which is the code that the process runs.

    Later changes of files affect ``code_on_disk`` only.
    """
    return code_on_disk()


def code_on_disk() -> str:
    """Return the SHA-256 of the installed source code that computes, sends or checks.

    Excludes names and places of files, comments and docstrings: see ``core.syntax_hash``.
    """
    package = Path(__file__).parents[3]
    folders = [found for part in COMPUTES for found in os.walk(package / part)]
    files = [f"{folder}/{name}" for folder, _, names in folders for name in names if name.endswith(".py")]
    places = [(path, status.st_ctime_ns, status.st_size) for path in files for status in [os.stat(path)]]
    if new := [place for place in places if place not in _hashes]:  # a file is reread only after a change
        _hashes.update(zip(new, hashes_of([Path(place[0]).read_bytes() for place in new]), strict=True))
    return combined(_hashes[place] for place in places)


_hashes: dict[tuple[str, int, int], str] = {}
