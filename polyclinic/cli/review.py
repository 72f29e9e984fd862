"""The text of a study for the person at a hospital who decides about it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from polyclinic.engines.flare.client.reviews import APPROVED, WAITING, Review, Reviews
from polyclinic.engines.flare.protocol import data_restrictions
from polyclinic.engines.flare.protocol.messages import printable
from polyclinic.engines.flare.protocol.paths import SetupError, SiteFolder
from polyclinic.engines.flare.protocol.request_comparison import differences, flat, kind
from polyclinic.engines.flare.protocol.run_request import RunRequest, code_hash
from polyclinic.errors import PolyclinicError

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
    """

    patients: Mapping[str, int] | None = None
    problems: tuple[str, ...] = ()
    min_cell: int | None = None
    class_names: bool = False


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


def show(item: Review, before: Review | None, others: Sequence[Review] = (), here: Here | None = None) -> None:
    """Print all that would run and leave the site, and the difference to the study ``before``, approved last.

    Args:
        item: The review to show.
        before: The review to compare with.
        others: Further waiting runs of the same study, which the same decision covers.
        here: The local data and policy.
    """
    an, here = item.what, here or Here()
    title = f"the study {an.study['name']}" if an.study else f"the run {an.run}"
    decided = f" by {item.by} (account {item.account}): {item.reason}" if item.by else ""
    _say(f"{title}: {item.state}{decided}")
    if an.rehearsal:
        _say(f"\n{SYNTHETIC}")
    methods = _methods(an)
    _show_asked(item, others, here)
    if methods:
        _show_methods(an, methods)
        _show_weights(methods)
    _show_leaving(an, methods)
    _show_how(an, methods)
    _show_data(item, here)
    _show_hashes(item, others)
    if before:
        _show_before(item, before)
    _show_end(item, others)


def _say(text: str) -> None:
    """Print ``text``, parts of which come from the server, without control characters."""
    print("\n".join(printable(line, len(line) + 1) for line in text.split("\n")))


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


def _show_asked(item: Review, others: Sequence[Review], here: Here) -> None:
    """Print each run that the decision covers."""
    _say("\nWhat is requested now")
    for one in (item, *others):
        an = one.what
        if an.mode == "survey":
            hidden = f"counts below {here.min_cell}" if here.min_cell is not None else "small counts (limits.min_cell)"
            named = "with" if here.class_names else "without"
            _say(f"  {an.run}: a survey. Nothing is trained. This site reports its data once: the shape of an")
            _say("    example, and the number of patients, of examples and of each class, by role;")
            _say(f"    {hidden} are hidden; the number of classes, {named} their names")
        else:
            whose = f"{an.label or an.plan['method']}, seed {an.plan.get('seed', 0)}"
            shape = "; ".join(f"{key} = {json.dumps(an.plan[key])}" for key in ("inputs", "outputs") if key in an.plan)
            _say(f"  {an.run}: {whose}; {shape}")
        for note in one.notes:
            _say(f"    ! {note}")
    if item.what.study:
        _say("  One decision covers the whole study: the survey and every method below, once for each of its seeds.")


def _show_methods(an: RunRequest, methods: Sequence[_Method]) -> None:
    _say("\nWhat would run here, every round")
    first = methods[0].plan
    shared = {key: value for key, value in first.items() if all(m.plan.get(key) == value for m in methods)}
    for key, value in flat({k: v for k, v in shared.items() if k not in APART}):
        _say(f"  {key} = {value}")
    for method in methods:
        own = {k: v for k, v in method.plan.items() if k not in APART and (k not in shared or k == "method")}
        seeds = f"seed{'s' if len(method.seeds) > 1 else ''} {', '.join(method.seeds)}"
        _say(f"  {method.label}, {seeds}, {method.plan.get('rounds')} rounds")
        for key, value in flat({k: v for k, v in own.items() if v not in ({}, [])}) if len(methods) > 1 else ():
            _say(f"    {key} = {value}")


def _show_weights(methods: Sequence[_Method]) -> None:
    """Print which start weights the study needs, and whether this site has them."""
    from polyclinic.learning.weights import store

    wanted = [method.plan.get("tuning", {}).get("weights", {}).get("sha256", "") for method in methods]
    for sha256 in dict.fromkeys(filter(None, wanted)):
        _say("\nStart weights")
        try:
            item = store.find(str(sha256))
        except PolyclinicError:
            _say(f"  {sha256}: NOT here. Add the file that the coordinator names: polyclinic site weights add FILE")
        else:
            card = item.card
            _say(f"  {sha256}: here")
            _say(
                f"  {card.name}, {item.size / 1e6:.1f} MB, license {card.license}; {card.source or 'no source stated'}"
            )


def _show_leaving(an: RunRequest, methods: Sequence[_Method]) -> None:
    _say("\nWhat would leave this site")
    if an.mode == "survey":
        _say("  the survey: what is requested now, and nothing else")
    if not methods:
        return
    for method in methods:
        through = ", ".join(str(item.get("name")) for item in method.plan.get("uplink", ()))
        leaves = _leaves(method.plan["method"])
        if leaves == "nothing":
            _say(f"  {method.label}: nothing but scores")
            continue
        _say(f"  {method.label}: {leaves}, in each of {method.plan.get('rounds')} rounds,")
        _say(f"    through {through or 'no transform: the server sees it unchanged'}")
    every = f"every {an.score_every} rounds" if an.score_every > 1 else "every round"
    scores = f"scores on validation data {every}" if an.score_every else "no scores between rounds"
    _say(f"  {scores}; at the end {_test(an.test)}")


def _show_how(an: RunRequest, methods: Sequence[_Method]) -> None:
    _say("\nHow it is run, and with which sites")
    plans = [an.plan, *(method.plan for method in methods)]
    _say(f"  {', '.join(dict.fromkeys(site for plan in plans for site in plan.get('sites', ())))}")
    for method in methods:
        if method.external:
            _say(f"  {method.label} is also scored at {', '.join(method.external)}, which does not train")
    if not methods:
        return
    if an.mode == "buffered":
        _say(f"  asynchronously: an update of the model uses {an.buffer} replies")
    asked = f"{an.sites_per_round} of the sites, drawn at random" if an.sites_per_round else "every site"
    _say(f"  each round asks {asked}, and needs {an.min_replies} usable replies")
    if an.deadline:
        _say(f"  a site that has not replied after {an.deadline:g} seconds is left out of that round")
    if an.best:
        _say(f"  the round with the best {an.best['metric']} on validation data is tested")
    if an.identities:
        keys = ", ".join(f"{site} {str(key)[:12]}" for site, key in sorted(an.identities.items()))
        _say(f"  keys for secure aggregation: {keys}")


def _show_data(item: Review, here: Here) -> None:
    an = item.what
    _say("\nThe data at this site")
    if an.rehearsal:
        _say("  none are read: the data are synthetic")
        return
    if here.patients is None:
        _say("  patients: unknown")
    else:
        _say(
            f"  patients: {', '.join(f'{count} {role}' for role, count in here.patients.items()) or 'none'}; "
            "counted by this command, not sent"
        )
    wrong = data_restrictions.refused(an.data)
    for key, value in flat({k: v for k, v in an.data.items() if k in data_restrictions.FROM_STUDY}):
        _say(f"  the study asks for {key} = {value}")
    for line in [*wrong, *here.problems, *([item.data] if item.data else [])]:
        _say(f"  ! {line}")
    if not an.data:
        _say("  the study requests no processing of the data")


def _show_hashes(item: Review, others: Sequence[Review]) -> None:
    _say("\nHashes")
    for one in (item, *others):
        _say(f"  request {one.what.hash}  {one.what.run if others else ''}".rstrip())
    if item.what.mode != "survey":
        _say(f"  method  {item.what.method_hash}")
    _say(f"  code    {item.code}")
    if item.what.study:
        _say(f"  study   {item.what.study['hash']}")
    for name, version, hash in item.packages:
        _say(f"  package {name}=={version}@{hash}")
    if item.code != code_hash() or item.packages != item.what.packages:
        _say("  the code here has changed since this study arrived: it will be offered again")


def _show_before(item: Review, before: Review) -> None:
    name = before.what.study.get("name") or before.what.run
    _say(f"\nCompared with {name}, approved {before.decided[:10]} by {before.by}")
    found = differences(item.what, before.what)
    keys = {group: {line[2:].partition(" = ")[0] for line in lines} for group, lines in found.items()}
    summary = ", ".join(f"{group} ({len(changed)})" for group, changed in keys.items())
    _say(f"  differs in: {summary}" if found else "  nothing differs")
    for group, lines in found.items():
        _say("\n".join([f"  {group}", *(f"    {line}" for line in lines)]))
    _say(f"  the code {'is the same' if before.code == item.code else 'has changed'}")


def _show_end(item: Review, others: Sequence[Review]) -> None:
    """Print why it is refused, or how to decide."""
    everything = (item, *others)
    if problems := list(dict.fromkeys(problem for one in everything for problem in one.problems)):
        _say("\nRefused by this site, whatever a person decides\n" + "\n".join(f"  {problem}" for problem in problems))
    if any(one.state == WAITING and not one.problems for one in everything):
        name = item.what.study.get("name") or item.what.run
        _say(f'\npolyclinic site approve {name} --reason "..."   or   polyclinic site refuse {name} --reason "..."')


def _test(job: str) -> str:
    asks = {
        "score/test": "scores on test data",
        "predict/test": "the model's prediction for each validation patient and each test patient, without names, if "
        "the policy here allows it (allow.never, allow.gather); otherwise scores on test data",
    }
    return asks.get(job, "no test")


def _leaves(method: str) -> str:
    from polyclinic.methods.registry import UnknownMethod, entry

    try:
        return entry(method).leaves
    except UnknownMethod:
        return "unknown, because this method is not installed here"
