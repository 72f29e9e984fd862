"""Plain values as TOML text, for studies that are written or changed by a command."""

import json
from collections.abc import Mapping
from typing import Any


def dumps(data: Mapping[str, Any], under: tuple[str, ...] = ()) -> str:
    """Return ``data`` as TOML. Tables become headings, lists of tables ``[[…]]``, and all other values one line."""
    plain = {k: v for k, v in data.items() if v is not None and not _is_table(v)}
    lines = [f"{_key(k)} = {inline(v)}" for k, v in plain.items()]
    for key, value in data.items():
        path = (*under, key)
        name = ".".join(_key(part) for part in path)
        if isinstance(value, Mapping):
            lines += ["", f"[{name}]", dumps(value, path).rstrip("\n")]
        elif _is_table(value):
            for item in value:
                lines += ["", f"[[{name}]]", dumps(item, path).rstrip("\n")]
    return "\n".join(lines).strip("\n") + "\n"


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Mapping) for item in value)
    )


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _quoted(key)


def _quoted(text: str) -> str:
    """Return ``text`` as a basic string. JSON escapes the same characters, except for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def inline(value: Any) -> str:
    """Return a value as TOML on one line."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return _quoted(value)
        case Mapping():
            return "{ " + ", ".join(f"{_key(k)} = {inline(v)}" for k, v in value.items()) + " }"
        case list() | tuple():
            return "[" + ", ".join(inline(item) for item in value) + "]"
    return str(value)
