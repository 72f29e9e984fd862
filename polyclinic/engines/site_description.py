"""What a site says of its data before anything is trained: the shape of an example, and how many there are of what.

A study file names no shape, for on one machine the data show it. Between hospitals each site describes its own, as one
more thing that its policy may refuse. Counts below the policy's least cell are left out, and no example is in it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from polyclinic.core.aggregates import PerSite, Reply
from polyclinic.core.method import Job, Method, Request
from polyclinic.core.serialization import Corrupt
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.data.examples import Examples
from polyclinic.errors import ConfigError

JOB = PART = "describe"
MAX_TEXT = 2**16
CONTINUOUS = ("regression", "reconstruction", "multilabel")
MOST = 10_000


@dataclass(frozen=True)
class Describe(Method[None]):
    """A method of one message, whose answer says what a site has.

    Attributes:
        kind: The kind of task, which says what a target is.
        classes: The names of the classes, where the site's data have names.
        min_cell: Counts above zero and below this one are left out.
        named: Whether the names of the classes are told, or only how many there are.
    """

    kind: str
    classes: tuple[str, ...] = ()
    min_cell: int = 0
    named: bool = False

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The one message."""
        return (Job(JOB, last=0),)

    def init(self, params: Any) -> None:
        """Nothing to begin with."""

    def request(self, state: None) -> Request | None:
        """The one message."""
        return Request(0, {}, JOB)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        """The description as text, apart from other sites'."""
        found = describe(site.data, self.kind, self.classes, self.min_cell, self.named)
        text = json.dumps(found, sort_keys=True).encode()
        return Reply({PART: PerSite({site.name: {"text": torch.tensor(list(text), dtype=torch.uint8)}})}), memory

    def server_update(self, state: None, reply: Reply, server: Site) -> None:
        """Nothing: who asked reads the reply."""


def describe(
    data: Mapping[str, Examples], kind: str, classes: tuple[str, ...] = (), min_cell: int = 0, named: bool = False
) -> dict[str, Any]:
    """The description of a site's ``data`` for a task of some ``kind``. A count that is left out is None.

    ``classes`` count as outputs in any case; their names are in it only if they are to be ``named``.
    """
    shape = next((list(examples.shape) for examples in data.values() if len(examples)), [])
    labeled = {role: examples for role, examples in data.items() if role != "unlabeled" and len(examples)}

    def shown(count: int) -> int | None:
        return None if 0 < count < min_cell else count

    if kind in CONTINUOUS:
        outputs = max((int(examples.targets.shape[1]) for examples in labeled.values()), default=0)
    else:
        outputs = max([len(classes), *(int(examples.targets.max()) + 1 for examples in labeled.values())])
    roles = {}
    for role, examples in data.items():
        counts: list[int | None] = []
        if role in labeled and examples.targets.ndim == 1 and kind == "classification":
            counts = hidden([int((examples.targets == c).sum()) for c in range(outputs)], min_cell)
        patients = shown(len(set(examples.patients)))
        roles[role] = {"patients": patients, "examples": None if patients is None else len(examples), "classes": counts}
    return {"inputs": shape, "outputs": outputs, "classes": list(classes) if named else [], "roles": roles}


def hidden(counts: Sequence[int], min_cell: int) -> list[int | None]:
    """``counts`` without the small ones; where only one is small, without another too, or the total would betray it."""
    shown: list[int | None] = [None if 0 < count < min_cell else count for count in counts]
    if shown.count(None) == 1:
        others = [i for i, count in enumerate(shown) if count]
        if others:
            shown[min(others, key=lambda i: counts[i])] = None
    return shown


def read_description(reply: Reply, site: str) -> dict[str, Any]:
    """The description in what ``site`` replied.

    Raises:
        Corrupt: Where it is not one.
    """
    leaf = reply.gather(PART).get(site, {}).get("text") if PART in reply.parts else None
    if leaf is None or leaf.dtype != torch.uint8 or leaf.ndim != 1 or leaf.numel() > MAX_TEXT:
        raise Corrupt(f"{site} sent no description of its data")
    try:
        found = json.loads(bytes(leaf.tolist()))
        return checked(found)
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise Corrupt(f"{site}: its description cannot be read ({error})") from None


def checked(found: Any) -> dict[str, Any]:
    """``found``, if it is a description.

    Raises:
        ValueError: Where it is not.
    """
    if not isinstance(found, dict) or found.keys() != {"inputs", "outputs", "classes", "roles"}:
        raise ConfigError("a description has inputs, outputs, classes and roles")
    if not all(type(n) is int and 0 < n < 2**20 for n in found["inputs"]) or len(found["inputs"]) not in (1, 3, 4):
        raise ConfigError("inputs are the shape of an example")
    if type(found["outputs"]) is not int or not 0 < found["outputs"] <= MOST:
        raise ConfigError("outputs are counted")
    if not all(isinstance(n, str) and len(n) <= 100 and n.isprintable() for n in found["classes"]):
        raise ConfigError("classes are names")
    for role, has in found["roles"].items():
        numbers = [has["patients"], has["examples"], *has["classes"]]
        if not role.isidentifier() or has.keys() != {"patients", "examples", "classes"}:
            raise ConfigError("a role has patients, examples and classes")
        if not all(n is None or (type(n) is int and 0 <= n < 2**40) for n in numbers):
            raise ConfigError("counts are whole numbers")
    return found


def shape_of(said: Mapping[str, Mapping[str, Any]]) -> tuple[list[int], int, list[str]]:
    """What all sites' descriptions say together: an example's shape, the number of outputs, the classes' names.

    Raises:
        ValueError: Where they disagree, naming who says what.
    """
    shapes = {site: tuple(found["inputs"]) for site, found in said.items()}
    if len(set(shapes.values())) != 1:
        told = "; ".join(f"{site}: {' x '.join(map(str, shape))}" for site, shape in sorted(shapes.items()))
        why = "the sites' examples differ in shape, and one model takes one shape"
        raise ConfigError(f"{why} ({told or 'no site said'}). Let them resize alike in data.toml")
    outputs = max(found["outputs"] for found in said.values())
    named = {tuple(found["classes"]): site for site, found in sorted(said.items()) if found["classes"]}
    if len(named) > 1:
        told = "; ".join(f"{site}: {', '.join(names)}" for names, site in named.items())
        raise ConfigError(f"the sites' classes differ, or stand in another order ({told})")
    names = list(next(iter(named))) if named else []
    return list(next(iter(shapes.values()))), outputs, names
