"""A site's policy: what it reads, what it refuses, and that its default lets little out."""

import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.core.aggregates import ElementwiseMean, PerSite, PerSiteUniform, Reply, WeightedMean
from polyclinic.core.execution import Refused, execute
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.engines.plan import Plan
from polyclinic.engines.policy.site_policy import (
    DEFAULT,
    BadPolicy,
    Enforced,
    _known_shapes,
    count_patients,
    parse,
    read,
)
from polyclinic.engines.site_description import Describe
from polyclinic.methods.plugins import packages_in
from tests.conftest import blobs


def plan(**changes: Any) -> Plan:
    fields = {
        "kind": "classification",
        "network": "cnn",
        "inputs": (1, 8, 8),
        "outputs": 2,
        "method": "fedavg",
        "sites": ("a", "b", "c"),
        "rounds": 3,
        "network_options": {"width": 8, "norm": "group"},
        "training": {"epochs": 1, "batch_size": 8},
    }
    return Plan(**{**fields, **changes})


def site(patients: int = 12) -> Site:
    return Site("a", {"train": blobs(0, patients, (1, 8, 8)), "val": blobs(1, 12, (1, 8, 8))})


def ask_of(p: Plan) -> Request:
    method = p.build_method()
    request = method.request(method.init(p.build_task().first(0)))
    assert request is not None
    return request


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
def test_more_than_the_limits_is_refused_and_less_is_not(changes: Any, line: str, why: str) -> None:
    policy = parse(f"[limits]\n{line}\n".encode())
    assert [why in problem for problem in policy.refusals(plan(**changes))] == [True]
    assert policy.refusals(plan()) == []


def test_required_transforms_are_required_with_their_numbers() -> None:
    wanted = b'[require]\ntransforms = [{name = "clip", bound_at_most = 1.0}, {name = "gaussian", multiplier_at_least = 0.8}]'
    policy, uniform = parse(wanted), {"uniform": True}
    good = ({"name": "clip", "bound": 1.0}, {"name": "gaussian", "multiplier": 0.8})
    loose = ({"name": "clip", "bound": 2.0}, {"name": "gaussian", "multiplier": 0.7})
    assert policy.refusals(plan(options=uniform, uplink=good)) == []
    assert len(policy.refusals(plan(options=uniform, uplink=loose))) == 2
    assert len(policy.refusals(plan())) == 2
    assert len(policy.refusals(plan(options=uniform, uplink=good[:1]))) == 1


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (Reply({"x": WeightedMean({"a": torch.zeros(2)}, 1.0)}), ""),
        (Reply({"x": ElementwiseMean({"a": torch.zeros(2)}, {"a": torch.zeros(2)})}), "ElementwiseMean"),
        (Reply({"features": PerSite({"a": {"x": torch.zeros(2)}})}), "allow.gather"),
        (Reply({"score": PerSite({"b": {"x": torch.zeros(2)}})}), "contains values of"),
        (
            Reply({"x": WeightedMean({"a": torch.zeros(300_000)}, 1.0)}),
            "allow.*megabytes_per_round|megabytes_per_round",
        ),
    ],
)
def test_what_would_leave_is_read_and_not_what_it_is_called(reply: Any, why: str) -> None:
    policy = parse(b'[allow]\nstats = ["WeightedMean"]\n[limits]\nmegabytes_per_round = 1.0\n')
    rules = Enforced(policy, plan())
    if why:
        with pytest.raises(Refused, match=why):
            rules.release(plan().build_method(), Request(0, {}), reply, site())
    else:
        rules.release(plan().build_method(), Request(0, {}), reply, site())


def test_bytes_count_over_a_round() -> None:
    policy, reply = (
        parse(b"[limits]\nmegabytes_per_round = 1.0\n"),
        Reply({"x": WeightedMean({"a": torch.zeros(100_000)}, 1.0)}),
    )
    Enforced(policy, plan(), sent=500_000).release(plan().build_method(), Request(0, {}), reply, site())
    with pytest.raises(Refused, match="would have left in this round"):
        Enforced(policy, plan(), sent=700_000).release(plan().build_method(), Request(0, {}), reply, site())


def test_only_secure_sums_where_the_policy_says_so() -> None:
    p, policy = plan(), parse(b"[require]\nsecure = true\n")
    with pytest.raises(Refused, match="secure sums only"):
        execute(p.build_method(), ask_of(p), {}, site(), Enforced(policy, p))


def test_a_promise_of_secrecy_is_kept_by_the_site() -> None:
    """The server drops ``secure`` from an ask whose study specifies secure aggregation."""
    p = plan(options={"uniform": True}, uplink=({"name": "secure-sum"},))
    request = ask_of(p)
    assert request.secure
    with pytest.raises(Refused, match="specifies secure aggregation"):
        execute(p.build_method(), replace(request, secure=False), {}, site(), Enforced(parse(b""), p))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[limits]\nepoch = 3", "policy.toml:2: limits.epoch = 3: unknown key. Did you mean 'epochs'?"),
        ("[limits]\nepochs = '3'", "limits.epochs"),
        ("[limits]\nepochs = -1", "limits.epochs"),
        ("[limits]\nlearning_rate = nan", "limits.learning_rate"),
        ("[allow]\njobs = 'train'", "allow.jobs"),
        (
            "[approve]\nautomatically = ['abc']",
            r"approve.automatically\[1\] = .abc.: must be a hash of 64 hexadecimal digits",
        ),
        ("[require]\ntransforms = [{name = 'gausian'}]", 'Did you mean "gaussian"'),
        ("[require]\ntransforms = [{name = 'clip', bound = 1.0}]", "clip has no 'bound'; write bound_at_least"),
        ("[require]\ntransforms = [{name = 'clip', bound_at_most = 'x'}]", "must be a number"),
        ("limits", "policy.toml"),
        ("a = " + "[" * 500, "policy.toml"),
    ],
)
def test_a_bad_policy_is_told_by_key(text: Any, why: str) -> None:
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
    rng, base = random.Random(0), DEFAULT.encode()
    until = time.monotonic() + 2
    while time.monotonic() < until:
        data = bytearray(base)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            parse(bytes(data))
        except BadPolicy:
            pass
    with pytest.raises(BadPolicy, match="larger"):
        parse(b"#" * 2**20)


@pytest.mark.parametrize("verb", ["score", "predict", "explain", "show"])
@pytest.mark.parametrize("role", ["train", "unlabeled", "public", "", "val/x", "Val"])
def test_no_model_is_scored_but_on_validation_and_test_data_whatever_the_policy_allows(verb: str, role: str) -> None:
    lax = parse(
        b'[allow]\njobs = ["*"]\nnever = []\ngather = ["*"]\nstats = ["WeightedMean"]\n[limits]\nmin_patients = 1\n'
    )
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
        (Reply({"update": WeightedMean({"head.bias": torch.zeros(2)}, 1.0)}), ""),
        (
            Reply({"update": WeightedMean({"head.bias": torch.zeros(3)}, 1.0)}),
            "update: 'head.bias' would leave in another shape",
        ),
        (Reply({"change": ElementwiseMean({"head.bias": torch.zeros(1, 2)}, {})}), "change: 'head.bias'"),
        (Reply({"model": PerSite({"a": {"head.bias": torch.zeros(2000)}})}), "model: 'head.bias'"),
        (Reply({"sent": WeightedMean({"m/gradient/head.bias": torch.zeros(3)}, 1.0)}), "gradient: 'head.bias'"),
        (Reply({"sent": WeightedMean({"m/update/head.bias": torch.zeros(2), "m/update/": torch.zeros(0)}, 1.0)}), ""),
        (Reply({"selector": WeightedMean({"head.bias": torch.zeros(3)}, 1.0)}), ""),  # a model of another kind
        (Reply({"update": WeightedMean({"head.bias": torch.zeros(3), "first.head.bias": torch.zeros(3)}, 1.0)}), ""),
        (Reply({"predict": PerSite({"a": {"score": torch.zeros(9, 2)}})}), ""),
        (
            Reply({"predict": PerSite({"a": {"score": torch.zeros(9, 3)}})}),
            "3 outputs for each patient would leave, and 2 ",
        ),
        (Reply({"predict": PerSite({"a": {"score": torch.zeros(9)}})}), ""),
        (Reply({"score": PerSite({"a": {"score": torch.zeros(9, 3)}})}), ""),  # only predictions are by output
    ],
)
def test_what_leaves_has_the_size_that_was_approved(reply: Reply, why: str) -> None:
    p = plan()
    rules = Enforced(parse(b'[allow]\ngather = ["*"]\n'), p)
    if why:
        with pytest.raises(Refused, match=why):
            rules.release(p.build_method(), ask_of(p), reply, site())
    else:
        rules.release(p.build_method(), ask_of(p), reply, site())


@pytest.mark.parametrize("shared", [False, True])
def test_encoded_replies_have_the_bound_of_their_bytes(shared: bool) -> None:
    """Also those that are summed: a shared selection is additive and has other shapes."""
    p = plan(uplink=({"name": "top-k", "fraction": 0.5, "shared": shared},))
    method = p.build_method()
    reply = Reply({"sent": WeightedMean({"m/update/head.bias": torch.zeros(300)}, 1.0)})
    Enforced(parse(b""), p).release(method, ask_of(p), reply, site())


HASH = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("[limits]\nrounds = 1000000000000", True),
        ("[limits]\nrounds = 1000000000001", False),
        ("[require]\nmin_sites = 0", True),
        ("[require]\nmin_sites = -1", False),
        ("[require]\nmin_sites = 2.0", False),
        ("[limits]\nlearning_rate = 1e15", True),
        ("[limits]\nlearning_rate = 1000000000000001.0", False),
        ("[limits]\nlearning_rate = nan", False),
        ("[limits]\nlearning_rate = 0.0", True),
        ("[limits]\nlearning_rate = -0.1", False),
        ("[limits]\nmegabytes_per_round = inf", False),
        (f"[approve]\nautomatically = ['{HASH}']", True),
        (f"[approve]\nautomatically = ['{HASH}0']", False),
        (f"[approve]\nautomatically = ['{HASH[1:]}']", False),
        (f"[approve]\nautomatically = ['{HASH.upper()}']", False),
        ("[allow]\npackages = ['mine==1.2']", True),
        ("[allow]\npackages = ['*']", False),
        (f"[allow]\nweights = ['*', '{'0' * 64}']", True),
        ("[allow]\nweights = ['given']", False),
        ("[privacy]\nepsilon = 1e6\ndelta = 0.5", True),
        ("[privacy]\nepsilon = 1000001.0\ndelta = 0.5", False),
        ("[privacy]\nepsilon = 1e-9\ndelta = 1e-9", True),
        ("[privacy]\nepsilon = 0.0\ndelta = 0.5", False),
        ("[privacy]\nepsilon = 1.0\ndelta = 0.0", False),
        ("[privacy]\nepsilon = 1.0\ndelta = 1.0", False),
        ("[privacy]\nepsilon = 1.0\ndelta = 0.999", True),
        ("[privacy]\nepsilon = 1.0", False),
        ("[privacy]\ndelta = 0.5", False),
        ("[privacy]\nepsilon = 1.0\ndelta = 0.5\nunit = 'image'", False),
    ],
)
def test_numbers_and_hashes_outside_their_range_are_no_policy(text: str, fits: bool) -> None:
    if fits:
        parse(text.encode())
    else:
        with pytest.raises(BadPolicy, match=r"^policy\.toml:\d: [a-z]+\.[a-z_]+"):
            parse(text.encode())


def test_a_privacy_budget_protects_patients_unless_it_says_otherwise() -> None:
    assert parse(b"").privacy is None
    budget = parse(b"[privacy]\nepsilon = 8.0\ndelta = 1e-5\n").privacy
    assert budget is not None
    assert (budget.epsilon, budget.delta, budget.unit) == (8.0, 1e-5, "patient")


def test_the_default_policy_is_the_documented_one() -> None:
    """A site that changes nothing has these; a change of one of them is a change of what hospitals agreed to."""
    policy = parse(DEFAULT.encode())
    assert policy.approve.automatically == ()
    assert policy.allow.model_dump() == {
        "jobs": ("*",),
        "never": ("predict/*", "show/*"),
        "stats": ("WeightedMean", "ElementwiseMean"),
        "gather": ("score", "describe"),
        "packages": (),
        "weights": ("*",),
        "class_names": False,
    }
    assert policy.require.model_dump() == {"transforms": (), "secure": False, "min_sites": 3}
    assert policy.limits.model_dump() == {
        "min_patients": 10,
        "min_cell": 5,
        "megabytes_per_round": 2000.0,
        "weights_megabytes": 0.0,
        "rounds": 2000,
        "epochs": 100,
        "steps": 100_000,
        "learning_rate": 10.0,
    }


def test_a_policy_cannot_be_changed_once_it_is_read() -> None:
    policy = parse(b"")
    for table, key, value in ((policy, "limits", None), (policy.limits, "rounds", 9), (policy.allow, "never", ())):
        with pytest.raises(ValueError, match="frozen"):
            setattr(table, key, value)


def test_a_policy_is_read_from_its_file_up_to_a_size(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    with pytest.raises(BadPolicy, match=r"rules\.toml does not exist, and without a policy nothing runs: .*--reset"):
        read(path)
    with pytest.raises(BadPolicy, match="does not exist"):
        read(tmp_path)
    path.write_text("[limits]\nrounds = 7\n")
    assert read(path).limits.rounds == 7
    path.write_text("[limits]\nround = 7\n")
    with pytest.raises(BadPolicy) as told:
        read(path)
    assert str(told.value) == f'{path}:2: limits.round = 7: unknown key. Did you mean "rounds"?'
    path.write_bytes(b"#" * 2**18)
    assert read(path) == parse(b"")
    path.write_bytes(b"#" * (2**18 + 1))
    with pytest.raises(BadPolicy, match=r"rules\.toml is larger than 262144 bytes"):
        read(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[limits]\nepochs = '3'", 'policy.toml:2: limits.epochs = "3": must be a whole number, not the text "3"'),
        ("[limits]\nepochs = -1", "policy.toml:2: limits.epochs = -1: must be at least 0"),
        ("a = " + "[" * 20_000, "policy.toml: "),
        (f"a = {'[' * 300}{']' * 300}", "policy.toml:1: a: unknown key. The valid keys are approve"),
        ("a = \xff", "policy.toml: 'utf-8' codec"),
    ],
)
def test_what_is_wrong_with_a_policy_is_said_as_a_sentence_of_its_place(text: str, said: str) -> None:
    with pytest.raises(BadPolicy) as told:
        parse(text.encode("latin-1"))
    assert str(told.value).startswith(said)
    assert "\n" not in str(told.value)


def test_a_policy_that_is_nested_deeper_than_it_can_be_checked_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser has a limit of its own, which depends on its version."""
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    monkeypatch.setattr("polyclinic.engines.policy.site_policy.tomllib.loads", lambda text: {"limits": nested})
    with pytest.raises(BadPolicy, match=r"^policy\.toml: nested too deeply$"):
        parse(b"")


def test_every_wrong_transform_is_told_with_its_place() -> None:
    with pytest.raises(BadPolicy) as told:
        parse(b'[require]\ntransforms = [{name = "gausian"}, {name = "klip"}]')
    lines = str(told.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("policy.toml:2: require.transforms: ") for line in lines)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"training": {"epochs": 10}}, "epochs = 10"),
        ({"training": {"steps": 10}}, "steps = 10"),
        ({"training": {"steps": 10}}, "epochs = 0"),  # counted in steps, not in epochs
        ({"training": {"lr": 1.0}}, "learning_rate = 1.0"),
        ({"rounds": 10}, "rounds = 10"),
    ],
)
def test_as_much_as_the_limit_is_allowed(changes: Any, line: str) -> None:
    assert parse(f"[limits]\n{line}\n".encode()).refusals(plan(**changes)) == []


def test_what_is_over_a_limit_is_told_with_both_numbers_and_the_key() -> None:
    policy = parse(b"[limits]\nrounds = 2\nepochs = 0\nsteps = 0\nlearning_rate = 0.25\n")
    assert policy.refusals(plan(training={"epochs": 1, "lr": 0.5})) == [
        "3 rounds, and the policy allows 2 (limits.rounds)",
        "1 epochs in a round, and the policy allows 0 (limits.epochs)",
        "0.5 learning rate, and the policy allows 0.25 (limits.learning_rate)",
    ]
    assert policy.refusals(plan(training={"steps": 1, "lr": 0.25}))[1:] == [
        "1 steps in a round, and the policy allows 0 (limits.steps)",
    ]


BUDGET = b"[privacy]\nepsilon = 8.0\ndelta = 1e-5\n"
NOISE = ({"name": "clip", "bound": 1.0}, {"name": "gaussian", "multiplier": 1.0})
DP_SGD = {"steps": 1, "private": {"noise": 1.0, "bound": 1.0, "unit": "patient"}}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ["replies must contain noise that the site's privacy budget can account for (privacy): train with DPSGD"]),
        ({"uplink": NOISE[:1], "options": {"uniform": True}}, ["replies must contain noise"]),
        ({"uplink": NOISE, "options": {"uniform": True}}, []),
        ({"training": DP_SGD}, []),
        ({"method": "local"}, []),  # nothing leaves, so nothing is paid
        ({"method": "moon", "training": DP_SGD}, []),
        (
            {"method": "fedmix", "kind": "segmentation", "network": "unet", "inputs": (1, 16, 16), "training": DP_SGD},
            ["does not cover what fedmix sends"],
        ),
    ],
)
def test_with_a_budget_only_noise_that_it_can_pay_for_may_leave(changes: Any, why: Any) -> None:
    found = parse(BUDGET).refusals(plan(**changes))
    assert len(found) == len(why)
    assert all(told in problem and "(privacy)" in problem for told, problem in zip(why, found, strict=True))


def test_noise_that_covers_less_than_it_promises_is_refused_without_a_budget_too() -> None:
    changes = {"method": "fedmix", "kind": "segmentation", "network": "unet", "inputs": (1, 16, 16)}
    assert parse(b"").refusals(plan(**changes)) == []
    (problem,) = parse(b"").refusals(plan(**changes, training=DP_SGD))
    assert "does not cover what fedmix sends" in problem
    assert problem.endswith("(privacy)")


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A method of another package, whose code says when it runs."""
    (tmp_path / "foreign_pack.py").write_text("raise RuntimeError('foreign code ran')\n")
    info = tmp_path / "foreign_pack-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-pack\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text("[polyclinic.methods]\nforeign = foreign_pack:make\n")
    (info / "RECORD").write_text("foreign_pack.py,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "foreign"


@pytest.mark.parametrize("changes", [{"method": "foreign"}, {"method": "fedper", "options": {"over": "foreign"}}])
def test_code_of_a_package_that_is_not_allowed_is_refused_before_it_runs(plugin: str, changes: dict[str, Any]) -> None:
    (refused,) = parse(b"").refusals(plan(**changes))
    (package,) = packages_in({"method": plugin})
    rule = f"foreign-pack==1.5@{package.hash}"
    assert refused == (
        "the plan needs the package foreign-pack 1.5, whose code the policy does not allow; "
        f'allow.packages = ["{rule}"] would allow the installed version'
    )
    for allowed in (rule, "foreign-pack"):
        policy = parse(f"[allow]\npackages = ['another', '{allowed}']".encode())
        assert policy.package_problems([package]) == []
    with pytest.raises(RuntimeError, match="foreign code ran"):
        policy.refusals(plan(method=plugin))
    assert len(parse(b"[allow]\npackages = ['another', 'foreign-pack==1.6']").refusals(plan(**changes))) == 1


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ("", []),
        ("jobs = ['train']", ["allow.jobs, allow.never"]),
        ("jobs = ['desc*']", []),
        ("never = ['describe']", ["allow.jobs, allow.never"]),
        ("never = ['desc*']", ["allow.jobs, allow.never"]),
        ("gather = ['score']", ["allow.gather"]),
        ("gather = []\nnever = ['*']", ["allow.jobs, allow.never", "allow.gather"]),
    ],
)
def test_a_site_says_what_its_data_are_if_the_policy_allows_it(rules: str, why: list[str]) -> None:
    """Whatever the rest of the plan is: a survey trains nothing."""
    policy = parse(f"[allow]\n{rules}\n[limits]\nrounds = 0\nmin_patients = 99\n".encode())
    found = policy.survey_problems()
    assert len(found) == len(why)
    assert all(told in problem and "'describe'" in problem for told, problem in zip(why, found, strict=True))
    enforced = Enforced(policy, plan())
    if why:
        with pytest.raises(Refused) as told:
            enforced.admit(Describe("classification"), Request(0, {}, "describe"), site())
        assert str(told.value) == "; ".join(found)
    else:
        enforced.admit(Describe("classification"), Request(0, {}, "describe"), site())


def refusal(policy: str, request: Request, p: Plan | None = None, at: Site | None = None) -> str:
    """Why ``request`` is not run; empty where it is."""
    p = p or plan()
    try:
        Enforced(parse(policy.encode()), p).admit(p.build_method(), request, at or site())
    except Refused as error:
        return str(error)
    return ""


def test_a_job_runs_if_it_is_allowed_and_not_forbidden() -> None:
    request = ask_of(plan())
    assert refusal("[allow]\njobs = ['t*']\n", request) == ""
    assert (
        refusal("[allow]\njobs = []\n", request)
        == "the job 'train' is not among those that the policy allows (allow.jobs)"
    )
    assert refusal("[allow]\nnever = ['t*']\n", request) == "the job 'train' never runs here (allow.never)"
    assert refusal("[allow]\njobs = ['score/*']\n", request).endswith("(allow.jobs)")
    assert refusal("[allow]\njobs = ['score/*']\n", replace(request, job="score/val")) == ""


@pytest.mark.parametrize(("round", "fits"), [(-1, False), (0, True), (2, True), (3, True), (4, False)])
def test_only_rounds_of_the_study_are_run(round: int, fits: bool) -> None:
    """The round after the last is that of the last model's scores."""
    assert refusal("", replace(ask_of(plan()), round=round)) == (
        "" if fits else f"round {round} is beyond the study's 3 rounds"
    )


def test_patients_are_counted_where_the_job_reads_them() -> None:
    few = Site("a", {"train": blobs(0, 20, (1, 8, 8)), "val": blobs(1, 9, (1, 8, 8)), "test": blobs(1, 10, (1, 8, 8))})
    request = ask_of(plan())
    assert refusal("", request, at=few) == refusal("", replace(request, job="score/test"), at=few) == ""
    assert refusal("", replace(request, job="score/val"), at=few) == "fewer than 10 patients here (limits.min_patients)"
    none = Site("a", {"val": blobs(1, 20, (1, 8, 8))})
    assert refusal("", request, at=none) == "fewer than 10 patients here (limits.min_patients)"
    assert refusal("", replace(request, job="score/test"), at=none) == "", (
        "no one is scored, so nothing is reported of anyone"
    )


@pytest.mark.parametrize("role", ["train", "other" * 30])
def test_the_role_that_is_refused_is_named_and_not_at_length(role: str) -> None:
    told = refusal("[limits]\nmin_patients = 0\n", replace(ask_of(plan()), job=f"score/{role}"))
    assert told == f"models are scored on val and test data alone, and never on {role[:80]!r}"


def test_scores_are_never_secret_and_training_is_where_the_policy_says_so() -> None:
    p = plan(options={"uniform": True}, uplink=({"name": "secure-sum"},))
    request, required = ask_of(p), "[require]\nsecure = true\n"
    assert refusal(required, request, p) == ""
    assert refusal(required, replace(request, job="score/val", secure=False), p) == ""
    assert refusal(required, replace(ask_of(plan()), job="score/val")) == ""
    assert refusal(required, ask_of(plan())) == "the policy allows secure sums only (require.secure)"
    both = refusal(required, replace(request, secure=False), p).split("; ")
    assert both == [
        "the study specifies secure aggregation, and the server requests the plain reply",
        "the policy allows secure sums only (require.secure)",
    ]


def test_a_message_of_the_limit_is_read_and_a_larger_one_is_not() -> None:
    request = ask_of(plan())
    bulky = replace(request, trees={**request.trees, "more": {"x": torch.zeros(3_000_000)}})
    size = bulky.nbytes("a")
    assert refusal(f"[limits]\nmegabytes_per_round = {size / 1e6!r}\n", bulky) == ""
    assert "(limits.megabytes_per_round)" in refusal(f"[limits]\nmegabytes_per_round = {(size - 1) / 1e6!r}\n", bulky)
    assert refusal("[limits]\nmegabytes_per_round = 2.5\n", bulky) == (
        "a message of 12 MB, and the policy allows 2.5 (limits.megabytes_per_round)"
    )
    addressed = replace(request, per_site={"a": {"more": {"x": torch.zeros(3_000_000)}}})
    assert "a message of 12 MB" in refusal("[limits]\nmegabytes_per_round = 2.5\n", addressed)
    assert (
        refusal("[limits]\nmegabytes_per_round = 2.5\n", replace(request, per_site={"b": addressed.per_site["a"]}))
        == ""
    )


def with_params(request: Request, **leaves: torch.Tensor) -> Request:
    params = dict(request.trees["params"]) | {name.replace("__", "."): leaf for name, leaf in leaves.items()}
    return replace(request, trees={**request.trees, "params": params})


def test_the_servers_model_must_be_the_approved_one() -> None:
    """Another architecture could copy what it is trained on into what leaves."""
    request = ask_of(plan())
    assert refusal("", replace(request, trees={})) == ""
    assert refusal("", with_params(request, head__bias=torch.ones(2))) == ""
    assert refusal("", with_params(request, copy=torch.zeros(2))) == (
        "the server's model has a tensor 'copy', which the approved model does not have"
    )
    assert refusal("", with_params(request, **{"x" * 99: torch.zeros(2)})) == (
        f"the server's model has a tensor {'x' * 80!r}, which the approved model does not have"
    )
    assert refusal("", with_params(request, head__bias=torch.zeros(2, 1))) == (
        "the server's 'head.bias' has the shape (2, 1), the approved model's (2,)"
    )
    for number in (float("nan"), float("inf"), -float("inf")):
        wrong = with_params(request, head__bias=torch.tensor([0.0, number]))
        assert refusal("", wrong) == "the server's model contains NaN or infinity"


def test_only_the_first_tensor_that_does_not_fit_is_told() -> None:
    """A hostile message must not fill the journal."""
    request = ask_of(plan())
    many = {f"tensor-{i}": torch.full((2,), float("nan")) for i in range(100)}
    assert refusal("", with_params(request, **many)).count("the server's") == 1
    shapes = {name: leaf.new_full((*leaf.shape, 2), float("nan")) for name, leaf in request.trees["params"].items()}
    assert refusal("", replace(request, trees={"params": shapes})).count("the server's") == 1


def test_a_model_is_checked_as_it_is_after_its_codecs_are_undone() -> None:
    p = plan(downlink=({"name": "bf16"},))
    request = ask_of(p)
    assert refusal("", request, p) == ""
    larger = ask_of(plan(downlink=p.downlink, network_options={"width": 16, "norm": "group"}))
    assert "has the shape (16, 1, 3, 3), the approved model's (8, 1, 3, 3)" in refusal("", larger, p)
    packed = request.trees["received"]
    more = replace(request, trees={"received": {**packed, "m/params/copy:half": torch.zeros(2, dtype=torch.bfloat16)}})
    assert refusal("", more, p) == "the server's model has a tensor 'copy', which the approved model does not have"
    unreadable = replace(
        request, trees={"received": {**packed, "x/params/copy:half": torch.zeros(2, dtype=torch.bfloat16)}}
    )
    assert (
        refusal("", unreadable, p)
        == "the server's message cannot be read: 'x/params/copy' is not a valid name in an encoded request"
    )


def test_models_of_two_studies_are_not_confused() -> None:
    """Each plan's shapes are its own, in whatever order they are asked for."""
    small, large = plan(), plan(network_options={"width": 16, "norm": "group"})
    for _ in range(2):
        assert refusal("", ask_of(small), small) == refusal("", ask_of(large), large) == ""
        assert "has the shape" in refusal("", ask_of(large), small)
        assert "has the shape" in refusal("", ask_of(small), large)


def test_the_shapes_of_a_plan_are_computed_once() -> None:
    """They are needed for every message, and a large model takes seconds to build."""
    assert _known_shapes(plan()) is _known_shapes(plan())


def test_every_reason_of_the_plan_and_of_the_ask_is_told() -> None:
    told = refusal("[limits]\nrounds = 2\nmin_patients = 13\n[allow]\njobs = []\n", ask_of(plan())).split("; ")
    assert [reason.rpartition(" ")[2] for reason in told] == [
        "(limits.rounds)",
        "(allow.jobs)",
        "(limits.min_patients)",
    ]


@pytest.mark.parametrize("method", ["harmofl", "fmtl", "fedni", "site-graph"])
def test_a_method_that_predicts_with_more_than_the_network_may_send_that_too(method: str) -> None:
    """Some put a front before the approved network, or another head behind it; nothing else may come."""
    p = plan(method=method)
    request, made = ask_of(p).for_site("a"), p.build_method()
    assert request.trees["params"].keys() - p.build_task().first(0).keys(), "it sends more than the network"
    assert refusal("", request, p) == ""
    assert refusal("", replace(made.evaluation_request(made.init(p.build_task().first(0))), job="score/val"), p) == ""
    assert "a tensor 'copy', which the approved model does not have" in refusal(
        "", with_params(request, copy=torch.zeros(2)), p
    )


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (Reply({"score": PerSite({"b": {"x": torch.zeros(2)}})}), "'score' contains values of ['b'], not of a alone"),
        (Reply({"score": PerSite({"b": {}, "a": {}})}), "'score' contains values of ['a', 'b'], not of a alone"),
        (Reply({"score": PerSite({})}), "'score' contains values of [], not of a alone"),
        (Reply({"score": PerSiteUniform({"a": {}})}), ""),
        (
            Reply({"rows": PerSiteUniform({"a": {}})}),
            "'rows' would leave as a PerSiteUniform, which the server sees separately from other sites' values (allow.gather lists the permitted parts)",
        ),
        (
            Reply({"x": ElementwiseMean({}, {})}),
            "'x' would leave as a ElementwiseMean, which the policy does not allow (allow.stats)",
        ),
        (
            Reply({"x": ElementwiseMean({}, {}), "y": ElementwiseMean({}, {})}),
            "'x' would leave as a ElementwiseMean, which the policy does not allow "
            "(allow.stats); 'y' would leave as a ElementwiseMean, which the policy does not allow (allow.stats)",
        ),
    ],
)
def test_why_a_reply_does_not_leave_is_told_part_by_part(reply: Reply, why: str) -> None:
    rules = Enforced(parse(b'[allow]\nstats = ["Mean"]\n'), plan())
    if why:
        with pytest.raises(Refused) as told:
            rules.release(plan().build_method(), Request(0, {}), reply, site())
        assert str(told.value) == why
    else:
        rules.release(plan().build_method(), Request(0, {}), reply, site())


def test_the_bytes_of_a_round_may_reach_the_limit_and_not_pass_it() -> None:
    policy, reply = (
        parse(b"[limits]\nmegabytes_per_round = 1.5\n"),
        Reply({"x": WeightedMean({"a": torch.zeros(100_000)}, 1.0)}),
    )
    Enforced(policy, plan(), sent=1_100_000).release(plan().build_method(), Request(0, {}), reply, site())
    Enforced(parse(b"[limits]\nmegabytes_per_round = 0.4\n"), plan()).release(
        plan().build_method(), Request(0, {}), reply, site()
    )
    with pytest.raises(Refused, match=r"^2 MB would have left in this round, and the policy allows 1\.5 \(limits"):
        Enforced(policy, plan(), sent=1_100_001).release(plan().build_method(), Request(0, {}), reply, site())


def test_both_forms_and_sizes_that_are_refused_are_told() -> None:
    reply = Reply(
        {
            "update": ElementwiseMean({"head.bias": torch.zeros(3)}, {}),
            "predict": PerSite({"a": {"score": torch.zeros(9, 3)}}),
        }
    )
    with pytest.raises(Refused) as told:
        Enforced(parse(b'[allow]\nstats = ["Mean"]\n'), plan()).release(
            plan().build_method(), Request(0, {}), reply, site()
        )
    assert [reason.split(" ")[0] for reason in str(told.value).split("; ")] == ["'update'", "'predict'", "update:", "3"]


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"m/update/head.bias": 2, "m/change/head.bias": 3}, "change: 'head.bias'"),
        ({"m/update/head.bias": 3, "m/update/head.weight": 3}, "update: 'head.bias'"),
        ({"w/update/head.bias": 3}, ""),  # weights of a mean, in a form of their own
        ({"m/selector/head.bias": 3}, ""),
    ],
)
def test_parts_that_travel_together_are_each_checked(parts: dict[str, int], why: str) -> None:
    p = plan()
    reply = Reply({"sent": WeightedMean({name: torch.zeros(size) for name, size in parts.items()}, 1.0)})
    rules = Enforced(parse(b""), p)
    if why:
        with pytest.raises(Refused, match=rf"{why} would leave in another shape than the approved model's \(2,\)"):
            rules.release(p.build_method(), ask_of(p), reply, site())
    else:
        rules.release(p.build_method(), ask_of(p), reply, site())


def test_a_whole_model_with_one_tensor_of_another_shape_does_not_leave() -> None:
    p = plan()
    model = dict(p.build_task().first(0))
    rules, method = Enforced(parse(b""), p), p.build_method()
    rules.release(method, ask_of(p), Reply({"update": WeightedMean(model, 1.0)}), site())
    wrong = {**model, "head.bias": torch.zeros(3)}
    with pytest.raises(Refused, match=r"update: 'head\.bias' would leave in another shape"):
        rules.release(method, ask_of(p), Reply({"update": WeightedMean(wrong, 1.0)}), site())
