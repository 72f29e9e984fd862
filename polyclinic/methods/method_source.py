"""What a method's page needs of its source: docstrings, options and defaults.

``read`` takes them from the syntax tree, without importing the method and therefore without importing PyTorch, which
takes seconds. What it cannot determine in this way, and methods of other packages, are imported (``imported``). Both
give the same, which a test compares for every method.
"""

import ast
import inspect
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from polyclinic.methods.catalog import METHODS, Entry

PROVIDED = frozenset({"task", "local", "sites", "rounds", "population"})
"""Arguments that the study provides (``registry.Setting``), so that they are not options."""
PACKAGE = Path(__file__).parents[1]
Place = tuple[str, ast.stmt]
"""The name of a module of Polyclinic, and a definition in it."""


@dataclass(frozen=True)
class MethodSource:
    """The source of a method.

    Attributes:
        maker: Docstring of what builds the method, if that is a function; otherwise empty.
        method: Docstring of its class, if that is defined in the same module; otherwise empty.
        module: Docstring of the module.
        classes: Docstrings of all classes of the module.
        lineage: Docstrings of its class and of the classes from which it inherits, the most general first.
        options: What a study may set, with the defaults; ``inspect.Parameter.empty`` if there is none.
    """

    maker: str
    method: str
    module: str
    classes: tuple[str, ...]
    lineage: tuple[str, ...]
    options: dict[str, Any]


def source_of(entry: Entry) -> MethodSource:
    """Return the source of the method in the table of methods, or of an installed package."""
    try:
        return read(entry)
    except _NotStatic:
        return imported(entry)


def imported(entry: Entry) -> MethodSource:
    """Return the source of a method by importing it."""
    from polyclinic.methods.registry import maker, options

    make = maker(entry)
    module = inspect.getmodule(make)
    built = make if inspect.isclass(make) else inspect.signature(make).return_annotation
    if not isinstance(built, type):
        built = getattr(module, str(built), None)
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == make.__module__]
    return MethodSource(
        "" if make is built else inspect.getdoc(make) or "",
        inspect.getdoc(built) or "" if built is not None and built.__module__ == make.__module__ else "",
        inspect.getdoc(module) or "",
        tuple(inspect.cleandoc(c.__doc__ or "") for c in own),
        tuple(inspect.cleandoc(c.__doc__ or "") for c in reversed(built.__mro__ if built else ())),
        {name: p.default for name, p in options(entry).items()},
    )


class _NotStatic(Exception):
    """Something that only the imported method can tell."""


def read(entry: Entry) -> MethodSource:
    """Return the source of a method of Polyclinic from its syntax tree.

    Raises:
        _NotStatic: If it must be imported.
    """
    if METHODS.get(entry.name) is not entry:
        raise _NotStatic
    path, _, name = entry.make.partition(":")
    home, make = _definition(f"polyclinic.methods.{path}", name)
    tree = _tree(home)
    built: Place | None = (home, make)
    if isinstance(make, ast.FunctionDef):
        built = _definition(home, make.returns.id) if isinstance(make.returns, ast.Name) else None
        defaults = zip(make.args.kwonlyargs, make.args.kw_defaults, strict=True)
        found = {argument.arg: (home, default) for argument, default in defaults}
    elif isinstance(make, ast.ClassDef):
        found = {key: value for key, value in _fields(_lineage(home, make)).items() if key not in PROVIDED}
    else:
        raise _NotStatic
    lineage = _lineage(*built) if built else []
    return MethodSource(
        "" if built == (home, make) else _doc(make),
        _doc(built[1]) if built and built[0] == home else "",
        _doc(tree),
        tuple(_doc(node) for node in tree.body if isinstance(node, ast.ClassDef)),
        tuple(_doc(node) for _, node in reversed(lineage)),
        {
            key: entry.defaults[key] if key in entry.defaults else _value(*default)
            for key, default in found.items()
            if key not in entry.fixed
        },
    )


@lru_cache(maxsize=64)
def _tree(module: str) -> ast.Module:
    place = PACKAGE.joinpath(*module.split(".")[1:])
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return ast.parse(file.read_bytes())


def _definition(module: str, name: str) -> Place:
    """Return where ``name``, as ``module`` uses it, is defined in Polyclinic."""
    for node in _tree(module).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("polyclinic."):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(node.module, alias.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if getattr(node, "name", None) == name or any(isinstance(t, ast.Name) and t.id == name for t in targets):
            return module, node
    raise _NotStatic


def _lineage(module: str, node: ast.stmt) -> list[Place]:
    """Return the definitions of a class and of those of Polyclinic that it inherits from, itself first."""
    if not isinstance(node, ast.ClassDef):
        raise _NotStatic
    bases = []
    for base in node.bases:
        named = base.value if isinstance(base, ast.Subscript) else base
        if not isinstance(named, ast.Name):
            raise _NotStatic
        if named.id not in ("ABC", "Generic", "Protocol"):
            bases.append(_definition(module, named.id))
    if len(bases) > 1:
        raise _NotStatic
    return [(module, node), *(_lineage(*bases[0]) if bases else [])]


def _fields(lineage: list[Place]) -> dict[str, tuple[str, ast.expr | None]]:
    """Return the fields of a dataclass in order, each with its default and the module that this belongs to."""
    found: dict[str, tuple[str, ast.expr | None]] = {}
    for module, node in reversed(lineage):
        assert isinstance(node, ast.ClassDef)
        if any(isinstance(part, ast.FunctionDef) and part.name == "__init__" for part in node.body):
            raise _NotStatic
        if not node.decorator_list:
            continue
        if "kw_only" in ast.unparse(node):
            raise _NotStatic
        for part in node.body:
            if not isinstance(part, ast.AnnAssign) or ast.unparse(part.annotation).startswith("ClassVar"):
                continue
            if isinstance(part.target, ast.Name):
                found[part.target.id] = (module, part.value)
    return found


def _value(module: str, node: ast.expr | None) -> Any:
    """Return the value of a default: a literal, or a constant of a module."""
    if node is None:
        return inspect.Parameter.empty
    try:
        return ast.literal_eval(node)
    except ValueError:
        if not isinstance(node, ast.Name):
            raise _NotStatic from None
    home, constant = _definition(module, node.id)
    if not isinstance(constant, ast.Assign | ast.AnnAssign):
        raise _NotStatic
    return _value(home, constant.value)


def _doc(node: ast.AST) -> str:
    """Return the docstring of a module, class or function."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
        return ast.get_docstring(node) or ""
    raise _NotStatic
