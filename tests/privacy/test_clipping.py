"""Clipping, the bound that adapts, and how deep the noise is: the formulas, by hand, with the noise itself replaced."""

import math
import re
from typing import Any

import pytest
import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import WeightedMean
from polyclinic.core.pipeline import Transform
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.learning.training.dp_sgd import Spend, metered
from polyclinic.privacy import gaussian
from polyclinic.privacy.gaussian import BELOW, AdaptiveClip, Clip, Gaussian
from polyclinic.secure_aggregation import SecureSum

SITE = Site("bern")
FIVE = {"m/a": torch.tensor([3.0]), "m/b": torch.tensor([[0.0, -4.0]])}  # of norm 5


def sent_by(transform: Any, total: Tree, notes: Any = None, weight: float = 1.0) -> WeightedMean:
    notes = transform.describe(transform.init({})) if notes is None else notes
    sent, memory = transform.encode(WeightedMean(total, weight), notes, {"kept": {}}, SITE, 3)
    assert memory == {"kept": {}}
    assert sent.weight == weight
    return sent


@pytest.mark.parametrize("bound", [5.0, 5.1, 1e6])
def test_what_is_within_the_bound_is_sent_as_it_is(bound: float) -> None:
    sent = sent_by(Clip(bound), FIVE).total
    assert all(torch.equal(sent[k], FIVE[k]) for k in FIVE)


@pytest.mark.parametrize("bound", [4.999, 2.5, 0.1, 1e-6])
def test_what_is_beyond_the_bound_keeps_its_direction_and_never_exceeds_it(bound: float) -> None:
    """In single precision too, to the last digit, though close to the bound."""
    sent = sent_by(Clip(bound), FIVE).total
    assert tree.norm(sent) <= bound
    for name in FIVE:
        assert torch.allclose(sent[name], FIVE[name] * bound / 5, rtol=3e-6)


def test_no_rounding_carries_a_reply_over_the_bound() -> None:
    rng = torch.Generator().manual_seed(0)
    for size in (1, 3, 1000):
        for bound in (0.1, 1.0, 3.0):
            x = torch.randn(20, size, generator=rng) * 7
            for row in x:
                assert float(sent_by(Clip(bound), {"w": row}).total["w"].double().norm()) <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_no_rounding_to_another_precision_does_either(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(1)
    for _ in range(50):
        total = {
            "w": (torch.randn(3, generator=rng) * 7).to(dtype),
            "v": torch.randn(1, generator=rng),
            "n": torch.zeros(0, dtype=torch.int64),
        }
        sent = sent_by(Clip(0.3), total).total
        assert 0.29 < tree.norm(sent) <= 0.3
        assert sent["w"].dtype == dtype


@pytest.mark.parametrize(
    ("lie", "named"),
    [
        ({"bound": 2.0}, "2"),
        ({"bound": 0.5}, "0.5"),
        ({"bound": math.nan}, "nan"),
        ({"bound": 1.0, "count_noise": 0.4}, "1"),
    ],
)
def test_a_site_clips_to_the_bound_that_was_approved_and_refuses_a_message_with_another_note(
    lie: dict[str, float], named: str
) -> None:
    """``Gaussian`` makes its noise by the note, so a note with a smaller bound would leave the reply bare."""
    notes = {"clip": {name: torch.tensor(value, dtype=torch.float64) for name, value in lie.items()}}
    with pytest.raises(ValueError, match=f"has the bound {named}, but 1 was approved"):
        sent_by(Clip(1.0), FIVE, notes)


@pytest.mark.parametrize(
    ("bound", "count_noise", "taken"),
    [
        (1.0, 0.7, True),
        (2.0**-60, 0.7, True),
        (2.0**60, 0.7, True),
        (2.0**-60.1, 0.7, False),
        (2.0**60.1, 0.7, False),
        (math.nan, 0.7, False),
        (1.0, 0.0, False),
        (1.0, 0.69, False),
        (1.0, 0.71, False),
        (2.0**61, 0.0, False),
    ],
)
def test_a_bound_that_moved_must_be_one_and_the_counts_noise_what_was_approved(
    bound: float, count_noise: float, taken: bool
) -> None:
    notes = {
        "clip": {
            "bound": torch.tensor(bound, dtype=torch.float64),
            "count_noise": torch.tensor(count_noise, dtype=torch.float64),
        }
    }
    if taken:
        assert (
            tree.norm(
                {k: v for k, v in sent_by(AdaptiveClip(1.0, count_noise=0.7), FIVE, notes).total.items() if k != BELOW}
            )
            <= bound
        )
        return
    with pytest.raises(
        ValueError, match=re.escape(f"has the bound {bound:g} and count noise {count_noise:g}, but bounds from")
    ):
        sent_by(AdaptiveClip(1.0, count_noise=0.7), FIVE, notes)


def test_without_noise_on_the_count_the_server_may_name_none() -> None:
    notes = {
        "clip": {"bound": torch.tensor(1.0, dtype=torch.float64), "count_noise": torch.tensor(0.1, dtype=torch.float64)}
    }
    for given in (None, 0.0):
        with pytest.raises(ValueError, match=r"count noise 0\.1, but .* and 0 were approved"):
            sent_by(AdaptiveClip(1.0, count_noise=given), FIVE, notes)
        assert sent_by(AdaptiveClip(1.0, count_noise=given), FIVE).total[BELOW].tolist() == [-0.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_cannot_be_clipped(bad: float) -> None:
    for transform in (Clip(1.0), AdaptiveClip(1.0)):
        with pytest.raises(ValueError, match="contains NaN or infinity, which cannot be clipped"):
            sent_by(transform, {"w": torch.tensor([bad])})


def test_the_bound_is_told_in_double_precision() -> None:
    for transform in (Clip(0.1), AdaptiveClip(0.1, count_noise=0.3)):
        note = transform.describe(transform.init({}))["clip"]
        assert note["bound"].dtype == torch.float64
        assert float(note["bound"]) == 0.1
    assert float(note["count_noise"]) == 0.3
    assert float(AdaptiveClip(1.0).describe(AdaptiveClip(1.0).init({}))["clip"]["count_noise"]) == 0.0
    assert float(AdaptiveClip(2.0).describe({"clip": {"bound": torch.tensor(7.0)}})["clip"]["bound"]) == 7.0


@pytest.mark.parametrize(
    "transform",
    [
        Clip(1.0),
        Clip(1e-3),
        Clip(1e6),
        Clip(2.0**-60),
        Clip(2.0**60),
        AdaptiveClip(1.0),
        AdaptiveClip(1e-3, 0.01),
        AdaptiveClip(1e6, 0.99),
        AdaptiveClip(2.0**-60),
        AdaptiveClip(2.0**60),
    ],
)
def test_these_are_right(transform: Any) -> None:
    assert transform.validate((), ()) == []
    assert transform.uniform
    assert transform.private


@pytest.mark.parametrize(
    "transform",
    [
        Clip(0.0),
        Clip(-1.0),
        Clip(math.inf),
        Clip(math.nan),
        AdaptiveClip(0.0),
        AdaptiveClip(math.inf),
        AdaptiveClip(1.0, 0.0),
        AdaptiveClip(1.0, 1.0),
        AdaptiveClip(1.0, -0.1),
        AdaptiveClip(1.0, math.nan),
        Clip(2.0**-60.1),
        Clip(2.0**60.1),
        AdaptiveClip(2.0**-60.1),
        AdaptiveClip(2.0**60.1),
    ],
)
def test_these_are_wrong(transform: Any) -> None:
    assert len(transform.validate((), ())) == 1


def test_all_that_is_wrong_is_told() -> None:
    said = AdaptiveClip(0.0, 1.0, count_noise=0.1).validate((), (Gaussian(1.0),))
    assert [text.split(" must")[0] for text in said] == [
        "AdaptiveClip: start",
        "AdaptiveClip: quantile",
        "AdaptiveClip: count_noise",
    ]
    assert len(Gaussian(0.0, 0).resolve(()).validate((), ())) == 3


def test_the_bound_adapts_once() -> None:
    (said,) = AdaptiveClip(1.0).validate((Clip(2.0), AdaptiveClip(2.0)), ())
    assert said == "AdaptiveClip is listed twice: remove one of them"
    assert AdaptiveClip(1.0).validate((Clip(2.0),), ()) == []


@pytest.mark.parametrize(
    ("count_noise", "fits"), [(0.5, False), (0.500001, True), (0.4, False), (0.0, False), (5.0, True)]
)
def test_the_count_may_not_spend_the_whole_budget(count_noise: float, fits: bool) -> None:
    """2 σ_b = z would leave infinite noise for everything else."""
    assert (AdaptiveClip(1.0, count_noise=count_noise).validate((), (Gaussian(1.0),)) == []) == fits
    assert AdaptiveClip(1.0, count_noise=count_noise).validate((), (SecureSum(),)) == []


def test_left_to_itself_the_count_takes_what_makes_the_rest_5_percent_noisier() -> None:
    for z in (0.5, 1.0, 4.0):
        settled = AdaptiveClip(2.0, 0.3, 0.1).resolve((Gaussian(z),))
        assert isinstance(settled, AdaptiveClip)
        assert (settled.start, settled.quantile, settled.rate) == (2.0, 0.3, 0.1)
        assert settled.count_noise is not None
        assert (z**-2 - (2 * settled.count_noise) ** -2) ** -0.5 == pytest.approx(1.05 * z)
        assert settled.validate((), (Gaussian(z),)) == []
    given = AdaptiveClip(1.0, count_noise=9.0)
    assert given.resolve((Gaussian(1.0),)) is given
    for after in ((), (SecureSum(),), (SecureSum(), Gaussian(1.0))):
        alone = AdaptiveClip(1.0).resolve(after)
        assert isinstance(alone, AdaptiveClip)
        assert alone.count_noise == 0


@pytest.mark.parametrize(("bound", "below"), [(5.0, 0.5), (5.1, 0.5), (4.99, -0.5), (0.1, -0.5)])
def test_a_site_tells_whether_it_was_within_the_bound_less_one_half(bound: float, below: float) -> None:
    sent = sent_by(
        AdaptiveClip(9.0),
        FIVE,
        {"clip": {"bound": torch.tensor(bound, dtype=torch.float64), "count_noise": torch.tensor(0.0)}},
    )
    assert sent.total.keys() == {*FIVE, BELOW}
    assert sent.total[BELOW].tolist() == [below]
    assert tree.norm({k: sent.total[k] for k in FIVE}) == pytest.approx(min(5.0, bound), rel=1e-5)


@pytest.mark.parametrize(("share", "sites"), [(0.0, 4), (0.25, 4), (0.5, 4), (1.0, 4), (1.5, 4), (-0.5, 2)])
def test_the_bound_moves_by_how_far_the_share_is_from_the_quantile(share: float, sites: int) -> None:
    """C ← C · exp(−η (b̃ − γ)), with a noisy share cut to what a share can be."""
    clip, total = (
        AdaptiveClip(1.0, quantile=0.3, rate=0.2),
        {"m/w": torch.ones(2), BELOW: torch.tensor([(share - 0.5) * sites])},
    )
    received, state = clip.decode(
        WeightedMean(total, float(sites)), {"clip": {"bound": torch.tensor(2.0, dtype=torch.float64)}}
    )
    assert float(state["clip"]["bound"]) == pytest.approx(2 * math.exp(-0.2 * (min(max(share, 0), 1) - 0.3)))
    assert received.total.keys() == {"m/w"}
    assert received.weight == sites


class Noise:
    """In place of ``add_noise``: adds the deviation itself, and writes down what it was asked for."""

    def __init__(self) -> None:
        self.deviations: list[float] = []

    def __call__(self, leaf: torch.Tensor, deviation: float, rng: Any) -> torch.Tensor:
        self.deviations.append(deviation)
        return leaf + deviation


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> Noise:
    made = Noise()
    monkeypatch.setattr(gaussian, "add_noise", made)
    return made


@pytest.mark.parametrize(
    ("multiplier", "bound", "share", "deviation"), [(1.0, 1.0, 1, 1.0), (2.0, 0.5, 4, 0.5), (0.8, 3.0, 9, 0.8)]
)
def test_the_noise_is_multiplier_times_bound_over_the_root_of_the_share(
    multiplier: float, bound: float, share: int, deviation: float, noise: Noise
) -> None:
    """Parts of variance (z C)² / share sum to (z C)²."""
    with metered() as spent:
        sent = sent_by(Gaussian(multiplier, share), FIVE, Clip(bound).describe({}))
    assert noise.deviations == pytest.approx([deviation] * 2)
    assert all(torch.allclose(sent.total[k], FIVE[k] + deviation) for k in FIVE)
    assert spent == [Spend(multiplier, share=share)]


def test_the_noise_comes_from_the_sites_secret_bytes() -> None:
    """The same bytes give the same reply, and others another, whatever the study's seed."""

    def sent(byte: int, seed: int) -> torch.Tensor:
        site = Site("bern", seed=seed, entropy=lambda n: bytes((byte + i) % 256 for i in range(n)))
        return Gaussian(1.0).encode(WeightedMean(FIVE, 1.0), Clip(1.0).describe({}), {}, site, 0)[0].total["m/b"]

    assert torch.equal(sent(3, 0), sent(3, 1))
    assert not torch.equal(sent(3, 0), sent(9, 0))


@pytest.mark.parametrize("share", [1, 4])
def test_the_count_has_its_own_noise_and_the_rest_has_more(share: int, noise: Noise) -> None:
    clip = AdaptiveClip(2.0, count_noise=3.0)
    with metered() as spent:
        sent_by(Gaussian(1.0, share), {"m/w": torch.ones(2), BELOW: torch.tensor([0.5])}, clip.describe(clip.init({})))
    rest = (1 - (2 * 3.0) ** -2) ** -0.5 * 2.0
    assert noise.deviations == pytest.approx([rest / share**0.5, 3.0 / share**0.5])
    assert [spend.multiplier for spend in spent] == [1.0], "count and rest together cost what was declared"


def test_integers_and_variances_are_not_hidden_but_empty_ones_pass(noise: Noise) -> None:
    notes = Clip(1.0).describe({})
    with metered() as spent:
        with pytest.raises(ValueError, match=r"Gaussian cannot protect integers, and m/n contains torch.int64"):
            sent_by(Gaussian(1.0), {"m/n": torch.ones(1, dtype=torch.int64)}, notes)
        with pytest.raises(ValueError, match=r"m/norm.running_var is a variance"):
            sent_by(Gaussian(1.0), {"m/a": torch.ones(1), "m/norm.running_var": torch.ones(1)}, notes)
    assert not spent, "nothing was released"
    sent_by(Gaussian(1.0), {"m/e": torch.zeros(0, dtype=torch.int32), "m/running_mean": torch.ones(1)}, notes)


def problems(transform: Gaussian, *before: Any, after: Any = ()) -> list[str]:
    return transform.resolve(tuple(after)).validate(tuple(before), tuple(after))


def test_noise_follows_a_clip_and_its_parts_are_summed_in_secret() -> None:
    clip, adaptive, secure = Clip(1.0), AdaptiveClip(1.0, count_noise=9.0), SecureSum(threshold=3)
    assert (
        problems(Gaussian(1.0), clip)
        == problems(Gaussian(1.0), adaptive)
        == problems(Gaussian(1.0), secure, clip)
        == []
    )
    assert problems(Gaussian(1.0, 3), clip, after=[secure]) == []
    for before in ((), (secure,), (clip, secure)):
        [said] = problems(Gaussian(1.0), *before)
        assert said.startswith("Gaussian must come directly after Clip or AdaptiveClip")
    for after in ((), (clip,)):
        [said] = problems(Gaussian(1.0, 2), clip, after=after)
        assert said.startswith("Gaussian(share=...) must be followed by SecureSum")
    for wrong in (Gaussian(0.0), Gaussian(-1.0), Gaussian(math.inf), Gaussian(math.nan)):
        [said] = problems(wrong, clip)
        assert said.endswith("without noise, remove Gaussian and claim no privacy")
    assert problems(Gaussian(1.0, 0), clip) == ["Gaussian: share is a number of sites of at least 1, not 0"]
    assert Gaussian(1.0).uniform
    assert Gaussian(1.0).private


def step_of(transform: Transform) -> float | None:
    assert isinstance(transform, Gaussian)
    return transform.step


def test_the_step_of_the_secure_sum_that_follows_is_taken_over() -> None:
    """No one can name a finer grid than the numbers are rounded to."""
    coarse = SecureSum(limit=64.0, bits=3, heaviest=2.0, threshold=4)
    assert step_of(Gaussian(1.0).resolve((coarse,))) == step_of(Gaussian(1.0).resolve((Clip(1.0), coarse))) == 0.25
    assert step_of(Gaussian(1.0).resolve(())) == step_of(Gaussian(1.0).resolve((Clip(1.0),))) == 0.0
    assert step_of(Gaussian(1.0, step=0.5).resolve((coarse,))) == 0.5
    for named in (0.5, 1e-9, None):
        [said] = Gaussian(1.0, step=named).validate((Clip(1.0),), (coarse,))
        assert said == f"Gaussian: step follows from SecureSum, so omit it: it is 0.25, not {named}"


@pytest.mark.parametrize(
    ("z", "share", "bits", "bound", "fits"),
    [
        (1.0, 4, 3, 1.0, True),
        (0.999, 4, 3, 1.0, False),
        (1.0, 5, 3, 1.0, False),
        (1.0, 4, 2, 1.0, False),
        (1.0, 4, 3, 0.999, False),
        (1e-3, 1, 0, 1.0, True),
        (0.75, 2, 3, 1.0, True),
        (0.7, 2, 3, 1.0, False),
    ],
)
def test_a_part_of_the_noise_spans_four_steps_of_the_grid(
    z: float, share: int, bits: int, bound: float, fits: bool
) -> None:
    """z C / sqrt(share) >= 4 steps. A site that adds all noise by itself rounds what is hidden already."""
    said = problems(Gaussian(z, share), Clip(bound), after=[SecureSum(limit=64.0, bits=bits, threshold=max(3, share))])
    assert len(said) == (not fits)
    assert all(
        f"Gaussian(share={share}): each site's part of the noise has standard deviation {z * bound / share**0.5:.3g}, "
        in text
        for text in said
    )


@pytest.mark.parametrize(
    ("bound", "count_noise", "fits"),
    [(1.0, 1.0, True), (0.8, 1.0, False), (9.0, 0.99, False), (9.0, 1.0, True), (1.0, 0.0, True)],
)
def test_the_site_checks_the_grid_for_the_bound_of_the_day(
    bound: float, count_noise: float, fits: bool, noise: Noise
) -> None:
    """An adaptive bound may shrink until the parts are rounded away; and the count's part must span the grid too."""
    settled = Gaussian(1.0, 4).resolve((SecureSum(limit=64.0, bits=3, threshold=4),))
    notes = {
        "clip": {
            "bound": torch.tensor(bound, dtype=torch.float64),
            "count_noise": torch.tensor(count_noise, dtype=torch.float64),
        }
    }
    with metered() as spent:
        if fits:
            assert sent_by(settled, FIVE, notes).total.keys() == FIVE.keys()
        else:
            with pytest.raises(ValueError, match=r"rounds to steps of 0\.125, so the sum would not have"):
                sent_by(settled, FIVE, notes)
    assert len(spent) == fits
    assert len(noise.deviations) == 2 * fits


@pytest.mark.parametrize(
    ("share", "sites", "fits"),
    [
        (3, 3, True),
        (3, 2, False),
        (3, 7, True),
        (3, 2.6, True),
        (3, 2.4, False),
        (1, 1, True),
        (1, 0.4, True),
        (2, 1, False),
    ],
)
def test_a_sum_holds_the_noise_that_was_counted_on(share: int, sites: float, fits: bool) -> None:
    received, state = WeightedMean({"w": torch.ones(1)}, float(sites)), {"clip": {"bound": torch.tensor(1.0)}}
    if fits:
        assert Gaussian(1.0, share).decode(received, state) == (received, state)
    else:
        with pytest.raises(ValueError, match=rf"contains the noise of {sites:g} sites, but {share} are required"):
            Gaussian(1.0, share).decode(received, state)
