"""Secure sums reveal only the sum, for any name, any roster and any colluding site."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polyclinic.engines.flare.pki import site_keys
from polyclinic.engines.flare.protocol.paths import SiteFolder
from polyclinic.secure_aggregation import shamir
from polyclinic.secure_aggregation.client import SecureSite
from polyclinic.secure_aggregation.secure_messages import Agreed
from polyclinic.secure_aggregation.session_keys import (
    Ed25519PrivateKey,
    ProtocolError,
    Session,
    X25519PrivateKey,
    add_masks_,
    default_threshold,
    pair_mask,
    public,
    signature,
)
from tests.adversary.server import (
    LENIENT,
    SUM,
    HostileServer,
    houses,
    nobody_exposed,
    numbers_in,
    refused,
    secure_order,
    session_of,
    small_order,
)
from tests.support.known import known

SECURE = LENIENT.replace("secure = false", "secure = true")
STRICT = SECURE.replace("min_sites = 3", "min_sites = 4")


@pytest.fixture
def server(tmp_path: Path) -> HostileServer:
    """Five sites that let only sums over at least three leave."""
    homes = houses(tmp_path, 5, SECURE)
    return HostileServer(homes, secure_order(homes, rounds=4))


def four(server: HostileServer) -> tuple[str, ...]:
    """All sites but the last."""
    return tuple(sorted(server.homes))[:-1]


def test_an_honest_secure_sum_is_opened_and_is_the_sum(server: HostileServer) -> None:
    """What every test below rests on: the sites do take part."""
    tried = server.secure_sum()
    assert tried.opened, tried.problems
    assert torch.equal(tried.total, sum(server.vectors.values(), torch.zeros_like(tried.total)))  # type: ignore[arg-type, call-overload]


# Differences of two sums ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", ["train", "train ", "train-again", "Train"])
def test_two_sums_of_one_content_never_show_one_site(job: str, server: HostileServer) -> None:
    """Over five sites, and then under any job name over four: the difference is the fifth's update."""
    assert server.secure_sum().opened
    server.secure_sum(job, four(server))
    nobody_exposed(server)


def test_two_sums_in_two_rounds_never_show_one_site(server: HostileServer) -> None:
    """The same model, and so nearly or exactly the same update, in two rounds over rosters that differ by one site."""
    assert server.secure_sum().opened
    server.secure_sum(roster=four(server), round=1)
    nobody_exposed(server)


def test_a_strict_policy_does_not_help_an_attacker(tmp_path: Path) -> None:
    """``min_sites = 4``: four sites are allowed in a sum, and five, but not both for one content."""
    homes = houses(tmp_path, 5, STRICT)
    server = HostileServer(homes, secure_order(homes))
    assert server.secure_sum(threshold=4).opened
    server.secure_sum("train ", four(server), 4)
    nobody_exposed(server)


def test_a_site_left_out_of_the_sum_is_not_shown_by_a_retry(server: HostileServer) -> None:
    """The victim's vector does not arrive, and the sum over the others opens; then the same again with it."""
    victim = sorted(server.homes)[-1]
    assert server.secure_sum(leave_out=[victim]).opened
    server.secure_sum()
    server.secure_sum("train ")
    nobody_exposed(server)


def test_a_static_statistic_is_summed_over_one_roster(tmp_path: Path) -> None:
    """Class counts, asked for in two rounds over rosters that differ by one site: exact counts of that site."""
    homes = houses(tmp_path, 5, SECURE)
    order = secure_order(homes, "fedsld", plan={"uplink": [{**SUM, "heaviest": 64.0}]}, rounds=4)
    server = HostileServer(homes, order)
    assert server.secure_sum().opened
    for round in (0, 1, 2):
        server.secure_sum(roster=four(server), round=round)
    nobody_exposed(server)


def test_a_static_statistic_is_summed_over_one_roster_in_all_runs(tmp_path: Path) -> None:
    """A second approved run of the same study asks for the same counts: over another roster they are not opened."""
    homes = houses(tmp_path, 5, SECURE)
    plan = {"uplink": [{**SUM, "heaviest": 64.0}]}
    server = HostileServer(homes, secure_order(homes, "fedsld", plan=plan, rounds=4))
    assert server.secure_sum().opened
    other = secure_order(homes, "fedsld", plan=plan, rounds=4, run="run-2")
    server.offer(other)
    server.approved(other)
    server.secure_sum(roster=four(server))
    nobody_exposed(server)


def test_a_run_that_is_forgotten_opens_no_second_sum(server: HostileServer) -> None:
    """A person may let a run begin anew; what was opened stays known."""
    assert server.secure_sum().opened
    for name, person in server.people.items():
        server.restart(name)
        assert person.forgets(server.order.run)
        server._last.clear()
    server.offer(server.order)
    server.secure_sum(roster=four(server))
    nobody_exposed(server)


# Threshold and roster ---------------------------------------------------------------------------------------------------


def test_a_sum_holds_the_noise_that_the_accounting_counts_on(tmp_path: Path) -> None:
    """Six of seven sites make the noise together. A session over three of them holds half of it."""
    homes = houses(tmp_path, 7, SECURE + '[privacy]\nepsilon = 100.0\ndelta = 1e-3\nunit = "site"\n')
    send = [
        {"name": "clip", "bound": 1.0},
        {"name": "gaussian", "multiplier": 1.0, "share": 6},
        {**SUM, "threshold": 6},
    ]
    server = HostileServer(homes, secure_order(homes, plan={"uplink": send}))
    few = tuple(sorted(homes))[:3]
    tried = server.secure_sum(roster=few, threshold=3)
    assert not tried.opened, f"a sum over {len(tried.alive)} sites was opened, and the noise is that of 6"
    tried = server.secure_sum(roster=tuple(sorted(homes))[:5], threshold=5)
    assert not tried.opened, f"a sum over {len(tried.alive)} sites was opened, and the noise is that of 6"


@pytest.mark.parametrize(("count", "threshold"), [(5, 3), (7, 4), (8, 5)])
def test_no_threshold_below_two_thirds_is_accepted(count: int, threshold: int, tmp_path: Path) -> None:
    homes = houses(tmp_path, count, SECURE)
    server = HostileServer(homes, secure_order(homes))
    assert threshold < default_threshold(count)
    tried = server.secure_sum(threshold=threshold)
    assert not tried.opened, f"a session of {count} sites with the threshold {threshold} was opened"


def test_no_threshold_below_the_approved_one_is_accepted(tmp_path: Path) -> None:
    """Five of five were approved; two thirds, four, are too few."""
    homes = houses(tmp_path, 5, SECURE)
    server = HostileServer(homes, secure_order(homes, plan={"uplink": [{**SUM, "threshold": 5}]}))
    tried = server.secure_sum(threshold=4)
    assert not tried.opened, "a session of 5 sites with the threshold 4 was opened, and 5 were approved"


def test_only_sites_that_train_are_in_a_sum(tmp_path: Path) -> None:
    """A site that is only scored has an approved key, too; with it in the session one honest site fewer is needed."""
    homes = houses(tmp_path, 4, SECURE)
    order = secure_order(homes)
    order = replace(order, plan={**order.plan, "sites": sorted(homes)[:3]}, external=(sorted(homes)[3],))
    server = HostileServer(homes, order)
    tried = server.secure_sum(roster=sorted(homes))
    assert not tried.opened


@pytest.mark.parametrize("collusion", ["threshold 3", "two thirds"])
def test_one_colluding_site_opens_no_vector(collusion: str, tmp_path: Path) -> None:
    """The server tells two groups two lists of who arrived; a site that helps it signs both. (Bonawitz et al.,
    section 6.)
    """
    homes = houses(tmp_path, 5, SECURE)
    server = HostileServer(homes, secure_order(homes))
    names = sorted(homes)
    found = _collude(server, names, 3 if collusion == "threshold 3" else default_threshold(5))
    if found is not None:
        own = next(vector for (site, *_), vector in server.vectors.items() if site == names[0])
        same = torch.equal(found, own)
        assert not same, f"the server and {names[-1]} recovered the vector of {names[0]} to the bit"


def _collude(server: HostileServer, names: list[str], threshold: int) -> Tensor | None:
    """What a server recovers of the first site's vector with the help of the last; None where sites refuse."""
    victim, helper, others = names[0], names[-1], names[:-1]
    replies = server.everyone("train", others)
    layout = replies[victim].value
    size = sum(numbers_in(tag) for tags in layout.values() for tag in tags.values())
    session = session_of(
        id=os.urandom(16).hex(), round=0, size=size, threshold=threshold, identities=dict(server.order.identities)
    )
    accomplice = SecureSite(session, helper, _identity(server.homes[helper]))
    number = server.number

    def stage(name: str, body: Any, kind: str) -> Any:
        got = server.call(name, "secure", body, job="train", round=0, stage=kind, number=number)
        if not got.left:
            raise ProtocolError(got.lost)
        return got.value

    try:
        adverts = (*(stage(n, session, "advertise") for n in others), accomplice.advertise())
        shares = {n: stage(n, adverts, "share") for n in others} | {helper: accomplice.share(adverts)}
        masked = {n: stage(n, {o: shares[o].to[n] for o in names if o != n}, "mask") for n in others}
        accomplice.mask({o: shares[o].to[helper] for o in names if o != helper}, torch.zeros(size, dtype=torch.int32))
        with_victim, without = tuple(names), tuple(names[1:])
        half = (len(others) + 1) // 2
        revealed = []
        for told, group in ((with_victim, others[:half]), (without, others[half:])):
            agreed = [stage(n, told, "agree") for n in group]
            agreed.append(
                Agreed(
                    helper, told, signature(session, _identity(server.homes[helper]), "agreement", helper, list(told))
                )
            )
            revealed += [stage(n, agreed, "reveal") for n in group]
    except ProtocolError as error:
        why = str(error)
        return None if "refused" in why else pytest.fail(f"the protocol failed, which shows nothing: {why}")
    opened = known(accomplice._opened(victim))
    seeds = {r.site: bytes.fromhex(r.seeds[victim]) for r in revealed if victim in r.seeds} | {
        helper: opened[shamir.SHARE_BYTES :]
    }
    privates = {r.site: bytes.fromhex(r.keys[victim]) for r in revealed if victim in r.keys} | {
        helper: opened[: shamir.SHARE_BYTES]
    }
    return _unmasked(session, threshold, adverts, masked[victim].vector.clone(), seeds, privates, victim)


def _unmasked(
    session: Session,
    threshold: int,
    adverts: Sequence[Any],
    vector: Tensor,
    seeds: dict[str, bytes],
    privates: dict[str, bytes],
    victim: str,
) -> Tensor | None:
    """The victim's vector without its masks, if there are enough shares of both of its secrets."""
    if min(len(seeds), len(privates)) < threshold:
        return None
    seed, private = (
        shamir.rebuild({session.place(who): shares[who] for who in sorted(shares)[:threshold]})
        for shares in (seeds, privates)
    )
    plus, minus = list[bytes](), [seed]
    for advert in adverts:
        if advert.site != victim:
            mask = pair_mask(
                session, X25519PrivateKey.from_private_bytes(private), advert.mask_key, victim, advert.site
            )
            (minus if victim < advert.site else plus).append(mask)
    add_masks_(vector, plus, minus)
    return vector


def _identity(home: SiteFolder) -> Any:
    return site_keys.load_secure(home.keys / "secure.key")


# Sessions that lie ------------------------------------------------------------------------------------------------------


def test_stages_out_of_order_open_nothing(server: HostileServer) -> None:
    for stages in (("share",), ("mask",), ("reveal",), ("advertise", "mask"), ("advertise", "share", "reveal")):
        with_these = server.secure_sum(order_of_stages=stages)
        assert not with_these.opened
    assert not [got for got in server.loot if got.call.stage in ("mask", "reveal")]


def test_sites_that_are_told_different_lists_open_nothing(server: HostileServer) -> None:
    names = sorted(server.homes)
    told = {name: names if i < 3 else names[1:] for i, name in enumerate(names)}
    assert not server.secure_sum(alive=told).opened


@pytest.mark.parametrize("change", [{"round": 1}, {"size": 3}, {"threshold": 3}])
def test_a_session_for_something_else_is_refused(change: dict[str, Any], server: HostileServer) -> None:
    """The session of another round, of another size, or with a lower threshold than two thirds."""

    def twist(stage: str, bodies: dict[str, Any]) -> dict[str, Any]:
        return {name: replace(body, **change) for name, body in bodies.items()} if stage == "advertise" else bodies

    server.secure_sum(twist=twist)
    assert not [got for got in server.loot if got.call.kind == "secure"]


def test_a_session_with_a_sites_name_and_another_key_is_refused(server: HostileServer) -> None:
    """The server plays one of the sites itself."""
    own = public(Ed25519PrivateKey.generate())
    identities = {**server.order.identities, "site-4": own}
    tried = server.secure_sum(identities=identities)
    assert not tried.opened
    assert not [got for got in server.loot if got.call.stage == "mask"]


def test_what_is_for_a_secure_sum_never_leaves_by_itself(server: HostileServer) -> None:
    """The same request without the word that it is for a sum, and under every kind."""
    refused(server.ask("site-0", secure=False))
    assert not server.ask("site-0", "score/val", secure=True).left
    assert not server.ask("site-0", "describe", secure=False).left
    for got in server.loot:
        assert type(got.value).__name__ != "Reply", f"numbers left outside of a sum: {got}"


def test_a_sum_over_two_sites_is_refused(tmp_path: Path) -> None:
    """Each of two sites would see what the other sent; and the policy asks for three."""
    homes = houses(tmp_path, 3, SECURE)
    server = HostileServer(homes, secure_order(homes))
    two = {n: server.order.identities[n] for n in ("site-0", "site-1")}
    assert not server.secure_sum(roster=tuple(two), threshold=2).opened
    assert not [got for got in server.loot if got.call.kind == "secure"]
    alive = dict.fromkeys(homes, ("site-0", "site-1"))
    assert not server.secure_sum(alive=alive, leave_out=["site-2"]).opened


def test_a_policy_of_secure_sums_lets_no_plain_study_run(tmp_path: Path) -> None:
    homes = houses(tmp_path, 3, SECURE)
    server = HostileServer(homes, small_order())
    refused(server.ask("site-0"))
