"""From a method's name and options to the method, with every wrong option named."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from polyclinic.core.method import Method
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.catalog import METHODS, Entry


@dataclass(frozen=True)
class Setting:
    """What a study knows and a method may need, by the name of the argument.

    Attributes:
        task: What is learned. ``local``: how a site trains.
        sites: The names of the sites that train. ``population`` is their number.
        rounds: How many rounds the study plans.
    """

    task: Task
    local: LocalTraining
    sites: tuple[str, ...]
    rounds: int

    @property
    def population(self) -> int:
        """How many sites train."""
        return len(self.sites)


class UnknownMethod(ConfigError):
    """No method has this name. The message suggests one."""


def entry(name: str) -> Entry:
    """The table's line for ``name``.

    Raises:
        UnknownMethod: Where there is none.
    """
    if name in METHODS:
        return METHODS[name]
    if name in (found := plugins()):
        return found[name]
    near = difflib.get_close_matches(name, [*METHODS, *found], 1)
    hint = f' Did you mean "{near[0]}"?' if near else ""
    raise UnknownMethod(f'no method is called "{name}".{hint} `polyclinic methods` lists them')


def plugins() -> dict[str, Entry]:
    """Methods that other installed packages offer, under the entry-point group ``polyclinic.methods``."""
    return {
        point.name: Entry(point.name, f"{point.module}:{point.attr}", "from an installed package", point.module)
        for point in entry_points(group="polyclinic.methods")
    }


def maker(of: Entry) -> Callable[..., Method[Any]]:
    """The function that builds a method."""
    module, _, function = of.make.partition(":")
    path = f"polyclinic.methods.{module}" if of.name in METHODS else module
    make: Callable[..., Method[Any]] = getattr(import_module(path), function)
    return make


def import_methods(names: Iterable[str] = tuple(METHODS)) -> None:
    """Import the modules of methods, so that the tags of their states are registered and their files can be read.

    Whoever builds a method has imported its module already. This is for code that reads a state without building its
    method. The names come from a study or a run's description, never from the file that is to be read.

    Args:
        names: The methods; by default all of Polyclinic's. Those of plug-ins must be named.

    Raises:
        UnknownMethod: If a name is unknown.
    """
    for name in names:
        maker(entry(name))


def options(of: Entry) -> Mapping[str, inspect.Parameter]:
    """What a study may set for a method, by name: the keyword-only arguments of its maker."""
    given = inspect.signature(maker(of)).parameters
    return {name: p for name, p in given.items() if p.kind is p.KEYWORD_ONLY}


def build(name: str, setting: Setting, given: Mapping[str, Any] | None = None) -> Method[Any]:
    """The method called ``name`` with the options ``given``, which must be valid."""
    make = maker(entry(name))
    own = {key: getattr(setting, key) for key in inspect.signature(make).parameters if hasattr(setting, key)}
    return make(**{**own, **(given or {})})


def names() -> Sequence[str]:
    """Every method that a study may name."""
    return [*METHODS, *plugins()]
