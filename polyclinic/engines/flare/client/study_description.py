"""Description of a study for the person at a hospital who decides about it, for the command line and the console.

Requires no PyTorch, except ``look``, which reads the local data.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from polyclinic.core.plugin_packages import packages_of
from polyclinic.engines.flare.client.reviews import APPROVED, WAITING, Review, Reviews
from polyclinic.engines.flare.protocol import data_restrictions
from polyclinic.engines.flare.protocol.messages import printable
from polyclinic.engines.flare.protocol.paths import SetupError, SiteFolder
from polyclinic.engines.flare.protocol.request_comparison import differences, flat, kind
from polyclinic.engines.flare.protocol.run_request import RunRequest, code_hash
from polyclinic.errors import PolyclinicError
from polyclinic.methods.catalog import METHODS, Entry, canonical

APART = ("sites", "rounds", "seed")
COUNTS = ("split", "unlabeled")
SYNTHETIC = "A REHEARSAL: every site trains on synthetic points. No patient file is opened, and no result is real."


@dataclass(frozen=True)
class Here:
    """The local data and policy, as read by the person's command before a decision. It is not sent.

    Attributes:
        patients: Number of patients by role; None if unknown.
        problems: Reasons why the local data do not fit the study.
        min_cell: Smaller counts are hidden in a survey. ``class_names``: whether a survey names classes.
        counted: Whether the patients were counted, so that their number is described.
    """

    patients: Mapping[str, int] | None = None
    problems: tuple[str, ...] = ()
    min_cell: int | None = None
    class_names: bool = False
    counted: bool = True


class Line(NamedTuple):
    """One line of a description, without control characters.

    Attributes:
        text: The line.
        kind: ``setting`` (key = value), ``warning``, ``group`` (a heading), ``before`` or ``now`` (a difference), or
            empty.
    """

    text: str
    kind: str = ""

    @property
    def printed(self) -> str:
        """The line as the command line shows it, below its section's title."""
        marks = {"warning": "! ", "before": "- ", "now": "+ "}
        return f"{marks.get(self.kind, '')}{self.text}"


@dataclass
class Section:
    """Part of a description.

    Attributes:
        title: Its title.
        lines: Its lines, each with its depth: 1 for most of them.
    """

    title: str
    lines: list[tuple[int, Line]] = field(default_factory=list)

    def say(self, text: str, kind: str = "", depth: int = 1) -> None:
        """Append ``text``, parts of which come from the server, without control characters."""
        for line in text.split("\n"):
            self.lines.append((depth, Line(printable(line, len(line) + 1), kind)))


@dataclass(frozen=True)
class Description:
    """Everything that a person is shown of a study before a decision.

    Attributes:
        headline: What it is, and its state.
        sections: The parts, in order.
        command: The commands that decide; empty if nothing is to be decided.
    """

    headline: str
    sections: tuple[Section, ...]
    command: str = ""

    @property
    def text(self) -> str:
        """The description as text for a terminal."""
        parts = [self.headline]
        for section in self.sections:
            body = [f"{'  ' * depth}{line.printed}" for depth, line in section.lines]
            parts.append("\n".join([f"\n{section.title}", *body]))
        return "\n".join([*parts, *([f"\n{self.command}"] if self.command else [])])


@dataclass(frozen=True)
class _Method:
    """One method of a study, with all seeds that have the same plan."""

    label: str
    plan: dict[str, Any]
    external: tuple[str, ...]
    seeds: list[str] = field(default_factory=list)


def methods_of(an: RunRequest) -> list[str]:
    """Return the methods of a study or run."""
    if an.mode == "survey" and not an.study:
        return ["a survey"]
    names = list(dict.fromkeys(arm["label"] for arm in an.arms)) or [an.label or an.plan["method"]]
    return [*names, "(synthetic data)"] if an.rehearsal else names


def look(home: SiteFolder, order: RunRequest, folder: Path) -> Here:
    """Read the local data and policy."""
    from polyclinic.data.examples import DataError
    from polyclinic.engines.flare.client import site_data
    from polyclinic.engines.flare.protocol.paths import read_toml
    from polyclinic.engines.policy import site_policy as policies

    policy = policies.read(home.policy)
    cell, named = policy.limits.min_cell, policy.allow.class_names
    if order.rehearsal:
        return Here(None, (), cell, named)
    try:
        own, site = data_restrictions.of_hospital(folder), read_toml(home.settings, "polyclinic site init")["site"]
        differ = tuple(data_restrictions.conflicts(own or {}, order.data).values())
        divided = {key: order.data[key] for key in COUNTS if key in order.data and key not in (own or {})}
        asked = replace(order, mode="survey", data=divided)  # only how patients are divided: nothing is prepared
        held = site_data.load(folder, asked, order.build_plan(), site)
    except (DataError, SetupError, ValueError, OSError, KeyError, TypeError, RuntimeError, MemoryError) as error:
        return Here(None, tuple(str(error).splitlines()), cell, named)
    return Here({role: policies.count_patients(data) for role, data in held.roles.items()}, differ, cell, named)


def before(reviews: Reviews, item: Review) -> Review | None:
    """Return the last approved study of the same kind."""
    found = [r for r in reviews.all() if r.state == APPROVED and r.group != item.group]
    return next((r for r in reversed(found) if kind(r.what) == kind(item.what)), None)


def describe(
    item: Review, before: Review | None, others: Sequence[Review] = (), here: Here | None = None
) -> Description:
    """Describe all that would run and leave the site, and the difference to the study ``before``, approved last.

    Args:
        item: The review to describe.
        before: The review to compare with.
        others: Further waiting runs of the same study, which the same decision covers.
        here: The local data and policy.
    """
    an, here = item.what, here or Here()
    title = f"the study {an.study['name']}" if an.study else f"the run {an.run}"
    decided = f" by {item.by} (account {item.account}): {item.reason}" if item.by else ""
    methods = _methods(an)
    parts = [
        Section(SYNTHETIC) if an.rehearsal else None,
        _asked(item, others, here),
        _what_runs(methods) if methods else None,
        _start_weights(methods, an.weights, data_restrictions.stage_models(an.data)),
        _leaving(an, methods),
        _how(an, methods),
        _data(item, here),
        _hashes(item, others),
        _compared(item, before) if before else None,
        _refused(item, others),
    ]
    headline = f"{title}: {item.state}{decided}"
    return Description(
        printable(headline, len(headline) + 1), tuple(part for part in parts if part), _command(item, others)
    )


def _methods(an: RunRequest) -> list[_Method]:
    """Return the methods that would run; none for a survey alone."""
    if an.mode == "survey" and not an.study:
        return []
    arms = an.arms or [{"label": an.label or an.plan["method"], "plan": an.plan, "external": an.external}]
    found: list[_Method] = []
    for arm in arms:
        plan = {key: value for key, value in arm["plan"].items() if key != "seed"}
        outside = tuple(arm.get("external", ()))
        same = next((m for m in found if (m.label, m.plan, m.external) == (arm["label"], plan, outside)), None)
        if same is None:
            found.append(same := _Method(arm["label"], plan, outside))
        same.seeds.append(str(arm["plan"].get("seed", 0)))
    return found


def _asked(item: Review, others: Sequence[Review], here: Here) -> Section:
    """Describe each run that the decision covers."""
    section = Section("What is requested now")
    for one in (item, *others):
        an = one.what
        if an.mode == "survey":
            hidden = f"counts below {here.min_cell}" if here.min_cell is not None else "small counts (limits.min_cell)"
            named = "with" if here.class_names else "without"
            section.say(f"{an.run}: a survey. Nothing is trained. This site reports its data once: the shape of an")
            section.say("example, and the number of patients, of examples and of each class, by role;", depth=2)
            section.say(f"{hidden} are hidden; the number of classes, {named} their names", depth=2)
        else:
            whose = f"{an.label or an.plan['method']}, seed {an.plan.get('seed', 0)}"
            shape = "; ".join(f"{key} = {json.dumps(an.plan[key])}" for key in ("inputs", "outputs") if key in an.plan)
            section.say(f"{an.run}: {whose}; {shape}")
        for note in one.notes:
            section.say(note, "warning", 2)
    if item.what.study:
        section.say(
            "One decision covers the whole study: the survey and every method below, once for each of its seeds."
        )
    return section


def _what_runs(methods: Sequence[_Method]) -> Section:
    section = Section("What would run here, every round")
    first = methods[0].plan
    shared = {key: value for key, value in first.items() if all(m.plan.get(key) == value for m in methods)}
    for key, value in flat({k: v for k, v in shared.items() if k not in APART}):
        section.say(f"{key} = {value}", "setting")
    for method in methods:
        own = {k: v for k, v in method.plan.items() if k not in APART and (k not in shared or k == "method")}
        seeds = f"seed{'s' if len(method.seeds) > 1 else ''} {', '.join(method.seeds)}"
        section.say(f"{method.label}, {seeds}, {method.plan.get('rounds')} rounds", "group")
        for key, value in flat({k: v for k, v in own.items() if v not in ({}, [])}) if len(methods) > 1 else ():
            section.say(f"{key} = {value}", "setting", 2)
    return section


def _start_weights(methods: Sequence[_Method], sent: Mapping[str, Any], models: Sequence[str]) -> Section | None:
    """Describe which start weights and models of a previous stage the study needs, and whether they are here.

    None if it needs none.

    Args:
        methods: The methods.
        sent: Start weights that the server sends to sites without them; empty for none.
        models: The models of a previous stage.
    """
    tunings = [method.plan.get("tuning", {}) for method in methods]
    starts = [t["weights"].get("sha256", "") for t in tunings if t.get("weights")]
    if not (wanted := list(dict.fromkeys([*starts, *models]))):
        return None
    from polyclinic.learning.weights import store  # PyTorch is loaded for these studies only

    section = Section("Start weights" if starts else "Models of the previous stage")
    for sha256 in wanted:
        try:
            item = store.find(str(sha256))
        except PolyclinicError:
            if sent.get("sha256") == sha256:
                section.say(f"{sha256}: NOT here. The server sends the file once, after an approval:")
                section.say(f"{sent['name']}, {sent['bytes'] / 1e6:.1f} MB; as the server states, license", depth=2)
                section.say(f"{sent['license']}; {sent['source'] or 'no source stated'}", depth=2)
                continue
            section.say(f"{sha256}: NOT here. Add the file that the coordinator names:")
            section.say("polyclinic site weights add FILE", depth=2)
            continue
        card, size = item.card, f"{item.size / 1e6:.1f} MB"
        section.say(f"{sha256}: here")
        section.say(f"{card.name}, {size}, license {card.license}; {card.source or 'no source stated'}", depth=2)
    return section


def _leaving(an: RunRequest, methods: Sequence[_Method]) -> Section:
    section = Section("What would leave this site")
    if an.mode == "survey":
        section.say("the survey: what is requested now, and nothing else")
    if not methods:
        return section
    for method in methods:
        through = ", ".join(str(item.get("name")) for item in method.plan.get("uplink", ()))
        leaves = _leaves(method.plan["method"])
        if leaves == "nothing":
            section.say(f"{method.label}: nothing but scores")
            continue
        section.say(f"{method.label}: {leaves}, in each of {method.plan.get('rounds')} rounds,")
        section.say(f"through {through or 'no transform: the server sees it unchanged'}", depth=2)
    every = f"every {an.score_every} rounds" if an.score_every > 1 else "every round"
    scores = f"scores on validation data {every}" if an.score_every else "no scores between rounds"
    section.say(f"{scores}; at the end {_test(an.test)}")
    return section


def _how(an: RunRequest, methods: Sequence[_Method]) -> Section:
    section = Section("How it is run, and with which sites")
    plans = [an.plan, *(method.plan for method in methods)]
    section.say(", ".join(dict.fromkeys(site for plan in plans for site in plan.get("sites", ()))))
    for method in methods:
        if method.external:
            section.say(f"{method.label} is also scored at {', '.join(method.external)}, which does not train")
    if not methods:
        return section
    if an.mode == "buffered":
        section.say(f"asynchronously: an update of the model uses {an.buffer} replies")
    asked = f"{an.sites_per_round} of the sites, drawn at random" if an.sites_per_round else "every site"
    replies = "reply" if an.min_replies == 1 else "replies"
    section.say(f"each round asks {asked}, and needs {an.min_replies} usable {replies}")
    if an.deadline:
        section.say(f"a site that has not replied after {an.deadline:g} seconds is left out of that round")
    if an.best:
        section.say(f"the round with the best {an.best['metric']} on validation data is tested")
    if an.identities:
        keys = ", ".join(f"{site} {str(key)[:12]}" for site, key in sorted(an.identities.items()))
        section.say(f"keys for secure aggregation: {keys}")
    return section


def _data(item: Review, here: Here) -> Section:
    an, section = item.what, Section("The data at this site")
    if an.rehearsal:
        section.say("none are read: the data are synthetic")
        return section
    if here.patients is None:
        if here.counted:
            section.say("patients: unknown")
    else:
        counts = ", ".join(f"{count} {role}" for role, count in here.patients.items()) or "none"
        section.say(f"patients: {counts}; counted by this command, not sent")
    wrong = data_restrictions.refused(an.data)
    for key, value in flat({k: v for k, v in an.data.items() if k in data_restrictions.FROM_STUDY}):
        section.say(f"the study asks for {key} = {value}")
    for line in [*wrong, *here.problems, *([item.data] if item.data else [])]:
        section.say(line, "warning")
    if not an.data:
        section.say("the study requests no processing of the data")
    return section


def _hashes(item: Review, others: Sequence[Review]) -> Section:
    section = Section("Hashes")
    for one in (item, *others):
        section.say(f"request {one.what.hash}  {one.what.run if others else ''}".rstrip())
    if item.what.mode != "survey":
        section.say(f"method  {item.what.method_hash}")
    section.say(f"code    {item.code}")
    if item.what.study:
        section.say(f"study   {item.what.study['hash']}")
    for name, version, hash in item.packages:
        section.say(f"package {name}=={version}@{hash}")
    if item.code != code_hash() or item.packages != item.what.packages:
        section.say("the code here has changed since this study arrived: it will be offered again")
    return section


def _compared(item: Review, before: Review) -> Section:
    name = before.what.study.get("name") or before.what.run
    section = Section(f"Compared with {name}, approved {before.decided[:10]} by {printable(before.by, 100)}")
    found = differences(item.what, before.what)
    keys = {group: {line[2:].partition(" = ")[0] for line in lines} for group, lines in found.items()}
    summary = ", ".join(f"{group} ({len(changed)})" for group, changed in keys.items())
    section.say(f"differs in: {summary}" if found else "nothing differs")
    for group, lines in found.items():
        section.say(group, "group")
        for line in lines:
            section.say(line[2:], "now" if line.startswith("+") else "before", 2)
    section.say(f"the code {'is the same' if before.code == item.code else 'has changed'}")
    return section


def _refused(item: Review, others: Sequence[Review]) -> Section | None:
    """Describe why the site refuses it, if it does."""
    problems = list(dict.fromkeys(problem for one in (item, *others) for problem in one.problems))
    section = Section("Refused by this site, whatever a person decides")
    for problem in problems:
        section.say(problem)
    return section if problems else None


def _command(item: Review, others: Sequence[Review]) -> str:
    """Return how to decide; nothing if there is nothing to decide."""
    if not any(one.state == WAITING and not one.problems for one in (item, *others)):
        return ""
    name = item.what.study.get("name") or item.what.run
    return f'polyclinic site approve {name} --reason "..."   or   polyclinic site refuse {name} --reason "..."'


def _test(job: str) -> str:
    asks = {
        "score/test": "scores on test data",
        "predict/test": "the model's prediction for each validation patient and each test patient, without names, if "
        "the policy here allows it (allow.never, allow.gather); otherwise scores on test data",
    }
    return asks.get(job, "no test")


def _leaves(method: str) -> str:
    if (known := METHODS.get(canonical(method))) is not None:
        return known.leaves
    return Entry.leaves if packages_of({"methods": {method}}) else "unknown, because this method is not installed here"
