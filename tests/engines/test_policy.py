"""A site's policy: what it reads, what it refuses, and that its default lets little out."""

import random
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.core.execute import Refused, execute
from polyclinic.core.method import Ask
from polyclinic.core.site import Site
from polyclinic.core.stats import Gather, LeafMean, Mean, Reply
from polyclinic.engines.plan import Plan
from polyclinic.engines.policy import DEFAULT, BadPolicy, Enforced, count_patients, parse
from tests.conftest import blobs


def plan(**changes) -> Plan:
    fields = {
        "kind": "classification", "network": "cnn", "inputs": (1, 8, 8), "outputs": 2, "method": "fedavg", "sites": ("a", "b", "c"),
        "rounds": 3, "network_options": {"width": 8, "norm": "group"}, "training": {"epochs": 1, "batch_size": 8},
    }  # fmt: skip
    return Plan(**{**fields, **changes})


def site(patients: int = 12) -> Site:
    return Site("a", {"train": blobs(0, patients, (1, 8, 8)), "val": blobs(1, 12, (1, 8, 8))})


def ask_of(p: Plan) -> Ask:
    method = p.build_method()
    ask = method.ask(method.init(p.build_task().first(0)))
    assert ask is not None
    return ask


def test_the_default_lets_an_update_out_and_predictions_never() -> None:
    p, policy = plan(), parse(DEFAULT.encode())
    method, rules = p.build_method(), Enforced(policy, p)
    reply, _ = execute(method, ask_of(p), {}, site(), rules)
    assert reply.mean("update").weight == 12
    scores, _ = execute(method, replace(ask_of(p), job="score/val"), {}, site(), rules)
    assert "score" in scores.parts
    with pytest.raises(Refused, match="never runs here"):
        execute(method, replace(ask_of(p), job="predict/val"), {}, site(), rules)


def test_an_empty_file_is_the_default() -> None:
    assert parse(b"") == parse(DEFAULT.encode())


def test_few_patients_never_train_and_are_never_scored() -> None:
    p, policy = plan(), parse(b"[limits]\nmin_patients = 13\n")
    for job in ("train", "score/val"):
        with pytest.raises(Refused, match="fewer than 13 patients here"):
            execute(p.build_method(), replace(ask_of(p), job=job), {}, site(), Enforced(policy, p))


def test_patients_are_counted_not_images() -> None:
    class Data:
        patients = ("x", "x", "y")

        def __len__(self) -> int:
            return 3

    assert count_patients(Data()) == 2
    assert count_patients(blobs(0, 5, (1, 8, 8))) == 5


@pytest.mark.parametrize(
    ("changes", "line", "why"),
    [
        ({"training": {"epochs": 11}}, "epochs = 10", "11 epochs in a round"),
        ({"training": {"steps": 11}}, "steps = 10", "11 steps in a round"),
        ({"training": {"lr": 2.0}}, "learning_rate = 1.0", "2 learning rate"),
        ({"rounds": 11}, "rounds = 10", "11 rounds"),
    ],
)
def test_more_than_the_limits_is_refused_and_less_is_not(changes, line, why) -> None:
    policy = parse(f"[limits]\n{line}\n".encode())
    assert [why in problem for problem in policy.problems(plan(**changes))] == [True]
    assert policy.problems(plan()) == []


def test_required_transforms_are_required_with_their_numbers() -> None:
    wanted = b'[require]\ntransforms = [{name = "clip", bound_at_most = 1.0}, {name = "gaussian", multiplier_at_least = 0.8}]'
    policy, uniform = parse(wanted), {"uniform": True}
    good = ({"name": "clip", "bound": 1.0}, {"name": "gaussian", "multiplier": 0.8})
    loose = ({"name": "clip", "bound": 2.0}, {"name": "gaussian", "multiplier": 0.7})
    assert policy.problems(plan(options=uniform, send=good)) == []
    assert len(policy.problems(plan(options=uniform, send=loose))) == 2
    assert len(policy.problems(plan())) == 2
    assert len(policy.problems(plan(options=uniform, send=good[:1]))) == 1


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (Reply({"x": Mean({"a": torch.zeros(2)}, 1.0)}), ""),
        (Reply({"x": LeafMean({"a": torch.zeros(2)}, {"a": torch.zeros(2)})}), "ElementwiseMean"),
        (Reply({"features": Gather({"a": {"x": torch.zeros(2)}})}), "allow.gather"),
        (Reply({"score": Gather({"b": {"x": torch.zeros(2)}})}), "speaks for"),
        (Reply({"x": Mean({"a": torch.zeros(300_000)}, 1.0)}), "allow.*megabytes_per_round|megabytes_per_round"),
    ],
)
def test_what_would_leave_is_read_and_not_what_it_is_called(reply, why) -> None:
    policy = parse(b'[allow]\nstats = ["WeightedMean"]\n[limits]\nmegabytes_per_round = 1.0\n')
    rules = Enforced(policy, plan())
    if why:
        with pytest.raises(Refused, match=why):
            rules.release(None, Ask(0, {}), reply, site())
    else:
        rules.release(None, Ask(0, {}), reply, site())


def test_bytes_count_over_a_round() -> None:
    policy, reply = parse(b"[limits]\nmegabytes_per_round = 1.0\n"), Reply({"x": Mean({"a": torch.zeros(100_000)}, 1.0)})
    Enforced(policy, plan(), sent=500_000).release(None, Ask(0, {}), reply, site())
    with pytest.raises(Refused, match="would have left in this round"):
        Enforced(policy, plan(), sent=700_000).release(None, Ask(0, {}), reply, site())


def test_only_secure_sums_where_the_policy_says_so() -> None:
    p, policy = plan(), parse(b"[require]\nsecure = true\n")
    with pytest.raises(Refused, match="secure sums only"):
        execute(p.build_method(), ask_of(p), {}, site(), Enforced(policy, p))


def test_a_promise_of_secrecy_is_kept_by_the_site() -> None:
    """The server drops ``secure`` from an ask whose study promises a secure sum."""
    p = plan(options={"uniform": True}, send=({"name": "secure-sum"},))
    ask = ask_of(p)
    assert ask.secure
    with pytest.raises(Refused, match="promises a secure sum"):
        execute(p.build_method(), replace(ask, secure=False), {}, site(), Enforced(parse(b""), p))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[limits]\nepoch = 3", "limits.epoch: no such key"),
        ("[limits]\nepochs = '3'", "limits.epochs"),
        ("[limits]\nepochs = -1", "limits.epochs"),
        ("[limits]\nlearning_rate = nan", "limits.learning_rate"),
        ("[allow]\njobs = 'train'", "allow.jobs"),
        ("[approve]\nautomatically = ['abc']", "approve.automatically.0"),
        ("[require]\ntransforms = [{name = 'gausian'}]", 'Did you mean "gaussian"'),
        ("[require]\ntransforms = [{name = 'clip', bound = 1.0}]", "clip has no 'bound'; write bound_at_least"),
        ("[require]\ntransforms = [{name = 'clip', bound_at_most = 'x'}]", "is a number"),
        ("limits", "policy.toml"),
        ("a = " + "[" * 500, "policy.toml"),
    ],
)
def test_a_bad_policy_is_told_by_key(text, why) -> None:
    with pytest.raises(BadPolicy, match=why.replace("?", r"\?").replace("'", ".")):
        parse(text.encode())


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(BadPolicy) as found:
        parse(b"[limits]\nepoch = 3\nrounds = 'x'\n[alow]\n")
    assert len(str(found.value).splitlines()) == 3


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_policy_or_a_bad_policy(data: bytes) -> None:
    try:
        policy = parse(data)
    except BadPolicy as error:
        assert "policy.toml" in str(error)  # noqa: PT017
    else:
        assert policy == parse(b""), "no noise changes a rule"


def test_a_mutated_policy_is_one_or_not_and_never_hangs() -> None:
    dice, base = random.Random(0), DEFAULT.encode()
    until = time.monotonic() + 2
    while time.monotonic() < until:
        data = bytearray(base)
        for _ in range(dice.randint(1, 8)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        try:
            parse(bytes(data))
        except BadPolicy:
            pass
    with pytest.raises(BadPolicy, match="larger"):
        parse(b"#" * 2**20)


@pytest.mark.parametrize("verb", ["score", "predict", "explain"])
@pytest.mark.parametrize("role", ["train", "unlabelled", "public", "", "val/x", "Val"])
def test_no_model_is_scored_but_on_validation_and_test_data_whatever_the_policy_allows(verb: str, role: str) -> None:
    lax = parse(b'[allow]\njobs = ["*"]\nnever = []\ngather = ["*"]\nstats = ["WeightedMean"]\n[limits]\nmin_patients = 1\n')
    p = plan()
    with pytest.raises(Refused, match="scored on val and test data alone, and never on"):
        execute(p.build_method(), replace(ask_of(p), job=f"{verb}/{role}"), {}, site(), Enforced(lax, p))


def test_patients_are_not_counted_for_the_server() -> None:
    p = plan()
    with pytest.raises(Refused) as told:
        execute(p.build_method(), ask_of(p), {}, site(9), Enforced(parse(DEFAULT.encode()), p))
    assert str(told.value) == "fewer than 10 patients here (limits.min_patients)"
    execute(p.build_method(), ask_of(p), {}, site(10), Enforced(parse(DEFAULT.encode()), p))


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (Reply({"update": Mean({"head.bias": torch.zeros(2)}, 1.0)}), ""),
        (Reply({"update": Mean({"head.bias": torch.zeros(3)}, 1.0)}), "update: 'head.bias' would leave in another shape"),
        (Reply({"change": LeafMean({"head.bias": torch.zeros(1, 2)}, {})}), "change: 'head.bias'"),
        (Reply({"model": Gather({"a": {"head.bias": torch.zeros(2000)}})}), "model: 'head.bias'"),
        (Reply({"sent": Mean({"m/gradient/head.bias": torch.zeros(3)}, 1.0)}), "gradient: 'head.bias'"),
        (Reply({"sent": Mean({"m/update/head.bias": torch.zeros(2), "m/update/": torch.zeros(0)}, 1.0)}), ""),
        (Reply({"selector": Mean({"head.bias": torch.zeros(3)}, 1.0)}), ""),  # a model of another kind
        (Reply({"update": Mean({"head.bias": torch.zeros(3), "first.head.bias": torch.zeros(3)}, 1.0)}), ""),
        (Reply({"predict": Gather({"a": {"score": torch.zeros(9, 2)}})}), ""),
        (Reply({"predict": Gather({"a": {"score": torch.zeros(9, 3)}})}), "3 outputs for each patient would leave, and 2 "),
        (Reply({"predict": Gather({"a": {"score": torch.zeros(9)}})}), ""),
    ],
)  # fmt: skip
def test_what_leaves_has_the_size_that_was_approved(reply: Reply, why: str) -> None:
    p = plan()
    rules = Enforced(parse(b'[allow]\ngather = ["*"]\n'), p)
    if why:
        with pytest.raises(Refused, match=why):
            rules.release(p.build_method(), ask_of(p), reply, site())
    else:
        rules.release(p.build_method(), ask_of(p), reply, site())


def test_encoded_replies_have_the_bound_of_their_bytes() -> None:
    p = plan(send=({"name": "top-k", "fraction": 0.5},))
    method = p.build_method()
    reply = Reply({"sent": Mean({"m/update/head.bias": torch.zeros(300)}, 1.0)})
    Enforced(parse(b""), p).release(method, ask_of(p), reply, site())
