"""Every step of a secure sum by itself: what exactly is sent, what is forgotten, and who is refused for what."""

import hashlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("cryptography", reason="needs polyclinic[privacy]")

from polyclinic.secure_aggregation import session_keys as rules
from polyclinic.secure_aggregation import shamir
from polyclinic.secure_aggregation.client import SecureSite, check_advert, commitment
from polyclinic.secure_aggregation.in_memory import STEPS
from polyclinic.secure_aggregation.secure_messages import Advert
from polyclinic.secure_aggregation.session_keys import (
    ProtocolError,
    X25519PrivateKey,
    add_masks_,
    check_signature,
    digest,
    pair_mask,
    public,
    seal,
    shared_key,
    signature,
    unseal,
)
from tests.secure_aggregation.test_secure import READ, Parties, ring_sum

NAMES = ("ankara", "bern", "cusco", "dhaka", "eger")
LOST = "dhaka"


def numbered() -> Callable[[int], bytes]:
    """Entropy in which the k-th request is answered with a hash of k."""
    count = iter(range(10_000))
    return lambda n: b"".join(hashlib.sha256(f"{k}/{i}".encode()).digest() for k in [next(count)] for i in range(3))[:n]


@pytest.fixture(autouse=True)
def three_of_five(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session asks for two thirds of its sites. The steps are tried with three of five, so that two may be lost."""
    monkeypatch.setattr(rules, "default_threshold", lambda sites: 3)


@pytest.fixture
def parties() -> Parties:
    return Parties(NAMES, 3)


def without(parties: Parties, lost: tuple[str, ...] = (LOST,)) -> Any:
    """The messages of the last step where the vectors of ``lost`` did not arrive."""
    inboxes = parties.server.shares(parties.until("share").values())
    alive = parties.server.masked(parties.sites[n].mask(inboxes[n], parties.vectors[n]) for n in NAMES if n not in lost)
    agreed = parties.server.agreed([parties.sites[n].agree(alive) for n in alive])
    return {n: parties.sites[n].reveal(agreed) for n in alive}


def signed_anew(parties: Parties, message: Any, **change: Any) -> Any:
    """``message`` of a reveal with a change that its own sender made."""
    message = replace(message, **change)
    body = (sorted(message.seeds.items()), sorted(message.keys.items()))
    key = parties.identities[message.site]
    return replace(message, signature=signature(parties.session, key, "revealed shares", message.site, *body))


# A site --------------------------------------------------------------------------------------------------------------


def test_a_sites_keys_and_its_seed_are_three_secrets_from_its_entropy(parties: Parties) -> None:
    take = numbered()
    cipher, mask, seed = (take(32) for _ in range(3))
    advert = SecureSite(parties.session, "bern", parties.identities["bern"], numbered()).advertise()
    assert advert.cipher_key == public(X25519PrivateKey.from_private_bytes(cipher))
    assert advert.mask_key == public(X25519PrivateKey.from_private_bytes(mask))
    bound = hashlib.sha256(bytes.fromhex(parties.session.context) + seed).hexdigest()
    assert advert.commitment == commitment(parties.session, seed) == bound
    body = (advert.cipher_key, advert.mask_key, advert.commitment)
    check_signature(parties.session, advert.signature, "advert", "bern", *body)
    check_advert(parties.session, advert)


@pytest.mark.parametrize("field", ["cipher_key", "mask_key", "commitment", "site"])
def test_every_field_of_an_advert_is_signed(field: str, parties: Parties) -> None:
    adverts = parties.until("advertise")
    other = replace(adverts["bern"], **{field: getattr(adverts["cusco"], field)})
    with pytest.raises(ProtocolError, match="has no valid signature"):
        check_advert(parties.session, other)
    with pytest.raises(ProtocolError, match="has no valid signature"):
        parties.sites["ankara"].share([other, *(a for n, a in adverts.items() if n != "bern")])


def test_what_the_server_passes_on_must_be_what_the_site_said(parties: Parties) -> None:
    """Also if the site's own key signed it: keys of an earlier start, say."""
    adverts = parties.until("advertise")
    for field in ("cipher_key", "mask_key"):
        again = SecureSite(parties.session, "bern", parties.identities["bern"])
        mine = again.advertise()
        body = {name: getattr(mine, name) for name in ("cipher_key", "mask_key", "commitment")}
        body[field] = getattr(adverts["cusco"], field)
        signed = signature(parties.session, parties.identities["bern"], "advert", "bern", *body.values())
        with pytest.raises(ProtocolError, match="does not forward the advert of bern"):
            again.share([Advert("bern", **body, signature=signed), *(a for n, a in adverts.items() if n != "bern")])


def test_shares_are_of_mask_key_and_seed_sealed_for_each_other_site_alone(parties: Parties) -> None:
    """Opened with the receivers' keys, any threshold of them rebuild both, and each lies at its receiver's place."""
    adverts = parties.until("advertise")
    bern = SecureSite(parties.session, "bern", parties.identities["bern"], numbered())
    take = numbered()
    _, mask, seed = (take(32) for _ in range(3))
    roster = [bern.advertise(), *(a for n, a in adverts.items() if n not in ("bern", "eger"))]  # eger did not advertise
    message = bern.share(roster)
    assert list(message.to) == ["ankara", "cusco", "dhaka"]
    check_signature(parties.session, message.signature, "shares", "bern", sorted(message.to.items()))
    keys, seeds = {}, {}
    for site, sealed in message.to.items():
        cipher = parties.sites[site]._cipher
        assert cipher is not None
        key = shared_key(parties.session, cipher, roster[0].cipher_key, "shares", "bern", site)
        share = unseal(key, sealed, f"bern/{site}")
        assert share is not None
        assert len(share) == 132
        keys[parties.session.place(site)], seeds[parties.session.place(site)] = share[:66], share[66:]
    assert shamir.rebuild(keys) == mask
    assert shamir.rebuild(seeds) == seed
    own = {2: bern._own[:66]} | {x: keys[x] for x in list(keys)[:2]}
    assert shamir.rebuild(own) == mask, "its own share fits the others'"
    with pytest.raises(ValueError, match="not shares of one secret"):
        shamir.rebuild(dict(list(keys.items())[:2]))


def test_a_masked_vector_is_the_vector_its_own_mask_and_one_for_each_pair(parties: Parties) -> None:
    inboxes = parties.server.shares(parties.until("share").values())
    site, vector = parties.sites["cusco"], parties.vectors["cusco"]
    kept = vector.clone()
    assert site._mask is not None
    seeds = {
        n: pair_mask(parties.session, site._mask, parties.sites[n]._adverts[n].mask_key, "cusco", n)
        for n in NAMES
        if n != "cusco"
    }
    expected = vector.clone()
    add_masks_(expected, [site._seed, seeds["dhaka"], seeds["eger"]], [seeds["ankara"], seeds["bern"]])
    message = site.mask({**inboxes["cusco"], "cusco": "00"}, vector)  # what it would seal for itself counts for nothing
    assert torch.equal(message.vector, expected)
    assert torch.equal(vector, kept), "a site's own vector is not changed"
    check_signature(parties.session, message.signature, "masked vector", "cusco", digest(message.vector))
    assert "cusco" not in site._sealed


def test_who_is_lost_before_masking_has_no_mask_in_the_vector(parties: Parties) -> None:
    shares = parties.until("share")
    inboxes = parties.server.shares(s for n, s in shares.items() if n != LOST)
    assert all(LOST not in inbox and n not in inbox for n, inbox in inboxes.items())
    assert set(inboxes) == set(NAMES) - {LOST}
    alive = parties.server.masked(parties.sites[n].mask(inboxes[n], parties.vectors[n]) for n in inboxes)
    agreed = parties.server.agreed([parties.sites[n].agree(alive) for n in alive])
    reveals = [parties.sites[n].reveal(agreed) for n in alive]
    assert all(not r.keys for r in reveals)
    assert torch.equal(parties.server.reveals(reveals), ring_sum([parties.vectors[n] for n in alive]))


def test_an_agreement_is_signed_over_the_list_in_name_order(parties: Parties) -> None:
    parties.server.masked(parties.until("mask").values())
    message = parties.sites["bern"].agree(reversed(NAMES))
    assert message.alive == NAMES
    check_signature(parties.session, message.signature, "agreement", "bern", list(NAMES))
    with pytest.raises(ProtocolError, match="2 sites arrived, but 3 are required"):
        parties.sites["cusco"].agree(["cusco", "bern"])


def test_a_site_reveals_seeds_of_those_who_arrived_and_keys_of_the_others(parties: Parties) -> None:
    reveals = without(parties)
    for name, message in reveals.items():
        assert set(message.seeds) == set(NAMES) - {LOST}
        assert set(message.keys) == {LOST}
        assert all(len(share) == 132 for share in (*message.seeds.values(), *message.keys.values()))
        body = (sorted(message.seeds.items()), sorted(message.keys.items()))
        check_signature(parties.session, message.signature, "revealed shares", name, *body)
    assert torch.equal(parties.server.reveals(reveals.values()), ring_sum([parties.vectors[n] for n in reveals]))
    assert parties.server.refused == {}


@pytest.mark.parametrize("who", [("ankara", "bern"), ("ankara", "bern", "ankara")])
def test_as_many_as_the_threshold_must_have_agreed_each_once(who: tuple[str, ...], parties: Parties) -> None:
    alive = parties.server.masked(parties.until("mask").values())
    agreed = {n: parties.sites[n].agree(alive) for n in alive}
    with pytest.raises(
        ProtocolError,
        match=r"2 sites agreed on the sites that arrived, but 3 are required|ankara is not on the list of sites, or agreed twice",
    ):
        parties.sites["cusco"].reveal([agreed[n] for n in who])


def test_who_did_not_arrive_cannot_agree(parties: Parties) -> None:
    inboxes = parties.server.shares(parties.until("share").values())
    alive = parties.server.masked(parties.sites[n].mask(inboxes[n], parties.vectors[n]) for n in NAMES if n != LOST)
    agreed = [parties.sites[n].agree(alive) for n in alive]
    forged = signature(parties.session, parties.identities[LOST], "agreement", LOST, list(alive))
    with pytest.raises(ProtocolError, match="dhaka is not on the list of sites, or agreed twice"):
        parties.sites["bern"].reveal([*agreed, replace(agreed[0], site=LOST, signature=forged)])
    with pytest.raises(ProtocolError, match="the agreement of ankara has no valid signature"):
        parties.sites["cusco"].reveal([replace(agreed[0], signature=agreed[1].signature), *agreed[1:]])


@pytest.mark.parametrize("size", [0, 66, 131, 133])
def test_sealed_shares_of_another_length_are_not_revealed(size: int, parties: Parties) -> None:
    """Their sender can seal what it likes; a wrong length would put bytes of one secret in the place of the other."""
    inboxes = parties.server.shares(parties.until("share").values())
    cipher = parties.sites["bern"]._cipher
    assert cipher is not None
    key = shared_key(
        parties.session, cipher, parties.sites["ankara"]._adverts["ankara"].cipher_key, "shares", "bern", "ankara"
    )
    inboxes["ankara"]["bern"] = seal(key, bytes(size), "bern/ankara")
    alive = parties.server.masked(parties.sites[n].mask(inboxes[n], parties.vectors[n]) for n in NAMES)
    agreed = parties.server.agreed([parties.sites[n].agree(alive) for n in alive])
    revealed = {n: parties.sites[n].reveal(agreed) for n in alive}
    assert set(revealed["ankara"].seeds) == set(NAMES) - {"bern"}
    assert torch.equal(parties.server.reveals(revealed.values()), ring_sum(list(parties.vectors.values())))


def gone(site: SecureSite) -> bool:
    return site._cipher is None and site._mask is None and site._seed == b"" and site._own == b""


def test_keys_are_gone_after_the_last_step_and_after_every_refusal(parties: Parties) -> None:
    inboxes = parties.server.shares(parties.until("share").values())
    assert not any(gone(site) for site in parties.sites.values())
    with pytest.raises(ProtocolError, match="cannot be summed"):
        parties.sites["eger"].mask(inboxes["eger"], torch.zeros(1))
    assert gone(parties.sites["eger"])
    with pytest.raises(ProtocolError, match="eger was asked to mask when 'nothing, after a refusal,' was next"):
        parties.sites["eger"].mask(inboxes["eger"], parties.vectors["eger"])
    with pytest.raises(
        ProtocolError, match="bern was asked to reveal when 'mask' was next: messages came twice or out of order"
    ):
        parties.sites["bern"].reveal([])
    assert gone(parties.sites["bern"])
    rest = ("ankara", "cusco", "dhaka")
    alive = parties.server.masked(parties.sites[n].mask(inboxes[n], parties.vectors[n]) for n in rest)
    agreed = parties.server.agreed([parties.sites[n].agree(alive) for n in alive])
    parties.sites["ankara"].reveal(agreed)
    assert gone(parties.sites["ankara"])
    assert not gone(parties.sites["cusco"])
    with pytest.raises(ProtocolError, match="ankara was asked to advertise when 'over' was next"):
        parties.sites["ankara"].advertise()


def test_each_step_can_be_taken_once(parties: Parties) -> None:
    adverts = parties.until("advertise")
    with pytest.raises(ProtocolError, match="bern was asked to advertise when 'share' was next"):
        parties.sites["bern"].advertise()
    with pytest.raises(ProtocolError, match="bern has deleted its keys: this session is over"):
        parties.sites["bern"].share(adverts.values())


def test_a_site_that_was_interrupted_forgets_too(parties: Parties) -> None:
    """By Ctrl-C or a timeout in the middle of a step, say."""

    def stops() -> Any:
        raise KeyboardInterrupt
        yield

    parties.until("advertise")
    with pytest.raises(KeyboardInterrupt):
        parties.sites["bern"].share(stops())
    assert gone(parties.sites["bern"])


# The server ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["advertise", "mask", "agree"])
def test_the_server_answers_in_name_order_however_messages_came(step: str, parties: Parties) -> None:
    answer = getattr(parties.server, READ[step])(reversed(list(parties.until(step).values())))
    assert tuple(getattr(item, "site", item) for item in answer) == NAMES


def test_a_server_takes_its_steps_once_and_in_order(parties: Parties) -> None:
    for read, text in (
        ("shares", "given shares when adverts were"),
        ("masked", "given masked vectors when adverts"),
        ("agreed", "given agreements when adverts"),
        ("reveals", "given revealed shares when adverts"),
    ):
        with pytest.raises(ProtocolError, match=text):
            getattr(parties.server, read)([])
    reveals = parties.until("reveal")
    parties.server.reveals(reveals.values())
    with pytest.raises(ProtocolError, match="given revealed shares when nothing were next"):
        parties.server.reveals(reveals.values())


def test_exactly_the_threshold_is_enough_and_one_less_is_told_with_every_reason(parties: Parties) -> None:
    adverts = parties.until("advertise")
    bad = replace(adverts["bern"], signature="00")
    with pytest.raises(ProtocolError) as error:
        parties.server.adverts([bad, adverts["cusco"], replace(adverts["ankara"], site="zoe"), adverts["dhaka"]])
    said = str(error.value)
    assert said.startswith(
        "2 sites sent adverts, but 3 are required: nothing can be summed; bern: the advert of bern has no valid signature"
    )
    assert said.endswith("replayed from another; zoe: zoe was not asked for adverts")
    again = Parties(NAMES, 3)
    adverts = again.until("advertise")
    assert len(again.server.adverts([adverts[n] for n in NAMES[:3]])) == 3


def test_the_first_reason_against_a_site_stays(parties: Parties) -> None:
    adverts = parties.until("advertise")
    broken = replace(adverts["bern"], signature="00")
    parties.server.adverts(
        [broken, *(a for n, a in adverts.items() if n != "bern"), broken, replace(broken, site="cusco")]
    )
    assert "the advert of bern has no valid signature" in parties.server.refused["bern"]
    assert parties.server.refused["cusco"] == "cusco sent adverts twice; the first counts"


def test_a_refused_message_does_not_keep_a_good_one_from_counting(parties: Parties) -> None:
    """Else anybody could shut a site out by sending rubbish in its name first."""
    adverts = parties.until("advertise")
    forged = replace(adverts["ankara"], site="bern")
    assert [a.site for a in parties.server.adverts([forged, *adverts.values()])] == list(NAMES)


@pytest.mark.parametrize("field", ["cipher_key", "mask_key"])
@pytest.mark.parametrize("value", ["00" * 32, "zz" * 32, "00"])
def test_each_key_of_an_advert_must_be_one(field: str, value: str, parties: Parties) -> None:
    adverts = parties.until("advertise")
    body = {name: getattr(adverts["bern"], name) for name in ("cipher_key", "mask_key", "commitment")} | {field: value}
    signed = signature(parties.session, parties.identities["bern"], "advert", "bern", *body.values())
    roster = parties.server.adverts(
        [Advert("bern", **body, signature=signed), *(a for n, a in adverts.items() if n != "bern")]
    )
    assert "bern" not in [a.site for a in roster]
    assert "bern" in parties.server.refused["bern"]


@pytest.mark.parametrize(
    "change",
    [
        lambda to: {n: t for n, t in to.items() if n != "eger"},
        lambda to: {**to, "bern": "00"},
        lambda to: {**to, "zoe": "00"},
    ],
)
def test_who_does_not_share_with_exactly_the_others_is_left_out(change: Any, parties: Parties) -> None:
    shares = parties.until("share")
    to = change(shares["bern"].to)
    signed = signature(parties.session, parties.identities["bern"], "shares", "bern", sorted(to.items()))
    inboxes = parties.server.shares(
        [replace(shares["bern"], to=to, signature=signed), *(s for n, s in shares.items() if n != "bern")]
    )
    assert set(inboxes) == set(NAMES) - {"bern"}
    assert parties.server.refused == {"bern": "bern did not share its secrets with every site"}
    assert all(set(inbox) == set(inboxes) - {site} for site, inbox in inboxes.items())


def test_what_is_passed_on_is_what_the_sender_sealed_for_the_receiver(parties: Parties) -> None:
    shares = parties.until("share")
    inboxes = parties.server.shares(shares.values())
    assert inboxes == {to: {n: shares[n].to[to] for n in NAMES if n != to} for to in NAMES}


def test_a_vector_that_is_refused_is_not_in_the_sum(parties: Parties) -> None:
    masked = parties.until("mask")
    wrong = replace(masked["bern"], vector=masked["bern"].vector + 1)
    alive = parties.server.masked([wrong, *(m for n, m in masked.items() if n != "bern")])
    agreed = parties.server.agreed([parties.sites[n].agree(alive) for n in alive])
    total = parties.server.reveals([parties.sites[n].reveal(agreed) for n in alive])
    assert torch.equal(total, ring_sum([parties.vectors[n] for n in alive]))
    assert total.shape == (7,)
    assert total.dtype == torch.int32


@pytest.mark.parametrize("step", STEPS)
def test_every_message_is_checked_against_its_signature(step: str, parties: Parties) -> None:
    messages = parties.until(step)
    forged = replace(messages["bern"], signature=messages["cusco"].signature)
    getattr(parties.server, READ[step])([forged, *(m for n, m in messages.items() if n != "bern")])
    assert list(parties.server.refused) == ["bern"]
    assert "of bern has no valid signature for this session" in parties.server.refused["bern"]


@pytest.mark.parametrize(
    "wrong", [torch.ones(1, dtype=torch.int32), torch.ones(7, dtype=torch.int64), torch.ones(1, 7, dtype=torch.int32)]
)
def test_a_signed_vector_of_another_form_is_not_added(wrong: torch.Tensor, parties: Parties) -> None:
    """One number would be added to all of them, without an error."""
    masked = parties.until("mask")
    signed = signature(parties.session, parties.identities["bern"], "masked vector", "bern", digest(wrong))
    alive = parties.server.masked(
        [replace(masked["bern"], vector=wrong, signature=signed), *(m for n, m in masked.items() if n != "bern")]
    )
    assert "bern" not in alive
    assert parties.server.refused["bern"].startswith("the vector of bern cannot be summed: it ")
    agreed = parties.server.agreed([parties.sites[n].agree(alive) for n in alive])
    total = parties.server.reveals([parties.sites[n].reveal(agreed) for n in alive])
    assert torch.equal(total, ring_sum([parties.vectors[n] for n in alive]))


def test_vectors_are_let_go_while_others_arrive(parties: Parties) -> None:
    """A server that held them all would need the memory of all models at once."""
    masked, seen = parties.until("mask"), list[weakref.ref[torch.Tensor]]()

    def arriving() -> Iterator[Any]:
        for name in NAMES:
            seen.append(weakref.ref(masked[name].vector))
            yield masked.pop(name)
            assert all(vector() is None for vector in seen[:-1])

    assert parties.server.masked(arriving()) == NAMES
    assert len(seen) == 5


def test_the_server_keeps_no_vector(parties: Parties) -> None:
    """Two of them could be compared, or written to a log; only the sum is held."""
    parties.server.masked(parties.until("mask").values())
    held = [value for value in vars(parties.server).values() if isinstance(value, torch.Tensor)]
    assert [tuple(value.shape) for value in held] == [(7,)]
    assert len(parties.server._alive) == 5


def test_who_signs_another_list_is_left_out(parties: Parties) -> None:
    alive = parties.server.masked(parties.until("mask").values())
    messages = {n: parties.sites[n].agree(alive[:4] if n == "bern" else alive) for n in alive}
    agreed = parties.server.agreed(messages.values())
    assert [m.site for m in agreed] == ["ankara", "cusco", "dhaka", "eger"]
    assert parties.server.refused == {"bern": "bern signed another list of sites"}
    assert agreed == tuple(messages[m.site] for m in agreed)


def test_a_site_that_reveals_both_secrets_of_another_is_refused(parties: Parties) -> None:
    reveals = without(parties)
    both = signed_anew(parties, reveals["bern"], keys={**reveals["bern"].keys, "cusco": "00" * 66})
    total = parties.server.reveals([both, *(r for n, r in reveals.items() if n != "bern")])
    assert parties.server.refused == {"bern": "bern reveals both secrets of a site"}
    assert torch.equal(total, ring_sum([parties.vectors[n] for n in NAMES if n != LOST]))


@pytest.mark.parametrize("part", ["seeds", "keys"])
@pytest.mark.parametrize("value", ["zz" * 66, "00", "ff" * 66, "00" * 66, 7, None])
def test_a_wrong_share_is_found_among_seeds_and_keys_and_its_sender_named(
    part: str, value: Any, parties: Parties
) -> None:
    reveals = without(parties)
    of = "cusco" if part == "seeds" else LOST
    wrong = signed_anew(parties, reveals["ankara"], **{part: {**getattr(reveals["ankara"], part), of: value}})
    total = parties.server.reveals([wrong, *(r for n, r in reveals.items() if n != "ankara")])
    assert torch.equal(total, ring_sum([parties.vectors[n] for n in NAMES if n != LOST]))
    assert set(parties.server.refused) == {"ankara"}
    assert f"its share of the secrets of {of}" in parties.server.refused["ankara"]


@pytest.mark.parametrize("part", ["seeds", "keys"])
def test_a_wrong_share_that_gives_another_secret_of_the_right_length_is_found(part: str, parties: Parties) -> None:
    """Random wrong shares give a secret that is too long; this one gives the secret plus one, or minus one."""
    reveals = without(parties)
    of = "cusco" if part == "seeds" else LOST
    shares = {n: bytes.fromhex(getattr(reveals[n], part)[of]) for n in ("ankara", "bern", "cusco")}  # tried first
    points = {parties.session.place(n): share for n, share in shares.items()}
    place, secret = parties.session.place("ankara"), int.from_bytes(shamir.rebuild(points))
    through = {0: secret ^ 1} | {x: int.from_bytes(share) for x, share in points.items() if x != place}
    points[place] = shamir.evaluate(through, place).to_bytes(shamir.SHARE_BYTES)
    assert int.from_bytes(shamir.rebuild(points)) == secret ^ 1
    changed = {**getattr(reveals["ankara"], part), of: points[place].hex()}
    wrong = signed_anew(parties, reveals["ankara"], **{part: changed})
    total = parties.server.reveals([wrong, *(r for n, r in reveals.items() if n != "ankara")])
    assert torch.equal(total, ring_sum([parties.vectors[n] for n in NAMES if n != LOST]))
    assert parties.server.refused == {"ankara": f"its share of the secrets of {of} contradicts the others"}


def test_too_few_shares_of_a_lost_sites_key_stop_the_sum(parties: Parties) -> None:
    reveals = without(parties)
    few = [signed_anew(parties, r, keys={}) if n in ("ankara", "bern") else r for n, r in reveals.items()]
    with pytest.raises(
        ProtocolError,
        match=r"2 shares of the secrets of dhaka do not match its advert: they are corrupt, or too few",
    ):
        parties.server.reveals(few)


def test_a_site_that_reveals_nothing_of_one_secret_is_not_needed(parties: Parties) -> None:
    reveals = without(parties)
    reveals["ankara"] = signed_anew(parties, reveals["ankara"], keys={}, seeds={})
    total = parties.server.reveals(reveals.values())
    assert torch.equal(total, ring_sum([parties.vectors[n] for n in NAMES if n != LOST]))
    assert parties.server.refused == {}


def test_two_may_be_lost_and_their_masks_with_each_other_are_in_nobodys_vector(parties: Parties) -> None:
    reveals = without(parties, ("bern", "dhaka"))
    total = parties.server.reveals(reveals.values())
    assert torch.equal(total, ring_sum([parties.vectors[n] for n in ("ankara", "cusco", "eger")]))
