"""What the server asks of a reply before it merges it. One bad site never poisons or stops a round."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from polyclinic.core import tree
from polyclinic.core.method import Ask
from polyclinic.core.stats import Alike, Gather, LeafMean, Mean, Reply, Stat

Form: TypeAlias = tuple[tuple[object, ...], ...]


@dataclass(frozen=True)
class Gate:
    """Which replies may be merged.

    Attributes:
        max_norm: The largest Euclidean norm that a mean may have, per unit of weight; none by default.
        max_weight: The largest weight that a site may claim, as its number of examples; none by default.
    """

    max_norm: float | None = None
    max_weight: float | None = None

    def refuse(self, ask: Ask, replies: Mapping[str, Reply]) -> dict[str, str]:
        """The sites whose replies to ``ask`` must not be merged, each with the reason.

        The form that a reply must have (which parts, names, shapes and types) is that of most replies. Between
        two forms of as many replies, the one wins whose leaves agree with what was asked.
        """
        reasons = {site: reason for site, reply in replies.items() if (reason := self._value(site, reply))}
        forms = {site: _form(reply) for site, reply in replies.items() if site not in reasons}
        if len(set(forms.values())) > 1:
            counts = Counter(forms.values())
            agreed = max(forms.values(), key=lambda form: (counts[form], _agreement(form, ask)))
            reasons |= {site: _difference(agreed, form) for site, form in forms.items() if form != agreed}
        return dict(sorted(reasons.items()))

    def _value(self, site: str, reply: Reply) -> str | None:
        for part, stat in reply.parts.items():
            if reason := self._stat(site, stat):
                return f"{part}: {reason}"
        return None

    def _stat(self, site: str, stat: Stat) -> str | None:
        for leaves in stat.trees:
            for name, leaf in leaves.items():
                if not tree.finite_leaf(leaf):
                    return f"{name} holds NaN or an infinity"
        match stat:
            case Gather(items) if list(items) != [site]:
                return f"speaks for {sorted(items)}, not for {site} alone"
            case LeafMean(total, weight) if total.keys() != weight.keys() or any(
                total[name].shape != weight[name].shape for name in total
            ):
                return "its weights do not fit its values"
            case LeafMean(_, weight) if any(bool((leaf < 0).any()) for leaf in weight.values()):
                return "a weight is negative"
            case Mean(total, weight):
                if not math.isfinite(weight) or weight < 0:
                    return f"a weight of {weight}"
                if self.max_weight is not None and weight > self.max_weight:
                    return f"a weight of {weight:g}, beyond the limit of {self.max_weight:g}"
                if self.max_norm is not None and weight and (norm := tree.norm(total) / weight) > self.max_norm:
                    return f"a norm of {norm:.3g}, beyond the limit of {self.max_norm:g}"
        return None


def _form(reply: Reply) -> Form:
    """Parts, kinds, names, shapes and types. Of a gather only the parts, unless its sites must send alike."""
    leaves: list[tuple[object, ...]] = []
    for part, stat in sorted(reply.parts.items()):
        leaves.append((part, type(stat).__name__))
        if isinstance(stat, Mean | LeafMean | Alike):
            leaves += [(part, name, tuple(leaf.shape), str(leaf.dtype)) for name, leaf in sorted(stat.trees[0].items())]
    return tuple(leaves)


def _agreement(form: Form, ask: Ask) -> int:
    """How many leaves have the name and shape of one that was asked."""
    asked = {(name, tuple(leaf.shape)) for leaves in ask.trees.values() for name, leaf in leaves.items()}
    return sum(tuple(entry[1:3]) in asked for entry in form)


def _difference(agreed: Form, form: Form) -> str:
    missing, extra = [e for e in agreed if e not in form], [e for e in form if e not in agreed]
    same = {e[:2] for e in missing} & {e[:2] for e in extra}
    if same:
        part, name = min((str(entry[0]), str(entry[1])) for entry in same)
        was = next(e for e in missing if e[:2] == (part, name))
        got = next(e for e in extra if e[:2] == (part, name))
        return f"{part}: {name} is {got[2:]}, where other sites send {was[2:]}"
    what = "/".join(str(e) for e in (missing or extra)[0][:2])
    return f"{what} is missing" if missing else f"{what} is not what other sites send"
