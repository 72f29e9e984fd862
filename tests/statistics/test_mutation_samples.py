"""Samples of mutants are reproducible and random, and the interval of a score is exact."""

import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from tests.support.known import known

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "mutation"
SPEC = known(spec_from_file_location("mutation_sample", TOOL / "sample.py"))
sample = module_from_spec(SPEC)
known(SPEC.loader).exec_module(sample)
drawn, score = sample.drawn, sample.score

KEYS = [f"{i:012x}" for i in range(200)]


def test_a_sample_depends_on_the_seed_and_the_keys_only() -> None:
    found = drawn(KEYS, 30, 1)
    assert len(set(found)) == 30
    assert found == drawn(reversed(KEYS), 30, 1)
    assert found != drawn(KEYS, 30, 2)
    assert drawn(KEYS, 10, 1) == found[:10]
    part = KEYS[:90]
    inside = [key for key in found if key in part]
    assert drawn(part, len(inside), 1) == inside
    assert sorted(drawn(KEYS, 1000, 1)) == KEYS


def test_every_key_is_drawn_equally_often() -> None:
    counts = np.array([sum(key in drawn(KEYS[:20], 5, seed) for seed in range(400)) for key in KEYS[:20]])
    assert counts.sum() == 5 * 400
    assert np.all(np.abs(counts - 100) < 5 * np.sqrt(400 * 0.25 * 0.75))


@pytest.mark.parametrize("number", [0, -3])
def test_an_empty_sample_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        drawn(KEYS, number, 0)


@pytest.mark.parametrize(("killed", "tried"), [(0, 7), (7, 7), (24, 30), (241, 300)])
def test_the_interval_is_that_of_the_binomial_distribution(killed: int, tried: int) -> None:
    """Outside of the interval, a result as extreme as this one has a probability of less than 2.5 %, on either side."""
    text = score(killed, tried)
    assert text.startswith(f"{killed} of {tried} killed ({killed / tried:.1%}, ")
    low, high = (float(word.strip("%)")) / 100 for word in text.split("interval ")[1].split(" to "))
    if killed:
        assert binom.sf(killed - 1, tried, low - 0.001) < 0.025 < binom.sf(killed - 1, tried, low + 0.001)
    else:
        assert low == 0
    if killed < tried:
        assert binom.cdf(killed, tried, high + 0.001) < 0.025 < binom.cdf(killed, tried, high - 0.001)
    else:
        assert high == 1


def test_no_mutant_has_no_score() -> None:
    assert score(0, 0) == "none tried"


def test_packages_list_their_modules_and_tests() -> None:
    table = tomllib.loads((TOOL / "modules.toml").read_text())
    for package, given in table["packages"].items():
        files = {file.relative_to(ROOT / "polyclinic") for file in (ROOT / "polyclinic" / package).rglob("*.py")}
        modules = {file.with_suffix("").as_posix() for file in files if file.name != "__init__.py"}
        assert set(given["modules"]) | {name for name in table["tests"] if name in modules} == modules
    named = [test for tests in table["tests"].values() for test in tests]
    named += [test for given in table["packages"].values() for test in given["tests"]]
    files = {test.removeprefix("--deselect=").partition("::")[0] for test in named}
    assert [file for file in sorted(files) if not (ROOT / file).exists()] == []
