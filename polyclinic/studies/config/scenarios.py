"""Scenarios: one file, one study for each of several settings of any keys.

```toml
[[scenarios]]
name = "few-sites"
set.data.sites.count = 4          # tables are merged, all else is replaced
```

Each scenario is a separate study with its own run folder, records and report. A panel of data sets is written in the
same way, with other keys. Settings outside ``[[scenarios]]`` are common to all scenarios.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyclinic.core.config_problems import Problem, nearest
from polyclinic.core.toml_text import dumps
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.loader import set_key, table_of, text_of
from polyclinic.studies.config.study_config import Study, checked

_NAME = re.compile(r"^[a-z0-9][a-z0-9-]{0,40}$")


@dataclass(frozen=True)
class Scenario:
    """One study of a file.

    Attributes:
        name: Name of the scenario; empty if the file contains one study.
        study: The study.
        text: The study alone, as TOML.
        notes: Sentences on what was omitted from it.
    """

    name: str
    study: Study
    text: str
    notes: tuple[str, ...] = ()

    def folder(self, out: Path) -> Path:
        """Return its run folder in ``out``, next to those of the file's other scenarios."""
        called = f"{self.name or self.study.name}-{self.study.hash[:8]}"
        return out / self.study.name / called if self.name else out / called


Complete = Callable[[dict[str, Any]], tuple[dict[str, Any], tuple[str, ...]]]
"""Completes a study, and returns notes on what it omitted."""


def read_all(
    path: Path, changes: Mapping[str, Any] | None = None, complete: Complete | None = None
) -> tuple[Scenario, ...]:
    """Return every study in the file at ``path``, with ``changes`` by dotted key in all of them.

    Raises:
        BadStudy: If a study is invalid. The message lists the problems of all studies.
        ConfigError: If the file does not exist or cannot be read.
    """
    return parse_all(text_of(path), path, changes, complete)


def parse_all(
    text: str,
    path: Path | str = "study.toml",
    changes: Mapping[str, Any] | None = None,
    complete: Complete | None = None,
) -> tuple[Scenario, ...]:
    """Return every study in ``text``; ``path`` is its name in messages."""
    return studies_in(table_of(text, path, changes), text, path, changes, complete)


def studies_in(
    data: dict[str, Any],
    text: str,
    path: Path | str,
    changes: Mapping[str, Any] | None = None,
    complete: Complete | None = None,
) -> tuple[Scenario, ...]:
    """Return every study in the table ``data`` of a file with this ``text`` and ``path``.

    Args:
        data: The table, with ``changes``.
        text: The text of the file, for the lines of messages.
        path: Its name in messages.
        changes: The changes, which are named in the text of each study.
        complete: Completes each study.
    """
    if "scenarios" in data:
        return _scenarios(data, text, path, changes, complete)
    study, problems = checked(data)
    if problems or study is None:
        raise BadStudy(path, text, data, problems)
    return (Scenario("", study, text if not changes else _written(data, Path(path).name, changes)),)


def _scenarios(
    data: dict[str, Any], text: str, path: Path | str, changes: Mapping[str, Any] | None, complete: Complete | None
) -> tuple[Scenario, ...]:
    """Return the studies of a file with scenarios. The arguments are those of ``studies_in``."""
    items = data["scenarios"]
    common = {key: value for key, value in data.items() if key != "scenarios"}
    problems = list(_form(items))
    found = []
    for i, item in enumerate(items if not problems else []):
        whole, notes = _merged(common, item.get("set", {})), tuple[str, ...]()
        if complete is not None:
            whole, notes = complete(whole)
        study, wrong = checked(whole)
        problems += [Problem(_place(p.path, item, i), p.says) for p in wrong]
        if study is not None:
            title = f"{study.title or study.name}: {item.get('title', item['name'])}"
            titled = study.model_copy(update={"title": title})
            told = _written(whole, f"{Path(path).name}, {item['name']}", changes)
            found.append(Scenario(item["name"], titled, "".join(f"# {note}\n" for note in notes) + told, notes))
    if problems:
        raise BadStudy(path, text, data, problems)
    return tuple(found)


def _form(items: Any) -> Iterator[Problem]:
    """Yield the problems of the list of scenarios itself."""
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        yield Problem(("scenarios",), "each scenario is a table [[scenarios]] with a name and what it sets")
        return
    names: list[str] = []
    for i, item in enumerate(items):
        name = item.get("name")
        if not isinstance(name, str) or not _NAME.match(name):
            yield Problem(("scenarios", i), "needs a name of lowercase letters, digits and hyphens")
        elif name in names:
            yield Problem(("scenarios", i, "name"), f'two scenarios are called "{name}"')
        names.append(str(name))
        if not isinstance(item.get("set", {}), dict):
            yield Problem(("scenarios", i, "set"), "must be a table of changed settings, such as set.rounds = 10")
        for key in item.keys() - {"name", "title", "set"}:
            near = nearest(key, ("name", "title", "set"))
            says = f"unknown key.{near} A scenario changes settings under set, as in set.{key} = …"
            yield Problem(("scenarios", i, key), says)


def _merged(common: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``common`` with the changes ``given``. Tables are merged, and other values are replaced."""
    found = copy.deepcopy(dict(common))
    for key, value in given.items():
        if "." in key:
            set_key(found, key.split("."), value)
        elif isinstance(value, Mapping) and isinstance(found.get(key), Mapping):
            found[key] = _merged(found[key], value)
        else:
            found[key] = copy.deepcopy(value)
    return found


def _place(path: tuple[str | int, ...], item: Mapping[str, Any], index: int) -> tuple[str | int, ...]:
    """Return the path in the file of a problem of a scenario: in its own settings or in the common ones."""
    given: Any = item.get("set", {})
    if not path:
        return ("scenarios", index)
    for depth, part in enumerate(path):
        if not isinstance(given, Mapping) or part not in given:
            return path if depth == 0 else ("scenarios", index, "set", *path[:depth])
        given = given[part]
    return ("scenarios", index, "set", *path)


def _written(data: Mapping[str, Any], name: str, changes: Mapping[str, Any] | None) -> str:
    """A study as TOML, saying where it is from."""
    told = f", changed by {' '.join(f'--set {key}={value}' for key, value in changes.items())}" if changes else ""
    return f"# {name}{told}\n{dumps(data)}"
