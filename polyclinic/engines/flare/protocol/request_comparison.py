"""Differences between a run request and one that was approved before, grouped for people to read."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from polyclinic.engines.flare.protocol.run_request import RunRequest

NAMES = ("run", "label", "study", "plan", "mode")
RUN, DATA, KEYS, ALL = "how it is run", "the data", "keys for secure sums", "all methods"


def kind(order: RunRequest) -> str:
    """Return the kind of a run request. Only requests of the same kind are compared."""
    return "rehearsal" if order.rehearsal else "study" if order.study else "run"


def flat(value: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """Yield the entries of a nested table as pairs of dotted key and value."""
    if isinstance(value, Mapping):
        for key in sorted(value):
            yield from flat(value[key], f"{at}.{key}" if at else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for i, item in enumerate(value):
            yield from flat(item, f"{at}[{i}]")
    else:
        yield at, json.dumps(value)


def differences(new: RunRequest, old: RunRequest) -> dict[str, list[str]]:
    """Return the changes by group: ``-`` for what was approved before, ``+`` for what is requested now.

    A change that applies to every method present in both is listed once, under ``all methods``.
    """
    before, now = _methods(old), _methods(new)
    both = [title for title in now if title in before]
    changed = {title: _lines(now[title], before[title]) for title in both}
    common = [line for line in changed[both[0]] if all(line in changed[title] for title in both)] if both else []
    single = len(both) == 1
    changes = {ALL: [] if single else common}
    changes |= {title: [line for line in changed[title] if single or line not in common] for title in both}
    changes |= {title: ["- the entire method"] for title in before if title not in now}
    changes |= {title: ["+ the entire method"] for title in now if title not in before}
    changes |= {group: _lines(_common(new)[group], _common(old)[group]) for group in (RUN, DATA, KEYS)}
    return {group: lines for group, lines in changes.items() if lines}


def _methods(an: RunRequest) -> dict[str, dict[str, str]]:
    """Return the flattened plans by method and seed."""
    arms = an.arms or [{"label": an.label or an.plan["method"], "plan": an.plan, "external": an.external}]
    methods = {}
    for arm in arms:
        plan = {key: value for key, value in arm["plan"].items() if key != "seed"}
        title = f"{arm['label']}, seed {arm['plan'].get('seed', 0)}"
        methods[title] = dict(flat({**plan, "external": list(arm.get("external", ()))}))
    return methods


def _common(an: RunRequest) -> dict[str, dict[str, str]]:
    """Return what all runs of a study share, flattened, by group."""
    table = {key: value for key, value in asdict(an).items() if key not in NAMES}
    data, identities = table.pop("data"), table.pop("identities")
    if an.arms:
        table.pop("external")  # it is listed with each method
    return {RUN: dict(flat(table)), DATA: dict(flat(data)), KEYS: dict(flat(identities))}


def _lines(now: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
    lines = []
    for key in sorted(now.keys() | before.keys()):
        if now.get(key) != before.get(key):
            lines += [f"- {key} = {before[key]}"] if key in before else []
            lines += [f"+ {key} = {now[key]}"] if key in now else []
    return lines
