"""Parts that a program registers, and those of installed packages: found by name, never replaced."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from polyclinic.core import extensions
from polyclinic.core.plugin_packages import (
    Package,
    allows,
    entry_points_in,
    exact_rule,
    normalized,
    packages_of,
    texts_in,
)
from polyclinic.errors import ConfigError
from tests.support.plugin_package import with_metadata


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two packages: one with a module in a single file, one with a folder; both provide the loss ``both``."""
    groups = {"polyclinic.losses": {"soft": "one_module:soft", "both": "one_module:soft"}}
    with_metadata(tmp_path, "One.Module", "1.2", groups)
    groups = {"polyclinic.losses": {"both": "two_folder.part:hard", "again": "two_folder.part:hard"}}
    with_metadata(tmp_path, "two_folder", "3", groups | {"other.losses": {"alien": "two_folder.part:hard"}})
    (tmp_path / "one_module.py").write_text("def soft(): return 'soft'\n")
    (tmp_path / "two_folder" / "__pycache__").mkdir(parents=True)
    (tmp_path / "two_folder" / "__init__.py").write_text("raise SystemExit('imported')\n")
    (tmp_path / "two_folder" / "part.py").write_text("hard = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "one_module", raising=False)
    extensions._loaded.cache_clear()
    yield tmp_path
    extensions._loaded.cache_clear()


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "_registered", {})


def test_a_registered_part_is_found_by_its_name_in_its_group(registered: None) -> None:
    part, other = object(), object()
    name = extensions.register("losses", "mine", part)
    assert name == "local:mine"
    assert extensions.register("losses", "mine", part) == name, "the same part again"
    with pytest.raises(ConfigError, match="another of the losses is registered as 'local:mine'"):
        extensions.register("losses", "mine", other)
    assert extensions.register("networks", "mine", other) == name
    assert extensions.load("losses", name) is part
    assert extensions.load("networks", name) is other
    assert extensions.names("losses")[-1:] == (name,)
    with pytest.raises(ConfigError, match="none of the metrics is called 'local:mine'"):
        extensions.load("metrics", name)


def test_parts_of_packages_are_listed_without_an_import_and_loaded_once(packages: Path, registered: None) -> None:
    extensions.register("losses", "mine", 1)
    assert extensions.names("losses") == ("again", "both", "soft", "local:mine")
    assert {point.name for point in entry_points_in("losses")} == {"again", "both", "soft"}
    assert entry_points_in("no-such-group") == ()
    assert extensions.load("losses", "soft")() == "soft"
    with pytest.raises(ConfigError, match=r"'both' of the losses is provided by several packages \(One.Module, two_f"):
        extensions.load("losses", "both")
    with pytest.raises(ConfigError, match=r"'none'\. Of installed packages: again, both, soft, local:mine\. If"):
        extensions.load("losses", "none")


def test_the_hash_follows_every_file_of_the_package_and_nothing_else(packages: Path) -> None:
    def found() -> dict[str, Package]:
        return {package.name: package for package in packages_of({"losses": ["soft", "again", "unknown"]})}

    before = found()
    assert {(p.name, p.version) for p in before.values()} == {("one-module", "1.2"), ("two-folder", "3")}
    for without_effect in ("two_folder/__pycache__/part.pyc", "two_folder/x.pyo", "one_module.pyc", "else.py"):
        (packages / without_effect).write_text("x")
    (packages / "two_folder-3.dist-info" / "RECORD").write_text("two_folder-3.dist-info/entry_points.txt,,\n")
    (packages / "two_folder-3.dist-info" / "INSTALLER").write_text("pip")
    assert found() == before
    for file, name in (
        ("one_module.py", "one-module"),
        ("two_folder/part.py", "two-folder"),
        ("two_folder/data.bin", "two-folder"),
        ("two_folder/deep/er.py", "two-folder"),
    ):
        (packages / file).parent.mkdir(exist_ok=True)
        (packages / file).write_text("changed = 1\n")
        after = found()
        assert {key for key in after if after[key] != before[key]} == {name}
        assert len(after[name].hash) == 64
        before = after
    entry = packages / "two_folder-3.dist-info" / "entry_points.txt"
    entry.write_text(entry.read_text() + "more = two_folder.part:hard\n")
    assert found()["two-folder"].hash != before["two-folder"].hash
    (packages / "two_folder" / "part.py").rename(packages / "two_folder" / "port.py")
    assert found()["two-folder"].hash != before["two-folder"].hash
    assert packages_of({"losses": [], "networks": ["soft"]}) == ()


def test_rules_allow_a_package_by_name_version_and_hash() -> None:
    package = Package("a-package", "1.2", "0" * 64)
    allowed = ("a-package", "A.Package", "a_package==1.2", f"a-package@{'0' * 64}", exact_rule(package))
    assert all(allows(rule, package) for rule in allowed)
    refused = ("b-package", "a-package==1.3", f"a-package@{'1' * 64}", f"a-package==1.3@{'0' * 64}", "a-package==1")
    assert not any(allows(rule, package) for rule in refused)
    assert exact_rule(package) == f"a-package==1.2@{'0' * 64}"
    assert normalized("Some._-.Name") == "some-name"


def test_every_text_of_a_nest_is_found_and_no_key() -> None:
    nest = {"a": "1", "b": ["2", ("3", {"c": "4"}), 5, None], "d": {"e": {"f": "6"}}}
    assert list(texts_in(nest)) == ["1", "2", "3", "4", "6"]
