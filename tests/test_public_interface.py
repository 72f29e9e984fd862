"""The public interface: its names, what importing it loads, and the examples in its docstrings."""

import doctest
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import polyclinic as pc

ROOT = Path(pc.__file__).parent
NAMES = """
__version__ tree
ElementwiseMean PerSite PerSiteUniform Reply WeightedMean merge
Method Request Site Tree Trees savable send_through train InProcess check_method
Classification MultiLabel Reconstruction Regression Segmentation Survival Task LocalTraining FedAvg
Study parse load_study run read_run evaluate build_report experiment network loss metric augmentation
training check_network check_metric check_augmentation
ConfigError DataError IntegrityError MissingDependency PolicyRefusal PolyclinicError ProtocolError RunError
"""
MODULES = sorted(
    ".".join(("polyclinic", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


def test_the_public_names_are_these() -> None:
    assert sorted(pc.__all__) == sorted(NAMES.split())
    assert len(set(pc.__all__)) == len(pc.__all__)
    assert set(pc.__all__) <= set(dir(pc))


@pytest.mark.parametrize("name", sorted(NAMES.split()))
def test_each_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(pc, name)
    assert value is getattr(pc, name)
    if callable(value) and name not in ("Tree", "Trees"):
        assert value.__doc__
        assert value.__name__ == {"load_study": "read"}.get(name, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'polyclinic' has no attribute 'FedAverage'"):
        _ = pc.FedAverage  # type: ignore[attr-defined]


def test_type_checkers_and_users_see_the_same_names() -> None:
    """The imports under TYPE_CHECKING name the modules that ``__getattr__`` imports from."""
    source = (ROOT / "__init__.py").read_text(encoding="utf-8")
    for name, home in pc._HOMES.items():
        defined = pc._RENAMED.get(name, name)
        assert f"from polyclinic.{home} import {defined} as {name}" in source


def test_no_folder_has_more_than_20_modules() -> None:
    counts = {folder: len([*folder.glob("*.py")]) - 1 for folder in {path.parent for path in ROOT.rglob("*.py")}}
    assert {folder.name: count for folder, count in counts.items() if count > 20} == {}


def test_importing_the_package_loads_no_numerical_library() -> None:
    script = """
import sys
import polyclinic
assert not [name for name in ("torch", "numpy", "pydantic", "rich", "cyclopts") if name in sys.modules]
assert not [name for name in sys.modules if name.startswith("polyclinic.")]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_run(name: str) -> None:
    result = doctest.testmod(import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted
    assert not result.failed
