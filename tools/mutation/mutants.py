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
from libcst.metadata import ByteSpanPositionProvider, MetadataWrapper, PositionProvider
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
    """One change of a module.

    Attributes:
        line: The line of the original in which the change begins.
        start: Position in the original at which the changed text begins.
        end: Position of its end.
        new: The text in its place.
    """

    line: int
    start: int
    end: int
    new: str

    def of(self, source: str) -> str:
        """Return the whole changed module."""
        return source[: self.start] + self.new + source[self.end :]

    def diff(self, source: str) -> str:
        """Return the changed lines, as a unified diff without context."""
        before, after = source.splitlines(), self.of(source).splitlines()
        lines = list(difflib.unified_diff(before, after, lineterm="", n=0))[2:]
        return "\n".join(line for line in lines if not line.startswith("@@"))


class Changes:
    """The changes of a module, in the order of its text. The text of each is generated when it is asked for."""

    def __init__(self, source: str) -> None:
        wrapper = MetadataWrapper(cst.parse_module(source), unsafe_skip_copy=True)
        self._source, self._text, self._module = source, source.encode(), wrapper.module
        self._lines, self._spans = wrapper.resolve(PositionProvider), wrapper.resolve(ByteSpanPositionProvider)
        self._all = list(_changes(wrapper.module))

    def __len__(self) -> int:
        return len(self._all)

    def mutant(self, number: int) -> Mutant | None:
        """Return the mutant of one change; None if it leaves the module as it is or is no valid Python."""
        node, new = self._all[number]
        if isinstance(node, cst.BaseCompoundStatement):
            start, end, code = 0, len(self._source), self._module.deep_replace(node, new).code
        else:  # the same, without generating the code of the whole module
            code, span = self._module.code_for_node(new), self._spans[node]
            if self._module.code_for_node(node) == code:
                return None
            start, end = (len(self._text[:k].decode()) for k in (span.start, span.start + span.length))
        mutant = Mutant(self._lines[node].start.line, start, end, code)
        try:
            compile(changed := mutant.of(self._source), "mutant", "exec")
        except SyntaxError:
            return None
        return None if changed == self._source else mutant


def _changes(module: cst.Module) -> Iterator[tuple[cst.CSTNode, cst.CSTNode]]:
    pending: list[cst.CSTNode] = [module]
    while pending:
        node = pending.pop()
        yield from _ours(node)
        if isinstance(node, SKIPPED) or m.matches(node, TYPES) or _is_text(node):
            continue
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                yield from ((node, new) for new in operator(node))
        pending += reversed(node.children)


def _ours(node: cst.CSTNode) -> Iterable[tuple[cst.CSTNode, cst.CSTNode]]:
    if isinstance(node, cst.If | cst.While | cst.CompIf):
        test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
        around = {"lpar": node.test.lpar, "rpar": node.test.rpar} if node.test.lpar else {}
        yield node.test, cst.BooleanOperation(test, cst.And(), cst.Name("False"), **around)
        if not isinstance(node, cst.While):
            yield node.test, cst.BooleanOperation(test, cst.Or(), cst.Name("True"), **around)
    if isinstance(node, cst.Raise) or m.matches(node, m.Expr(value=m.Call() | m.Yield())):
        yield node, cst.Pass()


def _is_text(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.SimpleString) and (" " in node.value or node.value.startswith(('"""', "'''")))
