"""What noise for a coarse unit is worth to a finer one inside it, and which spends are spends at all."""

import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from polyclinic.learning.training.dp_sgd import Spend
from polyclinic.privacy.guarantee import COVERS, described, guarantee, meaning, sentence
from polyclinic.privacy.privacy_units import Cost, cost, payable, problems

RECORD, PATIENT, SITE = (Spend(4.0, unit=unit) for unit in ("record", "patient", "site"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spend", "unit", "multiplier"),
    [
        (RECORD, "record", 4.0),
        (PATIENT, "record", 2.0),
        (SITE, "record", 2.0),
        (PATIENT, "patient", 4.0),
        (SITE, "patient", 2.0),
        (SITE, "site", 4.0),
    ],
)
def test_a_finer_unit_inside_is_twice_as_far_whatever_the_number_of_levels(
    spend: Spend, unit: Any, multiplier: float
) -> None:
    assert cost(spend, unit) == Cost(multiplier, 1.0, 1, 0.0, inside=False)
    pure = spend._replace(multiplier=0.0, pure=3.0, steps=5)
    assert cost(pure, unit) == Cost(0.0, 1.0, 5, 3.0 * 4.0 / multiplier, inside=False)


@pytest.mark.parametrize(("spend", "unit"), [(RECORD, "patient"), (RECORD, "site"), (PATIENT, "site")])
def test_noise_for_a_finer_unit_does_not_protect_a_coarser_one(spend: Spend, unit: Any) -> None:
    with pytest.raises(ValueError, match=f"hides each {spend.unit} does not protect a {unit}"):
        cost(spend, unit)
    assert payable([spend], unit) == []


def test_a_unit_inside_a_sampled_one_is_replaced_at_the_same_rate() -> None:
    sampled = PATIENT._replace(rate=0.25, steps=7)
    assert cost(sampled, "record") == Cost(2.0, 0.25, 7, 0.0, inside=True)
    assert cost(sampled, "patient") == Cost(4.0, 0.25, 7, 0.0, inside=False)


def test_noise_on_the_whole_reply_is_paid_for_alone_and_else_all_of_it() -> None:
    """Training returns not all that a method sends, so what protects only training does not pay for the reply."""
    assert payable([PATIENT, SITE, SITE], "patient") == [SITE, SITE]
    assert payable([RECORD, SITE], "patient") == [SITE]
    assert payable([RECORD, SITE], "record") == [SITE]
    assert payable([PATIENT, SITE], "site") == [SITE]
    assert payable([PATIENT, RECORD], "record") == [PATIENT, RECORD]
    assert payable([PATIENT, RECORD], "patient") == []
    assert payable([PATIENT, PATIENT], "patient") == [PATIENT, PATIENT]
    assert payable([], "record") == []


@pytest.mark.parametrize(
    "spend",
    [
        Spend(2.0**-10),
        Spend(2.0**20),
        Spend(1.0, 1e-9),
        Spend(1.0, 1.0),
        Spend(1.0, steps=10**9),
        Spend(1.0, share=10**6),
        Spend(0.0, pure=1e6),
        Spend(0.0, pure=1e-3),
        Spend(1, 1, 1, "record"),
        Spend(1.0, unit="patient"),
    ],
)
def test_a_spend_at_the_limits_is_one(spend: Spend) -> None:
    assert problems(spend) == []


NONSENSE = [
    ("multiplier", 2.0**-10 * 0.999),
    ("multiplier", 2.0**20 * 1.001),
    ("multiplier", 0.0),
    ("multiplier", -1.0),
    ("multiplier", math.nan),
    ("multiplier", math.inf),
    ("multiplier", "1"),
    ("multiplier", True),
    ("rate", 0.0),
    ("rate", 1.0000001),
    ("rate", -0.5),
    ("rate", math.nan),
    ("rate", None),
    ("steps", 0),
    ("steps", -1),
    ("steps", 2.0),
    ("steps", True),
    ("steps", 10**9 + 1),
    ("steps", math.inf),
    ("unit", "hospital"),
    ("unit", ""),
    ("pure", -0.1),
    ("pure", math.nan),
    ("pure", math.inf),
    ("pure", 1e6 + 1),
    ("share", 0),
    ("share", -3),
    ("share", 1.5),
    ("share", 10**6 + 1),
]


@pytest.mark.parametrize(("field", "value"), NONSENSE)
def test_a_spend_that_makes_no_sense_is_none(field: str, value: Any) -> None:
    (said,) = problems(Spend(1.0)._replace(**{field: value}))
    assert said.startswith(("the unit must be", f"{field} must be"))
    assert repr(value) in said


def test_pure_privacy_has_no_multiplier_beside_it() -> None:
    assert problems(Spend(1.0, pure=1.0)) == ["a spend of pure ε must have multiplier 0, not 1.0"]


ODD = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.integers(), st.booleans(), st.none(), st.text(max_size=3)
)


@settings(max_examples=400, deadline=None)
@given(ODD, ODD, ODD, st.sampled_from(["record", "patient", "site", "town"]), ODD, ODD)
@example(1.0, 1.0, 1, "site", 0.0, 1)
@example(0.0, 1.0, 1, "site", 2.0, 1)
def test_what_passes_can_be_accounted_for(
    multiplier: Any, rate: Any, steps: Any, unit: Any, pure: Any, share: Any
) -> None:
    spend = Spend(multiplier, rate, steps, unit, pure, share)
    if problems(spend):
        return
    one = cost(spend, "record")
    assert one.rate <= 1
    assert (one.multiplier > 0) != (one.pure > 0)
    assert all(math.isfinite(x) for x in one)
    assert one.rate > 0 < one.steps


def test_what_an_epsilon_says_depends_on_what_was_spent() -> None:
    plain = guarantee([PATIENT], "patient")
    assert plain.adjacency == "add or remove one patient"
    assert plain.assumptions == ("the number of patients counts as public",)
    assert plain.short == "per patient (add or remove one patient)"
    inside = guarantee([SITE._replace(share=7), PATIENT._replace(rate=0.1)], "record")
    assert inside.adjacency == "replace, add or remove one record inside a patient or site that takes part"
    assert inside.assumptions == (
        "the number of records counts as public",
        "who is in a Poisson sample stays secret",
        "each sum holds the noise of at least 7 sites that keep it secret; with k of them working with the server the "
        "noise is that of 7 - k",
    )
    assert guarantee([SITE], "patient").adjacency == "replace, add or remove one patient inside a site that takes part"
    assert guarantee([SITE, PATIENT], "patient").adjacency == "add or remove one patient", "what both protect"
    nothing = guarantee([], "site")
    assert nothing.adjacency == "add or remove one site"
    assert nothing.assumptions == ("the number of sites counts as public",), "no sum, so no other noise is counted on"
    (_, shared) = guarantee([SITE._replace(share=2)], "site").assumptions
    assert shared.startswith("each sum holds the noise of at least 2 sites"), "from two on"
    assert inside.facts() == {"unit": "record", "adjacency": inside.adjacency, "assumes": list(inside.assumptions)}


def test_one_sentence_says_unit_adjacency_assumptions_and_what_is_not_covered() -> None:
    said = sentence("1.50", "1e-05", "patient", "add or remove one patient", ("a", "b"), ", by PLD")
    assert said == (
        "ε = 1.50 at δ = 1e-05 for every patient (adjacency: add or remove one patient), by PLD. Assumed: a; b. Covers "
        + COVERS
        + "."
    )
    assert sentence("1.50", "1e-05", "patient", "x", ("a",)).startswith(
        "ε = 1.50 at δ = 1e-05 for every patient (adjacency: x). Assumed: a."
    )
    assert "scores of validation and test patients that a site sends are not covered" in said
    assert meaning("site", "add or remove one site", ()) == (
        f"ε is for every site (adjacency: add or remove one site). Covers {COVERS}."
    )


def test_a_spend_is_described_with_what_it_counts_as() -> None:
    assert described(SITE, "site") == "1 step on everyone with noise σ = 4"
    shared = SITE._replace(steps=3, share=7)
    assert described(shared, "patient") == (
        "3 steps on everyone with noise σ = 4 (a part from each of 7 sites) for a site, which is σ = 2 for a patient inside"
    )
    assert described(SITE._replace(share=2), "site").endswith("with noise σ = 4 (a part from each of 2 sites)")
    pure = Spend(0.0, pure=1.5)
    assert described(pure, "record") == "1 release of ε = 1.5 each for a site, which is ε = 3 for a record inside"
    assert "2 steps on a Poisson sample of q = 0.25 with" in described(PATIENT._replace(rate=0.25, steps=2), "patient")
