"""A site's random numbers: those that repeat, and those that cannot be repeated."""

import hashlib
import math
import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from polyclinic.core.execution import UniformSampler
from polyclinic.core.rounds import train
from polyclinic.core.site import SecretRng, Site, SitesOnDemand
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.privacy.sparse_vector import laplace
from polyclinic.testing import equal
from tests.conftest import little_sites


def from_bytes(data: bytes) -> Callable[[int], bytes]:
    """Entropy that is known, and handed out once from the front."""
    rest = bytearray(data)

    def take(n: int) -> bytes:
        assert n <= len(rest), "more entropy was asked for than two numbers a pair need"
        taken = bytes(rest[:n])
        del rest[:n]
        return taken

    return take


def known(n: int) -> bytes:
    return b"".join(hashlib.sha256(bytes([i])).digest() for i in range(-(-n // 32)))[:n]


def as_uniform(data: bytes) -> np.ndarray:
    """The middle of one of 2^52 equal parts of (0, 1) for every 8 bytes, lowest byte first; whole numbers in Python."""
    words = [int.from_bytes(data[i : i + 8], "little") >> 12 for i in range(0, len(data), 8)]
    return np.array([(2 * w + 1) / 2**53 for w in words])


def test_uniform_numbers_are_those_of_the_bytes() -> None:
    data = known(8 * 50)
    found = SecretRng(from_bytes(data)).uniform(50)
    assert found.dtype == torch.float64
    np.testing.assert_array_equal(found.numpy(), as_uniform(data))


@pytest.mark.parametrize(("byte", "expected"), [(0x00, 2**-53), (0xFF, 1 - 2**-53)])
def test_uniform_numbers_never_reach_zero_or_one(byte: int, expected: float) -> None:
    """Or a logarithm of 0 would make infinite noise: of u for normal noise, of 1 - u for Laplace's."""
    secret = SecretRng(lambda n: bytes([byte]) * n)
    assert float(secret.uniform(1)) == expected
    assert 0 < expected < 1
    assert math.isfinite(float(secret.normal(1)))
    assert math.isfinite(float(laplace(1, 1.0, secret)))


def test_no_numbers_take_no_entropy() -> None:
    empty = SecretRng(from_bytes(b"")).uniform(0)
    assert (empty.shape, empty.dtype) == ((0,), torch.float64)
    assert SecretRng(from_bytes(b"")).normal(0).shape == (0,)
    assert SecretRng(from_bytes(b"")).normal(3, 0).shape == (3, 0)


@pytest.mark.parametrize("shape", [(1,), (2,), (5,), (4, 3), (), (1, 2, 3)])
def test_normal_numbers_are_box_and_mullers(shape: tuple[int, ...]) -> None:
    """z = sqrt(-2 ln u) cos(2πv), and sin(2πv): independent bytes for u and for v."""
    size = math.prod(shape)
    half = -(-size // 2)
    data = known(16 * half)
    u, v = as_uniform(data[: 8 * half]), as_uniform(data[8 * half :])
    radius, angle = np.sqrt(-2 * np.log(u)), 2 * np.pi * v
    expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size].reshape(shape)
    found = SecretRng(from_bytes(data)).normal(*shape)
    assert found.dtype == torch.float64
    assert found.shape == shape
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("size", [40_000, 40_001])
def test_no_normal_number_comes_twice_or_follows_from_others(size: int) -> None:
    """Noise that repeats can be subtracted: every number is new, and no lag or pairing shows a correlation."""
    x = SecretRng().normal(size).numpy()
    assert len(np.unique(x)) == size
    assert len(np.unique(np.abs(x))) == size
    limit = 6 / math.sqrt(size)
    centered, power = x - x.mean(), float(np.var(x))
    for lag in (1, 2, 3, 4, 8, 64, 1000, size // 4, size // 2 - 1, size // 2, size // 2 + 1):
        for values in (
            centered,
            centered**2 - power,
        ):  # numbers, and their squares: Box and Muller's pairs share a radius
            a, b = values[:-lag], values[lag:]
            assert abs(float(np.mean(a * b)) / float(np.var(values))) < limit * (size / len(a)) ** 0.5, lag
    assert stats.kstest(x, "norm").pvalue > 1e-6
    assert stats.kstest(SecretRng().uniform(size).numpy(), "uniform").pvalue > 1e-6
    assert len(np.unique(SecretRng().uniform(size).numpy())) == size


def test_a_sites_secrets_come_from_its_entropy_and_by_default_from_the_operating_system() -> None:
    data = known(80)
    assert Site("a", entropy=from_bytes(data)).secret_rng().uniform(10).tolist() == as_uniform(data).tolist()
    assert Site("a").secret_rng().entropy is SecretRng().entropy is os.urandom
    one, two = (Site("a", seed=1).secret_rng().uniform(8) for _ in range(2))
    assert not torch.equal(one, two)


def test_a_site_is_on_the_processor_with_no_data_and_seed_0_unless_told() -> None:
    site = Site("a")
    assert (site.device, site.seed, dict(site.data)) == ("cpu", 0, {})


@pytest.mark.parametrize(
    ("site", "key"),
    [(Site("a"), ()), (Site("bern", seed=7), (3, "train", "x")), (Site("a", seed=-1), ("1",)), (Site("a"), (1,))],
)
def test_a_repeatable_generator_is_known_from_seed_name_and_key(site: Site, key: tuple[int | str, ...]) -> None:
    """A resumed or repeated study draws what it drew, on any machine: the seed is a hash of what it depends on."""
    text = repr((site.seed, site.name, *key)).encode()
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
    expected = torch.rand(4, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(torch.rand(4, generator=site.rng(*key)), expected)


def test_sites_on_demand_are_built_at_each_access_and_not_kept() -> None:
    built: list[str] = []

    def build(name: str) -> Site:
        built.append(name)
        return Site(name)

    sites = SitesOnDemand(("b", "a"), build)
    assert (list(sites), len(sites), "a" in sites.keys() - {"b"}) == (["b", "a"], 2, True)
    assert not built
    assert sites["a"] is not sites["a"]
    assert built == ["a", "a"]
    with pytest.raises(KeyError):
        sites["c"]


def test_engines_build_only_the_sites_that_they_ask(task: Classification, local: LocalTraining) -> None:
    built: list[str] = []
    given = little_sites(count=6)

    def build(name: str) -> Site:
        built.append(name)
        return given[name]

    method, sampler = FedAvg(task, local), UniformSampler(tuple(given), 2)
    states = []
    for sites in (SitesOnDemand(given, build), given):
        state = method.init(task.first(0))
        for step in train(method, InProcess(method, sites), state, rounds=2, sampler=sampler):
            state = step.state
        states.append(state)
    assert len(built) == 4
    assert equal(*states)
