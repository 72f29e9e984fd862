"""Plug-in packages: found and hashed without an import, and refused unless the policy names them."""

import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from polyclinic.core import plugin_packages as plugins
from polyclinic.core.plugin_packages import Package, allows, exact_rule
from polyclinic.engines.policy import site_policy as policies
from polyclinic.methods import registry
from polyclinic.methods.plugins import methods_in, packages_in
from tests.support.local_deployment import order

CODE = """
from polyclinic.methods.optimization.fedavg import FedAvg as fedavg

def make(task, local):
    return fedavg(task, local)
"""
Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Lays a package down as pip does; an editable one with its sources elsewhere."""
    count = iter(range(9))

    def put(
        name: str = "Mine.Pack",
        version: str = "1.0",
        method: str = "mine",
        module: str = "minepack",
        editable: bool = False,
    ) -> Path:
        root = tmp_path / f"site-packages-{next(count)}"
        source = tmp_path / "src" if editable else root
        (source / module).mkdir(parents=True)
        (source / module / "__init__.py").write_text("")
        (source / module / "make.py").write_text(CODE)
        info = root / f"{module}-{version}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[polyclinic.methods]\n{method} = {module}.make:make\n")
        (info / "INSTALLER").write_text("pip\n")
        files = [f"{info.name}/{name}" for name in ("METADATA", "entry_points.txt", "INSTALLER", "RECORD")]
        files += [] if editable else [f"{module}/__init__.py", f"{module}/make.py", f"{module}/__pycache__/make.pyc"]
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        for place in {root, source}:
            monkeypatch.syspath_prepend(str(place))
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.delitem(sys.modules, f"{module}.make", raising=False)
        return source / module

    return put


@pytest.mark.parametrize("editable", [False, True])
def test_any_change_of_a_package_changes_the_hash_of_its_method(install: Install, editable: bool) -> None:
    folder, an = install(editable=editable), order("mine")
    (package,) = an.packages
    assert package[:2] == ("mine-pack", "1.0")
    found = [an.method_hash]
    for change in (
        lambda: (folder / "make.py").write_text(CODE + "# changed\n"),
        lambda: (folder / "more.py").write_text(""),
        lambda: (folder / "more.py").rename(folder / "other.py"),
        lambda: (folder / "weights.bin").write_bytes(b"\x00"),
    ):
        change()
        found.append(an.method_hash)
    assert len(set(found)) == len(found)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "make.cpython-311.pyc").write_bytes(b"x")
    assert an.method_hash == found[-1], "compiled copies are not part of it"
    assert "minepack" not in sys.modules
    assert order().method_hash not in found


def test_the_version_and_the_name_are_in_the_hash_and_the_installer_is_not(install: Install) -> None:
    folder = install()
    info = folder.with_name("minepack-1.0.dist-info")
    (before,) = packages_in({"method": "mine"})
    (info / "INSTALLER").write_text("uv\n")
    assert packages_in({"method": "mine"}) == (before,)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: Mine.Pack\nVersion: 1.1\n")
    an = order("mine")
    assert packages_in({"method": "mine"}) == (before._replace(version="1.1"),)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: Mine.Pack\nVersion: 1.0\n")
    other = order("mine").method_hash
    assert an.method_hash == other  # the same files and version again
    (info / "entry_points.txt").write_text("[polyclinic.methods]\nmine = minepack.make:other\n")
    assert packages_in({"method": "mine"})[0].hash != before.hash


def test_what_is_installed_is_read_again_after_every_change_and_only_then(install: Install) -> None:
    assert "mine" not in registry.plugins()
    info = install().with_name("minepack-1.0.dist-info")
    assert "mine" in registry.plugins()
    (info / "entry_points.txt").write_text("[polyclinic.methods]\nours = minepack.make:make\n")
    assert registry.plugins().keys() & {"mine", "ours"} == {"ours"}
    reads = plugins._entry_points.cache_info().misses
    assert packages_in({"method": "ours", "network": "mine"})
    assert plugins._entry_points.cache_info().misses == reads
    shutil.rmtree(info)
    assert "ours" not in registry.plugins()
    assert packages_in({"method": "ours"}) == ()


def test_a_module_of_one_file_is_hashed_too(install: Install) -> None:
    folder = install()
    info = folder.with_name("minepack-1.0.dist-info")
    (info / "entry_points.txt").write_text("[polyclinic.methods]\nmine = lonely:make\n")
    lonely = folder.with_name("lonely.py")
    lonely.write_text(CODE)
    before = packages_in({"method": "mine"})
    lonely.write_text(CODE + "\n")
    assert packages_in({"method": "mine"}) != before


@pytest.mark.parametrize("module", ["lonely", "fedprox"])
def test_a_module_of_one_file_is_the_one_that_is_built(
    install: Install, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    """Whatever it is called: a module of Polyclinic with the same name is not mistaken for it."""
    folder = install()
    info = folder.with_name("minepack-1.0.dist-info")
    (info / "entry_points.txt").write_text(f"[polyclinic.methods]\nmine = {module}:make\n")
    folder.with_name(f"{module}.py").write_text(CODE)
    monkeypatch.delitem(sys.modules, module, raising=False)
    made = registry.maker(registry.entry("mine"))
    assert (made.__module__, made.__name__) == (module, "make")


def test_only_named_methods_of_others_have_packages(install: Install) -> None:
    install()
    install("other-pack", method="fedavg", module="otherpack")  # our own methods cannot be replaced
    assert packages_in({"method": "fedavg", "network": "nothing"}) == ()
    assert registry.entry("fedavg").make == "optimization.fedavg:FedAvg"
    assert [package.name for package in packages_in({"method": "mine"})] == ["mine-pack"]
    assert order("krum", plan={"options": {"over": "mine"}}).packages == packages_in({"method": "mine"})
    assert order(study={"name": "s", "hash": "h", "arms": [{"label": "x", "plan": {"method": "mine"}}]}).packages


def test_the_packages_of_a_study_are_looked_up_once(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("mine-pack")
    listed, lists = tuple(plugins._entry_point_files()), Counter[str]()

    def counted() -> tuple[tuple[str, int, int], ...]:
        lists["of packages"] += 1
        return listed

    monkeypatch.setattr(plugins, "_entry_point_files", counted)
    arms = [{"label": str(i), "plan": {"method": "mine" if i == 3 else "fedavg"}} for i in range(5)]
    found = order(study={"name": "s", "hash": "h", "arms": arms}).packages
    assert [package.name for package in found] == ["mine-pack"]
    assert lists.total() == 1


def test_two_packages_with_one_method_are_both_hashed_and_must_both_be_allowed(install: Install) -> None:
    install()
    install("second", module="secondpack")
    found = packages_in({"method": "mine"})
    assert [package.name for package in found] == ["mine-pack", "second"]
    (refused,) = policies.parse(b'[allow]\npackages = ["mine-pack"]\n').package_problems(found)
    assert "second 1.0" in refused


def test_a_plan_names_methods_anywhere_in_its_options() -> None:
    plan = {"method": "a", "options": {"over": "b", "many": ["c", {"deep": ("d",)}], "n": 3}, "network": "e"}
    assert methods_in(plan) == {"a", "b", "c", "d"}


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        ("mine-pack", True),
        ("Mine_Pack", True),
        ("mine.pack==1.0", True),
        ("mine-pack@" + "a" * 64, True),
        ("mine-pack==1.0@" + "a" * 64, True),
        ("mine", False),
        ("mine-pack==1.1", False),
        ("mine-pack==1", False),
        ("mine-pack@" + "b" * 64, False),
        ("mine-pack==1.0@" + "b" * 64, False),
        ("mine-pack==1.1@" + "a" * 64, False),
        ("other", False),
    ],
)
def test_rules_name_packages_by_name_version_or_hash(rule: str, fits: bool) -> None:
    package = Package("mine-pack", "1.0", "a" * 64)
    assert allows(rule, package) is fits
    policy = policies.parse(f'[allow]\npackages = ["{rule}"]\n'.encode())
    assert (policy.package_problems([package]) == []) is fits
    assert allows(exact_rule(package), package)


@pytest.mark.parametrize(
    "rule", ["", "*", "mine*", "mine>=1", "mine==", "mine@abc", "mine==1==2", "a b", "-mine", "mine-"]
)
def test_a_rule_that_is_none_is_told(rule: str) -> None:
    with pytest.raises(policies.BadPolicy, match=r"policy\.toml:2: allow\.packages.* must be the name of a package"):
        policies.parse(f'[allow]\npackages = ["{rule}"]\n'.encode())


def test_code_of_a_package_that_is_not_allowed_is_never_loaded(install: Install) -> None:
    folder, plan = install(), order("mine").build_plan()
    (folder / "make.py").write_text("raise SystemExit('loaded')\n")
    assert not policies.Policy().allow.packages, "by default none is allowed"
    for refused in (plan, replace(plan, method="krum", options={"over": "mine"})):
        (why,) = policies.Policy().refusals(refused)
        assert "needs the package mine-pack 1.0" in why
        assert exact_rule(packages_in({"method": "mine"})[0]) in why
    assert "minepack" not in sys.modules
    allowed = policies.parse(b'[allow]\npackages = ["mine-pack"]\n')
    with pytest.raises(SystemExit, match="loaded"):
        allowed.refusals(plan)


def test_an_allowed_package_runs(install: Install) -> None:
    install()
    rule = exact_rule(packages_in({"method": "mine"})[0])
    assert policies.parse(f'[allow]\npackages = ["{rule}"]\n'.encode()).refusals(order("mine").build_plan()) == []


def test_a_distribution_without_a_list_of_files_is_hashed_by_what_would_be_imported(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = install()
    (folder.with_name("minepack-1.0.dist-info") / "RECORD").unlink()
    before = packages_in({"method": "mine"})
    (folder / "make.py").write_text("")
    assert packages_in({"method": "mine"}) != before
    monkeypatch.setattr(plugins, "find_spec", lambda name: (_ for _ in ()).throw(ImportError(name)))
    assert packages_in({"method": "mine"})[0].name == "mine-pack"
