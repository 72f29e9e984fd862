"""Encrypted sums: right to seven digits, unreadable without the key, refused where broken or too large."""

import pytest
import torch

pytest.importorskip("tenseal", reason="needs polyclinic[he]")

from polyclinic.core.aggregates import PerSite, Reply, WeightedMean, merge
from polyclinic.secure_aggregation.homomorphic import SLOTS, Keys, add, cost, decrypt, encrypt, encrypted_merge


@pytest.fixture(scope="module")
def keys() -> Keys:
    return Keys.make()


def reply(seed: int, size: int = SLOTS + 40) -> Reply:
    rng = torch.Generator().manual_seed(seed)
    update = {"w": torch.randn(size // 4, 4, generator=rng) * 0.1, "b": torch.randn(7, generator=rng)}
    return Reply(
        {
            "update": WeightedMean.of(update, 3.0 + seed),
            "loss": WeightedMean.of({"l": torch.rand((), generator=rng)}, 2.0),
        }
    )


def test_the_encrypted_sum_is_the_sum(keys: Keys) -> None:
    replies = {f"s{i}": reply(i) for i in range(3)}
    ours, plain = encrypted_merge(replies, keys), merge(replies.values())
    for part in plain.parts:
        assert ours.mean(part).weight == pytest.approx(plain.mean(part).weight, abs=1e-4)
        for name, leaf in plain.mean(part).total.items():
            assert torch.allclose(ours.mean(part).total[name], leaf, atol=1e-5)
            assert ours.mean(part).total[name].shape == leaf.shape


def test_without_the_secret_nothing_is_read_and_nothing_repeats(keys: Keys) -> None:
    vector = torch.ones(10)
    (one,), (two,) = encrypt(vector, keys.public), encrypt(vector, keys.public)
    assert one != two
    with pytest.raises(ValueError, match="secret"):
        decrypt(one, keys.public, 10)
    other = decrypt(one, Keys.make().secret, 10)
    assert not torch.allclose(other, vector.double(), atol=0.1)
    assert torch.allclose(decrypt(one, keys.secret, 10), vector.double(), atol=1e-6)


def test_broken_ciphertexts_are_refused(keys: Keys) -> None:
    (good,) = encrypt(torch.ones(10), keys.public)
    for bad, why in ((b"", "contains 0 numbers, expected 10"), (good[:-30], "broken"), (b"\x01" * 50, "broken")):
        with pytest.raises(ValueError, match=why):
            add([good, bad], keys.public, 10)
    with pytest.raises(ValueError, match="contains 10 numbers, expected 9"):
        decrypt(good, keys.secret, 9)
    with pytest.raises(ValueError, match="nothing to add"):
        add([], keys.public, 10)
    with pytest.raises(ValueError, match="NaN and infinities"):
        list(encrypt(torch.tensor([float("nan")]), keys.public))


def test_what_it_costs_is_said_and_what_is_too_large_is_refused_with_the_figure(keys: Keys) -> None:
    price = cost(1_000_000, keys)
    assert price.chunks == 245
    assert 10 < price.times < 20
    assert "245 ciphertexts" in str(price)
    with pytest.raises(ValueError, match=r"takes 2 ciphertexts, 0\.\d MB a site, .* times the plain numbers, and 0 MB"):
        encrypted_merge({"a": reply(0), "b": reply(1)}, keys, memory=1000)


def test_only_means_of_one_shape_are_added(keys: Keys) -> None:
    with pytest.raises(ValueError, match="which are not means"):
        encrypted_merge({"a": Reply({"g": PerSite({"a": {"w": torch.ones(1)}})})}, keys)
    with pytest.raises(ValueError, match="b would send tensors with other names"):
        encrypted_merge({"a": reply(0), "b": reply(1, 400)}, keys)
