"""Put a mutant in the place of an imported module's functions, or of the module itself."""

import functools
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def functions_of(code: types.CodeType) -> dict[str, types.CodeType]:
    """The code of a module's functions and methods by qualified name; not of functions within functions."""
    found: dict[str, types.CodeType] = {}
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            if const.co_flags & 2 or const.co_name.startswith("<"):  # a new scope of locals: a function
                found[const.co_qualname] = const
            else:  # the body of a class
                found |= functions_of(const)
    return found


def changed_functions(original: types.CodeType, mutant: types.CodeType) -> set[str] | None:
    """The functions in which two versions of a module differ; None if they also differ outside functions."""
    ours, theirs = functions_of(original), functions_of(mutant)
    if ours.keys() != theirs.keys() or _frame(original) != _frame(mutant):
        return None
    return {name for name in ours if ours[name] != theirs[name]}


def swap(module: types.ModuleType, mutant: types.CodeType, names: set[str]) -> bool:
    """Give the functions called ``names`` the code they have in ``mutant``; whether all could be found and changed."""
    codes = functions_of(mutant)
    for name in names:
        holder: Any = module
        *path, last = name.split(".")
        for step in path:
            holder = vars(holder).get(step)
            if holder is None:
                return False
        function = _function(vars(holder).get(last))
        if function is None or function.__qualname__ != name:
            return False
        try:
            function.__code__ = codes[name]
        except ValueError:  # another number of free variables
            return False
    return True


class Replaced(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports ``source`` as the module ``name``, in place of the module's file."""

    def __init__(self, name: str, path: str, source: str) -> None:
        self.name, self.path, self.source = name, path, source

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        """Only for the one module."""
        if name != self.name:
            return None
        return importlib.machinery.ModuleSpec(name, self, origin=self.path)

    def exec_module(self, module: types.ModuleType) -> None:
        """Run the mutant's source."""
        module.__file__ = self.path
        exec(compile(self.source, self.path, "exec"), module.__dict__)

    def install(self) -> None:
        """Use this finder before all others."""
        sys.meta_path.insert(0, self)


def _frame(code: types.CodeType) -> tuple[Any, ...]:
    """All of a module's code but the insides of its functions."""
    consts = []
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            function = const.co_flags & 2 or const.co_name.startswith("<")
            consts.append(const.co_qualname if function else _frame(const))
        else:
            consts.append((type(const), const))
    return (code.co_code, code.co_names, tuple(consts))


def _function(found: Any) -> types.FunctionType | None:
    for _ in range(4):
        match found:
            case types.FunctionType():
                inner = getattr(found, "__wrapped__", None)
                if inner is None:
                    return found
                found = inner
            case property():
                found = found.fget
            case functools.cached_property():
                found = found.func
            case classmethod() | staticmethod():
                found = found.__func__
            case _:
                found = getattr(found, "__wrapped__", None)
    return None


class Calls:
    """Notes which functions of ``paths`` are called while it is on: name of the path, colon, qualified name."""

    def __init__(self, paths: Mapping[str, str]) -> None:
        self.paths, self.names = paths, set[str]()

    def __call__(self, frame: types.FrameType, event: str, arg: Any) -> None:
        """As ``sys.setprofile`` wants it."""
        if event == "call" and (name := self.paths.get(frame.f_code.co_filename)):
            self.names.add(f"{name}:{frame.f_code.co_qualname.split('.<locals>')[0]}")

    def taken(self) -> Iterator[str]:
        """The names since the last time."""
        names, self.names = self.names, set()
        return iter(sorted(names))
