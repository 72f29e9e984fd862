"""Validation of replies before they are merged. An invalid reply neither distorts nor stops a round."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import (
    WEIGHT,
    ElementwiseMean,
    Form,
    PerSite,
    Reply,
    RunningSum,
    Stat,
    WeightedMean,
    merge,
)
from polyclinic.core.method import Request
from polyclinic.core.tree import Tree

UNCOUNTED = 10.0
"""Factor by which ``weight_ratio`` is increased for a site whose number of examples is not known."""
BLOCK = 2**20
HELD = 2**26
"""Bytes of replies to one request that the server holds at once; a sum of more is formed while they arrive."""
GROUP = 4
"""Number of larger replies that are held in order to be added at once, if they take no more than ``GROUP * HELD``."""
Spare: TypeAlias = dict[Form, Mapping[str, Tree]]
"""Tensors by the form of a sum and by part, to which no one refers."""
WITNESSES = 2
"""Number of other sites that a comparison needs. With two, one hostile site can at most halve their median."""


class Size(NamedTuple):
    """Weight of one part of a reply, and the Euclidean norm of its mean; NaN if it was not computed."""

    weight: float
    norm: float


Figures: TypeAlias = Mapping[str, Size]
"""The size of each part of a reply that can be compared between sites."""


@dataclass(frozen=True)
class ReplyValidator:
    """Decides which replies may be merged.

    The relative limits compare a site with the median of the other sites in the same round, and are independent of the
    method: a weight may be a number of examples, steps or voxels. They keep a single hostile site within a known factor
    of the others; limiting its effect within that factor is the task of a robust aggregation rule.

    Attributes:
        max_norm: The largest Euclidean norm of a mean, per unit of weight; None for no limit.
        max_weight: The largest weight of a site; None for no limit.
        weight_ratio: A weight above this multiple of the median of the others is refused, unless it is at most the
            site's count in ``counts``. For a site without a count the limit is ``UNCOUNTED`` times as large, and at
            least ``WITNESSES`` others are needed. None for no limit.
        norm_ratio: A mean whose norm exceeds this multiple of the median of at least ``WITNESSES`` others is refused.
            None for no limit.
        counts: Number of examples that each site reported before the run.
    """

    max_norm: float | None = None
    max_weight: float | None = None
    weight_ratio: float | None = None
    norm_ratio: float | None = None
    counts: Mapping[str, float] = field(default_factory=dict)

    def refuse(
        self, request: Request, replies: Mapping[str, Reply], before: Mapping[str, Figures] | None = None
    ) -> dict[str, str]:
        """Return the sites whose replies to ``request`` must not be merged, each with the reason.

        The expected form of a reply (parts, names, shapes and types) is that of the majority. Of two equally frequent
        forms, the one whose leaves agree with the request is expected. ``before`` holds the figures of other sites'
        earlier replies, with which replies that arrive one by one are compared.
        """
        return self._refuse(request, replies, before or {}, finite=False)

    def merge(self, request: Request, replies: Mapping[str, Reply]) -> tuple[dict[str, str], Reply]:
        """Return the sites that ``refuse`` names, and the sum of all other replies.

        The sum of weighted means shows whether all of them are finite, which saves a pass over every reply.
        """
        alike = _means(replies.values()) and len({reply.form for reply in replies.values()}) == 1
        sum_ = RunningSum()
        finite = alike and sum_.add_if_finite(list(replies.values()))
        if (reasons := self._refuse(request, replies, {}, finite)) or not finite:
            return reasons, merge(reply for site, reply in replies.items() if site not in reasons)
        return reasons, sum_.total

    def _refuse(
        self, request: Request, replies: Mapping[str, Reply], before: Mapping[str, Figures], finite: bool
    ) -> dict[str, str]:
        """Return the sites to refuse; ``finite`` says that all numbers of ``replies`` are known to be finite."""
        reasons = {site: reason for site, reply in replies.items() if (reason := self.refused(site, reply, finite))}
        reasons |= _of_other_form(request, {site: reply.form for site, reply in replies.items() if site not in reasons})
        figures = {site: self.figures(reply) for site, reply in replies.items() if site not in reasons}
        everyone = {**before, **figures}
        reasons |= {site: reason for site in figures if (reason := self._compared(site, everyone))}
        return dict(sorted(reasons.items()))

    def refused(self, site: str, reply: Reply, finite: bool = False) -> str | None:
        """Return why the reply of ``site`` must not be merged, whatever the other sites send; or None.

        ``finite`` says that all numbers of the reply are known to be finite.
        """
        for part, stat in reply.parts.items():
            if reason := self._stat(site, stat, finite):
                return f"{part}: {reason}"
        return None

    @property
    def compares(self) -> bool:
        """Whether a limit is relative to the replies of other sites."""
        return self.weight_ratio is not None or self.norm_ratio is not None

    def figures(self, reply: Reply) -> Figures:
        """Return the values of ``reply`` that the relative limits compare; empty if there are no such limits."""
        sizes: dict[str, Size] = {}
        for part, stat in reply.parts.items():
            if not self.compares:
                break
            if isinstance(stat, WeightedMean) and stat.weight > 0:
                size = math.nan if self.norm_ratio is None else _length(stat.total) / stat.weight
                sizes[part] = Size(stat.weight, size)
            elif isinstance(stat, ElementwiseMean):
                sizes[part] = Size(_mean_weight(stat), math.nan)
            elif isinstance(stat, PerSite):
                for weight in stat.stated_weights().values():  # one, or none
                    sizes |= {part: Size(weight, math.nan)} if weight > 0 else {}
        return sizes

    def _compared(self, site: str, everyone: Mapping[str, Figures]) -> str | None:
        """Return why a site's reply exceeds a relative limit, or None."""
        count = self.counts.get(site)
        for part, mine in everyone[site].items():
            others = [figures[part] for name, figures in everyone.items() if name != site and part in figures]
            if self.weight_ratio is not None and len(others) >= (1 if count is not None else WITNESSES):
                usual = statistics.median(other.weight for other in others)
                most = max(usual * self.weight_ratio * (1.0 if count is not None else UNCOUNTED), count or 0.0)
                if usual > 0 and mine.weight > most:
                    known = "not known" if count is None else f"{count:g}"
                    return (
                        f"{part}: weight {mine.weight:g} exceeds the limit of {most:g}; the median of the other sites "
                        f"is {usual:g}, and the site's number of examples is {known}"
                    )
            norms = [other.norm for other in others if not math.isnan(other.norm)]
            if self.norm_ratio is not None and not math.isnan(mine.norm) and len(norms) >= WITNESSES:
                usual = statistics.median(norms)
                if usual > 0 and mine.norm > usual * self.norm_ratio:
                    return (
                        f"{part}: norm {mine.norm:.3g} exceeds {self.norm_ratio:g} times the median of the other "
                        f"sites, {usual:.3g}"
                    )
        return None

    def _stat(self, site: str, stat: Stat, finite: bool) -> str | None:
        for leaves in () if finite else stat.trees:
            for name, leaf in leaves.items():
                if not tree.finite_leaf(leaf):
                    return f"{name} contains NaN or infinity"
        match stat:
            case PerSite(items) if list(items) != [site]:
                return f"contains values of {sorted(items)}, not of {site} alone"
            case PerSite(items) if WEIGHT in items[site]:
                if items[site][WEIGHT].numel() != 1:
                    return f"the weight is a tensor of {items[site][WEIGHT].numel()} numbers, not one number"
                return self._weight(float(items[site][WEIGHT]))
            case ElementwiseMean(total, weight) if total.keys() != weight.keys() or any(
                total[name].shape != weight[name].shape for name in total
            ):
                return "the weights do not have the names and shapes of the values"
            case ElementwiseMean(_, weight) if any(bool((leaf < 0).any()) for leaf in weight.values()):
                return "a weight is negative"
            case WeightedMean(total, weight):
                if reason := self._weight(weight):
                    return reason
                if not weight and any(bool(leaf.any()) for leaf in total.values()):
                    return "the weight is 0, and the values are not"
                if self.max_norm is not None and weight and (norm := tree.norm(total) / weight) > self.max_norm:
                    return f"norm {norm:.3g} exceeds max_norm = {self.max_norm:g}"
        return None

    def _weight(self, weight: float) -> str | None:
        """Return why a reply with this weight must not be merged, or None."""
        if not math.isfinite(weight) or weight < 0:
            return f"weight {weight} is not a finite number of at least 0"
        if self.max_weight is not None and weight > self.max_weight:
            return f"weight {weight:g} exceeds max_weight = {self.max_weight:g}"
        return None


class ReplySum:
    """The sum of the valid replies to one request, which is that of ``ReplyValidator.merge``, to the bit.

    Replies are held while they are small together, or few (``GROUP``). After that, and if no limit compares them, they
    are validated, added and released together, so that memory does not grow with the number of sites. Replies of
    different forms then have separate sums, because the majority is known at the end. They are written to the tensors
    ``spare`` of an earlier sum; at the end, those that are not needed are placed there.
    """

    def __init__(self, validator: ReplyValidator, request: Request, spare: Spare | None = None) -> None:
        """Create an empty sum of replies to ``request``, which ``validator`` admits."""
        self._validator, self._request = validator, request
        self._spare: Spare = {} if spare is None else spare
        self._held: dict[str, Reply] = {}
        self._size = 0
        self._reasons: dict[str, str] = {}
        self._forms: dict[str, Form] = {}
        self._sums: dict[Form, RunningSum] = {}

    def add(self, site: str, reply: Reply) -> None:
        """Add the reply of ``site``. Sites have one order in every engine."""
        self._held[site] = reply
        self._size += reply.nbytes
        many = len(self._held) >= GROUP or self._size > GROUP * HELD
        if self._size > HELD and many and not self._validator.compares:
            self._release()

    def _release(self) -> None:
        """Validate and add the replies that are held, and release them."""
        groups: dict[Form, dict[str, Reply]] = {}
        for site, reply in self._held.items():
            groups.setdefault(reply.form, {})[site] = reply
        reasons: dict[str, str] = {}
        for form, replies in groups.items():
            reasons |= self._add(form, replies)
        self._forms |= {site: reply.form for site, reply in self._held.items() if site not in reasons}
        self._reasons |= reasons
        self._held, self._size = {}, 0

    def _add(self, form: Form, replies: Mapping[str, Reply]) -> dict[str, str]:
        """Add replies of one form, and return the sites that are refused, each with the reason."""
        if form not in self._sums:
            self._sums[form] = RunningSum(self._spare.pop(form, {}))
        valid, sum_ = self._validator, self._sums[form]
        sound = not any(valid.refused(site, reply, finite=True) for site, reply in replies.items())
        if sound and _means(replies.values()) and sum_.add_if_finite(list(replies.values())):
            return {}
        reasons = {site: reason for site, reply in replies.items() if (reason := valid.refused(site, reply))}
        for site, reply in replies.items():
            if site not in reasons:
                sum_.add(reply)
        return reasons

    def result(self) -> tuple[dict[str, str], Reply]:
        """Return the sites that were refused, each with the reason, and the sum of all other replies."""
        if not self._sums:
            return self._validator.merge(self._request, self._held)
        self._release()
        others = _of_other_form(self._request, self._forms)
        agreed = next((form for site, form in self._forms.items() if site not in others), ())
        self._spare.clear()  # of other requests, so that memory does not grow with their number
        self._spare |= {agreed: self._sums[agreed].spare} if agreed in self._sums else {}
        total = self._sums[agreed].total if agreed in self._sums else Reply()
        return dict(sorted((self._reasons | others).items())), total


def _means(replies: Iterable[Reply]) -> bool:
    """Return whether all parts are weighted means, and there is at least one."""
    stats = [stat for reply in replies for stat in reply.parts.values()]
    return bool(stats) and all(type(stat) is WeightedMean for stat in stats)


def _of_other_form(request: Request, forms: Mapping[str, Form]) -> dict[str, str]:
    """Return the sites whose replies do not have the expected form, each with the difference."""
    if len(set(forms.values())) < 2:
        return {}
    counts = Counter(forms.values())
    agreed = max(forms.values(), key=lambda form: (counts[form], _agreement(form, request)))
    return {site: _difference(agreed, form) for site, form in forms.items() if form != agreed}


def _length(leaves: Tree) -> float:
    """Return the Euclidean norm of all leaves in double precision, computed in blocks to limit memory."""
    squares = [
        float(torch.linalg.vector_norm(block.double())) ** 2
        for name in leaves
        for block in leaves[name].reshape(-1).split(BLOCK)
    ]
    return math.sqrt(math.fsum(squares))


def _mean_weight(stat: ElementwiseMean) -> float:
    """Return the mean weight over all elements."""
    sizes = [(float(leaf.double().sum()), leaf.numel()) for leaf in stat.weight.values()]
    return sum(total for total, _ in sizes) / max(sum(size for _, size in sizes), 1)


def _agreement(form: Form, request: Request) -> int:
    """Return the number of leaves with the name and shape of a leaf in the request."""
    asked = {(name, leaf.shape) for leaves in request.trees.values() for name, leaf in leaves.items()}
    return sum(entry[1:3] in asked for entry in form)


def _difference(agreed: Form, form: Form) -> str:
    missing, extra = [e for e in agreed if e not in form], [e for e in form if e not in agreed]
    same = {e[:2] for e in missing} & {e[:2] for e in extra}
    if same:
        part, name = min((str(entry[0]), str(entry[1])) for entry in same)
        was = next(e for e in missing if e[:2] == (part, name))
        got = next(e for e in extra if e[:2] == (part, name))
        return f"{part}: {name} is {_described(got)}, expected {_described(was)} as from the other sites"
    what = "/".join(str(e) for e in (missing or extra)[0][:2])
    return f"{what} is missing" if missing else f"{what} is not in the replies of the other sites"


def _described(entry: tuple[object, ...]) -> str:
    """Return the shape and type of a leaf's entry in a form."""
    *_, shape, dtype = entry
    return str((tuple(shape) if isinstance(shape, torch.Size) else shape, str(dtype)))
