"""What a site that never trained predicts with: no method gives it a part that was never trained."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from polyclinic.compression.downlink import received_through
from polyclinic.compression.quantization import BFloat16
from polyclinic.compression.topk import TopK
from polyclinic.core.method import Method
from polyclinic.core.pipeline import send_through
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.batch_statistics import batches, recomputed
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate, outputs
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.catalog import FEDAVG, METHODS, NOTHING, RECOMPUTED
from polyclinic.methods.registry import Setting, build
from polyclinic.testing import equal
from tests.conftest import blobs, little_sites
from tests.laws.test_methods import FEW_STEPS, LOCAL, case, held_by_server
from tests.methods.test_features_of_networks import NETWORKS as OF_ALL_KINDS

CONSTANT = {"front", "routed", "use", "site", "gate", "calibrate", "prototypes", "norm_cross_attn"}
"""Leaves that are not trained: switches, settings, Fed-MoE's gate between two equal models, LC-Fed's calibration, which
an unseen site does not use, FedETF's prototypes, and layers of a transformer for attention to another one's tokens."""
FIXED = {"fedbabu": ("head.", "classification_head.")}
"""Leaves that the method trains at no site before the last evaluation."""
PRIVATE = (
    "fedbn",
    "fedper",
    "lg-fedavg",
    "fedrep",
    "fedmri",
    "private-heads",
    "site-graph",
    "fmtl",
    "pfa",
    "prr-fl",
    "fedproto",
)


def classifies(name: str) -> bool:
    return not METHODS[name].tasks or "classification" in METHODS[name].tasks


HAVE = [name for name, entry in METHODS.items() if entry.newcomers and name not in ("pooled", "histofl", "frozen")]


def trained(method: Method[Any], sites: dict[str, Site], params: Tree, rounds: int = 2) -> Any:
    engine, state = InProcess(method, sites, server_data=held_by_server(sites)), method.init(params)
    for step in train(method, engine, state, rounds=rounds):
        state = step.state
    return state, engine


def newcomer(sites: dict[str, Site]) -> Site:
    """A site with test data of the same shape, and nothing to train on."""
    return Site("elsewhere", {"test": sites["site-1"].data["test"]})


SAME = {
    "fedavg": {
        "ditto": "its unseen site gets FedAvg's model",
        "fine-tuned": "its unseen site gets the model before fine-tuning",
        "fednorm": "all sites have one modality",
        "swarm": "it differs in who merges",
        "fedsm": "its selector is sure of no training site",
        "dynamic-fusion": "every site improved, and sent its model",
        "fedsoup": "no site gained by a global model in its soup",
        "fedntd": "of two classes one is not the true one, so that there is nothing to distill",
        "rolora": "without adapters, which studies must have",
        "ffa-lora": "likewise",
        "flexlora": "likewise",
        "flora": "likewise",
    },
    "fedavg-recomputed": {"silobn": "both recompute the statistics"},
    "balanced-softmax": {"fedrod": "its shared head is trained with this loss; the private one stays at the sites"},
    "multi-krum": {"centered-clipping": "of three honest sites all are kept, and none is clipped"},
    "bulyan": {"trimmed-mean": "of three sites both keep the middle"},
    "cfl": {"fedbuff": "the plain mean of all sites, before any cluster is divided"},
    "split": {"u-split": "they differ in who holds the last layer"},
}
"""Methods with the same model for an unseen site on these data, and why."""


WITHOUT_STATISTICS = {
    **{name: others for name, others in SAME.items() if name not in ("fedavg", "fedavg-recomputed")},
    "fedavg": {
        **SAME["fedavg"],
        "fedavg-recomputed": "there is nothing to recompute",
        "silobn": "likewise",
        "apfl": "its shared model",
    },
}
"""The same for networks without batch normalization."""
NETWORKS = {
    "batch": None,
    "group": Network("cnn", (1, 8, 8), 2, (("width", 8), ("depth", 2), ("norm", "group"))),
    "vit": OF_ALL_KINDS["vit"][0],
    "batch, 3-D": OF_ALL_KINDS["cnn, batch, 3-D"][0],
    "group, 3-D": OF_ALL_KINDS["cnn, group, 3-D"][0],
    "vit, 3-D": OF_ALL_KINDS["vit, 3-D"][0],
}
"""Networks of the property test; None for that of the contract tests, which has batch normalization."""


def planned(name: str, rounds: int, kind: str = "batch") -> tuple[Method[Any], Task, dict[str, Site]]:
    """Return ``case(name)`` with the number of rounds that the study plans, and a network of the given kind."""
    _, task, sites = case(name)
    if network := NETWORKS[kind]:
        task, sites = task.with_network(network), little_sites(network.inputs)
    return build(name, Setting(task, LOCAL, tuple(sites), rounds), FEW_STEPS.get(name)), task, sites


def newcomers_model(name: str, rounds: int, kind: str = "batch") -> tuple[list[str], bytes]:
    """Train, and return what of a newcomer's model was never trained, and its scores, as bytes.

    Every parameter and statistic must differ from its initial value, which no training would change.
    """
    method, task, sites = planned(name, rounds, kind)
    params, site = task.first(), newcomer(sites)
    begun = method.site_model(method.evaluation_request(method.init(params)).for_site(site.name), {})
    state, _ = trained(method, sites, params, rounds)
    found = method.adapted_model(method.evaluation_request(state).for_site(site.name), {}, site, "test")
    same = [n for n in found if n in begun and torch.equal(found[n], begun[n])]
    unchanged = [n for n in same if not set(n.split(".")) & CONSTANT and not n.endswith("conv.bias")]  # has no effect
    unchanged = [n for n in unchanged if not n.startswith(FIXED.get(name, "-"))]
    scores = outputs(method.prediction_task or task, found, site.data["test"]).get("score", torch.zeros(0))
    return unchanged, scores.numpy().tobytes()


def rounds_of(name: str) -> int:
    return 5 if METHODS[name].unlabeled else 2  # after a warm-up or pretraining


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "fedvss" else pytest.mark.slow) for n in HAVE if not classifies(n)]
)
def test_no_part_is_untrained(name: str) -> None:
    assert newcomers_model(name, rounds_of(name))[0] == []


# One of each way to a model for an unseen site.
QUICK = {
    *("fedavg", "fedavg-recomputed", "silobn", "ditto", "swarm", "apfl", "moon", "fed-moe", "ifca", "fedsm", "krum"),
    *("feddf", "fedbabu", "combat", "split", "u-split", "fedmoco", "data-vectors", "scaffold"),
} & set(HAVE)


def test_every_method_is_covered() -> None:
    """A method without a model for an unseen site says so, and all others are in the tests of this module."""
    left_out = METHODS.keys() - set(HAVE) - {n for n, entry in METHODS.items() if entry.unseen == NOTHING}
    assert left_out == {"pooled", "histofl", "frozen"}  # one place, bags of images, and a model that no one trains


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        pytest.param(QUICK, "batch", id="some"),
        pytest.param({n for n in HAVE if classifies(n)}, "batch", id="all", marks=pytest.mark.slow),
        pytest.param(QUICK, "group", id="some, group", marks=pytest.mark.slow),
        pytest.param(QUICK - {"split", "u-split"}, "vit", id="some, vit", marks=pytest.mark.slow),  # layers in a row
        pytest.param(QUICK, "batch, 3-D", id="some, batch, 3-D", marks=pytest.mark.slow),
        pytest.param(QUICK, "group, 3-D", id="some, group, 3-D", marks=pytest.mark.slow),
        pytest.param(QUICK - {"split", "u-split"}, "vit, 3-D", id="some, vit, 3-D", marks=pytest.mark.slow),
    ],
)
def test_no_part_is_untrained_and_no_two_methods_share_all_digits(names: set[str], kind: str) -> None:
    """Methods for classification, on the same data. FedAvg is also compared with methods of five rounds."""
    untrained: dict[str, list[str]] = {}
    digests: dict[bytes, set[str]] = {}
    for name, rounds in [*((n, rounds_of(n)) for n in HAVE if n in names), ("fedavg", 5)]:
        unchanged, scores = newcomers_model(name, rounds, kind)
        untrained |= {name: unchanged} if unchanged else {}
        digests.setdefault(scores, set()).add(name)
    assert not untrained
    shared = [found for found in digests.values() if len(found) > 1]
    same = dict(SAME if kind.startswith("batch") else WITHOUT_STATISTICS)
    if kind == "batch, 3-D":
        same["fedavg"] = {
            **same["fedavg"],
            "apfl": "its shared model; the other network has dropout, of which it draws more",
        }
    if kind == "vit":
        same["fedavg"] = {**same["fedavg"], "ifca": "all sites choose one of the two models"}
    expected = [{name, *others} & names for name, others in same.items()]
    assert sorted(map(sorted, shared)) == sorted(sorted(found) for found in expected if len(found) > 1)
    assert METHODS["ditto"].unseen == FEDAVG
    assert METHODS["silobn"].unseen == METHODS["fedavg-recomputed"].unseen == RECOMPUTED


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 8, 8, 8)])
def test_recomputed_statistics_are_those_of_the_inputs(shape: tuple[int, ...]) -> None:
    """Against the mean and variance of what enters each layer, in one batch of all inputs."""
    task = Classification(Network("cnn", shape, 2, (("width", 4), ("depth", 2))))
    data, params = blobs(5, 20, shape, 2.0), task.first()
    found = recomputed(task, params, data)
    model = task.model()
    model.load_state_dict(params, strict=False)
    h = data.x
    axes = [0, *range(2, h.ndim)]
    for name, layer in model.get_submodule("encoder").named_children():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d):
            mean, var = h.mean(axes), h.var(axes)
            torch.testing.assert_close(found[f"encoder.{name}.running_mean"], mean, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found[f"encoder.{name}.running_var"], var, atol=1e-5, rtol=1e-5)
            biased = h.var(axes, correction=0)
            h = (h - mean.view(1, -1, *[1] * (h.ndim - 2))) / (biased.view(1, -1, *[1] * (h.ndim - 2)) + 1e-5).sqrt()
        else:
            h = layer(h)
    unchanged = [name for name in params if "running" not in name]
    assert equal({name: found[name] for name in unchanged}, {name: params[name] for name in unchanged})


@pytest.mark.parametrize("kind", ["cnn, batch", "cnn, batch, 3-D", "cnn, group", "vit, 3-D"])
def test_recomputed_statistics_of_several_batches_are_pytorchs(kind: str) -> None:
    """Against ``torch.optim.swa_utils.update_bn``, which averages over batches; nothing changes without statistics."""
    network = OF_ALL_KINDS[kind][0]
    task, data = Classification(network), blobs(5, 192, network.inputs, 2.0)
    found, model = recomputed(task, task.first(), data), task.model()
    model.load_state_dict(task.first(), strict=False)
    update_bn(data.x.split(64), model)
    wanted = {name: leaf for name, leaf in model.state_dict().items() if name in found}
    for name, leaf in wanted.items():
        torch.testing.assert_close(found[name], leaf, atol=1e-5, rtol=1e-5)
    assert equal(found, task.first()) == ("batch" not in kind)


def test_batches_have_at_least_two_examples() -> None:
    assert [len(chunk) for chunk in batches(33, 16)] == [16, 17]
    assert [len(chunk) for chunk in batches(34, 16)] == [16, 16, 2]
    assert [len(chunk) for chunk in batches(1, 16)] == [1]


@pytest.mark.parametrize("name", ["silobn", "fedavg-recomputed"])
def test_evaluation_recomputes_at_an_unseen_site_only(name: str) -> None:
    sites = little_sites()
    task = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2))))
    method = Evaluated(build(name, Setting(task, LocalTraining(batch_size=8), tuple(sites), 3)), task)
    site = newcomer(sites)
    state, engine = trained(method, sites, task.first())
    request = method.evaluation_request(state)
    params = method.site_model(request, {})
    engine = InProcess(method, {**sites, "elsewhere": site})
    found = evaluate(method, engine, state, ["elsewhere"], "predict/test")["elsewhere"]["score"]
    recalculated = recomputed(task, params, site.data["test"])
    torch.testing.assert_close(found, outputs(task, recalculated, site.data["test"])["score"])
    assert not equal(recalculated, params)
    memory = {"own": {n: leaf for n, leaf in params.items() if "running" in n}} if name == "silobn" else {}
    assert equal(method.adapted_model(request, memory, sites["site-0"], "test"), method.site_model(request, memory))


def test_methods_with_private_layers_have_no_model_for_an_unseen_site() -> None:
    for name in PRIVATE:
        assert METHODS[name].unseen == "nothing"
        assert not METHODS[name].newcomers


@pytest.mark.parametrize("name", [*PRIVATE, "silobn", "local", "cross"])
def test_the_model_in_a_file_has_no_untrained_leaf(name: str) -> None:
    """Of the leaves that each site keeps, the server has only initial values: they are in no file."""
    method, task, sites = case(name)
    state, engine = trained(method, sites, task.first())
    first = method.site_model(method.evaluation_request(method.init(task.first())), {})
    shared, own = (
        method.shared_model(state),
        method.site_model(method.evaluation_request(state), engine.memory["site-0"]),
    )
    assert [n for n in shared if torch.equal(shared[n], first[n])] == []
    assert {n for n in own if method.kept_at_sites(n)} == own.keys() - shared.keys() != set()


def test_wrappers_pass_on_what_stays_at_the_sites() -> None:
    method, task, sites = case("fedbn")
    state, _ = trained(method, sites, task.first())
    layers = Evaluated(received_through(send_through(method, TopK(0.5)), task.first(), BFloat16()), task)
    assert layers.shared_model(layers.init(task.first())).keys() == method.shared_model(state).keys()
    plain, task, sites = case("fedavg")
    state, _ = trained(plain, sites, task.first())
    assert equal(plain.shared_model(state), state.params)
