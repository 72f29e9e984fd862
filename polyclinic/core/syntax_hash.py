"""Hashes of Python code over its syntax tree.

The hash of a set of files does not depend on their names, places or order, nor on comments, docstrings and layout. Any
other change alters it: a constant, an operator, a name, a message in a ``raise``, an import statement. Files without
code (an ``__init__.py`` with a docstring) do not contribute.

This module serializes the tree itself, because the output of ``ast.dump`` differs between Python versions. Sites with
different versions of Python must get the same hash from the same source, so differences between the versions are
omitted or normalized: fields that are absent or empty (``type_params`` before Python 3.12), and how the constant parts
of an f-string are split.

Two files that exchange their names keep the hash, and so does a change of a ``__doc__`` that code reads. The hash shows
whether two installations compute the same; it does not protect against a person who can change the installation.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

SKIPPED = frozenset({"ctx", "kind", "type_comment", "type_ignores"})
"""Fields of nodes that do not affect execution, or that follow from the position of the node."""


def combined(hashes: Iterable[str]) -> str:
    """Return the SHA-256 of the hashes of files, in any order. Empty hashes, of files without code, are ignored."""
    return hashlib.sha256("\n".join(sorted(filter(None, hashes))).encode()).hexdigest()


def hash_of_source(source: bytes) -> str:
    """Return the SHA-256 of one Python file in hexadecimal; empty if the file holds no code.

    A file that this version of Python cannot parse is hashed byte by byte, so that damage also changes the hash.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return hashlib.sha256(b"not Python\n" + source).hexdigest()
    if not (body := _statements(tree.body)):
        return ""
    tokens: list[bytes] = []
    _write(body, tokens)
    return hashlib.sha256(b"".join(tokens)).hexdigest()


def _statements(body: list[Any]) -> list[Any]:
    """Return the statements that are not docstrings. Any string expression statement counts as a docstring."""
    return [node for node in body if not _is_docstring(node)]


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _write(value: Any, tokens: list[bytes]) -> None:
    """Append the canonical form of a node, a list or a plain value. Each begins with its kind and its length."""
    if isinstance(value, ast.AST):
        _write_node(value, tokens)
    elif isinstance(value, list):
        tokens.append(b"[%d" % len(value))
        for item in value:
            _write(item, tokens)
    elif isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        tokens.append(b"s%d:%b" % (len(text), text))
    elif isinstance(value, bytes):
        tokens.append(b"b%d:%b" % (len(value), value))
    elif isinstance(value, bool) or value is None or value is ...:
        tokens.append(b"<%b>" % repr(value).encode())
    elif isinstance(value, int):
        tokens.append(b"i%x;" % value)
    else:
        tokens.append(b"n%b;" % repr(value).encode())  # float and complex: repr gives every bit


def _write_node(node: ast.AST, tokens: list[bytes]) -> None:
    cls = type(node)
    tokens.append(b"(%b" % cls.__name__.encode())
    for name, token in _fields(cls):  # type: ignore[arg-type]  # mypy takes AST for unhashable
        value: Any = getattr(node, name, None)
        if name in ("body", "orelse", "finalbody") and isinstance(value, list) and value:
            value = _statements(value) or [ast.Pass()]
        elif cls is ast.JoinedStr:
            value = list(_joined(value))
        elif name == "format_spec" and isinstance(value, ast.JoinedStr):
            value = value if list(_joined(value.values)) else None
        if (value is None or value == []) and cls is not ast.Constant:
            continue
        tokens.append(token)
        if isinstance(value, ast.AST):
            _write_node(value, tokens)
        else:
            _write(value, tokens)
    tokens.append(b")")


@cache
def _fields(cls: Any) -> tuple[tuple[str, bytes], ...]:
    """Return the relevant fields of a kind of node by name, with the token that precedes each."""
    return tuple((name, b",%b=" % name.encode()) for name in sorted(cls._fields) if name not in SKIPPED)


def _joined(parts: list[Any]) -> Iterator[Any]:
    """Yield the parts of an f-string, with adjacent constants merged and empty ones removed."""
    text: str = ""
    for part in parts:
        if isinstance(part, ast.Constant):
            text += str(part.value)
            continue
        if text:
            yield text
        text = ""
        yield part
    if text:
        yield text
