"""How an order differs from one that was approved before, in groups that a person can read."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from polyclinic.engines.flare.protocol.run_request import RunRequest

NAMES = ("run", "label", "study", "plan", "mode")
RUN, DATA, KEYS, ALL = "how it is run", "the data", "keys for secure sums", "all methods"


def kind(order: RunRequest) -> str:
    """What sort of order it is; only orders of the same sort are compared."""
    return "rehearsal" if order.rehearsal else "study" if order.study else "run"


def flat(value: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """A nested table as pairs of dotted key and value."""
    if isinstance(value, Mapping):
        for key in sorted(value):
            yield from flat(value[key], f"{at}.{key}" if at else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for i, item in enumerate(value):
            yield from flat(item, f"{at}[{i}]")
    else:
        yield at, json.dumps(value)


def differences(new: RunRequest, old: RunRequest) -> dict[str, list[str]]:
    """By group, what a person should look at: ``-`` what was approved before, ``+`` what is asked now.

    What differs in the same way for every method that both have stands once, under ``all methods``.
    """
    before, now = _methods(old), _methods(new)
    both = [title for title in now if title in before]
    changed = {title: _lines(now[title], before[title]) for title in both}
    common = [line for line in changed[both[0]] if all(line in changed[title] for title in both)] if both else []
    single = len(both) == 1
    found = {ALL: [] if single else common}
    found |= {title: [line for line in changed[title] if single or line not in common] for title in both}
    found |= {title: ["- the whole method"] for title in before if title not in now}
    found |= {title: ["+ the whole method"] for title in now if title not in before}
    found |= {group: _lines(_common(new)[group], _common(old)[group]) for group in (RUN, DATA, KEYS)}
    return {group: lines for group, lines in found.items() if lines}


def _methods(an: RunRequest) -> dict[str, dict[str, str]]:
    """The plans, flat, by method and seed."""
    arms = an.arms or [{"label": an.label or an.plan["method"], "plan": an.plan, "external": an.external}]
    found = {}
    for arm in arms:
        plan = {key: value for key, value in arm["plan"].items() if key != "seed"}
        title = f"{arm['label']}, seed {arm['plan'].get('seed', 0)}"
        found[title] = dict(flat({**plan, "external": list(arm.get("external", ()))}))
    return found


def _common(an: RunRequest) -> dict[str, dict[str, str]]:
    """What all runs of a study share, flat, by group."""
    table = {key: value for key, value in asdict(an).items() if key not in NAMES}
    data, identities = table.pop("data"), table.pop("identities")
    if an.arms:
        table.pop("external")  # it stands with each method
    return {RUN: dict(flat(table)), DATA: dict(flat(data)), KEYS: dict(flat(identities))}


def _lines(now: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
    lines = []
    for key in sorted(now.keys() | before.keys()):
        if now.get(key) != before.get(key):
            lines += [f"- {key} = {before[key]}"] if key in before else []
            lines += [f"+ {key} = {now[key]}"] if key in now else []
    return lines
