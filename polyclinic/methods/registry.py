"""Look up methods by name, list their options, and build them."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib import import_module
from typing import Any

from polyclinic.core.method import Method
from polyclinic.core.plugin_packages import entry_points_in
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.catalog import METHODS, Entry, canonical


@dataclass(frozen=True)
class Setting:
    """What a study provides to a method, by the name of the constructor's argument.

    Attributes:
        task: The learning task.
        local: The local training at a site.
        sites: The names of the training sites. ``population`` is their number.
        rounds: The number of rounds that the study plans.
    """

    task: Task
    local: LocalTraining
    sites: tuple[str, ...]
    rounds: int

    @property
    def population(self) -> int:
        """The number of training sites."""
        return len(self.sites)


PROVIDED = frozenset({*(field.name for field in fields(Setting)), "population"})
"""Arguments that the study provides, so that they are not options."""


class UnknownMethod(ConfigError):
    """No method has this name. The message suggests a similar one."""


def entry(name: str) -> Entry:
    """Return the table entry of a method, by its name or an alias.

    Raises:
        UnknownMethod: If no method has this name. The message suggests a similar one.
    """
    name = canonical(name)
    if name in METHODS:
        return METHODS[name]
    installed = plugins()
    if name in installed:
        return installed[name]
    similar = difflib.get_close_matches(name, [*METHODS, *installed], 1)
    hint = f' Did you mean "{similar[0]}"?' if similar else ""
    raise UnknownMethod(f'no method is called "{name}".{hint} `polyclinic methods` lists them')


def plugins() -> dict[str, Entry]:
    """Return the methods that other installed packages provide, under the entry-point group ``polyclinic.methods``."""
    return {
        point.name: Entry(point.name, f"{point.module}:{point.attr}", "from an installed package", point.module)
        for point in entry_points_in("methods")
    }


def maker(of: Entry) -> Callable[..., Method[Any]]:
    """Return what builds a method: its class, or a function that returns one."""
    module, _, name = of.make.partition(":")
    path = f"polyclinic.methods.{module}" if of.name in METHODS else module
    make: Callable[..., Method[Any]] = getattr(import_module(path), name)
    return make


def import_methods(names: Iterable[str] = tuple(METHODS)) -> None:
    """Import the modules of methods, so that the tags of their states are registered and their files can be read.

    Building a method imports its module. This is for code that reads a state without building its method. The names
    come from a study or a run's description, never from the file that is to be read.

    Args:
        names: The methods; by default all of Polyclinic's. Plug-in methods must be named.

    Raises:
        UnknownMethod: If a name is unknown.
    """
    for name in names:
        maker(entry(name))


def options(of: Entry) -> Mapping[str, inspect.Parameter]:
    """Return what a study may set for a method, by name, with the defaults.

    Of a class, these are all fields that ``Setting`` does not provide; of a function, its keyword-only arguments.
    Arguments that the table fixes are not options.
    """
    make = maker(of)
    listed = fields(make) if inspect.isclass(make) and is_dataclass(make) else ()
    made = {field.name: field.default_factory() for field in listed if field.default_factory is not MISSING}
    found = {
        name: p.replace(default={**made, **of.defaults}.get(name, p.default))
        for name, p in inspect.signature(make).parameters.items()
        if (name not in PROVIDED if inspect.isclass(make) else p.kind is p.KEYWORD_ONLY)
    }
    return {name: p for name, p in found.items() if name not in of.fixed}


def build(name: str, setting: Setting, given: Mapping[str, Any] | None = None) -> Method[Any]:
    """Build the method called ``name`` with the options ``given``, which ``studies.config.study_config`` validates.

    Raises:
        ConfigError: If ``given`` has an argument that this name fixes, or the method refuses its options.
        UnknownMethod: If no method has this name.
    """
    of, given = entry(name), given or {}
    if fixed := sorted(given.keys() & of.fixed.keys()):
        values = ", ".join(f"{key} = {of.fixed[key]}" for key in fixed)
        raise ConfigError(f"{of.name}: {', '.join(fixed)} cannot be set: this name means {values}")
    make = maker(of)
    provided = {key: getattr(setting, key) for key in PROVIDED & inspect.signature(make).parameters.keys()}
    return make(**{**provided, **of.defaults, **given, **of.fixed})


def names() -> Sequence[str]:
    """Return the name of every method that a study may use."""
    return [*METHODS, *plugins()]
