"""Parts that studies name and Polyclinic does not contain: of installed packages, and of this process.

A package provides a part as an entry point in a group such as ``polyclinic.networks``; a program registers one for
itself with ``register``. Polyclinic's own names come first: a plug-in cannot replace them.
"""

from functools import lru_cache
from typing import Any

from polyclinic.core.plugin_packages import entry_points_in
from polyclinic.errors import ConfigError

LOCAL = "local:"
"""The beginning of names of parts that a program registered for itself."""
_registered: dict[tuple[str, str], Any] = {}


def register(group: str, name: str, part: Any) -> str:
    """Make ``part`` available in this process, and in those that it starts, and return its name in studies.

    Raises:
        ConfigError: If another part has the name.
    """
    name = LOCAL + name
    if _registered.get((group, name), part) is not part:
        raise ConfigError(f"another of the {group} is registered as {name!r}")
    _registered[group, name] = part
    return name


def names(group: str) -> tuple[str, ...]:
    """Return the names of all parts in ``group``. No package is imported."""
    own = [name for kind, name in _registered if kind == group]
    return (*sorted({point.name for point in entry_points_in(group)}), *own)


def load(group: str, name: str) -> Any:
    """Return the part called ``name``. Its package is imported.

    Raises:
        ConfigError: If there is none, or two packages provide it.
    """
    if (group, name) in _registered:
        return _registered[group, name]
    return _loaded(group, name)


@lru_cache(maxsize=256)  # a loss is looked up in every step, and a module is imported once anyway
def _loaded(group: str, name: str) -> Any:
    points = [point for point in entry_points_in(group) if point.name == name]
    if not points:
        here = ", ".join(names(group)) or "none"
        raise ConfigError(
            f"none of the {group} is called {name!r}. Of installed packages: {here}. If a package provides it, install "
            "the package here"
        )
    if len({point.value for point in points}) > 1:
        owners = ", ".join(sorted(point.dist.name if point.dist else "unknown" for point in points))
        raise ConfigError(f"{name!r} of the {group} is provided by several packages ({owners}): remove all but one")
    return points[0].load()
