"""Description of a site's data before training: the shape of an example, and counts by role and class.

A study file names no shape, because on one machine the data show it. In a deployment each site describes its own data,
which its policy may refuse. Counts below the policy's ``min_cell`` are omitted, and no example is included.
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
from polyclinic.data.examples import Dataset
from polyclinic.errors import ConfigError

JOB = PART = "describe"
MAX_TEXT = 2**16
CONTINUOUS = ("regression", "survival", "reconstruction", "multilabel")
MOST = 10_000


@dataclass(frozen=True)
class Describe(Method[None]):
    """A method with a single request, which returns the description of a site's data.

    Attributes:
        kind: The kind of task, which defines the meaning of a target.
        classes: The names of the classes, if the site's data have names.
        min_cell: Counts above zero and below this value are omitted.
        named: Whether to include the names of the classes, or only their number.
    """

    kind: str
    classes: tuple[str, ...] = ()
    min_cell: int = 0
    named: bool = False

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The single job."""
        return (Job(JOB, last=0),)

    def init(self, params: Any) -> None:
        """Return None; the method has no state."""

    def request(self, state: None) -> Request | None:
        """Return the single request."""
        return Request(0, {}, JOB)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        """Return the description as text, separate for each site."""
        description = describe(site.data, self.kind, self.classes, self.min_cell, self.named)
        text = json.dumps(description, sort_keys=True).encode()
        return Reply({PART: PerSite({site.name: {"text": torch.tensor(list(text), dtype=torch.uint8)}})}), memory

    def server_update(self, state: None, reply: Reply, server: Site) -> None:
        """Do nothing; the caller reads the reply."""


def describe(
    data: Mapping[str, Dataset], kind: str, classes: tuple[str, ...] = (), min_cell: int = 0, named: bool = False
) -> dict[str, Any]:
    """Describe a site's ``data`` for a task of the given ``kind``. An omitted count is None.

    ``classes`` always count as outputs; their names are included only if ``named``.
    """
    shape = next((list(examples.shape) for examples in data.values() if len(examples)), [])
    labeled = {role: examples for role, examples in data.items() if role != "unlabeled" and len(examples)}

    def shown(count: int) -> int | None:
        return None if 0 < count < min_cell else count

    if kind in CONTINUOUS:
        outputs = max((examples.width for examples in labeled.values()), default=0)
    else:
        outputs = max([len(classes), *(examples.highest + 1 for examples in labeled.values())])
    roles = {}
    for role, examples in data.items():
        counts: list[int | None] = []
        if role in labeled and examples.labels is not None and examples.labels.ndim == 1 and kind == "classification":
            counts = hidden([int((examples.labels == c).sum()) for c in range(outputs)], min_cell)
        elif role in labeled and examples.labels is not None and kind == "survival":
            events = int(examples.labels[:, 1].sum())
            counts = hidden([len(examples) - events, events], min_cell)
        patients = shown(len(set(examples.patients)))
        roles[role] = {"patients": patients, "examples": None if patients is None else len(examples), "classes": counts}
    return {"inputs": shape, "outputs": outputs, "classes": list(classes) if named else [], "roles": roles}


def hidden(counts: Sequence[int], min_cell: int) -> list[int | None]:
    """Omit small counts. If only one is small, omit another one too, because the total would reveal it."""
    shown: list[int | None] = [None if 0 < count < min_cell else count for count in counts]
    if shown.count(None) == 1:
        others = [i for i, count in enumerate(shown) if count]
        if others:
            shown[min(others, key=lambda i: counts[i])] = None
    return shown


def read_description(reply: Reply, site: str) -> dict[str, Any]:
    """Read the description in the reply of ``site``.

    Raises:
        Corrupt: If the reply holds no valid description.
    """
    leaf = reply.gather(PART).get(site, {}).get("text") if PART in reply.parts else None
    if leaf is None or leaf.dtype != torch.uint8 or leaf.ndim != 1 or leaf.numel() > MAX_TEXT:
        raise Corrupt(f"{site} sent no description of its data")
    try:
        return checked(json.loads(bytes(leaf.tolist())))
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise Corrupt(f"{site}: its description cannot be read ({error})") from None


def checked(found: Any) -> dict[str, Any]:
    """Return ``found`` if it is a valid description.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(found, dict) or found.keys() != {"inputs", "outputs", "classes", "roles"}:
        raise ConfigError("a description has inputs, outputs, classes and roles")
    if not all(type(n) is int and 0 < n < 2**20 for n in found["inputs"]) or len(found["inputs"]) not in (1, 3, 4):
        raise ConfigError("inputs must be the shape of an example")
    if type(found["outputs"]) is not int or not 0 < found["outputs"] <= MOST:
        raise ConfigError(f"outputs must be a number from 1 to {MOST}")
    if not all(isinstance(n, str) and len(n) <= 100 and n.isprintable() for n in found["classes"]):
        raise ConfigError("classes must be names")
    for role, has in found["roles"].items():
        numbers = [has["patients"], has["examples"], *has["classes"]]
        if not role.isidentifier() or has.keys() != {"patients", "examples", "classes"}:
            raise ConfigError("a role has patients, examples and classes")
        if not all(n is None or (type(n) is int and 0 <= n < 2**40) for n in numbers):
            raise ConfigError("counts must be whole numbers")
    return found


def shape_of(descriptions: Mapping[str, Mapping[str, Any]]) -> tuple[list[int], int, list[str]]:
    """Combine the descriptions of all sites: the shape of an example, the number of outputs, the class names.

    Raises:
        ValueError: If they disagree. The message lists each site's value.
    """
    shapes = {site: tuple(description["inputs"]) for site, description in descriptions.items()}
    if len(set(shapes.values())) != 1:
        listed = "; ".join(f"{site}: {' x '.join(map(str, shape))}" for site, shape in sorted(shapes.items()))
        why = "the sites' examples differ in shape, but a model needs a single shape"
        raise ConfigError(f"{why} ({listed or 'no site answered'}). Set the same size in data.toml at each site")
    outputs = max(description["outputs"] for description in descriptions.values())
    named = {tuple(item["classes"]): site for site, item in sorted(descriptions.items()) if item["classes"]}
    if len(named) > 1:
        listed = "; ".join(f"{site}: {', '.join(names)}" for names, site in named.items())
        raise ConfigError(f"the sites' classes differ, or are in another order ({listed})")
    names = list(next(iter(named))) if named else []
    return list(next(iter(shapes.values()))), outputs, names
