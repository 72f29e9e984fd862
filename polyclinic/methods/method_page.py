"""A method's reference page, built from its table entry, its docstrings and its options."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from polyclinic.methods.catalog import METHODS, NOTHING, Entry, canonical, family_of
from polyclinic.methods.method_source import source_of

USUAL = {
    "lr": "Step size of the server along the mean change; 1 for plain averaging.",
    "uniform": "Whether all sites have equal weight, instead of in proportion to their training examples.",
    "bins": "Number of bins of the histograms from which quantiles are read.",
    "over": "The method whose updates the rule aggregates, with that method's own defaults.",
    "bound": "Updates longer than this multiple of the median length are first scaled down to it; 0 for no bound.",
}
"""Meanings of common options, used if a method's own docstrings do not describe them."""
FROM_FEDAVG = ("lr", "uniform")
"""Options that most methods share with FedAvg. An example shows others, if there are any."""


@dataclass(frozen=True)
class Page:
    """The description of one method.

    Attributes:
        entry: Its table entry. ``family``: its heading in the table.
        about: The docstrings of its maker, its class and its module.
        options: What a study may set, with defaults and, if described, the meaning.
    """

    entry: Entry
    family: str
    about: tuple[str, ...]
    options: dict[str, tuple[Any, str]]

    def as_markdown(self) -> str:
        """The page as Markdown."""
        e = self.entry
        lines = [f"## {e.name}", "", f"*{self.family}* · {e.paper}", "", *(f"{text}\n" for text in self.about)]
        lines += [f"**What leaves a site:** {e.leaves}.", ""]
        covered = {"dp-sgd": "private training (DP-SGD)", "gaussian": "clip and noise on replies"}
        ways = " and ".join(covered[way] for way in e.private)
        why = f"Not with private training: {e.exposes}." if e.exposes else ""
        lines += [f"**Differential privacy is available with:** {ways or 'nothing'}. {why}".rstrip(), ""]
        lines += [f"**Secure sums:** {secure_sums(e)}.", ""]
        if e.fixed:
            lines += [f"**Fixed:** {', '.join(f'`{name} = {value!r}`' for name, value in e.fixed.items())}.", ""]
        if e.uplink:
            through = ", ".join(f'{{ name = "{name}" }}' for name in e.uplink)
            lines += [f"By default a study uses `uplink = [{through}]` with it; `uplink = []` turns this off.", ""]
        if e.tasks:
            lines += [f"**For:** {', '.join(e.tasks)}.", ""]
        if e.stateful:
            lines += ["**Sites keep state** between rounds; it never leaves them.", ""]
        lines += [f"**Fidelity to the paper:** {e.fidelity}.", ""]
        lines += [f"**A site that did not train predicts with:** {e.unseen}.", ""]
        if e.unlabeled:
            lines += ["**A site without labels can take part.**", ""]
        if self.options:
            lines += ["| option | default | meaning |", "|---|---|---|"]
            lines += [f"| `{name}` | `{value!r}` | {text} |" for name, (value, text) in self.options.items()]
            lines += [""]
        shown = [name for name in self.options if name not in FROM_FEDAVG] or list(self.options)
        given = "".join(f"{n} = {text}\n" for n in shown[:2] if (text := _toml(self.options[n][0])))
        lines += ["```toml", "[[methods]]", f'name = "{e.name}"', given + "```"]
        return "\n".join(lines) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """The page as plain values."""
        e = self.entry
        return {
            "name": e.name,
            "family": self.family,
            "summary": e.summary,
            "paper": e.paper,
            "leaves": e.leaves,
            "secure_sums": secure_sums(e),
            "unseen": e.unseen,
            "fidelity": e.fidelity,
            "about": list(self.about),
            "options": {k: {"default": v, "meaning": m} for k, (v, m) in self.options.items()},
        }


def secure_sums(entry: Entry) -> str:
    """Return whether a method's replies can be summed securely, in words."""
    if entry.leaves == NOTHING:
        return "not needed, because nothing leaves a site"
    return "available" if entry.secure_sums else "not available, because the server sees the replies of single sites"


def page(name: str) -> Page:
    """Return the page of the method called ``name``.

    Raises:
        UnknownMethod: If no method has this name.
    """
    line = METHODS.get(canonical(name)) or _other(name)
    source, meanings = source_of(line), dict[str, str]()
    known = source.options
    for doc in (*source.classes, *source.lineage):  # a wrapper's options may be described by the class that it wraps
        meanings |= described(doc, known)  # parents describe inherited options
    about = []
    if source.maker:
        meanings |= described(source.maker, known, "Args")
        about.append(before_attributes(source.maker, "Args"))
    about += [before_attributes(source.method), source.module]
    given = {key: (default, meanings.get(key, USUAL.get(key, ""))) for key, default in known.items()}
    return Page(line, family_of(name), tuple(text for text in about if text), given)


def _other(name: str) -> Entry:
    """Return the entry of a method that another package provides.

    Raises:
        UnknownMethod: If no method has this name.
    """
    from polyclinic.methods.registry import entry

    return entry(name)


def before_attributes(doc: str, heading: str = "Attributes") -> str:
    """Return the part of a docstring above its section ``heading``."""
    return re.split(rf"\n\s*{heading}:\n", doc)[0].strip()


def described(doc: str, known: Collection[str], heading: str = "Attributes") -> dict[str, str]:
    """Return the entries of a docstring's section ``heading``, by name.

    A ``known`` name within a meaning that a colon follows has what comes after; other names within a meaning share it.
    """
    parts = re.split(rf"\n\s*{heading}:\n", re.split(r"\n\s*(?:Raises|Returns):\n", doc)[0])
    found: dict[str, str] = {}
    if len(parts) > 1:
        for name, text in re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", parts[1] + "\n", re.M | re.S):
            meaning = " ".join(text.split())
            own, *others = re.split(rf"[;.,] ``(?=(?:{'|'.join(known) or '-'})``: )", meaning)
            found[name] = own + ("" if own.endswith(".") else ".")
            for other, what in (text.split("``: ", 1) for text in others):
                found[other] = what[0].upper() + what[1:].removesuffix(".") + "."
            for other in re.findall(r"``(\w+)``", own):
                found.setdefault(other, found[name])
    return found


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return (
        f'"{value}"'
        if isinstance(value, str)
        else ""
        if value is None
        else str(list(value) if isinstance(value, tuple) else value)
    )
