"""Codecs: the limits in which they change nothing, what they may lose, what they remember, what they refuse."""

import math
import random
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.compression.leaf_packing import pack_bits, shape_in, shape_tag, unpack_bits
from polyclinic.compression.powersgd import PowerSGD
from polyclinic.compression.quantization import QSGD, BFloat16, Codec, Int8, LowRank, Sign
from polyclinic.compression.topk import TopK
from polyclinic.compression.zstd import Zstd, unfold
from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.pipeline import Packed, Transform, send_through
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from tests.support.transform_sending import Told, close, constant, random_values, run

VALUES = random_values()
ALL = (
    BFloat16(),
    Int8(),
    QSGD(127),
    QSGD(7),
    QSGD(1),
    Sign(),
    LowRank(),
    LowRank(remember=True),
    PowerSGD(2),
    Zstd(),
    PowerSGD(2, shared=True),
    TopK(0.1),
    TopK(0.1, shared=True),
    TopK(0.1, feedback=False),
)
REMEMBER = (
    Sign(),
    LowRank(0.5, 0.5, remember=True),
    PowerSGD(1),
    PowerSGD(1, shared=True),
    TopK(0.05),
    TopK(0.1, shared=True),
)


@pytest.mark.parametrize("lossless", [TopK(1.0), TopK(1.0, shared=True), LowRank(1.0, 1.0), Zstd(), PowerSGD(99)])
@pytest.mark.parametrize("weights", [{}, {"a": 3.0, "b": 0.5}])
def test_in_the_limit_nothing_changes(lossless: Transform, weights: Any) -> None:
    ours, plain = (run(VALUES, *t, rounds=2, weights=weights, uniform=False) for t in ((lossless,), ()))
    assert close(ours.total, plain.total)
    assert ours.weight == pytest.approx(plain.weight)


def test_zstd_is_exact_to_the_bit() -> None:
    ours, plain = run(VALUES, Zstd(), sites=("a",)), run(VALUES, sites=("a",))
    assert all(torch.equal(ours.last[k], plain.last[k]) for k in plain.last)


@pytest.mark.parametrize("codecs", [(), (BFloat16(),), (Int8(),), (LowRank(1.0, 1.0),), (PowerSGD(1),)])
def test_factors_of_rank_1_are_compressed(codecs: tuple[Transform, ...]) -> None:
    """A column is contiguous with any last stride, and the bytes of such a factor could not be read."""

    def rank_1(site: str, round: int) -> Tree:
        return {"a": torch.outer(torch.arange(1.0, 7.0), torch.tensor([1.0, -2.0, 0.5])), "b": torch.ones(3, 4)[:, :1]}

    ours, plain = (run(rank_1, *c, sites=("a",)) for c in ((*codecs, Zstd()), codecs))
    assert close(ours.last, plain.last, 0)


@pytest.mark.parametrize(("codec", "bound"), [(BFloat16(), 2**-8), (Int8(), 1 / 254)])
def test_rounding_errs_by_half_a_step_at_most(codec: Codec, bound: float) -> None:
    for name, leaf in VALUES("a", 0).items():
        if leaf.ndim > 1:
            error = (codec.grow(codec.shrink(leaf, torch.Generator(), 0) or {}) - leaf).abs()
            largest = leaf.reshape(len(leaf), -1).abs().amax(1).reshape(-1, *[1] * (leaf.ndim - 1))
            assert bool((error <= bound * largest * 1.001).all()), name


def test_int8_of_zeros_is_zeros() -> None:
    codec = Int8()
    assert not codec.grow(codec.shrink(torch.zeros(3, 4), torch.Generator(), 0)).any()


@pytest.mark.parametrize("levels", [1, 7, 127])
def test_qsgd_is_right_on_average(levels: int) -> None:
    leaf, codec = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), QSGD(levels, bucket=16)
    rng = torch.Generator().manual_seed(1)
    drawn = torch.stack([codec.grow(codec.shrink(leaf, rng, 0)) for _ in range(1000)])
    # each number is one of two neighboring levels, so it deviates by at most half a level
    level = torch.nn.functional.pad(leaf.reshape(-1), (0, 13)).reshape(-1, 16).norm(dim=1).max() / levels
    assert bool(((drawn.mean(0) - leaf).abs() < 5 * level / 2 / math.sqrt(1000)).all())
    assert float(drawn.std(0).max()) <= float(level) / 2 * 1.05


@pytest.mark.parametrize("codec", REMEMBER, ids=str)
def test_what_was_sent_and_what_is_remembered_are_together_what_there_was(codec: Transform) -> None:
    """Error feedback telescopes: Σ sent + residual = Σ updates, at every site."""
    ran = run(VALUES, codec, sites=("a",), rounds=5)
    (residual,) = (t for name, t in ran.memory["a"].items() if name.endswith("/residual"))
    everything = [VALUES("a", round) for round in range(5)]
    for name, received in ran.total.items():
        left = residual.get(f"m/update/{name}", torch.zeros(()))
        wanted = torch.stack([v[name] for v in everything]).sum(0)
        assert torch.allclose(received + left.reshape(-1 if not left.ndim else received.shape), wanted, atol=1e-4), name


@pytest.mark.parametrize("codec", REMEMBER, ids=str)
def test_what_is_remembered_arrives_in_the_end(codec: Transform) -> None:
    """Of an update that repeats, the mean of what arrived over many rounds comes near to it."""
    ran, plain = run(constant(VALUES), codec, rounds=60), run(constant(VALUES))
    mean = tree.scale(ran.total, 1 / 60)
    gap = tree.norm(tree.sub(mean, plain.total)) / tree.norm(plain.total)
    assert gap < 0.35, gap
    early = tree.scale(run(constant(VALUES), codec, rounds=6).total, 1 / 6)
    assert gap < tree.norm(tree.sub(early, plain.total)) / tree.norm(plain.total)


PLAIN = 4 * 64 * 128
SIZES: list[tuple[Transform, float]] = [
    (BFloat16(), PLAIN / 2),
    (Int8(), PLAIN / 4 + 4 * 64),
    (QSGD(127), PLAIN / 4 + 4 * 16),
    (QSGD(7), PLAIN / 8 + 4 * 16),
    (QSGD(1), PLAIN / 16 + 4 * 16),
    (Sign(), PLAIN / 32 + 4),
    (LowRank(), PLAIN),
    (PowerSGD(2), 4 * 2 * (64 + 128)),
    (PowerSGD(2, shared=True), 4 * 2 * 64),
    (TopK(0.1), 8 * 820),
    (TopK(0.1, shared=True), 4 * 820),
]


@pytest.mark.parametrize(("codec", "size"), SIZES, ids=str)
def test_messages_are_as_small_as_they_say(codec: Transform, size: float) -> None:
    matrix = {"w": torch.randn(64, 128, generator=torch.Generator().manual_seed(0))}
    assert run(lambda site, round: matrix, codec, sites=("a",)).replies[0]["a"].nbytes == size


def test_zstd_gains_where_there_is_something_to_gain() -> None:
    dull = {"w": torch.zeros(64, 128)}
    assert run(lambda site, round: dull, Zstd(), sites=("a",)).replies[0]["a"].nbytes < 1000


@pytest.mark.parametrize("codec", ALL, ids=str)
def test_what_is_not_a_change_travels_whole(codec: Transform) -> None:
    """Prototypes, sums and the like replace what the server had: to send half now and half later would be wrong."""
    for part, same in (("sums", True), ("update", isinstance(codec, Zstd | LowRank))):
        ours, plain = (run(VALUES, *t, rounds=2, part=part) for t in ((codec,), ()))
        assert all(torch.equal(ours.last[k], plain.last[k]) for k in plain.last) == same


def always(change: Tree, site: str, round: int) -> Tree:
    """The same change at every site in every round."""
    return change


@pytest.mark.parametrize("codec", ALL, ids=str)
def test_a_variance_that_shrinks_does_not_become_negative(codec: Transform) -> None:
    """A running variance moves a tenth of the way to the truth in each round; what is sent twice would overshoot."""
    variance, truth = torch.linspace(1, 100, 50), torch.linspace(1e-3, 1e-2, 50)
    for _ in range(30):
        change = {"running_var": 0.9 * (truth - variance), "weight": torch.randn(20, 20)}
        variance = variance + run(partial(always, change), codec, sites=("a",)).last["running_var"]
        assert bool((variance > 0).all())


@pytest.mark.parametrize("codec", ALL, ids=str)
def test_the_same_seed_sends_the_same(codec: Transform) -> None:
    one, two = run(VALUES, codec, rounds=2), run(VALUES, codec, rounds=2)
    assert all(torch.equal(one.total[k], two.total[k]) for k in one.total)


CHAINS = [
    (TopK(0.2), Int8(), Zstd()),
    (LowRank(), Int8()),
    (LowRank(), BFloat16(), Zstd()),
    (Int8(), Zstd()),
    (PowerSGD(2), Int8()),
    (TopK(0.5, shared=True), Int8()),
]


@pytest.mark.parametrize("codecs", CHAINS, ids=str)
def test_codecs_follow_one_another(codecs: Any) -> None:
    plain, first, ours = (run(VALUES, *t, rounds=2) for t in ((), codecs[:1], codecs))
    assert isinstance(ours.replies[0]["a"].parts["sent"], Packed)
    gap = tree.norm(tree.sub(ours.total, plain.total)) / tree.norm(plain.total)
    lost = tree.norm(tree.sub(first.total, plain.total)) / tree.norm(plain.total)
    assert gap < max(1.4 * lost, 0.01)
    if not isinstance(codecs[-1], Zstd):  # whose frame has a header, larger than all of this small model
        assert ours.replies[1]["a"].nbytes <= first.replies[1]["a"].nbytes


def test_energy_rises_and_rank_with_it() -> None:
    codec = LowRank(0.5, 0.9, rounds=4)
    assert [round(codec.energy(t), 3) for t in (0, 1, 3, 4, 100)] == [0.6, 0.7, 0.9, 0.9, 0.9]
    leaf = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    s = torch.linalg.svdvals(leaf.double()).square()
    ranks = []
    for t in range(4):
        parts = codec.shrink(leaf, torch.Generator(), t)
        if parts is not None:
            rank = parts["left"].shape[1]
            share = s.cumsum(0) / s.sum()
            assert float(share[rank - 1]) >= codec.energy(t) > float(share[rank - 2] if rank > 1 else 0)
            assert float((codec.grow(parts) - leaf).norm() / leaf.norm()) <= math.sqrt(1 - codec.energy(t)) + 1e-6
            ranks.append(rank)
    assert ranks == sorted(ranks)


def test_low_rank_keeps_matrices_that_need_all_their_values() -> None:
    """The loop of one published code drops the whole update where every singular value is needed."""
    codec = LowRank(0.999, 0.999)
    for leaf in (torch.eye(12), torch.randn(8, 1), torch.randn(1, 8)):
        parts = codec.shrink(leaf, torch.Generator(), 0)
        got = leaf if parts is None else codec.grow(parts)
        assert torch.allclose(got, leaf, atol=1e-5)
    outer = torch.outer(torch.arange(1.0, 9), torch.arange(1.0, 9)).reshape(8, 2, 2, 2)
    parts = codec.shrink(outer, torch.Generator(), 0)
    assert parts is not None
    assert parts["left"].shape == (8, 1)
    assert torch.allclose(codec.grow(parts), outer, atol=1e-4)
    zero = codec.shrink(torch.zeros(8, 8), torch.Generator(), 0)
    assert zero is not None
    assert not codec.grow(zero).any()


def test_power_iteration_finds_the_leading_directions() -> None:
    rng = torch.Generator().manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(20, 2, generator=rng)).Q, torch.linalg.qr(torch.randn(30, 2, generator=rng)).Q
    low = (u * torch.tensor([5.0, 3.0])) @ v.T
    ran = run(lambda site, round: {"w": low}, PowerSGD(2), sites=("a",))
    assert torch.allclose(ran.last["w"], low, atol=1e-4)
    shared = run(
        lambda site, round: {"w": low if round < 4 else torch.zeros(20, 30)}, PowerSGD(2, shared=True), rounds=5
    )
    assert torch.allclose(shared.total["w"], 4 * low, atol=1e-3), "all has arrived once the bases are found"


def test_a_shared_support_is_the_same_at_every_site_and_follows_the_largest() -> None:
    def values(site: str, round: int) -> dict[str, torch.Tensor]:
        return {"w": torch.zeros(100).index_fill_(0, torch.tensor([3, 50, 97]), 10.0).reshape(10, 10)}

    ran = run(values, TopK(0.1, shared=True, feedback=False), rounds=22)
    assert torch.equal(ran.last["w"], values("a", 0)["w"])
    support = ran.states[-1].transforms[0]["support"]["m/update/w"]
    assert len(support.unique()) == 10
    assert {3, 50, 97} <= set(support.tolist())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_bits_are_packed_and_unpacked(bits: int, data: Any) -> None:
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40)), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert len(packed) == math.ceil(len(codes) * bits / 8)
    assert torch.equal(unpack_bits(packed, bits, len(codes)), codes)


def test_shapes_travel_without_bytes_and_not_beyond_what_the_model_needs() -> None:
    tag = shape_tag(torch.zeros(3, 4, 5))
    assert tag.numel() == 0
    assert shape_in(tag, 60) == (3, 4, 5)
    with pytest.raises(ValueError, match="a tensor of 60 numbers exceeds the limit of 59"):
        shape_in(tag, 59)
    with pytest.raises(ValueError, match="has no shape"):
        shape_in(torch.zeros(1, 3), 10)


def hostile(codec: Transform, **parts: torch.Tensor) -> str:
    """What the server says to a reply of these parts, where the model has 64 numbers."""
    state = codec.init({"w": torch.zeros(8, 8)})
    with pytest.raises((ValueError, RuntimeError, KeyError)) as caught:
        codec.decode(WeightedMean({f"m/update/w:{k}": v for k, v in parts.items()}, 1.0), state)
    return str(caught.value)


def test_a_small_message_cannot_make_the_server_reserve_much() -> None:
    huge, long = torch.empty(0, 2**20, 2**20), torch.zeros(2**20, 1)
    assert "exceeds the limit" in hostile(
        Sign(), bits=torch.zeros(1, dtype=torch.uint8), size=torch.ones(1), shape=huge
    )
    assert "exceeds the limit" in hostile(LowRank(), left=long, right=long.T, shape=huge)
    assert "do not make" in hostile(LowRank(), left=long, right=long.T, shape=torch.empty(0, 8, 8))
    assert "do not make" in hostile(PowerSGD(1), p=long, q=long, shape=torch.empty(0, 8, 8))
    assert "exceeds the limit" in hostile(TopK(0.1), values=torch.zeros(1), index=torch.zeros(1).int(), shape=huge)
    assert "norms do not fit" in hostile(
        QSGD(7), codes=torch.zeros(32, dtype=torch.uint8), norm=torch.zeros(9), shape=torch.empty(0, 64)
    )


def test_messages_that_do_not_fit_are_refused() -> None:
    eight = torch.empty(0, 8, 8)
    assert "bytes do not contain" in hostile(
        Sign(), bits=torch.zeros(7, dtype=torch.uint8), size=torch.ones(1), shape=eight
    )
    assert "scales do not fit" in hostile(Int8(), codes=torch.zeros(8, 8, dtype=torch.int8), scale=torch.zeros(3))
    for index in ([0, 0, 1, 2, 3, 4, 5], [-1, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 64]):
        said = hostile(TopK(0.1), values=torch.zeros(7), index=torch.tensor(index).int(), shape=eight)
        assert "must be increasing" in said or "a position is out of range" in said
    assert "values received, 7 expected" in hostile(
        TopK(0.1), values=torch.zeros(9), index=torch.arange(9).int(), shape=eight
    )
    with pytest.raises(ValueError, match="is not the name of a packed part"):
        Int8().decode(WeightedMean({"w": torch.zeros(2)}, 1.0), Int8().init({}))


def test_a_bomb_of_compressed_zeros_is_refused() -> None:
    zstandard = pytest.importorskip("zstandard", reason="needs polyclinic[privacy]")
    bomb = zstandard.ZstdCompressor().compress(bytes(2**27))
    assert len(bomb) < 20_000
    state = Zstd().init({"w": torch.zeros(8)})
    with pytest.raises(ValueError, match="exceeds the decompressed limit"):
        Zstd().decode(WeightedMean({"zstd": torch.frombuffer(bytearray(bomb), dtype=torch.uint8)}, 1.0), state)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compressobj().compress(b"x") or bomb[:5]
    for frame, why in (
        (unsized, r"corrupt|exceeds|contains"),
        (bomb[:-3], r"corrupt|contains"),
        (b"PK\x03\x04" * 9, "frame is corrupt"),
    ):
        with pytest.raises(ValueError, match=why):
            unfold(frame, 2**40)
    with pytest.raises(ValueError, match="expected a single compressed frame"):
        Zstd().decode(WeightedMean({"w": torch.zeros(2)}, 1.0), state)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ((TopK(0.0),), "fraction must be above 0"),
        ((TopK(0.5, explore=2),), "explore must be"),
        ((QSGD(200),), "levels must be"),
        ((LowRank(0),), "start and end"),
        ((PowerSGD(0),), "rank must be"),
        ((Zstd(99),), "level must be"),
        ((Zstd(), Int8()), "Zstd must come last"),
        ((TopK(0.1), Sign()), "Sign must come before TopK: its error feedback"),
        ((LowRank(), PowerSGD()), "PowerSGD must come before LowRank"),
        ((Int8(), TopK(0.1)), "TopK must come before Int8"),
    ],
)
def test_fields_that_make_no_sense_are_refused(wrong: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        run(VALUES, *wrong)


def spoiled(parts: Tree, rng: random.Random) -> dict[str, torch.Tensor]:
    """A message with something wrong in it."""
    found = dict(parts)
    name = rng.choice(sorted(found))
    x = found[name]
    match rng.randrange(7):
        case 0:
            del found[name]
        case 1:
            found[f"m/update/{rng.random()}:raw"] = torch.ones(3)
        case 2:
            found[name] = x.to(rng.choice([torch.int64, torch.float64, torch.uint8, torch.bool, torch.float16]))
        case 3:
            found[name] = x.reshape(-1)[: x.numel() // 2]
        case 4:
            found[name] = torch.full_like(x, rng.choice([0, 1, 127]))
        case 5:
            found[name] = torch.randint(0, 255, tuple(x.shape), dtype=torch.uint8).to(x.dtype)
        case _:
            found[name.replace(":", ";", 1)] = found.pop(name)
    return found


@pytest.mark.parametrize("codecs", [*((codec,) for codec in ALL if not codec.additive), *CHAINS], ids=str)
def test_spoiled_messages_are_refused_or_harmless(codecs: Any) -> None:
    method = send_through(Told(VALUES, {}), *codecs)
    state = method.init(VALUES("a", 0))
    request = method.request(state)
    assert request is not None
    good, _ = method.site_update(request.for_site("a"), {}, Site("a"))
    rng, refused = random.Random(0), 0
    for _ in range(60):
        items = {"a": spoiled(good.gather("sent")["a"], rng)}
        said = ""
        try:
            opened = method.opened(state, Reply({"sent": Packed(items, {"a": 1.0})}))
            assert tree.finite(opened.mean("").total)
        except ValueError as error:
            said, refused = str(error), refused + 1
        assert not said or "the reply of site 'a' cannot be decoded" in said
    assert refused > 5 or method.cut  # what is decoded on the sum shows there, or in the gate before it
