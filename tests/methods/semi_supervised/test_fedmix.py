"""FedMix: which masks may be learned, its weights in numpy, its limits, and images that help."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import merge
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.model_tree import load, params_of
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.example_pool import unlabeled
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.semi_supervised.fedmix import FedMix
from polyclinic.methods.semi_supervised.mixed_annotations import MixedSegmentation
from tests.conftest import Rows, segmentation_sites
from tests.support.agreement import MASK_KINDS, agree, mean, minibatches, place_of_masks, ready
from tests.support.few_labels import near, only_labels, run, same, with_other_targets, without_labels

TASK = Segmentation(Network("unet", (1, 16, 16), 2, (("width", 4), ("norm", "batch"))))
LOCAL = LocalTraining(epochs=1, batch_size=5, lr=0.05)


def logits(mask: Any, classes: Any = 2) -> Any:
    return torch.nn.functional.one_hot(mask, classes).movedim(-1, 1).float() * 5


def square(a: Any, b: Any, side: Any = 12) -> Any:
    mask = torch.zeros(side, side, dtype=torch.long)
    mask[a:b, a:b] = 1
    return mask


def dice(a: Any, b: Any) -> Any:
    a, b = a.numpy() > 0, b.numpy() > 0
    return 2 * (a & b).sum() / max((a.sum() + b.sum()), 1)


def test_masks_are_kept_where_the_networks_agree() -> None:
    one = torch.stack([square(2, 8), square(2, 8), square(0, 0), square(2, 8)])
    two = torch.stack([square(2, 8), square(3, 9), square(0, 0), square(0, 0)])
    mixed = MixedSegmentation(TASK, agree=0.9)
    y1, y2, kept = mixed.masks("unlabeled", logits(one), logits(two), torch.zeros(4))
    wanted = [dice(a, b) >= 0.9 and a.any() and b.any() for a, b in zip(one, two, strict=True)]
    assert kept.tolist() == [bool(w) for w in wanted] == [True, False, False, False]
    assert torch.equal(y1, one)
    assert torch.equal(y2, two)
    assert MixedSegmentation(TASK, agree=0.6).masks("unlabeled", logits(one), logits(two), one)[2].tolist() == [
        True,
        True,
        False,
        False,
    ]


def test_boxes_cut_masks_and_must_be_filled() -> None:
    one = torch.stack([square(2, 10), square(2, 10), square(4, 6)])
    box = torch.stack([square(2, 8), square(10, 12), square(2, 8)])
    y1, y2, kept = MixedSegmentation(TASK).masks("boxed", logits(one), logits(one), box)
    assert torch.equal(y1, one * box)
    assert torch.equal(y1, y2)
    filled = [dice(a * b, b) >= 0.5 and bool((a * b).any()) for a, b in zip(one, box, strict=True)]
    assert kept.tolist() == filled == [True, False, False]


def test_an_image_without_foreground_has_an_empty_mask_and_no_other() -> None:
    one = torch.stack([square(2, 8), square(0, 0)])
    for z in (logits(one), logits(one.flip(0))):
        y1, _, kept = MixedSegmentation(TASK).masks("tagged", logits(one), z, torch.tensor([0, 1]))
        assert kept.tolist() == [True, False]
        assert not bool(y1[0].any())


def test_weights_are_the_papers_in_numpy() -> None:
    """w_i = n_i / Σ n + λ loss_i^β / Σ loss^β, normalized (equations 3 to 5)."""
    sites, method = segmentation_sites(), FedMix(TASK, LOCAL, by_loss=10.0, power=1.5)
    sites = {name: only_labels(site) for name, site in sites.items()}
    state = method.init(TASK.first(0))
    first = {name: method.site_update(method.request(state), {}, site) for name, site in sites.items()}
    middle = method.server_update(state, merge(reply for reply, _ in first.values()), Site("server"))
    request = method.request(middle)
    assert (request.job, request.round) == ("weigh", 0)
    replies = {name: method.site_update(request, first[name][1], site)[0] for name, site in sites.items()}
    n = np.array([float(memory["own"]["used"]) for _, memory in first.values()])
    loss = np.array([float(memory["own"]["loss"]) for _, memory in first.values()])  # already to the power of β
    w = n / n.sum() + 10 * loss / loss.sum()
    assert [reply.mean("update").weight for reply in replies.values()] == pytest.approx(list(w), rel=1e-5)
    end = method.server_update(middle, merge(replies.values()), Site("server"))
    w = w / w.sum()
    changes = [memory["change"] for _, memory in first.values()]
    wanted = {k: state.twins[k] + sum(float(a) * c[k] for a, c in zip(w, changes, strict=True)) for k in state.twins}
    assert near(end.twins, wanted, 1e-5)
    assert method.request(end).job == "train"
    _, kept = method.site_update(request, first["site-0"][1], sites["site-0"])
    assert kept == {}


def test_with_masks_everywhere_and_no_weight_by_loss_the_first_network_is_fedavgs() -> None:
    sites = {name: only_labels(site) for name, site in segmentation_sites().items()}
    step, _ = run(FedMix(TASK, LOCAL, by_loss=0.0), sites, TASK.first(0), 1)
    plain, _ = run(FedAvg(TASK, LOCAL), sites, TASK.first(0), 1)
    assert (step.request.round, step.request.job) == (0, "weigh")
    assert near(step.state.params, plain.state.params, 1e-5)
    assert not near(tree.under("second", step.state.twins), plain.state.params, 1e-2)


def boxes(data: Any) -> Any:
    """Masks of the boxes around the masks."""
    found = torch.zeros_like(data.y)
    for mask, box in zip(data.y, found, strict=True):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        if len(rows):
            box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = 1
    return Rows(data.x, found)


def mixed_sites(sites: Any = None) -> Any:
    """One site with masks, one with boxes, one with images alone."""
    a, b, c = (sites or segmentation_sites()).values()
    return {
        "site-0": only_labels(a),
        "site-1": replace(b, data={"boxed": boxes(b.data["train"]), "val": b.data["val"], "test": b.data["test"]}),
        "site-2": without_labels(c),
    }


def test_masks_are_those_of_the_received_networks_in_evaluation_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in a round: written again from both networks, and what training sees is that and nothing else."""
    method, site = FedMix(TASK, replace(LOCAL, epochs=2), agree=0.2), mixed_sites()["site-2"]
    request = method.request(method.init(TASK.first(0)))
    twins, x = request.trees["twins"], site.data["unlabeled"].x
    with torch.no_grad():
        one, two = (load(TASK.model(), tree.under(part, twins)).eval()(x).argmax(1) for part in ("first", "second"))
    wanted = [i for i in range(len(x)) if dice(one[i], two[i]) >= 0.2 and one[i].any() and two[i].any()]
    assert len(wanted) > 0
    found = method.mixed.masked("unlabeled", twins, unlabeled(site.data))
    assert found.chosen.tolist() == wanted
    assert torch.equal(found.masks, torch.stack([one, two], 1)[wanted])
    seen, loss = [], Segmentation.loss

    def record(task: Any, model: Any, batch: Any) -> Any:
        seen.append(batch[1].clone())
        return loss(task, model, batch)

    monkeypatch.setattr(Segmentation, "loss", record)
    method.site_update(request, {}, site)
    first, second = ({m.numpy().tobytes() for m in masks} for masks in (one[wanted], two[wanted]))
    assert {
        m.numpy().tobytes() for masks in seen[1::2] for m in masks
    } == first  # the second network learns the first's
    assert {m.numpy().tobytes() for masks in seen[::2] for m in masks} == second


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.slow
def test_two_rounds_are_the_published_ones(kind: str) -> None:
    """Of sites with masks and without any: masks by both received networks, cross teaching, and weights by loss."""
    task, sites = place_of_masks(kind)
    trained = LocalTraining(epochs=8, batch_size=4, optimizer="adam", lr=0.03)  # so that masks are not empty
    starts = tuple(trained.fit(task, task.first(k), sites["site-1"], k) for k in (0, 1))
    sites = {"site-0": only_labels(sites["site-0"]), "site-2": without_labels(sites["site-2"])}
    x = sites["site-2"].data["unlabeled"].x
    with torch.no_grad():
        found = [load(task.model(), start).eval()(x).argmax(1) for start in starts]
    agreed = float(np.median([dice(a, b) for a, b in zip(*found, strict=True)])) - 1e-3  # half of the images agree
    method = FedMix(task, LOCAL, agree=agreed)
    both = {**tree.prefixed("first", starts[0]), **tree.prefixed("second", starts[1])}
    state = method.init(starts[0])._replace(twins=both)
    for step in train(method, InProcess(method, sites), state, rounds=2):
        assert not step.lost

    twins, learned = starts, 0
    for round in range(2):
        ends, numbers, losses = [], [], []
        for name, site in sites.items():
            if name == "site-0":
                data = Rows(site.data["train"].x, torch.stack([site.data["train"].y] * 2, 1))
            else:
                with torch.no_grad():
                    one, two = (load(task.model(), twin).eval()(x).argmax(1) for twin in twins)
                fine = [i for i in range(len(x)) if one[i].any() and two[i].any() and dice(one[i], two[i]) >= agreed]
                learned += len(fine)
                data = Rows(x[fine], torch.stack([one, two], 1)[fine])
            first, second = (ready(task, twin) for twin in twins)
            optimizer, seen = torch.optim.SGD([*first.parameters(), *second.parameters()], LOCAL.lr), []
            for images, masks in minibatches(LOCAL, site, round, data=data):
                loss = task.loss(first, (images, masks[:, 1])) + task.loss(second, (images, masks[:, 0]))
                seen.append((len(images), float(loss.detach())))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            ends.append((params_of(first), params_of(second)))
            numbers.append(sum(n for n, _ in seen))
            losses.append((sum(n * loss for n, loss in seen) / max(sum(n for n, _ in seen), 1)) ** 1.5)
        weights = [n / sum(numbers) + 10 * loss / sum(losses) for n, loss in zip(numbers, losses, strict=True)]
        twins = tuple(mean([end[k] for end in ends], weights) for k in (0, 1))
    for part, twin in zip(("first", "second"), twins, strict=True):
        agree(tree.under(part, step.state.twins), twin)
    assert 2 <= learned < 2 * len(x)


def test_hidden_masks_are_never_used() -> None:
    quick, sites = FedMix(TASK, LOCAL, agree=0.0), mixed_sites()
    one, two = (run(quick, s, TASK.first(0), 1)[0].state.twins for s in (sites, with_other_targets(sites)))
    assert same(one, two)


@pytest.mark.slow
def test_it_learns_from_every_kind_of_annotation() -> None:
    local = LocalTraining(epochs=4, batch_size=5, lr=0.01, optimizer="adam")
    method = Evaluated(FedMix(TASK, local, agree=0.7), TASK)
    step, engine = run(method, mixed_sites(), TASK.first(0), 5)
    scores = evaluate(method, engine, step.state, engine.sites)
    assert np.mean([float(s["dice"]) for s in scores.values()]) > 0.7
