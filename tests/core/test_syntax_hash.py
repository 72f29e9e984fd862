"""The hash of code covers what runs, whatever the layout, the documentation, the place, and the version of Python."""

import ast
import io
import tokenize
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import polyclinic
from polyclinic.core import syntax_hash
from polyclinic.core.syntax_hash import combined, hash_of_source

SOURCE = '''\
"""What this module does."""

import math
from os import path as p  # a comment

LIMIT: int = 0x10
"""What the limit is for."""


class Box:
    """A box."""

    side = 1.5

    def area(self, times: int = 2, *, scale: float = -1.0) -> float:
        """The area."""
        if times > LIMIT and not scale:
            raise ValueError(f"too {times!r:>{LIMIT}} often {{}}")
        return math.pi * self.side ** 2 + times * scale


def size(x):
    match x:
        case {"a": [1, *rest], **more}:
            return (yield rest), more
        case None | True:
            return b"\\x00\\xff", 1j, ...
    return [y for y in x if y is not None]
'''
SAME: dict[str, Callable[[str], str]] = {
    "layout": lambda s: ast.unparse(ast.parse(s)),
    "windows newlines": lambda s: s.replace("\n", "\r\n"),
    "byte order mark": lambda s: "\ufeff" + s,
    "a comment": lambda s: s + "# more\n",
    "without comments": lambda s: s.replace("  # a comment", ""),
    "docstrings reworded": lambda s: s.replace("The area.", "Area in square meters.\n\n        More.\n        "),
    "module's docstring left out": lambda s: s.replace('"""What this module does."""\n', ""),
    "class's docstring left out": lambda s: s.replace('    """A box."""\n', ""),
    "note on a constant left out": lambda s: s.replace('"""What the limit is for."""\n', ""),
    "docstring added": lambda s: s.replace("def size(x):\n", 'def size(x):\n    """The size."""\n'),
    "number written otherwise": lambda s: s.replace("0x10", "16"),
    "quotes": lambda s: s.replace('{"a"', "{'a'"),
    "parentheses": lambda s: s.replace("times * scale", "(times * scale)"),
    "prefix": lambda s: s.replace('"a"', 'u"a"'),
}
OTHER = {
    "constant": ("0x10", "0x11"),
    "type of a constant": ("1.5", "1"),
    "sign": ("= -1.0", "= 1.0"),
    "operator": ("side ** 2", "side * 2"),
    "comparison": ("times > LIMIT", "times >= LIMIT"),
    "order": ("times * scale", "scale * times"),
    "name": ("self.side", "self.size"),
    "name of a class": ("Box", "Case"),
    "argument": ("times: int = 2", "times: int = 3"),
    "kind of argument": (" *,", ""),
    "annotation": ("-> float", "-> int"),
    "message": ("too", "so"),
    "conversion": ("!r", "!s"),
    "format": (":>", ":<"),
    "brace": ("{{}}", "{{"),
    "bytes": ("x00", "x01"),
    "imaginary number": ("1j", "2j"),
    "ellipsis": ("...", "None"),
    "import": ("import math", "import cmath as math"),
    "alias": ("path as p", "path as q"),
    "level of an import": ("from os", "from .os"),
    "pattern": ("None | True", "None | False"),
    "rest of a pattern": ("*rest]", "*_, rest]"),
    "test": ("is not None", "is None"),
    "decorator": ("class Box", "@object\nclass Box"),
    "statement": ("    side = 1.5\n", "    side = 1.5\n    del side\n"),
}


def hashed(text: str) -> str:
    return hash_of_source(text.encode())


@pytest.mark.parametrize("change", SAME)
def test_what_does_not_run_keeps_the_hash(change: str) -> None:
    changed = SAME[change](SOURCE)
    assert changed != SOURCE
    assert hashed(changed) == hashed(SOURCE)


@pytest.mark.parametrize("change", OTHER)
def test_whatever_runs_changes_the_hash(change: str) -> None:
    old, new = OTHER[change]
    changed = SOURCE.replace(old, new)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(SOURCE))
    assert hashed(changed) != hashed(SOURCE)


def test_a_function_of_a_docstring_alone_is_one_that_passes() -> None:
    assert (
        hashed('def f():\n    """Nothing."""\n') == hashed("def f():\n    pass\n") != hashed("def f():\n    return\n")
    )


FILES = sorted(Path(polyclinic.__file__).parent.rglob("*.py"))


def _tokens(source: bytes) -> list[tokenize.TokenInfo]:
    return list(tokenize.tokenize(io.BytesIO(source).readline))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(FILES), st.data())
def test_laws_on_our_own_files(file: Path, data: st.DataObject) -> None:
    """Printing a file anew keeps the hash; any other number or name in it gives another."""
    source = file.read_bytes()
    assert hash_of_source(ast.unparse(ast.parse(source)).encode()) == hash_of_source(source)
    marks = [
        t
        for t in _tokens(source)
        if t.type == tokenize.NUMBER or (t.type == tokenize.NAME and t.string in ("self", "len"))
    ]
    if not marks:
        return
    mark = data.draw(st.sampled_from(marks))
    lines = source.decode().splitlines(keepends=True)
    (row, start), (_, end) = mark.start, mark.end
    word = "17731" if mark.type == tokenize.NUMBER else "another_name"
    lines[row - 1] = lines[row - 1][:start] + word + lines[row - 1][end:]
    assert hash_of_source("".join(lines).encode()) != hash_of_source(source)


@given(
    st.lists(st.sampled_from([b"a = 1\n", b"a = 2\n", b"b = 1\n", b"", b'"""Words."""\n', b"# note\n"]), max_size=6),
    st.randoms(),
)
def test_order_and_files_without_code_do_not_count(sources: list[bytes], random: Random) -> None:
    found = combined(map(hash_of_source, sources))
    random.shuffle(sources)
    assert combined(map(hash_of_source, sources)) == found
    assert combined(hash_of_source(s) for s in sources if b"=" in s) == found
    assert combined(map(hash_of_source, [*sources, b"a = 1\n"])) != found


def test_what_is_no_python_is_hashed_by_its_bytes() -> None:
    broken = [b"def f(:\n", b"def g(:\n", b"a = '\x00'\n", b"# coding: nonsense\n", b"(" * 5000, b"\xff\xfe"]
    assert len({hash_of_source(source) for source in broken}) == len(broken)


# Every supported Python must give these (compared under 3.11, 3.12 and 3.13). A change of them changes the hash of every installation.
KNOWN = {
    "x = 1\n": "4cc7062884499db9e578f0711d8d087bd5223df5d2df24f80a8895e4723f5be2",
    'async def f(*a: int, b=None, **c):\n    async with a as b, c: await b\n    return f"{a}b{c!r:>{b}}{{"\n': "03267844d927b8863a7789c717ba64d575cfd5ab0d200ea8bec5d1b092d2d750",
    SOURCE: "b38fd97b36e950dd9e2f09e51bccb8dbe921909ce6cb7e3aafddc0f0845aa613",
}


@pytest.mark.parametrize("source", KNOWN)
def test_known_answers(source: str) -> None:
    assert hashed(source) == KNOWN[source]


def test_trees_of_other_versions_of_python_have_the_same_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fields that a version adds or leaves out, and f-strings that it splits otherwise."""
    source = 'class A:\n    def f(self): return f"a{{b{self:}c" "d"\n'
    found = hashed(source)
    tree = ast.parse(source)

    class Newer(ast.NodeTransformer):
        def generic_visit(self, node: ast.AST) -> ast.AST:
            super().generic_visit(node)
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                node.type_params = []  # type: ignore[union-attr, unused-ignore]  # Python 3.12
                monkeypatch.setattr(type(node), "_fields", (*dict.fromkeys((*type(node)._fields, "type_params")),))
                node.returns = None  # type: ignore[union-attr]
            if isinstance(node, ast.FormattedValue):
                node.format_spec = ast.JoinedStr([ast.Constant("")])
            if isinstance(node, ast.JoinedStr):
                split = [ast.Constant(c) for c in "a{b"]
                node.values = (
                    [*split, *node.values[1:2], ast.Constant("c"), ast.Constant(""), ast.Constant("d")]
                    if len(node.values) > 1
                    else node.values
                )
            return node

    newer = Newer().visit(tree)
    if hasattr(newer.body[0], "keywords"):
        del newer.body[0].keywords  # as a tree that was made by hand before Python 3.13
    syntax_hash._fields.cache_clear()
    monkeypatch.setattr(ast, "parse", lambda _: newer)
    try:
        assert hashed(source) == found
    finally:
        syntax_hash._fields.cache_clear()
