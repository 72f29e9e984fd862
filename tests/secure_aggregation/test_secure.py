"""Secure summation: the sum is exact, nothing else is seen, and a party that breaks the rules is refused by name."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

pytest.importorskip("cryptography", reason="needs polyclinic[privacy]")

from polyclinic.core.aggregates import PerSite, Reply, WeightedMean, merge
from polyclinic.secure_aggregation import layout_of, reply_of, shamir, vector_of
from polyclinic.secure_aggregation.client import SecureSite
from polyclinic.secure_aggregation.in_memory import STEPS, secure_merge, secure_sum
from polyclinic.secure_aggregation.server import SecureServer
from polyclinic.secure_aggregation.session_keys import (
    Ed25519PrivateKey,
    ProtocolError,
    Session,
    add_masks_,
    default_threshold,
    public,
    signature,
)

NAMES = ("ankara", "bern", "cusco", "dhaka", "eger", "faro")


def vectors(names: tuple[str, ...] = NAMES, size: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {n: torch.randint(-(2**31), 2**31, (size,), generator=rng).to(torch.int32) for n in names}


def ring_sum(some: list[torch.Tensor]) -> torch.Tensor:
    """By numpy and whole numbers of any length, reduced at the end."""
    total = np.sum([int_vector.numpy().astype(object) for int_vector in some], axis=0)
    return torch.from_numpy(((total + 2**31) % 2**32 - 2**31).astype(np.int32))


@settings(max_examples=25, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 7), st.data())
def test_any_threshold_of_shares_rebuild_a_secret_and_fewer_do_not(secret: bytes, threshold: int, data: Any) -> None:
    rng = np.random.default_rng(0)
    shares = shamir.split(secret, threshold, range(1, 8), rng.bytes)
    chosen = data.draw(st.sets(st.integers(1, 7), min_size=threshold, max_size=threshold))
    assert shamir.rebuild({x: shares[x] for x in chosen}) == secret
    if threshold > 1:
        # with one share less, every secret is as likely: some share completes the rest to any secret
        other = bytes(32)
        points = {x: int.from_bytes(shares[x]) for x in sorted(chosen)[1:]}
        missing = sorted(chosen)[0]
        value = shamir.evaluate({0: int.from_bytes(other), **points}, missing)
        completed = {x: y.to_bytes(66) for x, y in {missing: value, **points}.items()}
        assert shamir.rebuild(completed) == other


def test_shares_that_are_not_shares_are_refused() -> None:
    with pytest.raises(ValueError, match="66 bytes"):
        shamir.rebuild({1: b"short"})
    with pytest.raises(ValueError, match="not shares of one secret"):
        shamir.rebuild({1: (2**300).to_bytes(66)})
    for threshold, places in ((0, [1]), (2, [1])):
        with pytest.raises(ValueError, match="threshold"):
            shamir.split(bytes(32), threshold, places, bytes)
    with pytest.raises(ValueError, match="32 bytes"):
        shamir.split(b"", 1, [1], bytes)


@pytest.mark.parametrize(
    ("names", "threshold"), [(NAMES[:5], 4), (NAMES, 5), pytest.param(NAMES, 4, marks=pytest.mark.slow)]
)
def test_the_sum_is_exact_whoever_is_lost_down_to_the_threshold(names: tuple[str, ...], threshold: int) -> None:
    mine = vectors(names)
    for count in range(len(names) - threshold + 1):
        for lost in itertools.combinations(names, count):
            for step in STEPS:
                total, alive = secure_sum(mine, threshold=threshold, lost=dict.fromkeys(lost, step))
                late = step in ("agree", "reveal")  # their vectors had arrived, and count
                assert alive == (names if late else tuple(n for n in names if n not in lost))
                assert torch.equal(total, ring_sum([mine[n] for n in alive]))


def test_sites_may_be_lost_at_different_steps() -> None:
    mine = vectors((*NAMES, "gent", "hue", "iasi"))
    total, alive = secure_sum(mine, threshold=6, lost={"bern": "share", "dhaka": "mask", "gent": "reveal"})
    assert alive == ("ankara", "cusco", "eger", "faro", "gent", "hue", "iasi")
    assert torch.equal(total, ring_sum([mine[n] for n in alive]))


@pytest.mark.parametrize("step", STEPS)
def test_below_the_threshold_nothing_is_summed(step: str) -> None:
    with pytest.raises(ProtocolError, match="are required"):
        secure_sum(vectors(), threshold=4, lost={"ankara": step, "bern": step, "cusco": step})


def test_a_threshold_protects_or_is_refused() -> None:
    for n, wrong in ((2, 2), (5, 2), (6, 3), (5, 6)):
        with pytest.raises(ProtocolError, match=r"threshold|at least 3"):
            secure_sum(vectors(NAMES[:n]), threshold=wrong)
    assert [default_threshold(n) for n in (3, 4, 5, 6, 10)] == [3, 3, 4, 4, 7]
    with pytest.raises(ProtocolError, match="nothing to sum"):
        secure_sum(vectors(size=0))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 70_000), st.integers(0, 2**31))
def test_masks_that_are_added_and_taken_off_leave_nothing(size: int, seed: int) -> None:
    vector = vectors(("x",), size, seed)["x"]
    masked = vector.clone()
    add_masks_(masked, [b"a" * 32, b"b" * 32], [b"c" * 32])
    assert not torch.equal(masked, vector)
    add_masks_(masked, [b"c" * 32], [b"b" * 32, b"a" * 32])
    assert torch.equal(masked, vector)


def test_what_the_server_sees_tells_nothing_of_one_site() -> None:
    """Chi-square over all bytes of a masked vector of zeros, of ones, and of their correlation with a bit pattern."""
    size, seen = 50_000, dict[str, torch.Tensor]()

    def record(step: str, site: str, message: Any) -> None:
        if step == "mask":
            seen[site] = message.vector.clone()

    pattern = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(1)).to(torch.int32) * -1
    secure_sum(
        {"a": torch.zeros(size, dtype=torch.int32), "b": torch.ones(size, dtype=torch.int32), "c": pattern},
        record=record,
    )
    for masked in seen.values():
        counts = np.bincount(np.frombuffer(masked.numpy().tobytes(), np.uint8), minlength=256)
        assert scipy_stats.chisquare(counts).pvalue > 1e-6
    for bit in (0, 15, 31):
        ones = (seen["c"].numpy().view(np.uint32) >> bit) & 1
        set_ = pattern.numpy() != 0
        table = [[np.sum((set_ == p) & (ones == o)) for o in (0, 1)] for p in (False, True)]
        assert scipy_stats.chi2_contingency(table).pvalue > 1e-6
    again = dict(seen)
    secure_sum(
        {"a": torch.zeros(size, dtype=torch.int32), "b": torch.ones(size, dtype=torch.int32), "c": pattern},
        record=record,
    )
    assert all(float((seen[n] == again[n]).float().mean()) < 1e-3 for n in seen), "a retry has new masks"


class Parties:
    """Six sites and a server whose messages a test can change on the way."""

    def __init__(self, names: tuple[str, ...] = NAMES, threshold: int = 4, session_id: str = "s") -> None:
        self.identities = {n: Ed25519PrivateKey.generate() for n in names}
        known = {n: public(key) for n, key in self.identities.items()}
        self.session = Session(session_id, 0, 7, threshold, known)
        self.server = SecureServer(self.session)
        self.sites = {n: SecureSite(self.session, n, self.identities[n]) for n in names}
        self.vectors = vectors(names)

    def until(self, step: str) -> Any:
        """Runs honestly up to the messages of ``step`` and returns them, unread, by site."""
        given: Any = dict.fromkeys(self.sites, ())
        for at, read in zip(STEPS, ("adverts", "shares", "masked", "agreed", ""), strict=True):
            messages = {n: getattr(self.sites[n], at)(*args) for n, args in given.items()}
            if at == step:
                return messages
            out = getattr(self.server, read)(messages.values())
            if at == "advertise":
                given = {a.site: (out,) for a in out}
            elif at == "share":
                given = {n: (inbox, self.vectors[n]) for n, inbox in out.items()}
            elif at == "mask":
                given = dict.fromkeys(out, (out,))
            else:
                given = {a.site: (out,) for a in out}
        raise AssertionError


READ = {"advertise": "adverts", "share": "shares", "mask": "masked", "agree": "agreed", "reveal": "reveals"}


@pytest.mark.parametrize("step", STEPS)
def test_forged_replayed_and_uninvited_messages_are_refused_by_name(step: str) -> None:
    parties, others = Parties(), Parties(session_id="yesterday")
    messages, old = parties.until(step), others.until(step)
    stolen = replace(messages["ankara"], site="bern")  # one site speaks for another
    replayed = old["cusco"]  # from another session, and other keys
    stranger = replace(messages["ankara"], site="mallory")
    broken = replace(messages["eger"], signature="00" * 64)
    getattr(parties.server, READ[step])(
        [stolen, replayed, stranger, broken, *map(messages.get, ("ankara", "bern", "dhaka", "faro"))]
    )
    refused = parties.server.refused
    assert set(refused) == {"bern", "cusco", "mallory", "eger"}
    for name in ("bern", "cusco", "eger"):
        assert name in refused[name]
        assert "no valid signature" in refused[name] or "signed another" in refused[name] or "agree" in refused[name]
    assert "mallory was not asked" in refused["mallory"]


@pytest.mark.parametrize("step", STEPS)
def test_the_same_message_counts_once(step: str) -> None:
    parties = Parties()
    messages = parties.until(step)
    getattr(parties.server, READ[step])([*messages.values(), messages["bern"]])
    assert "twice; the first counts" in parties.server.refused["bern"]


def test_a_site_answers_once_and_in_order() -> None:
    parties = Parties()
    messages = parties.until("agree")
    agreed = parties.server.agreed(messages.values())
    site = parties.sites["ankara"]
    site.reveal(agreed)
    with pytest.raises(ProtocolError, match="twice or out of order"):
        site.reveal(agreed)
    early = parties.sites["bern"]
    with pytest.raises(ProtocolError, match=r"bern was asked to mask when 'reveal' was next"):
        early.mask({}, vectors()["bern"])
    with pytest.raises(ProtocolError, match="out of order"):  # and has forgotten everything
        early.share([])
    with pytest.raises(ProtocolError, match="given shares when revealed shares were next"):
        parties.server.shares([])


def test_the_server_may_not_change_who_advertised() -> None:
    parties = Parties()
    adverts = parties.until("advertise")
    own = replace(adverts["ankara"], mask_key=adverts["bern"].mask_key)
    with pytest.raises(ProtocolError, match="the advert of ankara has no valid signature"):
        parties.sites["ankara"].share([own, *(a for n, a in adverts.items() if n != "ankara")])
    with pytest.raises(ProtocolError, match="does not forward the advert of bern"):
        parties.sites["bern"].share([a for n, a in adverts.items() if n != "bern"])
    with pytest.raises(ProtocolError, match="cusco advertised twice"):
        parties.sites["dhaka"].share([*adverts.values(), adverts["cusco"]])
    with pytest.raises(ProtocolError, match="2 sites advertised, but 4 are required"):
        parties.sites["eger"].share([adverts["eger"], adverts["cusco"]])


def test_sites_that_were_told_of_different_sessions_do_not_meet() -> None:
    parties = Parties()
    other = replace(parties.session, round=1)
    site = SecureSite(other, "bern", parties.identities["bern"])
    parties.server.adverts([site.advertise(), *(parties.sites[n].advertise() for n in NAMES if n != "bern")])
    assert "bern has no valid signature for this session" in parties.server.refused["bern"]
    with pytest.raises(ProtocolError, match="does not list mallory"):
        SecureSite(parties.session, "mallory", parties.identities["bern"])
    with pytest.raises(ProtocolError, match="does not list bern"):
        SecureSite(parties.session, "bern", parties.identities["ankara"])


def test_the_server_may_not_lie_about_who_arrived() -> None:
    parties = Parties()
    alive = parties.server.masked(parties.until("mask").values())
    one = parties.sites["ankara"].agree(alive)
    rest = [parties.sites[n].agree(alive[:-1]) for n in ("bern", "cusco")]
    with pytest.raises(ProtocolError, match="and ankara different lists of sites"):
        parties.sites["ankara"].reveal([one, *rest])
    with pytest.raises(ProtocolError, match="lists faro as lost"):
        parties.sites["faro"].agree(alive[:-1])
    with pytest.raises(ProtocolError, match="lists a site twice"):
        parties.sites["dhaka"].agree([*alive, "dhaka"])
    with pytest.raises(ProtocolError, match="1 sites agreed on the sites that arrived, but 4 are required"):
        parties.sites["bern"].reveal([rest[0]])


def test_the_server_may_not_count_who_never_shared() -> None:
    parties = Parties()
    shares = parties.until("share")
    inboxes = parties.server.shares(s for n, s in shares.items() if n != "eger")
    parties.sites["ankara"].mask(inboxes["ankara"], parties.vectors["ankara"])
    with pytest.raises(ProtocolError, match="lists eger as arrived, but it shared no secrets"):
        parties.sites["ankara"].agree(NAMES)
    with pytest.raises(ProtocolError, match="mallory sent shares but did not advertise"):
        parties.sites["bern"].mask({**inboxes["bern"], "mallory": "00"}, parties.vectors["bern"])
    with pytest.raises(ProtocolError, match="sites shared their secrets, but 4 are required"):
        parties.sites["cusco"].mask({"dhaka": inboxes["cusco"]["dhaka"]}, parties.vectors["cusco"])


def test_nobody_reveals_both_secrets_of_a_site() -> None:
    parties = Parties()
    shares = parties.until("share")
    inboxes = parties.server.shares(shares.values())
    masked = [parties.sites[n].mask(inboxes[n], parties.vectors[n]) for n in NAMES if n != "dhaka"]
    alive = parties.server.masked(masked)
    agreed = parties.server.agreed([parties.sites[n].agree(alive) for n in alive])
    for name in alive:
        revealed = parties.sites[name].reveal(agreed)
        assert set(revealed.seeds) == set(alive)
        assert set(revealed.keys) == {"dhaka"}


@pytest.mark.parametrize(
    "wrong", [torch.zeros(8, dtype=torch.int32), torch.zeros(7), torch.zeros(7, 1, dtype=torch.int32)]
)
def test_vectors_of_the_wrong_form_are_refused_at_both_ends(wrong: torch.Tensor) -> None:
    parties = Parties()
    inboxes = parties.server.shares(parties.until("share").values())
    with pytest.raises(ProtocolError, match="the vector of ankara cannot be summed"):
        parties.sites["ankara"].mask(inboxes["ankara"], wrong)
    masked = {n: parties.sites[n].mask(inboxes[n], parties.vectors[n]) for n in NAMES if n != "ankara"}
    parties.server.masked(
        [replace(masked["bern"], vector=wrong), *(masked[n] for n in ("cusco", "dhaka", "eger", "faro"))]
    )
    assert "the vector of bern cannot be summed" in parties.server.refused["bern"]


def test_a_vector_that_was_altered_on_the_way_is_refused() -> None:
    parties = Parties()
    masked = parties.until("mask")
    altered = masked["bern"].vector.clone()
    altered[3] ^= 1
    alive = parties.server.masked(
        [replace(masked["bern"], vector=altered), *(m for n, m in masked.items() if n != "bern")]
    )
    assert "bern" not in alive
    assert "masked vector of bern has no valid signature" in parties.server.refused["bern"]


def test_a_corrupt_share_is_found_and_named_and_too_many_stop_the_sum() -> None:
    def corrupted(parties: Parties, who: tuple[str, ...]) -> list[Any]:
        messages = parties.until("reveal")
        out = []
        for name, message in messages.items():
            if name in who:
                wrong = format(int(message.seeds["eger"], 16) ^ (NAMES.index(name) + 3) ** 9, "0132x")
                seeds = {**message.seeds, "eger": wrong}
                signed = signature(
                    parties.session,
                    parties.identities[name],
                    "revealed shares",
                    name,
                    sorted(seeds.items()),
                    sorted(message.keys.items()),
                )
                message = replace(message, seeds=seeds, signature=signed)
            out.append(message)
        return out

    for who in (("ankara",), ("eger",), ("bern", "cusco")):
        parties = Parties()
        total = parties.server.reveals(corrupted(parties, who))
        assert torch.equal(total, ring_sum(list(parties.vectors.values())))
        assert set(parties.server.refused) == set(who)
        assert "its share of the secrets of eger contradicts" in parties.server.refused[who[0]]
    parties = Parties()
    with pytest.raises(ProtocolError, match="shares of the secrets of eger do not match its advert"):
        parties.server.reveals(corrupted(parties, ("ankara", "bern", "cusco")))


def test_a_sealed_share_that_was_altered_is_simply_not_revealed() -> None:
    parties = Parties()
    inboxes = parties.server.shares(parties.until("share").values())
    sealed = inboxes["ankara"]["bern"]
    inboxes["ankara"]["bern"] = sealed[:-2] + format(int(sealed[-2:], 16) ^ 1, "02x")
    alive = parties.server.masked(parties.sites[n].mask(inboxes[n], parties.vectors[n]) for n in NAMES)
    agreed = parties.server.agreed(parties.sites[n].agree(alive) for n in alive)
    revealed = {n: parties.sites[n].reveal(agreed) for n in alive}
    assert "bern" not in revealed["ankara"].seeds
    assert torch.equal(parties.server.reveals(revealed.values()), ring_sum(list(parties.vectors.values())))


def test_keys_that_are_none_are_refused_by_the_server_before_they_stop_the_others() -> None:
    parties = Parties()
    adverts = parties.until("advertise")
    bad = replace(adverts["bern"], cipher_key="00" * 32)
    signed = signature(
        parties.session, parties.identities["bern"], "advert", "bern", bad.cipher_key, bad.mask_key, bad.commitment
    )
    roster = parties.server.adverts([replace(bad, signature=signed), *(a for n, a in adverts.items() if n != "bern")])
    assert [a.site for a in roster] == ["ankara", "cusco", "dhaka", "eger", "faro"]
    assert "bern" in parties.server.refused["bern"]


def ring_reply(seed: int) -> Reply:
    v = vectors(("x",), 6, seed)["x"]
    return Reply(
        {"sent": WeightedMean({"m/update/w": v[:4].reshape(2, 2), "m/update/b": v[4:], "m/update/": v[:0]}, 1.0)}
    )


def test_merging_in_secret_is_merging() -> None:
    replies = {n: ring_reply(i) for i, n in enumerate(NAMES)}
    reply, alive = secure_merge(replies)
    plain = replies[NAMES[0]]
    for name in NAMES[1:]:
        plain = plain + replies[name]
    assert alive == NAMES
    assert reply.mean("sent").weight == plain.mean("sent").weight == len(NAMES)
    assert all(torch.equal(reply.mean("sent").total[k], leaf) for k, leaf in plain.mean("sent").total.items())
    one, alive = secure_merge(replies, lost={"bern": "mask"})
    assert one.mean("sent").weight == len(alive) == len(NAMES) - 1
    assert vector_of(reply_of(vector_of(plain), layout_of(plain), 5)).equal(vector_of(plain))


def test_only_sums_in_the_ring_are_merged_in_secret() -> None:
    for reply in (
        Reply({"a": WeightedMean({"w": torch.ones(2)}, 1.0)}),
        Reply({"a": PerSite({"x": {"w": torch.ones(2)}})}),
    ):
        with pytest.raises(ValueError, match="was not made by SecureSum"):
            secure_merge(dict.fromkeys(NAMES, reply))
    odd = Reply({"sent": WeightedMean({"m/update/w": torch.zeros(6, dtype=torch.int32)}, 1.0)})
    with pytest.raises(ValueError, match=r"\['eger'\] would send tensors with other names"):
        secure_merge({**{n: ring_reply(0) for n in NAMES}, "eger": odd})
    with pytest.raises(ValueError, match="6 numbers received, but the layout has 0"):
        reply_of(torch.zeros(6), {}, 1)
    assert merge([]).parts == {}
