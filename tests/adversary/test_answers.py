"""Whatever one site answers, the server neither takes it for another's, nor stops, nor moves its model far for it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSite, Reply, WeightedMean
from polyclinic.core.audit_log import verify
from polyclinic.core.tree import Tree
from polyclinic.secure_aggregation.secure_messages import Masked
from tests.adversary.server import houses, secure_order, small_order
from tests.adversary.site import Attack, End, Said, far, run, same_model, weighted, without

pytestmark = pytest.mark.usefixtures("looks")
EVIL = "site-1"
ONE: dict[str, Any] = {"rounds": 1, "deadline": 100.0}


def attacked(root: Path, attack: Attack, kinds: tuple[str, ...] = ("do",), **how: Any) -> tuple[End, Tree]:
    """The run with ``attack`` at one of three sites, and the model that the two others make without it."""
    an = small_order(**{**ONE, **how})
    return run(root, an, {EVIL: attack}, kinds), without(root, an, EVIL)


def lost_without_a_trace(root: Path, attack: Attack, **how: Any) -> End:
    """Asserts that the site is lost by name, and that not a bit of the model comes of what it sent."""
    end, model = attacked(root, attack, **how)
    end.loses(EVIL)
    assert same_model(end.model, model), "the model differs from that of the other sites alone"
    return end


def test_an_honest_run_loses_nobody(tmp_path: Path) -> None:
    """What every test below rests on."""
    end = run(tmp_path, small_order(**ONE, score_every=1, test="score/test"), {})
    assert (end.outcome, end.lost) == ("finished", [])
    assert end.model is not None
    assert far(end.model, without(tmp_path, small_order(**ONE), EVIL)) > 0


# Signatures -------------------------------------------------------------------------------------------------------------


def empty(said: Said) -> None:
    said.signed = False
    said.table |= {"signature": "", "head": ""}


def of_another_message(said: Said) -> None:
    """The site's own signature, under another head than the one that the answer names."""
    said.signed = False
    said.table["head"] = "ab" * 32


def changed(said: Said, change: Callable[[Any], Any]) -> Reply:
    """The reply with ``change`` of the sum of each mean."""
    found: dict[str, Any] = {}
    for part, stat in said.reply.parts.items():
        assert isinstance(stat, WeightedMean)
        found[part] = WeightedMean(change(stat.total), stat.weight)
    return Reply(found)


def garbage(said: Said) -> None:
    said.signed = False
    said.table["signature"] = "QUJD" * 86


def another_file(said: Said) -> None:
    """The file is changed, its hash in the message too, and the signature stays."""
    said.signed = False
    said.reply = changed(said, lambda total: tree.scale(total, -50.0))


@pytest.mark.parametrize("attack", [empty, garbage, of_another_message, another_file])
def test_an_answer_that_its_site_did_not_sign_is_not_used(attack: Attack, tmp_path: Path) -> None:
    end = lost_without_a_trace(tmp_path, attack)
    assert any("sign" in why for _, site, why in end.lost if site == EVIL), end.lost


def test_a_run_of_which_no_answer_is_signed_does_not_finish(tmp_path: Path) -> None:
    end = run(tmp_path, small_order(**ONE), dict.fromkeys(("site-0", "site-1", "site-2"), empty), ("hello", "do"))
    assert end.outcome != "finished", "no answer was signed, no site was lost, and the run finished"


def test_a_site_that_does_not_sign_its_greeting_does_not_take_part(tmp_path: Path) -> None:
    end = run(tmp_path, small_order(**ONE), {EVIL: empty}, ("hello",))
    assert end.outcome == "finished", end.why
    asked = {call.site for call in end.carrier.calls if call.kind == "do"}
    assert EVIL not in asked, "its greeting was not signed, and it trains"


# Weight and size --------------------------------------------------------------------------------------------------------


def claims(weight: float) -> Attack:
    """The same values with another weight, or what would replace the model, with an immense one."""

    def attack(said: Said) -> None:
        if weight < 1e6:
            said.reply = weighted(said.reply, weight)
            return
        evil = {name: 666.0 - leaf for name, leaf in said.ask.trees["params"].items()} if said.ask else {}
        said.reply = Reply({part: WeightedMean(tree.scale(evil, weight), weight) for part in said.reply.parts})

    return attack


@pytest.mark.parametrize("weight", [1e12, 1e300, 1e6])
def test_a_site_that_claims_an_immense_weight_does_not_replace_the_model(weight: float, tmp_path: Path) -> None:
    end, model = attacked(tmp_path, claims(weight))
    assert end.outcome == "finished", end.why
    assert far(end.model, model) < 2.0, (
        f"one site with the weight {weight:g} moved the model by {far(end.model, model):.3g} times its norm"
    )


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -5.0])
def test_a_weight_that_is_none_is_refused(weight: float, tmp_path: Path) -> None:
    lost_without_a_trace(tmp_path, claims(weight))


def test_a_weight_beyond_the_sites_number_of_patients_does_not_count_in_full(tmp_path: Path) -> None:
    """Site-1 has 17 training examples and claims a thousand times as many; its values are its own."""
    end, model = attacked(tmp_path, claims(17_000.0))
    honest = run(tmp_path / "honest", small_order(**ONE), {}).model
    assert end.outcome == "finished", end.why
    assert honest is not None
    moved = min(far(end.model, model), far(end.model, honest))
    limit = 1.5 * max(far(honest, model), 1e-6)
    assert moved < limit, (
        f"the model is {moved:.3g} from the honest one; all of an honest site moves it {far(honest, model):.3g}"
    )


@pytest.mark.parametrize("factor", [1e4, 1e8, 1e30])
def test_an_immense_update_does_not_move_the_model(factor: float, tmp_path: Path) -> None:
    def huge(said: Said) -> None:
        said.reply = changed(said, lambda total: tree.scale(total, factor))

    end, model = attacked(tmp_path, huge)
    assert end.outcome == "finished", end.why
    assert far(end.model, model) < 2.0, (
        f"an update {factor:g} times too large moved the model by {far(end.model, model):.3g} times its norm"
    )


# Values and shapes ------------------------------------------------------------------------------------------------------


def with_leaves(change: Any) -> Attack:
    """Changes the leaves of the update."""

    def attack(said: Said) -> None:
        said.reply = changed(said, lambda total: change(dict(total)))

    return attack


def first(leaves: Tree) -> str:
    return sorted(leaves)[0]


ODD = {
    "NaN": with_leaves(lambda t: {**t, first(t): t[first(t)] * float("nan")}),
    "infinite": with_leaves(lambda t: {**t, first(t): t[first(t)] + float("inf")}),
    "another shape": with_leaves(lambda t: {**t, first(t): torch.zeros(7, 3)}),
    "a scalar": with_leaves(lambda t: {**t, first(t): torch.tensor(1.0)}),
    "another type": with_leaves(lambda t: {**t, first(t): t[first(t)].double()}),
    "a leaf less": with_leaves(lambda t: {name: leaf for name, leaf in t.items() if name != first(t)}),
    "a leaf more": with_leaves(lambda t: {**t, "backdoor": torch.ones(3)}),
    "nothing": with_leaves(lambda t: {}),
}


@pytest.mark.parametrize("what", ODD)
def test_values_that_cannot_be_merged_are_lost_with_their_site(what: str, tmp_path: Path) -> None:
    lost_without_a_trace(tmp_path, ODD[what])


def test_a_reply_of_another_kind_is_refused(tmp_path: Path) -> None:
    def gathered(said: Said) -> None:
        said.reply = Reply({part: PerSite({EVIL: stat.trees[0]}) for part, stat in said.reply.parts.items()})

    lost_without_a_trace(tmp_path, gathered)


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 100, b"PK\x03\x04" + b"x" * 200, b"\x80\x04\x95" + b"." * 50, b"\xff" * 8 + b"{}" * 50]
)
def test_a_file_that_is_none_of_ours_is_refused_and_never_run(data: bytes, tmp_path: Path) -> None:
    """Nothing, zeros, a zip (as PyTorch saves), a pickle, a header of 2^64 bytes."""

    def odd(said: Said) -> None:
        said.data = data

    lost_without_a_trace(tmp_path, odd)


def test_a_file_that_is_not_the_one_of_its_message_is_refused(tmp_path: Path) -> None:
    def other(said: Said) -> None:
        said.hashed = False
        said.data = said.data[:-1] + bytes([said.data[-1] ^ 1])

    lost_without_a_trace(tmp_path, other)


@pytest.mark.parametrize("size", [2**40, 2**52, 1])
def test_an_announced_size_is_not_believed(size: int, tmp_path: Path) -> None:
    def lies(said: Said) -> None:
        said.hashed = False
        said.table["size"] = size

    lost_without_a_trace(tmp_path, lies)


def test_nothing_is_kept_of_a_file_beside_a_greeting(tmp_path: Path) -> None:
    """A registration brings no file. 4 MB with each would fill the server's disk, before anybody has trained."""

    def heavy(said: Said) -> None:
        said.data = b"\0" * 2**22

    end = run(tmp_path, small_order(**ONE), {EVIL: heavy}, ("hello",))
    assert end.outcome == "finished", end.why
    size = sum(path.stat().st_size for path in (tmp_path / "server").rglob("*") if path.is_file())
    assert size < 2**20, f"{size} bytes lie at the server"


# Who says what, and when ------------------------------------------------------------------------------------------------


def speaks_for(name: str) -> Attack:
    def attack(said: Said) -> None:
        said.table["site"] = name

    return attack


@pytest.mark.parametrize("name", ["site-0", "site-9", "../../etc", "site-1\n"])
def test_no_site_speaks_for_another(name: str, tmp_path: Path) -> None:
    lost_without_a_trace(tmp_path, speaks_for(name))


def test_no_site_gathers_for_another(tmp_path: Path) -> None:
    """Scores are kept apart by site: a site that sends a row for another one changes none of that one's."""

    def forged(said: Said) -> None:
        if said.call.job.startswith("score"):
            good = {name: leaf * 0 for name, leaf in next(iter(said.reply.gather("score").values())).items()}
            said.reply = Reply({"score": PerSite({"site-0": good, EVIL: good})})

    an = small_order(**ONE, score_every=1, test="score/test")
    end = run(tmp_path, an, {EVIL: forged})
    honest = run(tmp_path / "honest", an, {})
    assert end.outcome == "finished", end.why
    theirs, ours = ([line for line in e.scores if line["site"] == "site-0"] for e in (end, honest))
    assert [line["metrics"] for line in theirs] == [line["metrics"] for line in ours], "site-1 set the scores of site-0"


@pytest.mark.parametrize("score", [float("nan"), float("inf"), 1e308, -1e308])
def test_a_score_that_is_no_number_stops_nothing(score: float, tmp_path: Path) -> None:
    def odd(said: Said) -> None:
        if said.call.job.startswith("score"):
            leaves = next(iter(said.reply.gather("score").values()))
            said.reply = Reply(
                {"score": PerSite({EVIL: {name: torch.full_like(leaf, score) for name, leaf in leaves.items()}})}
            )

    an = small_order(rounds=2, deadline=100.0, score_every=1, test="score/test", best={"metric": "auc", "higher": True})
    end = run(tmp_path, an, {EVIL: odd})
    assert end.outcome == "finished", f"a score of {score} stopped the run: {end.why}"


def test_an_earlier_answer_counts_once(tmp_path: Path) -> None:
    """The answer of round 0 is given three times in it, and again in round 1, where it answers no call."""
    kept: list[tuple[dict[str, Any], bytes]] = []

    def replay(said: Said) -> None:
        kept.append((dict(said.table), said.data))
        said.also = [kept[0], kept[0]]
        if said.call.round == 1:
            said.table, said.data, said.signed, said.hashed = dict(kept[0][0]), kept[0][1], False, False

    an = small_order(rounds=2, deadline=100.0)
    end = run(tmp_path, an, {EVIL: replay})
    assert end.outcome == "finished", end.why
    assert [(round, site) for round, site, _ in end.lost] == [(1, EVIL)], (
        f"the replay was used, or another was lost: {end.lost}"
    )
    twice = [
        entry
        for entry in verify(end.folder / "journal.jsonl")
        if entry["event"] == "answered" and entry["site"] == EVIL
    ]
    assert len(twice) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"number": 2**40},
        {"number": -1},
        {"stage": "mask"},
        {"run": "run-2"},
        {"version": 99},
        {"seconds": float("1e300")},
        {"more": 1},
        {"code": "x" * 10_000},
        {"lost": "\x1b[31m" + "x" * 10_000},
    ],
)
def test_an_answer_with_odd_fields_stops_nothing(change: dict[str, Any], tmp_path: Path) -> None:
    def odd(said: Said) -> None:
        said.table |= change

    end, model = attacked(tmp_path, odd)
    end.loses(EVIL)
    assert same_model(end.model, model)
    assert "\x1b" not in (end.folder / "status.json").read_text()


def test_a_refusal_and_a_file_at_once_are_a_refusal(tmp_path: Path) -> None:
    def both(said: Said) -> None:
        said.table["lost"] = "refused: and here it is"

    lost_without_a_trace(tmp_path, both)


def test_other_code_does_not_take_part(tmp_path: Path) -> None:
    def other(said: Said) -> None:
        said.table["code"] = "cd" * 32

    end = run(tmp_path, small_order(**ONE), {EVIL: other}, ("hello",))
    assert end.outcome == "finished", end.why
    assert EVIL not in {call.site for call in end.carrier.calls if call.kind == "do"}


def test_the_servers_journal_holds_after_every_attack(tmp_path: Path) -> None:
    """And names the hash of the file of everyone who was used."""
    end = run(tmp_path, small_order(**ONE), {EVIL: garbage})
    entries = list(verify(end.folder / "journal.jsonl"))
    replies = {entry.get("reply") for entry in entries if entry["event"] == "answered"}
    assert replies
    assert all(isinstance(reply, str) and len(reply) == 64 for reply in replies), json.dumps(entries)[:500]


# Secure sums ------------------------------------------------------------------------------------------------------------


def masked(change: Any) -> Attack:
    def attack(said: Said) -> None:
        if said.call.stage == "mask" and isinstance(said.value, Masked):
            said.value = change(said.value)

    return attack


FORGED = {
    "another vector under the old signature": masked(lambda m: replace(m, vector=m.vector + 1)),
    "a longer vector": masked(lambda m: replace(m, vector=torch.cat([m.vector, m.vector]))),
    "floating point": masked(lambda m: replace(m, vector=m.vector.float())),
    "for another site": masked(lambda m: replace(m, site="site-0")),
    "no signature": masked(lambda m: replace(m, signature="")),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_message_of_a_secure_sum_loses_its_site_alone(what: str, tmp_path: Path) -> None:
    homes = houses(tmp_path, 5)
    an = secure_order(homes, **ONE)
    end = run(tmp_path, an, {EVIL: FORGED[what]}, ("secure",), homes=homes)
    end.loses(EVIL)
    assert {site for _, site, _ in end.lost} == {EVIL}, end.lost


@pytest.mark.parametrize("stage", ["advertise", "share", "mask", "agree", "reveal"])
def test_what_is_no_message_of_the_stage_loses_its_site_alone(stage: str, tmp_path: Path) -> None:
    """After the vectors are in, the sum no longer needs the site."""

    def odd(said: Said) -> None:
        if said.call.stage == stage:
            said.value = {"odd": torch.zeros(3)}

    homes = houses(tmp_path, 5)
    end = run(tmp_path, secure_order(homes, **ONE), {EVIL: odd}, ("secure",), homes=homes)
    assert end.outcome == "finished", end.why
    assert {site for _, site, _ in end.lost} <= {EVIL}, end.lost
