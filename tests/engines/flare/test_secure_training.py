"""The site's half of a secure sum, step by step: whatever the server says, a site sums only what was approved here."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.atomic import write_private
from polyclinic.engines.flare.client.secure_training import Demands, SecureTraining
from polyclinic.engines.flare.pki import site_keys
from polyclinic.engines.flare.protocol import tensor_file
from polyclinic.engines.flare.protocol.paths import hash_of
from polyclinic.privacy.gaussian import Gaussian
from polyclinic.secure_aggregation import SecureSum
from polyclinic.secure_aggregation.server import SecureServer
from polyclinic.secure_aggregation.session_keys import ProtocolError, Session, public

NAMES = ("a", "b", "c", "d", "e")
ROUND = 2


def values(k: int) -> torch.Tensor:
    return torch.arange(4, dtype=torch.int32) * 100 + k


class Federation:
    """Sites with keys and a vector each, and a server that says to them what a test tells it to."""

    def __init__(self, root: Path, demands: Demands, names: Sequence[str] = NAMES) -> None:
        self.root, self.min_sites = root, 0
        own = {name: Ed25519PrivateKey.generate() for name in names}
        self.identities = {name: public(key) for name, key in own.items()}
        self.sites: dict[str, SecureTraining] = {}
        for k, (name, key) in enumerate(own.items()):
            (root / name).mkdir(parents=True)
            write_private(root / name / "secure.key", key.private_bytes_raw().hex())
            tensor_file.write(root / name / "vector", Reply({"update": WeightedMean({"w": values(k)}, 1.0)}))
            self.sites[name] = SecureTraining(name, self.identities, root / name, demands)

    def session(self, names: Sequence[str] = NAMES, threshold: int = 4, **changes: Any) -> Session:
        known = {name: self.identities[name] for name in names}
        return replace(Session(os.urandom(16).hex(), ROUND, 4, threshold, known), **changes)

    def step(self, site: str, stage: str, value: Any, min_sites: int | None = None) -> dict[str, Any]:
        """What the training process says; what the site answers lies in the file ``out``."""
        folder = self.root / site
        tensor_file.write(folder / "body", value)
        command = {"stage": stage, "body": folder / "body", "vector": folder / "vector", "out": folder / "out"}
        asked = self.min_sites if min_sites is None else min_sites
        return self.sites[site].step({k: str(v) for k, v in command.items()} | {"round": ROUND}, asked)

    def all(self, stage: str, values: Mapping[str, Any]) -> list[Any]:
        return [self._answer(site, stage, value) for site, value in values.items()]

    def _answer(self, site: str, stage: str, value: Any) -> Any:
        self.step(site, stage, value)
        return tensor_file.read(self.root / site / "out")

    def until(self, stage: str, session: Session, lost: Sequence[str] = ()) -> tuple[SecureServer, Any]:
        """Up to just before ``stage``: the server, and what it would say at that stage to each site."""
        server = SecureServer(session)
        said: Any = dict.fromkeys(session.roster, session)
        steps: tuple[tuple[str, Callable[[list[Any]], Any]], ...] = (
            ("advertise", lambda got: dict.fromkeys(session.roster, server.adverts(got))),
            ("share", lambda got: {to: box for to, box in server.shares(got).items() if to not in lost}),
            ("mask", lambda got: dict.fromkeys(alive := server.masked(got), alive)),
            ("agree", lambda got: dict.fromkeys(session.identities.keys() - set(lost), server.agreed(got))),
        )
        for name, after in steps:
            if name == stage:
                break
            said = after(self.all(name, said))
        return server, said


def demands(threshold: int = 0, capacity: int = 9, sites: Sequence[str] = NAMES) -> Demands:
    return Demands(frozenset(sites), threshold, capacity)


@pytest.fixture
def made(tmp_path: Path) -> Federation:
    return Federation(tmp_path, demands())


def refusal(federation: Federation, session: Any, min_sites: int = 0, site: str = "a") -> str:
    """Why a site does not begin a session; empty where it does."""
    try:
        federation.step(site, "advertise", session, min_sites)
    except ProtocolError as error:
        return str(error)
    return ""


# A sum ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [(), ("e",)])
def test_the_sum_is_over_the_sites_whose_vectors_arrived(made: Federation, lost: tuple[str, ...]) -> None:
    server, agreed = made.until("reveal", made.session(), lost)
    total = server.reveals(made.all("reveal", agreed))
    assert torch.equal(total, sum((values(k) for k, name in enumerate(NAMES) if name not in lost), torch.tensor(0)))


def test_every_step_describes_the_file_that_is_sent_and_who_is_in_the_sum(made: Federation) -> None:
    """The agent records the roster of an opened sum as the training process reports it at each stage."""
    session = made.session()
    expected: tuple[str, ...] = ()
    for stage in ("advertise", "share", "mask", "agree", "reveal"):
        _, said = made.until(stage, replace(session, id=os.urandom(16).hex()))
        for site in ("c", "a"):
            found = made.step(site, stage, said[site], 3)
            expected = NAMES if stage in ("agree", "reveal") else ()
            assert (tuple(found["alive"]), found["min_sites"], found["lost"]) == (expected, 3, "")
            assert found["seconds"] == 0.0
            assert (found["size"], found["sha256"]) == hash_of(made.root / site / "out")


def test_the_roster_that_is_reported_leaves_out_who_was_lost(made: Federation) -> None:
    _, alive = made.until("agree", made.session(), ("b",))
    assert made.step("a", "agree", ["e", "d", "c", "a"])["alive"] == ["a", "c", "d", "e"]
    assert sorted(alive) == ["a", "c", "d", "e"]


def test_a_new_session_forgets_who_was_in_the_last_one(made: Federation) -> None:
    _, alive = made.until("agree", made.session())
    assert made.step("a", "agree", alive["a"])["alive"] == list(NAMES)
    assert made.step("a", "advertise", made.session())["alive"] == []


def test_shares_are_revealed_once(made: Federation) -> None:
    _, agreed = made.until("reveal", made.session())
    made.step("a", "reveal", agreed["a"])
    for stage, value in (("reveal", agreed["a"]), ("agree", NAMES), ("share", ())):
        with pytest.raises(ProtocolError, match="no secure sum is in progress here"):
            made.step("a", stage, value)


# Partners of a site -----------------------------------------------------------------------------------------------


def test_a_site_with_another_key_than_was_approved_is_in_no_sum(made: Federation) -> None:
    session, other = made.session(), public(Ed25519PrivateKey.generate())
    for site in ("a", "b"):
        forged = replace(session, identities={**session.identities, site: other})
        assert f"{site} has another key, or another name, than was approved here" in refusal(made, forged)
    swapped = {**session.identities, "b": session.identities["c"], "c": session.identities["b"]}
    assert "b has another key" in refusal(made, replace(session, identities=swapped))


def test_a_site_that_nobody_approved_is_in_no_sum(made: Federation) -> None:
    session = made.session()
    extra = replace(session, identities={**session.identities, "sybil": public(Ed25519PrivateKey.generate())})
    assert "sybil has another key, or another name" in refusal(made, extra)


def test_a_site_that_only_tests_is_in_no_sum(tmp_path: Path) -> None:
    federation = Federation(tmp_path, demands(sites=NAMES[:4]))
    assert "e is not one of the approved sites that train" in refusal(federation, federation.session())
    assert refusal(federation, federation.session(NAMES[:4])) == ""


def test_a_site_does_not_begin_with_a_key_that_is_not_the_approved_one(made: Federation) -> None:
    write_private(made.root / "a" / "secure.key", Ed25519PrivateKey.generate().private_bytes_raw().hex())
    assert "the study names a key of this site for secure sums that is not in keys" in refusal(made, made.session())


def test_a_session_that_leaves_this_site_out_is_refused(made: Federation) -> None:
    assert "does not list a with its key" in refusal(made, made.session(("b", "c", "d", "e")))


def test_a_site_without_an_approved_key_is_in_no_sum(made: Federation) -> None:
    others = {name: key for name, key in made.identities.items() if name != "a"}
    made.sites["a"] = SecureTraining("a", others, made.root / "a", demands())
    assert "a has another key, or another name" in refusal(made, made.session())
    assert "names a key of this site for secure sums that is not in keys" in refusal(made, made.session(NAMES[1:]))


def test_a_study_that_was_approved_with_an_earlier_key_goes_on_after_new_keys(made: Federation) -> None:
    folder = made.root / "a"
    site_keys.make(site_keys.upcoming(folder))
    site_keys.take_up(folder)
    assert refusal(made, made.session()) == ""


# How many sites ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threshold", "min_sites", "asked", "why"),
    [
        (0, 0, 4, ""),
        (5, 0, 5, ""),
        (0, 5, 5, ""),
        (4, 4, 4, ""),
        (5, 0, 4, "least 5 (the approved threshold, and the sites whose noise is assumed)"),
        (0, 5, 4, "least 5 (the policy here, require.min_sites)"),
        (5, 5, 4, "least 5 (the policy here, require.min_sites)"),
        (3, 5, 4, "least 5 (the policy here, require.min_sites)"),
        (5, 3, 4, "least 5 (the approved threshold, and the sites whose noise is assumed)"),
    ],
)
def test_the_threshold_is_the_most_that_anybody_asks_for(
    tmp_path: Path, threshold: int, min_sites: int, asked: int, why: str
) -> None:
    federation = Federation(tmp_path, demands(threshold))
    said = refusal(federation, federation.session(threshold=asked), min_sites)
    assert bool(said) == bool(why)
    assert why in said
    assert said.startswith(f"a sum over 5 sites, of which {asked} must stay" if why else "")


@pytest.mark.parametrize(
    ("roster", "threshold", "min_sites", "least"),
    [
        (3, 0, 0, 3),
        (4, 0, 0, 3),
        (5, 0, 0, 4),
        (9, 0, 0, 6),
        (9, 7, 0, 7),
        (9, 0, 8, 8),
        (9, 7, 8, 8),
        (9, 8, 7, 8),
    ],
)
def test_the_least_threshold(roster: int, threshold: int, min_sites: int, least: int) -> None:
    assert demands(threshold).least(roster, min_sites) == least


@pytest.mark.parametrize(("capacity", "fits"), [(4, False), (5, True), (6, True)])
def test_no_more_sites_are_summed_than_the_ring_has_room_for(tmp_path: Path, capacity: int, fits: bool) -> None:
    federation = Federation(tmp_path, demands(capacity=capacity))
    said = refusal(federation, federation.session())
    assert said == ("" if fits else f"a sum over 5 sites, and the approved one has room for {capacity}")


def test_what_a_pipeline_demands_follows_from_all_of_its_transforms() -> None:
    assert Demands.of((), NAMES) == Demands(frozenset(NAMES), 0, 5)
    assert Demands.of((SecureSum(),), NAMES) == Demands(frozenset(NAMES), 0, 5)
    assert Demands.of((SecureSum(threshold=4),), NAMES).threshold == 4
    assert Demands.of((Gaussian(1.0, share=4), SecureSum(threshold=3)), NAMES).threshold == 4
    assert Demands.of((Gaussian(1.0, share=3), SecureSum(threshold=4)), NAMES).threshold == 4
    assert Demands.of((SecureSum(limit=448.0, bits=20), SecureSum()), NAMES).capacity == 4


@pytest.mark.parametrize(("least", "fits"), [(4, True), (5, False)])
def test_a_site_reveals_nothing_of_a_sum_of_too_few(made: Federation, least: int, fits: bool) -> None:
    """The policy of a site may have become stricter since the session began: it holds at once."""
    made.until("agree", made.session(), ("e",))
    if fits:
        assert made.step("a", "agree", ("a", "b", "c", "d"), least)["alive"] == list("abcd")
    else:
        with pytest.raises(ProtocolError, match="4 sites arrived, and a sum here needs 5"):
            made.step("a", "agree", ("a", "b", "c", "d"), least)


def test_a_site_that_is_listed_twice_counts_once(made: Federation) -> None:
    made.until("agree", made.session(), ("e",))
    with pytest.raises(ProtocolError, match="3 sites arrived, and a sum here needs 4"):
        made.step("a", "agree", ("a", "b", "c", "c"))


def test_the_threshold_of_the_session_holds_to_its_end(tmp_path: Path) -> None:
    federation = Federation(tmp_path, demands(5))
    federation.until("agree", federation.session(threshold=5))
    with pytest.raises(ProtocolError, match="4 sites arrived, and a sum here needs 5"):
        federation.step("a", "agree", ("a", "b", "c", "d"))


# What is summed ------------------------------------------------------------------------------------------------------


def test_a_session_is_begun_once(made: Federation) -> None:
    session = made.session()
    assert refusal(made, session) == ""
    assert refusal(made, session) == "this session was begun before; a retry needs a new session"
    with pytest.raises(ProtocolError, match="no secure sum is in progress"):
        made.step("a", "share", ())
    assert refusal(made, made.session()) == ""
    assert refusal(made, session) == "this session was begun before; a retry needs a new session"


@pytest.mark.parametrize(("round", "fits"), [(ROUND - 1, False), (ROUND, True), (ROUND + 1, False)])
def test_a_session_is_for_the_round_of_the_request(made: Federation, round: int, fits: bool) -> None:
    said = refusal(made, made.session(round=round))
    assert said == ("" if fits else f"a sum for round {round}, and the round is {ROUND}")


@pytest.mark.parametrize(("size", "fits"), [(3, False), (4, True), (5, False)])
def test_a_session_is_for_as_many_numbers_as_the_reply_has(made: Federation, size: int, fits: bool) -> None:
    said = refusal(made, made.session(size=size))
    assert said == ("" if fits else f"the session is for {size} numbers, and this site has 4")


def test_a_session_that_was_refused_may_be_begun_when_it_fits(made: Federation) -> None:
    session = made.session()
    assert "needs" in refusal(made, session, 5) or "least 5" in refusal(made, session, 5)
    assert refusal(made, session, 4) == ""


def test_a_refused_session_ends_the_one_before(made: Federation) -> None:
    _, adverts = made.until("share", made.session())
    assert "for round 9" in refusal(made, made.session(round=9))
    with pytest.raises(ProtocolError, match="no secure sum is in progress"):
        made.step("a", "share", adverts["a"])


# What the server may say ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [(), [], {"id": "x"}, "session"])
def test_a_sum_begins_with_a_session(made: Federation, value: Any) -> None:
    assert refusal(made, value) == "a secure sum begins with a session"


@pytest.mark.parametrize("stage", ["", "Reveal", "open"])
def test_a_stage_that_is_none_is_refused(made: Federation, stage: str) -> None:
    with pytest.raises(ProtocolError, match="a secure sum has no stage"):
        made.step("a", stage, ())


@pytest.mark.parametrize(
    ("stage", "value", "said"),
    [
        ("share", ("a", "b"), "a list of Advert was expected"),
        ("share", {}, "a list of Advert was expected"),
        ("share", "text", "a list of Advert was expected"),
        ("mask", ["a"], "an inbox must be a table of sealed shares"),
        ("mask", {"b": 3}, "an inbox must be a table of sealed shares"),
        ("mask", {"b": "x", "c": 3}, "an inbox must be a table of sealed shares"),
        ("mask", 3, "an inbox must be a table"),
        ("agree", "abcde", "the sites that arrived must be a list of names"),
        ("agree", ("a", 3), "the sites that arrived must be a list of names"),
        ("agree", {"a": "b"}, "the sites that arrived must be a list of names"),
        ("agree", 7, "the sites that arrived must be a list of names"),
        ("reveal", ("a", "b"), "a list of Agreed was expected"),
        ("reveal", 3, "a list of Agreed was expected"),
    ],
)
def test_a_body_of_another_form_is_refused(made: Federation, stage: str, value: Any, said: str) -> None:
    made.until(stage, made.session())
    with pytest.raises(ProtocolError, match=said):
        made.step("a", stage, value)


@pytest.mark.parametrize("stage", ["share", "reveal"])
def test_one_message_of_another_kind_among_right_ones_is_refused(made: Federation, stage: str) -> None:
    _, said = made.until(stage, made.session())
    with pytest.raises(ProtocolError, match="was expected"):
        made.step("a", stage, (*said["a"], "x"))


@pytest.mark.parametrize("form", [list, tuple])
def test_lists_travel_as_lists_or_tuples(made: Federation, form: type) -> None:
    session = made.session()
    _, adverts = made.until("share", session)
    made.step("a", "share", form(adverts["a"]))
    _, agreed = made.until("reveal", made.session())
    made.step("a", "reveal", form(agreed["a"]))


def test_steps_out_of_order_are_refused(made: Federation) -> None:
    with pytest.raises(ProtocolError, match="it began before the training process started"):
        made.step("a", "share", ())
    made.until("share", made.session())
    with pytest.raises(ProtocolError):
        made.step("a", "agree", NAMES)
