"""Neither roster nor threshold of a secure sum is the server's choice: real sites with a dishonest server."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polyclinic.engines.flare.client.secure_training import Demands
from polyclinic.engines.flare.client.site_agent import take_in
from polyclinic.engines.flare.protocol import tensor_file
from polyclinic.engines.flare.protocol.messages import VERSION, Call
from polyclinic.engines.flare.server.secure_aggregation import _size
from polyclinic.privacy.gaussian import Clip, Gaussian
from polyclinic.secure_aggregation import SecureSum, contents, vector_of
from polyclinic.secure_aggregation.fixed_point import content
from polyclinic.secure_aggregation.server import SecureServer
from polyclinic.secure_aggregation.session_keys import ProtocolError, Session, default_threshold, least_threshold
from tests.support.known import known
from tests.support.local_deployment import LocalCarrier, approve, hospital, identities, order

SUM = {"name": "secure-sum", "limit": 8.0, "bits": 20}
GROUP = {"width": 4, "depth": 2, "norm": "group"}
ALL = ("site-0", "site-1", "site-2", "site-3", "site-4")


class Liar:
    """A server that sums over any sites, under any name and threshold."""

    def __init__(
        self,
        root: Path,
        method: str = "fedavg",
        count: int = 5,
        min_sites: int = 3,
        run: str = "run-1",
        homes: Any = None,
        **how: Any,
    ) -> None:
        policy = f"[limits]\nmin_patients = 2\n[require]\nsecure = true\nmin_sites = {min_sites}\n"
        self.homes = homes or hospital(root, count, policy)
        plan = {"options": {"uniform": True}, "uplink": [SUM], "network_options": GROUP, **how.pop("plan", {})}
        sites = how.pop("sites", tuple(self.homes))
        self.an = order(method, run, sites, plan=plan, identities=identities(self.homes), **how)
        for home in self.homes.values():
            approve(home, self.an)
        self.carrier, self.number, self.id = LocalCarrier(self.homes, self.an), 0, ""
        built = self.an.build_plan().build_method()
        self.honest = known(built.request(built.init(self.an.build_plan().build_task().first(3))))

    def call(self, site: str, value: Any, kind: str, stage: str = "", job: str = "train", round: int = 0) -> Any:
        """What a site sends; raises with the reason where it sends nothing."""
        agent = self.carrier.agent(site)
        received = agent.memory.folder / "received"
        size, sha256 = tensor_file.write(received, value, durable=False)
        body = take_in(agent.memory, received, self.number)
        call = Call(
            VERSION,
            self.an.run,
            self.number,
            site,
            "",
            size,
            sha256,
            kind,
            self.an.hash,
            round,
            job,
            0,
            0,
            0,
            0.0,
            stage,
        )
        answer, file = agent.answer(call, body)
        if answer.lost:
            raise ProtocolError(answer.lost)
        return tensor_file.read(known(file))

    def train(self, sites: Any, job: str = "", round: int = 0, by: float = 0.0) -> Any:
        self.number += 1
        job = job or self.honest.job
        trees = {
            name: {k: v + by for k, v in t.items()} if name == "params" else t for name, t in self.honest.trees.items()
        }
        request = replace(self.honest, job=job, round=round, trees=trees)
        self.asked = (job, round)
        return {site: self.call(site, request, "do", "", job, round) for site in sites}

    def sum(
        self,
        sites: Any = ALL,
        threshold: int = 0,
        until: str = "",
        job: str = "",
        round: int = 0,
        by: float = 0.0,
        id: str = "",
        leave_out: Any = (),
    ) -> Any:
        """The sum over ``sites``, after asking them to train; the masked vectors where it goes ``until`` "mask"."""
        layouts = self.train(sites, job, round, by)
        self.id = id or os.urandom(16).hex()
        keys = {site: self.an.identities[site] for site in sites}
        session = Session(
            self.id, round, _size(next(iter(layouts.values()))), threshold or default_threshold(len(sites)), keys
        )
        return self.protocol(session, sites, until, leave_out)

    def protocol(self, session: Session, sites: Any, until: str = "", leave_out: Any = ()) -> Any:
        server = SecureServer(session)

        def stage(name: Any, bodies: Any) -> Any:
            return [self.call(site, body, "secure", name, *self.asked) for site, body in bodies.items()]

        adverts = server.adverts(stage("advertise", dict.fromkeys(sites, session)))
        inboxes = server.shares(stage("share", dict.fromkeys([a.site for a in adverts], adverts)))
        masked = stage("mask", {site: box for site, box in inboxes.items() if site not in leave_out})
        if until == "mask":
            return {message.site: message.vector for message in masked}
        alive = server.masked(masked)
        agreed = server.agreed(stage("agree", dict.fromkeys(alive, alive)))
        if until == "agree":
            return alive
        return server.reveals(stage("reveal", dict.fromkeys([a.site for a in agreed], agreed)))

    def own(self, site: str, number: int = 0) -> torch.Tensor:
        return vector_of(tensor_file.read(self.homes[site].memory(self.an.run) / f"{number or self.number}.reply"))


# The same values over another roster ---------------------------------------------------------------------------------


def test_a_sum_is_not_asked_again_without_one_site_under_any_name(tmp_path: Path) -> None:
    liar = Liar(tmp_path)
    five = liar.sum()
    assert torch.equal(five, sum((liar.own(site) for site in ALL), torch.tensor(0)))
    assert torch.equal(liar.sum(), five)  # the same roster shows nothing new
    with pytest.raises(ProtocolError, match="was opened already; one over others would show what 1 of them sent"):
        liar.sum(ALL[:4])
    for job in ("train ", "Train", "train-again"):
        with pytest.raises(ProtocolError, match="is not in the schedule"):
            liar.sum(ALL[:4], job=job)
    liar.carrier.restart("site-0")  # what was opened is on the disk
    with pytest.raises(ProtocolError, match="was opened already"):
        liar.sum(ALL[:4])


def test_a_survivor_is_not_left_out_of_a_second_session(tmp_path: Path) -> None:
    liar = Liar(tmp_path)
    liar.sum()
    with pytest.raises(ProtocolError, match="was opened already"):
        liar.sum(leave_out=("site-4",))  # the same roster, of which one is claimed to have vanished


COUNTS = {"uplink": [{**SUM, "limit": 64.0, "bits": 16, "heaviest": 64.0}]}


def test_a_static_statistic_is_summed_once_whatever_round_is_named(tmp_path: Path) -> None:
    liar = Liar(tmp_path, "fedsld", plan=COUNTS)
    assert liar.honest.job == "count"
    liar.sum()
    with pytest.raises(ProtocolError, match="'count' in round 1 is not in the schedule"):
        liar.sum(ALL[:4], round=1)
    with pytest.raises(
        ProtocolError, match=r"a sum of 'count' over site-0, .* was opened already, and a run opens one"
    ):
        liar.sum(ALL[:4])


def test_the_same_values_in_another_run_have_the_same_roster(tmp_path: Path) -> None:
    first = Liar(tmp_path, "fedsld", plan=COUNTS)
    five = first.sum()
    first.carrier.close()
    second = Liar(tmp_path, "fedsld", run="run-2", homes=first.homes, plan=COUNTS)
    with pytest.raises(ProtocolError, match="one over others would show what 1 of them sent"):
        second.sum(ALL[:4])
    third = Liar(tmp_path, "fedsld", run="run-3", homes=first.homes, plan=COUNTS)
    assert torch.equal(third.sum(), five)


def test_the_same_gradient_in_another_round_has_the_same_roster(tmp_path: Path) -> None:
    """A full gradient does not depend on the round, so a second sum of it is one of the same values."""
    liar = Liar(tmp_path, "fedsgd")
    liar.sum()
    with pytest.raises(ProtocolError, match="was opened already"):
        liar.sum(ALL[:4], round=1)


def test_other_values_are_summed_over_whoever_is_there(tmp_path: Path) -> None:
    liar = Liar(tmp_path)
    liar.sum()
    assert torch.equal(liar.sum(ALL[:4], round=1, by=0.01), sum((liar.own(site) for site in ALL[:4]), torch.tensor(0)))


def test_noise_that_is_drawn_anew_opens_no_second_roster_for_a_request(tmp_path: Path) -> None:
    send = [{"name": "clip", "bound": 1.0}, {"name": "gaussian", "multiplier": 0.1}, {**SUM, "limit": 64.0, "bits": 18}]
    liar = Liar(tmp_path, plan={"uplink": send})
    liar.sum()
    for home in liar.homes.values():  # the replies are gone, so that the sites train once more
        for file in home.memory("run-1").glob("*.reply"):
            file.unlink()
    with pytest.raises(ProtocolError, match="was opened already"):
        liar.sum(ALL[:4])


def test_a_session_that_is_given_up_shows_nothing_of_the_next(tmp_path: Path) -> None:
    """Masks are made anew for each session, and its keys are forgotten: nothing is opened before shares are
    revealed.
    """
    liar = Liar(tmp_path)
    first = liar.sum(until="mask")
    second = liar.sum(ALL[:4], until="mask")
    own = liar.own("site-0")
    for masked in (first["site-0"] - own, second["site-0"] - own, first["site-0"] - second["site-0"]):
        bits = ((masked[:, None] >> torch.arange(32)) & 1).float()
        assert abs(float(bits.mean()) - 0.5) < 0.03
    assert liar.sum(ALL[:4], until="agree") == ALL[:4]  # what was agreed on was not opened either
    five = liar.sum()
    assert torch.equal(five, sum((liar.own(site) for site in ALL), torch.tensor(0)))
    with pytest.raises(ProtocolError, match="was opened already"):
        liar.sum(ALL[:4])


def test_a_session_is_begun_once(tmp_path: Path) -> None:
    liar = Liar(tmp_path)
    liar.sum(until="mask", id="00" * 16)
    with pytest.raises(ProtocolError, match="this session was begun before"):
        liar.sum(id="00" * 16)


# Thresholds and rosters ----------------------------------------------------------------------------------------------


def _lower(session: Session, threshold: int) -> Session:
    object.__setattr__(session, "threshold", threshold)
    return session


@pytest.mark.parametrize(("threshold", "fits"), [(3, False), (4, True), (5, True)])
def test_two_thirds_must_stay_to_the_end(threshold: int, fits: bool, tmp_path: Path) -> None:
    liar = Liar(tmp_path)
    layouts = liar.train(ALL)
    session = _lower(Session("ab" * 16, 0, _size(layouts["site-0"]), 4, dict(liar.an.identities)), threshold)
    if fits:
        liar.protocol(session, ALL)
    else:
        with pytest.raises(ProtocolError, match=r"failed|two thirds"):
            liar.protocol(session, ALL)


SHARED = [
    {"name": "clip", "bound": 1.0},
    {"name": "gaussian", "multiplier": 1.0, "share": 5},
    {**SUM, "limit": 64.0, "threshold": 5, "bits": 18},
]


def test_as_many_sites_as_the_noise_counts_on_must_stay(tmp_path: Path) -> None:
    liar = Liar(tmp_path, count=7, plan={"uplink": SHARED})
    seven = tuple(liar.homes)
    with pytest.raises(ProtocolError, match=r"of which 3 must stay: here it is at least 5 \(the approved threshold"):
        liar.sum(seven[:3], threshold=3)
    with pytest.raises(ProtocolError, match="of which 4 must stay: here it is at least 5"):
        liar.sum(seven[:6], threshold=4)
    with pytest.raises(ProtocolError, match="here it is at least 5"):
        liar.sum(seven[:4], threshold=4)
    assert torch.equal(liar.sum(seven[:5], threshold=5), sum((liar.own(site) for site in seven[:5]), torch.tensor(0)))


def test_the_policy_asks_for_more(tmp_path: Path) -> None:
    liar = Liar(tmp_path, min_sites=5)
    with pytest.raises(ProtocolError, match=r"here it is at least 5 \(the policy here, require.min_sites\)"):
        liar.sum(threshold=4)
    liar.sum(threshold=5)


def test_a_sum_holds_sites_that_train_and_no_other(tmp_path: Path) -> None:
    liar = Liar(tmp_path, sites=ALL[:4], external=("site-4",))
    layouts = liar.train(ALL[:4])
    session = Session("ab" * 16, 0, _size(layouts["site-0"]), 4, dict(liar.an.identities))
    with pytest.raises(ProtocolError, match="site-4 is not one of the approved sites that train"):
        liar.protocol(session, ALL[:4])
    liar.sum(ALL[:4])


def test_a_sum_has_room_for_all_of_its_sites(tmp_path: Path) -> None:
    """Beyond the capacity a sum wraps around, and what comes out is no sum."""
    liar = Liar(tmp_path, plan={"uplink": [{"name": "secure-sum", "limit": 448.0, "bits": 20}]})
    with pytest.raises(ProtocolError, match="a sum over 5 sites, and the approved one has room for 4"):
        liar.sum()
    liar.sum(ALL[:4])


def test_what_a_pipeline_demands() -> None:
    sites = ("a", "b", "c", "d", "e", "f", "g")
    plain = Demands.of((SecureSum(),), sites)
    assert (plain.threshold, plain.sites) == (0, frozenset(sites))
    assert plain.capacity == min(7, SecureSum().capacity) == 7
    assert Demands.of((Clip(1.0), Gaussian(1.0, share=5), SecureSum(threshold=6)), sites).threshold == 6
    assert Demands.of((Clip(1.0), Gaussian(1.0, share=6), SecureSum(threshold=4)), sites).threshold == 6
    assert Demands.of((SecureSum(limit=448.0, bits=20),), sites).capacity == 4
    assert [Demands(frozenset(), 4, 9).least(n, 2) for n in (3, 6, 7, 9)] == [4, 4, 5, 6]
    assert [Demands(frozenset(), 0, 9).least(n, 5) for n in (5, 7, 8)] == [5, 5, 6]


def test_one_function_says_how_many_must_stay() -> None:
    assert [default_threshold(n) for n in range(3, 13)] == [3, 3, 4, 4, 5, 6, 6, 7, 8, 8]
    assert [least_threshold(n, None, 6) for n in (4, 5, 6)] == [4, 4, 4]
    assert [least_threshold(n, 3, 6) for n in (3, 4, 5, 6)] == [3, 3, 4, 4]
    assert least_threshold(5, 5, 9) == 5
    assert least_threshold(3, None, 9) == 6


@pytest.mark.parametrize("n", range(3, 13))
def test_a_session_has_the_threshold_of_its_roster(n: int) -> None:
    keys = {f"s{k}": "" for k in range(n)}
    least = default_threshold(n)
    for threshold in range(n + 2):
        if least <= threshold <= n:
            Session("x", 0, 1, threshold, keys)
        else:
            with pytest.raises(ProtocolError, match=f"must be at least {least}, two thirds of the {n} sites"):
                Session("x", 0, 1, threshold, keys)


@pytest.mark.parametrize("n", range(3, 13))
def test_fewer_than_a_third_do_not_help_a_server_that_shows_two_lists(n: int) -> None:
    """The attack of ``default_threshold``: two groups of honest sites, to both of which the colluding ones belong."""
    t = default_threshold(n)
    for colluding in range(n):
        both = 2 * (t - colluding) <= n - colluding
        assert not both or 3 * colluding >= n


# What is summed ------------------------------------------------------------------------------------------------------


def test_values_are_known_by_their_numbers_and_not_by_their_names() -> None:
    one = {"m/a/x": torch.tensor([1.0, 2.0]), "m/a/y": torch.zeros(3)}
    assert content(one) == content({"m/b/x": one["m/a/x"], "m/b/z": one["m/a/y"]})
    different = [
        {"x": torch.tensor([1.0, 2.0])},
        {**one, "m/a/x": torch.tensor([1.0, 2.0 + 1e-6])},
        {"x": torch.tensor([[1.0, 2.0]]), "y": torch.zeros(3)},
        {"x": torch.tensor([1.0, 2.0]).double(), "y": torch.zeros(3)},
        {"x": torch.tensor([2.0, 1.0]), "y": torch.zeros(3)},
    ]
    assert len({content(one), *map(content, different)}) == 6
    assert content({"x": torch.zeros(3), "y": torch.zeros(0)}) == content({}) == ""
    assert content({"x": torch.tensor(float("nan"))}) != ""
    assert content({"x": torch.tensor([1.0, 2.0])[::2]}) == content({"x": torch.tensor([1.0])})
    assert content({"x": torch.arange(6.0).reshape(2, 3).T}) == content(
        {"x": torch.arange(6.0).reshape(2, 3).T.contiguous()}
    )


def test_what_is_coded_is_noted_within_the_block_alone() -> None:
    from polyclinic.core.aggregates import WeightedMean
    from polyclinic.core.site import Site

    sent, site = WeightedMean({"m/a/x": torch.tensor([1.0])}, 1.0), Site("a", {})
    SecureSum().encode(sent, {}, {}, site, 0)
    with contents() as outer:
        SecureSum().encode(sent, {}, {}, site, 0)
        with contents() as inner:
            SecureSum().encode(sent, {}, {}, site, 1)
    SecureSum().encode(sent, {}, {}, site, 0)
    assert outer == inner == [content(sent.total)]
