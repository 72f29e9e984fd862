"""The installed packages that a plan needs: those that provide its method, network, loss, metrics,
transforms, augmentations and training.

Every text in a plan that names an installed plug-in counts, in any place. A plan can therefore need a package
whose plug-in it does not use, and never use one that is not counted.
"""

from collections.abc import Mapping

from polyclinic.core.plugin_packages import Package, packages_of, texts_in
from polyclinic.methods.catalog import METHODS

PLAN_GROUPS = ("networks", "losses", "metrics", "transforms", "augmentations", "trainings")
"""Groups of plug-ins, besides methods, that a plan can name."""


def packages_in(*plans: Mapping[str, object]) -> tuple[Package, ...]:
    """Return the packages that ``plans``, as mappings, need by their names; Polyclinic's own names need none."""
    methods = {name for plan in plans for name in methods_in(plan)} - METHODS.keys()
    texts = {
        text
        for plan in plans
        for key, value in plan.items()
        if key not in ("sites", "kind")
        for text in texts_in(value)
    }
    return packages_of({"methods": methods, **dict.fromkeys(PLAN_GROUPS, texts)})


def methods_in(plan: Mapping[str, object]) -> set[str]:
    """Return every text in a plan that may name a method: its ``method``, and the texts in its options (``over``)."""
    return {text for key in ("method", "options") for text in texts_in(plan.get(key))}
