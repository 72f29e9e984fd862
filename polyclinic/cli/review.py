"""How a study looks to the person at a hospital who decides about it."""

import json
from typing import Any

from polyclinic.engines.flare.order import Order, code_hash
from polyclinic.engines.flare.reviews import WAITING, Review, differences, flat


def methods_of(an: Order) -> list[str]:
    """What a study runs, or the run its method."""
    return list(dict.fromkeys(arm["label"] for arm in an.study.get("arms", ()))) or [an.label or an.plan["method"]]


def show(item: Review, before: Review | None) -> None:
    """Prints all that would run and leave, and what differs from the study ``before``, approved last."""
    an = item.what
    title = f"the study {an.study['name']}" if an.study else an.run
    print(f"{title}: {item.state}{f' by {item.by}: {item.reason}' if item.by else ''}")
    arms = _arms(an)
    shared = {key: value for key, value in arms[0][2].items() if all(arm[2].get(key) == value for arm in arms)}
    apart = ("sites", "rounds", "seed")
    print("\nWhat would run here, every round")
    for key, value in flat({k: v for k, v in shared.items() if k not in apart}):
        print(f"  {key} = {value}")
    for label, seeds, plan in arms:
        own = {k: v for k, v in plan.items() if k not in apart and (k not in shared or k == "method")}
        print(f"  {label}{f', with the seeds {seeds}' if len(arms) > 1 or an.study else ''}")
        for key, value in flat({k: v for k, v in own.items() if v not in ({}, [])}) if len(arms) > 1 else ():
            print(f"    {key} = {value}")
    print("\nWhat would leave")
    if an.mode == "survey":
        print("  first, once: the shape of an example, and how many patients, examples and classes there are")
    for label, _, plan in arms:
        through, leaves = ", ".join(item["name"] for item in plan.get("send", ())), _leaves(plan["method"])
        if leaves == "nothing":
            print(f"  {label}: nothing but scores")
            continue
        print(f"  {label}: {leaves}, {plan['rounds']} times,")
        print(f"    through {through or 'no transform: the server sees it as it is'}")
    every = f"every {an.score_every} rounds" if an.score_every > 1 else "every round"
    scores = f"scores on validation data {every}" if an.score_every else "no scores"
    print(f"  {scores}; at the end {_test(an.test)}")
    others = f"; only scored: {', '.join(an.external)}" if an.external else ""
    print(f"\nWith whom\n  {', '.join(an.plan['sites'])}{others}")
    print(f"\nWhose data here\n  {json.dumps(dict(item.patients))} patients")
    print(f"\nHashes\n  order  {an.hash}\n  method {an.method_hash}\n  code   {item.code}")
    if an.study:
        print(f"  study  {an.study['hash']}")
    if item.code != code_hash():
        print("  polyclinic was changed here since this study came: it will be offered again")
    if before:
        print(f"\nAgainst {before.what.study.get('name') or before.what.run}, "
              f"approved {before.decided[:10]} by {before.by}")  # fmt: skip
        print("\n".join(f"  {line}" for line in differences(an, before.what)) or "  nothing differs")
        print(f"  the code {'is the same' if before.code == item.code else 'has changed'}")
    if item.notes:
        print("\nThe policy refuses, of this study\n" + "\n".join(f"  {note}" for note in item.notes))
    if item.problems:
        print("\nThe policy refuses it\n" + "\n".join(f"  {problem}" for problem in item.problems))
    elif item.state == WAITING:
        name = an.study.get("name") or an.run
        print(f'\npolyclinic site approve {name} --reason "..."   or   polyclinic site refuse {name} --reason "..."')


def _arms(an: Order) -> list[tuple[str, str, dict[str, Any]]]:
    """The methods that would run: label, seeds, plan."""
    seeds: dict[str, list[str]] = {}
    plans: dict[str, dict[str, Any]] = {}
    for arm in an.study.get("arms", ()):
        seeds.setdefault(arm["label"], []).append(str(arm["plan"].get("seed", 0)))
        plans.setdefault(arm["label"], arm["plan"])
    if not plans:
        return [(an.label or an.plan["method"], str(an.plan.get("seed", 0)), an.plan)]
    return [(label, ", ".join(seeds[label]), plan) for label, plan in plans.items()]


def _test(job: str) -> str:
    asks = {
        "score/test": "scores on test data",
        "predict/test": "what the model says of each test patient, without names, where the policy allows it "
        "(allow.never, allow.gather); else scores",
    }
    return asks.get(job, "no test")


def _leaves(method: str) -> str:
    from polyclinic.methods.registry import entry

    return entry(method).leaves
