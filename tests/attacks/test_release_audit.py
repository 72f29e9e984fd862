"""The release audit, over every method for ever: what the table declares of each is what is measured.

And the audit itself: it finds what leaks in each of the ways that it looks at, and nothing if nothing leaks.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from polyclinic.attacks.neighboring_sites import Cohort, neighbors, sites
from polyclinic.attacks.release_audit import Verdict, audit
from polyclinic.compression.quantization import Int8
from polyclinic.compression.topk import TopK
from polyclinic.core import tree
from polyclinic.core.aggregates import ElementwiseMean, PerSite, PerSiteUniform, Reply, WeightedMean
from polyclinic.core.metering import Spend, meter, metered
from polyclinic.core.method import Method, Request
from polyclinic.core.pipeline import send_through
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.engines.plan import Plan
from polyclinic.engines.policy.coverage import audited, declared_problem, small, typical, uncovered
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.dp_sgd import DPSGD
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.catalog import METHODS, Way
from polyclinic.methods.label_noise.fedmlp import prototypes
from polyclinic.methods.local_adaptation.fedsoup import Soup
from polyclinic.methods.optimization.fedavg import FedAvg, State
from polyclinic.privacy.gaussian import AdaptiveClip, Clip, Gaussian
from polyclinic.privacy.sparse_vector import SparseVector, UncalibratedNoise
from polyclinic.secure_aggregation import SecureSum

WAYS: tuple[Way, ...] = ("dp-sgd", "gaussian")
TAKES_LONG = {"vafl", "stain-norm", "feddg", "fedrep", "lc-fed", "fedmix", "fedreplay", "fedirm", "fedvss", "pfedme"}
# Others run the same code at a site: of the robust rules, krum; of the server's optimizers, fedadam
ALIKE = {
    "multi-krum",
    "bulyan",
    "median",
    "trimmed-mean",
    "geometric-median",
    "centered-clipping",
    "fltrust",
    "dos",
    "watched",
    "fedavgm",
    "fedadagrad",
    "fedyogi",
}
NOISE_ON_REPLIES = {
    "fedavg",
    "scaffold",
    "fedbn",
    "ditto",
    "mime",
    "ifca",
    "krum",
    "fedadam",
    "feddyn",
    "moon",
    "swarm",
}
RARE = {
    ("prr-fl", "dp-sgd"),
    ("fedsoup", "dp-sgd"),
    ("fedmlp", "gaussian"),
}  # what depends on the patient here does so for few data sets: shown by itself, below


def slow(name: str, way: Way) -> bool:
    """By default one way for each method: noise on gradients; noise on replies, of one method of each kind."""
    return name in TAKES_LONG | ALIKE or (way == "gaussian" and name not in NOISE_ON_REPLIES)


def cases(declared: bool) -> list[Any]:
    return [
        pytest.param(name, way, id=f"{name}-{way}", marks=[pytest.mark.slow] if slow(name, way) else [])
        for name, line in METHODS.items()
        for way in WAYS
        if (way in line.private) == declared and (name, way) not in RARE
    ]


def verdict_of(name: str, way: Way) -> Verdict | None:
    """The verdict on a method with one kind of noise; None where it cannot be built so."""
    try:
        return audited(replace(typical(name, way), rounds=2))
    except ValueError:
        return None


@pytest.mark.parametrize(("name", "way"), cases(declared=True))
def test_what_is_declared_covered_is_covered(name: str, way: Way) -> None:
    found = verdict_of(name, way)
    assert found is not None
    assert found.covered, found.says
    assert found.largest > 1e-3 or not found.released, "the change must reach the mechanism for this to be a test"
    assert found.uses > 5 or not found.released


@pytest.mark.parametrize(("name", "way"), cases(declared=False))
def test_what_is_not_covered_is_not_declared(name: str, way: Way) -> None:
    found = verdict_of(name, way)
    assert found is None or not found.covered, f"{found.says} Declare it in methods/catalog.py"


def test_the_loss_of_prr_fl_is_chosen_by_scores_on_all_training_patients() -> None:
    """One patient more or less turns its stage, and with it every other patient's gradient."""
    method: Any = typical("prr-fl", "dp-sgd").build_method().inner
    found, changed = places()
    pairs = [(method.task.first(seed), {"personal": method.task.first(100 + seed)}) for seed in range(40)]
    turned = [
        method.stage(deputy, memory, found["a"]) != method.stage(deputy, memory, n.site)
        for deputy, memory in pairs
        for n in changed
        if n.role == "train"
    ]
    assert any(turned)
    assert "dp-sgd" not in METHODS["prr-fl"].private


def test_the_model_that_fedsoup_sends_is_chosen_by_validation_patients() -> None:
    """One patient of the validation data more or less decides which of two means leaves the site."""
    method: Any = typical("fedsoup", "dp-sgd").build_method().inner
    found, changed = places()
    models = [[method.task.first(3 * seed + k) for k in range(2)] for seed in range(40)]
    chosen = [
        method.interpolated(*pair, Soup({}, 0), site, 1)[1].size
        for pair in models
        for site in (found["a"], *(n.site for n in changed if n.role == "val"))
    ]
    per = len(chosen) // len(models)
    assert any(len(set(chosen[k : k + per])) > 1 for k in range(0, len(chosen), per))
    assert "dp-sgd" not in METHODS["fedsoup"].private


def test_the_weights_of_fedmlps_prototypes_tell_whether_any_patient_has_a_finding() -> None:
    """One patient decides it, and noise on the means does not hide it."""
    h, y = torch.randn(4, 3), torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    whole, without = prototypes(h, y, 4.0), prototypes(h[1:], y[1:], 4.0)
    assert whole.weight["mean"][0, 1].tolist() == [4.0] * 3
    assert without.weight["mean"][0, 1].tolist() == [0.0] * 3


def test_every_method_that_is_not_covered_says_why() -> None:
    for name, line in METHODS.items():
        reason = declared_problem(name, ("dp-sgd",))
        assert (reason is None) == ("dp-sgd" in line.private or line.leaves == "nothing"), name
        if reason:
            assert line.exposes in reason, name
            assert "use fedavg" in reason, name
            assert ("send through clip and gaussian instead" in reason) == ("gaussian" in line.private), name
        assert bool(line.exposes) == ("dp-sgd" not in line.private), name
        assert set(line.private) <= set(WAYS), name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), [(n, w) for n, line in METHODS.items() for w in line.private])
def test_what_is_declared_covered_is_covered_at_all_sites(name: str, way: Way) -> None:
    for kind in METHODS[name].tasks or ("classification", "multilabel", "regression", "survival"):
        if way == "dp-sgd" and kind == "segmentation":
            continue  # its loss cannot be taken example by example, which is reported
        found = audited(typical(name, way, kind), full=True)
        assert found.covered, f"{kind}: {found.says}"


KNOWN = {  # what the issue found, with where it leaves
    "mime-lite": ("train", "gradient"),
    "fedsm": ("train", "selector"),
    "ifca": ("train", "update"),
    "loss-weighted": ("train", "update"),
    "q-ffl": ("train", "update"),
    "afl": ("train", "loss"),
    "fedce": ("train", "update"),
    "fedad": ("train", "scores"),
    "fedmix-weights": ("train", "amounts"),
    "dynamic-fusion": ("send", "update"),
    "site-graph": ("train", ""),
    "prop-ffl": ("loss", "loss"),
    "fedsld": ("count", "classes"),
    "combat": ("prepare regress", "sums"),
    "zscore": ("prepare moments", "sums"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_leaks_are_found_where_they_are(name: str) -> None:
    found = verdict_of(name, "dp-sgd")
    assert found is not None
    assert KNOWN[name] in {(f.job, f.part) for f in found.findings}, found.says
    assert name in found.says
    assert "use fedavg" in found.says
    assert json.loads(json.dumps(found.to_json()))["covered"] is False


TASK = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2), ("norm", "group"))))
PRIVATE = DPSGD(batch_size=3, lr=0.2, noise=1.0, bound=0.5)
CLIPPED = (Clip(0.05), Gaussian(1.0))


@dataclass(frozen=True)
class Leaky(FedAvg):
    """FedAvg with DP-SGD, whose reply is spoiled in one way."""

    way: str = ""

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        x, y = site.data["train"][torch.arange(8)]
        if self.way == "random time" and "n" not in memory:
            memory = {**memory, "n": {"n": torch.tensor(float(torch.randint(2**20, (), generator=None)))}}
        if self.way == "silence" and float(x.abs().max()) > 10:
            return Reply(), memory
        if self.way == "failure" and float(x.abs().max()) > 10:
            raise ValueError("one is too bright")
        if self.way == "message":
            raise ValueError(f"the brightest is {float(x.abs().max())}")
        if self.way == "unlabeled":
            hidden = site.data["unlabeled"][torch.arange(8)][0].mean()
        if self.way == "unmetered":
            with metered():
                reply, memory = super().site_update(request, memory, site)
            meter(Spend(1.0, 0.5, 1, "patient"))
            return reply, memory
        if self.way == "pretended":
            meter(Spend(1.0, 0.5, 1, "patient"))
            return Reply(
                {"update": WeightedMean.of({n: leaf + x.mean() for n, leaf in request.trees["params"].items()})}
            ), memory
        if self.way == "loss by class":
            share = torch.bincount(y, minlength=2) / len(y)
            weighted = lambda model, batch: TASK.loss(model, batch) * share[batch[1]].mean()  # noqa: E731
            end = self.local.fit(self.task, request.trees["params"], site, request.round, loss=weighted)
            return Reply({"update": WeightedMean.of(tree.sub(end, request.trees["params"]))}), memory
        reply, kept = super().site_update(request, memory, site)
        update = reply.mean("update")
        ways: dict[str, dict[str, Any]] = {
            "weight": {"update": WeightedMean(update.total, update.weight * (1 + float(x.abs().mean())))},
            "leaf weight": {"more": ElementwiseMean({"x": torch.ones(2)}, {"x": torch.ones(2) * x.mean()})},
            "gather": {"more": PerSite({site.name: {"x": x.amax()[None]}})},
            "alike": {"more": PerSiteUniform({site.name: {"x": y.float().mean()[None]}})},
            "tensor": {"more": WeightedMean.of({"a" if float(x.max()) > 10 else "b": torch.ones(1)})},
            "shape": {"more": WeightedMean.of({"a": torch.ones(1 + int(y.sum()))})},
            "type": {
                "more": WeightedMean.of({"a": torch.ones(1, dtype=torch.float64 if x.max() > 10 else torch.float32)})
            },
            "part": {"more": WeightedMean.of({"a": torch.ones(1)})} if float(x.max()) > 10 else {},
            "least bit": {"more": WeightedMean.of({"a": 1 + 1e-7 * y.float().mean()[None]})},
            "nan": {"more": WeightedMean.of({"a": torch.tensor([torch.nan if x.max() > 10 else 0.0])})},
            "unlabeled": {"more": WeightedMean.of({"a": hidden[None]})} if self.way == "unlabeled" else {},
        }
        more = ways.get(self.way, {})
        if self.way == "later":
            seen = memory.get("seen", {"x": torch.zeros(1)})
            more, kept = {"more": WeightedMean.of(seen)}, {**kept, "seen": {"x": x.mean()[None]}}
        return Reply({**reply.parts, **more}), kept


def places(full: bool = False, unit: Any = "patient", names: Any = ("a", "b")) -> tuple[dict[str, Site], list[Any]]:
    found = sites("classification", (1, 8, 8), 2, names)
    return found, list(neighbors(found["a"], "classification", 2, unit, full))


def run(method: Method[Any], unit: Any = "patient", rounds: int = 2) -> Verdict:
    found, changed = places(unit=unit)
    return audit("it", method, TASK.first(0), found, changed, unit, rounds=rounds)


@pytest.mark.parametrize(
    ("way", "job", "part", "what"),
    [
        ("weight", "train", "update", "has another weight"),
        ("leaf weight", "train", "more", "contains numbers that do not come from mechanisms"),
        ("gather", "train", "more", "contains numbers that do not come from mechanisms"),
        ("alike", "train", "more", "contains numbers that do not come from mechanisms"),
        ("tensor", "train", "more", "contains other tensors"),
        ("shape", "train", "more", "of another form"),
        ("type", "train", "more", "of another form"),
        ("part", "train", "more", "is sent or not"),
        ("least bit", "train", "more", "contains numbers that do not come from mechanisms"),
        ("nan", "train", "more", "contains numbers that do not come from mechanisms"),
        ("unlabeled", "train", "more", "contains numbers that do not come from mechanisms"),
        ("later", "train", "more", "contains numbers that do not come from mechanisms"),
        ("failure", "train", "", "is answered or not"),
        ("message", "train", "", "fails with another message"),
        ("silence", "train", "update", "is sent or not"),
        ("unmetered", "train", "", "uses noise 2 times, and 1 are paid for"),
        ("pretended", "train", "update", "contains numbers that do not come from mechanisms"),
        ("loss by class", "train", "", "another value in steps without the patient"),
    ],
)
def test_each_way_to_leak_is_found(way: str, job: str, part: str, what: str) -> None:
    found = run(Leaky(TASK, PRIVATE, way=way))
    assert not found.covered
    assert any(f.job == job and f.part == part and what in f.what for f in found.findings), found.findings
    assert "is not covered" in found.says


def test_nothing_is_found_where_nothing_leaks() -> None:
    found = run(Leaky(TASK, PRIVATE))
    assert found.covered, found.says
    assert not found.findings
    assert found.released == 4
    assert 0.2 < found.largest <= 1
    assert "only the output of mechanisms depended on one patient's data" in found.says


@pytest.mark.parametrize(
    ("transforms", "covered"),
    [
        (CLIPPED, True),
        ((AdaptiveClip(0.05), Gaussian(1.0)), True),
        ((SparseVector(bound=1e-3),), True),
        ((TopK(0.5), *CLIPPED), True),
        ((*CLIPPED, Int8()), True),
        ((), False),
        ((Clip(0.05),), False),
        ((UncalibratedNoise(0.1),), False),
        ((Int8(),), False),
    ],
)
def test_noise_on_replies(transforms: Any, covered: bool) -> None:
    inner = FedAvg(TASK, LocalTraining(batch_size=3, lr=0.2), uniform=True)
    found = run(send_through(inner, *transforms) if transforms else inner, "site")
    assert found.covered == covered, found.says
    if covered:
        assert 0.1 < found.largest <= 1 + 1e-4
    else:
        assert "leaves without any noise" in found.says


def test_shared_noise_is_judged_by_what_is_in_the_sum() -> None:
    """Each of three sites adds a third of the variance; the accountant counts on the whole."""
    method = send_through(
        FedAvg(TASK, LocalTraining(batch_size=3, lr=0.2), uniform=True),
        Clip(0.05),
        Gaussian(1.0, share=3),
        SecureSum(threshold=3),
    )
    found, changed = places(unit="site", names=("a", "b", "c"))
    shared = audit("it", method, TASK.first(0), found, changed, "site", rounds=2)
    alone = run(send_through(method.inner, *CLIPPED), "site")
    assert shared.covered, shared.says
    assert shared.largest == pytest.approx(alone.largest, rel=0.2)


def test_the_count_of_adaptive_clipping_is_part_of_what_is_compared() -> None:
    """A site whose reply falls below the bound in one world and not in the other moves both, by 2/z at the most."""
    inner = FedAvg(TASK, LocalTraining(batch_size=3, lr=0.2), uniform=True)
    sizes = []
    for bound in (0.05, 0.1, 0.2, 0.3):
        found = run(send_through(inner, AdaptiveClip(bound), Gaussian(1.0)), "site", rounds=1)
        assert found.covered, found.says
        sizes.append(found.largest)
    assert max(sizes) <= 1


@dataclass(frozen=True)
class Weak(Gaussian):
    """Noise, metered as of twice its depth."""

    def encode(
        self, sent: WeightedMean, notes: Trees, memory: Trees, site: Site, round: int
    ) -> tuple[WeightedMean, Trees]:
        weaker = {"clip": {"bound": notes["clip"]["bound"] / 4}}
        return super().encode(sent, weaker, memory, site, round)


class Loose(DPSGD):
    """DP-SGD that forgets to clip."""

    def _clipped_sum(self, *args: Any) -> Any:
        return replace(self, bound=1e3)._other_sum(*args)

    def _other_sum(self, *args: Any) -> Any:
        return DPSGD._clipped_sum(self, *args)


def test_what_moves_further_than_the_accountant_allows_is_found() -> None:
    weak = run(
        send_through(FedAvg(TASK, LocalTraining(batch_size=3, lr=0.5), uniform=True), Clip(0.05), Weak(1.0)), "site"
    )
    assert "times as far away as the accountant allows" in weak.says
    loose = run(FedAvg(TASK, Loose(batch_size=3, lr=0.2, noise=1.0, bound=0.05)))
    assert "times as far away as the accountant allows" in loose.says
    assert loose.largest > 1


def test_what_does_not_run_is_not_covered() -> None:
    batched = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2))))
    found, changed = places()
    stopped = audit("it", FedAvg(batched, PRIVATE), batched.first(0), found, changed, "patient")
    assert not stopped.covered
    assert "does not run: the job 'train' failed at a (ConfigError: DPSGD: this network has batch norm" in stopped.says


def test_an_audit_that_reaches_no_data_shows_nothing() -> None:
    """If no change reaches a mechanism, nothing was tested, and that is no proof of anything."""
    found, _ = places()
    idle = audit("it", FedAvg(TASK, PRIVATE), TASK.first(0), found, [], "patient")
    assert not idle.covered
    assert "the audit is empty" in idle.says


def test_neighbors_differ_in_one_unit_and_nothing_else() -> None:
    for unit in ("record", "patient", "site"):
        found, changed = places(True, unit)
        assert {n.role for n in changed} == {"train", "val", "test", "unlabeled"}
        for n in changed:
            base, other = found["a"].data[n.role], n.site.data[n.role]
            assert isinstance(base, Cohort)
            assert len(base) == len(other)
            assert base.patients == other.patients
            moved = [i for i in range(len(base)) if not torch.equal(base.x[i], other.x[i])]
            mine = [i for i, who in enumerate(base.patients) if n.patient in (who, None)]
            assert moved == (mine[:1] if unit == "record" else mine)
            assert all(base.y[i] != other.y[i] for i in moved) or n.patient is None
            for role in found["a"].data.keys() - {n.role}:
                assert found["a"].data[role] is n.site.data[role]


@pytest.mark.parametrize(
    "kind",
    [
        "classification",
        "multilabel",
        "regression",
        "survival",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("segmentation", "reconstruction")),
    ],
)
def test_every_kind_of_task_has_data(kind: Any) -> None:
    """FedAvg with noise on its replies is covered on each of them; small shapes represent large ones."""
    found = audited(typical("fedavg", "gaussian", kind))
    assert found.covered, found.says


def test_records_are_protected_as_such() -> None:
    plan = typical("fedavg", "dp-sgd")
    record = replace(plan, training={**plan.training, "private": {"noise": 1.0, "bound": 0.5, "unit": "record"}})
    found = audited(record)
    assert found.covered, found.says
    assert found.unit == "record"


def test_large_plans_are_audited_in_small() -> None:
    plan = Plan(
        "classification",
        "cnn",
        (3, 256, 256),
        2,
        "fedavg",
        tuple(f"s{i}" for i in range(40)),
        500,
        network_options={"width": 4, "depth": 2},
        training={"epochs": 7, "batch_size": 64},
    )
    less = small(plan)
    assert less.inputs == (3, 16, 16)
    assert len(less.sites) == 5
    assert (less.rounds, less.training["epochs"], less.training["batch_size"]) == (3, 1, 3)
    assert small(replace(plan, inputs=(3, 8, 8))).inputs == (3, 8, 8)
    table = replace(plan, network="mlp", network_options={}, inputs=(13,))
    assert small(table).inputs == (13,)


def test_plans_without_noise_have_nothing_to_cover() -> None:
    plan = typical("mime-lite", "dp-sgd")
    assert "mime-lite" in (uncovered(plan) or "")
    assert uncovered(replace(plan, training={"lr": 0.1})) is None
    both = typical("fedavg", "gaussian")
    assert uncovered(both) is None
    assert uncovered(replace(both, training=plan.training)) is None
    assert "noise on its replies" in (uncovered(replace(both, method="krum")) or "")


def test_the_state_of_the_run_is_that_of_the_first_world() -> None:
    """The server sees substitutes only: what it makes of them does not depend on the neighbors that are compared."""
    states: list[State] = []

    @dataclass(frozen=True)
    class Kept(FedAvg):
        def server_update(self, state: State, reply: Reply, server: Site) -> State:
            states.append(super().server_update(state, reply, server))
            return states[-1]

    found, changed = places()
    for some in ([], changed):
        audit("it", Kept(TASK, PRIVATE), TASK.first(0), found, some, "patient", rounds=2)
    first, second = states[1], states[3]
    assert all(torch.equal(first.params[n], second.params[n]) for n in first.params)
    assert not torch.equal(states[0].params["head.weight"], states[1].params["head.weight"])
