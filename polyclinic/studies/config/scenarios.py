"""Scenarios: one file, one study for each of several settings of any keys.

```toml
[[scenarios]]
name = "few-sites"
set.data.sites.count = 4          # tables are merged, all else is replaced
```

Each scenario is a study of its own, with a run folder, records and a report of its own; a panel of data sets is the
same thing with other keys. What stands outside ``[[scenarios]]`` is common to all.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyclinic.core.config_problems import Problem, nearest
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.loader import set_key, table_of, text_of
from polyclinic.studies.config.study_config import Study, checked
from polyclinic.studies.config.toml_text import dumps

_NAME = re.compile(r"^[a-z0-9][a-z0-9-]{0,40}$")


@dataclass(frozen=True)
class Scenario:
    """One study of a file.

    Attributes:
        name: Its own; empty where the file is one study.
        study: What to run.
        text: The study alone, as TOML.
        notes: What was left out of it, in sentences.
    """

    name: str
    study: Study
    text: str
    notes: tuple[str, ...] = ()

    def folder(self, out: Path) -> Path:
        """Where it runs, under ``out``: beside the file's other scenarios, if there are any."""
        called = f"{self.name or self.study.name}-{self.study.hash[:8]}"
        return out / self.study.name / called if self.name else out / called


Complete = Callable[[dict[str, Any]], tuple[dict[str, Any], tuple[str, ...]]]
"""Fills in what a study leaves open, and says what it left out."""


def read_all(
    path: Path, changes: Mapping[str, Any] | None = None, complete: Complete | None = None
) -> tuple[Scenario, ...]:
    """Every study in the file at ``path``, with ``changes`` by dotted key in all of them.

    Raises:
        BadStudy: Lists every problem of all of them.
        FileNotFoundError: Where there is no such file.
    """
    return parse_all(text_of(path), path, changes, complete)


def parse_all(
    text: str,
    path: Path | str = "study.toml",
    changes: Mapping[str, Any] | None = None,
    complete: Complete | None = None,
) -> tuple[Scenario, ...]:
    """Every study in ``text``; ``path`` is its name in messages."""
    data = table_of(text, path, changes)
    items = data.get("scenarios")
    if items is None:
        study, problems = checked(data)
        if problems or study is None:
            raise BadStudy(path, text, data, problems)
        return (Scenario("", study, text if not changes else _written(data, Path(path).name, changes)),)
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
    """What is wrong with the list of scenarios itself."""
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        yield Problem(("scenarios",), "each scenario is a table [[scenarios]] with a name and what it sets")
        return
    names: list[str] = []
    for i, item in enumerate(items):
        name = item.get("name")
        if not isinstance(name, str) or not _NAME.match(name):
            yield Problem(("scenarios", i), "needs a name of small letters, digits and hyphens")
        elif name in names:
            yield Problem(("scenarios", i, "name"), f'two scenarios are called "{name}"')
        names.append(str(name))
        if not isinstance(item.get("set", {}), dict):
            yield Problem(("scenarios", i, "set"), "must be a table of what differs, such as set.rounds = 10")
        for key in item.keys() - {"name", "title", "set"}:
            near = nearest(key, ("name", "title", "set"))
            says = f"unknown key.{near} What a scenario changes stands under set, as in set.{key} = …"
            yield Problem(("scenarios", i, key), says)


def _merged(common: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``common`` changed by ``given``: tables are merged, all else is replaced; quoted keys may be dotted."""
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
    """Where in the file a problem of a scenario's study stands: in what the scenario sets, or in the common part."""
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
