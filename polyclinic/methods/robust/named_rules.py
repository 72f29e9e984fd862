"""The robust rules by the names that a study uses. The papers are in the rules' modules, ``methods.robust.rules``.

``over`` names the method whose updates the rule aggregates, with that method's own defaults. ``bound`` and
``quarantined`` are those of ``Robust``; the other options are the fields of the rule.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_type_hints

from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.registry import Setting, build
from polyclinic.methods.robust.robust_method import Robust
from polyclinic.methods.robust.rules.aggregation_rule import Average, Rule
from polyclinic.methods.robust.rules.bulyan import Bulyan
from polyclinic.methods.robust.rules.centered_clipping import CentredClipping
from polyclinic.methods.robust.rules.coordinate_wise import Median, TrimmedMean
from polyclinic.methods.robust.rules.dos import DOS
from polyclinic.methods.robust.rules.fltrust import FLTrust
from polyclinic.methods.robust.rules.geometric_median import GeometricMedian
from polyclinic.methods.robust.rules.krum import Krum, MultiKrum


def named(rule: type[Rule], *, bound: float = 0.0) -> Callable[..., Robust]:
    """Return the function that composes ``rule`` with the method called ``over``.

    Args:
        bound: The default of the option ``bound``.
    """
    default = bound

    def make(
        task: Task,
        local: LocalTraining,
        sites: tuple[str, ...],
        rounds: int,
        *,
        over: str = "fedavg",
        bound: float = default,
        quarantined: tuple[str, ...] = (),
        **options: Any,
    ) -> Robust:
        if unknown := set(quarantined) - set(sites):
            raise ConfigError(f"quarantined names {sorted(unknown)}, which are not sites; there are {', '.join(sites)}")
        if rule is FLTrust and not options.get("root"):
            options["root"] = min(sites)  # the same site in every round, also if it does not reply
        inner = build(over, Setting(task, local, tuple(sites), rounds))
        return Robust(inner, rule(**options), bound, tuple(quarantined))

    signature, hints = inspect.signature(make), get_type_hints(rule)
    own = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(rule)
    ]
    shared = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    make.__signature__ = signature.replace(parameters=[*shared, *own])  # type: ignore[attr-defined]  # for inspect
    make.__doc__ = inspect.cleandoc(rule.__doc__ or "").partition("\n\nAttributes:")[0]
    make.__module__ = rule.__module__  # whose docstring names the paper
    return make


watched = named(Average)
krum = named(Krum)
multi_krum = named(MultiKrum)
bulyan = named(Bulyan)
coordinate_median = named(Median)
trimmed_mean = named(TrimmedMean)
geometric_median = named(GeometricMedian)
centered_clipping = named(CentredClipping)
fltrust = named(FLTrust)
dos = named(DOS, bound=1.0)
