"""Generate mutants: copies of a module that differ from it in one place.

The operators are mutmut's (https://github.com/boxed/mutmut, BSD license): numbers, names, keywords, arithmetic and
comparison operators, arguments, assignments, conditional expressions. Three are ours: a condition that always or never
holds, a statement that is left out, and an exception that is not raised.

Not mutated, because no test should depend on it: annotations, decorators, imports, type variables, docstrings, and
texts for people (everything inside ``raise``, f-strings, and string literals that contain a space).
"""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import libcst as cst
import libcst.matchers as m
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

SKIPPED = (
    cst.Annotation,
    cst.Decorator,
    cst.Import,
    cst.ImportFrom,
    cst.FormattedString,
    cst.ConcatenatedString,
    cst.Raise,
)
TYPES = m.Assign(value=m.Call(func=m.Name("TypeVar"))) | m.AnnAssign(annotation=m.Annotation(m.Name("TypeAlias")))


@dataclass(frozen=True)
class Mutant:
    """One changed copy of a module.

    Attributes:
        line: The line of the original in which the change begins.
        source: The whole changed module.
        diff: The changed lines, as a unified diff without context.
    """

    line: int
    source: str
    diff: str


def mutants(source: str) -> list[Mutant]:
    """Return every mutant of ``source``, in the order of lines, without repeats."""
    wrapper = MetadataWrapper(cst.parse_module(source))
    places = wrapper.resolve(PositionProvider)
    found: dict[str, Mutant] = {}
    for node, new in _changes(wrapper.module):
        changed = wrapper.module.deep_replace(node, new).code
        if changed == source or changed in found:
            continue
        try:
            compile(changed, "mutant", "exec")
        except SyntaxError:
            continue
        found[changed] = Mutant(places[node].start.line, changed, _diff(source, changed))
    return sorted(found.values(), key=lambda mutant: mutant.line)


def _changes(module: cst.Module) -> Iterator[tuple[cst.CSTNode, cst.CSTNode]]:
    pending: list[cst.CSTNode] = [module]
    while pending:
        node = pending.pop()
        yield from ((node, new) for new in _ours(node))
        if isinstance(node, SKIPPED) or m.matches(node, TYPES) or _is_text(node):
            continue
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                yield from ((node, new) for new in operator(node))
        pending += reversed(node.children)


def _ours(node: cst.CSTNode) -> Iterable[cst.CSTNode]:
    if isinstance(node, cst.If | cst.While | cst.CompIf):
        test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
        never = cst.BooleanOperation(test, cst.And(), cst.Name("False"))
        always = cst.BooleanOperation(test, cst.Or(), cst.Name("True"))
        yield node.with_changes(test=never)
        if not isinstance(node, cst.While):
            yield node.with_changes(test=always)
    if isinstance(node, cst.Raise) or m.matches(node, m.Expr(value=m.Call() | m.Yield())):
        yield cst.Pass()


def _is_text(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.SimpleString) and (" " in node.value or node.value.startswith(('"""', "'''")))


def _diff(before: str, after: str) -> str:
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0))[2:]
    return "\n".join(line for line in lines if not line.startswith("@@"))
