"""What is written as TOML is read back as it was."""

import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.core.toml_text import dumps, inline

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
PLAIN = st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)


@settings(max_examples=40)
@given(st.dictionaries(TEXT, VALUES, max_size=4))
def test_tables_are_read_back(table: dict[str, Any]) -> None:
    assert tomllib.loads(dumps(table)) == table
    assert tomllib.loads(f"a = {inline(table)}") == {"a": table}
    assert "\n" not in inline(table)


@pytest.mark.parametrize("text", ["\x7f", "😀", '"', "\\", "a\nb", "\x00", "é", ""])
def test_any_text_is_a_key_and_a_value(text: str) -> None:
    for table in ({text: text}, {text: {text: [text]}}, {"a": [{text: text}]}):
        assert tomllib.loads(dumps(table)) == table
        assert tomllib.loads(f"a = {inline(table)}") == {"a": table}


def test_values_come_before_tables_none_is_left_out_and_bare_keys_have_no_quotes() -> None:
    table = {"t": {"x_1": 1, "list": [{"a-b": 1, "in": {"c": True}}, {}]}, "none": None, "v": ("p", 2.5), "é": 1}
    text = 'v = ["p", 2.5]\n"é" = 1\n\n[t]\nx_1 = 1\n\n[[t.list]]\na-b = 1\n\n[t.list.in]\nc = true\n\n[[t.list]]\n'
    assert dumps(table) == text
