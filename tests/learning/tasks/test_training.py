"""Training is pure: the same start, data and dice give the same bits, and what bends it does what it says."""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch

from polyclinic.core import tree
from polyclinic.core.site import Site
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification, MultiLabel, auc
from polyclinic.learning.tasks.regression import Regression
from polyclinic.learning.tasks.segmentation import IGNORED, Segmentation, agreement
from polyclinic.learning.tasks.task_evaluation import outputs
from polyclinic.learning.training.local import LocalTraining, Proximal
from polyclinic.testing import close, equal
from tests.conftest import Rows, little_sites, segmentation_sites
from tests.support.known import known

DROPOUT = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2), ("dropout", 0.5))))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_training_repeats_to_the_bit_and_leaves_the_global_dice_alone(
    optimizer: Literal["sgd", "adam", "adamw"],
) -> None:
    site, local = little_sites()["site-0"], LocalTraining(epochs=2, batch_size=4, optimizer=optimizer, lr=0.01)
    start = DROPOUT.first(0)
    kept = tree.copy(start)
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    end = local.fit(DROPOUT, start, site, 0)
    assert torch.equal(torch.randn(3), expected)
    torch.manual_seed(99)
    assert equal(end, local.fit(DROPOUT, start, site, 0))
    assert not equal(end, local.fit(DROPOUT, start, site, 1))
    assert not equal(end, local.fit(DROPOUT, start, replace(site, name="other"), 0))
    assert equal(start, kept)


def test_one_step_is_plain_gradient_descent(task: Classification) -> None:
    site = little_sites()["site-0"]
    data = site.data["train"]
    end = LocalTraining(epochs=1, batch_size=len(data), lr=0.1).fit(task, task.first(0), site, 0)
    model = task.model()
    from polyclinic.learning.networks.model_tree import load

    load(model, task.first(0)).train()
    order = torch.randperm(len(data), generator=site.rng(0, "train", "train", ""))
    loss = task.loss(model, data[order])
    loss.backward()
    for name, p in model.named_parameters():
        assert torch.allclose(end[name], p.detach() - 0.1 * known(p.grad), atol=1e-6)


def test_a_batch_of_one_is_left_out_where_there_are_others() -> None:
    local = LocalTraining(batch_size=4)
    sizes = [len(batch[1]) for batch in local.batches(Rows(torch.zeros(9, 2), torch.zeros(9)), torch.Generator())]
    assert sizes == [4, 4]
    assert local.count(range(9)) == 2
    assert local.count(range(1)) == 1
    assert local.count(range(8)) == 2
    assert [LocalTraining(batch_size=4, steps=5).count(range(n)) for n in (1, 9, 100)] == [5, 5, 5]


def test_what_bends_training(task: Classification) -> None:
    site, start = little_sites()["site-1"], task.first(0)
    local = LocalTraining(epochs=2, batch_size=8, lr=0.1)
    free = local.fit(task, start, site, 0)
    trainable = {name for name, _ in task.model().named_parameters()}
    held = local.with_penalty(Proximal(5.0)).fit(task, start, site, 0)
    moved = [tree.norm(tree.select(tree.sub(end, start), trainable.__contains__)) for end in (free, held)]
    assert moved[1] < 0.5 * moved[0]
    assert equal(free, local.with_penalty(Proximal(0.0)).fit(task, start, site, 0))
    still = local.fit(task, start, site, 0, gradient_hook=lambda name, g: torch.zeros_like(g))
    assert equal(tree.select(still, trainable.__contains__), tree.select(start, trainable.__contains__))
    heads = local.fit(task, start, site, 0, trainable=lambda name: name.startswith("head."))
    changed = {name for name in trainable if not torch.equal(heads[name], start[name])}
    assert changed == {"head.weight", "head.bias"}
    clipped = replace(local, steps=1, clip_norm=1e-3).fit(task, start, site, 0)
    step = tree.norm(tree.select(tree.sub(clipped, start), trainable.__contains__))
    assert np.isclose(step, 0.1 * 1e-3, rtol=1e-3)


def test_the_rate_rises_over_the_warm_up_and_falls_along_a_cosine_but_never_to_nothing() -> None:
    plain = LocalTraining(lr=0.2)
    assert [plain.rate(r) for r in (0, 7)] == [0.2, 0.2]
    rising = replace(plain, warmup_rounds=3)
    assert [rising.rate(r) for r in range(5)] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2])
    falling = replace(plain, cosine_rounds=4)
    assert falling.rate(0) == 0.2
    assert falling.rate(2) == pytest.approx(0.1)
    assert falling.rate(100) == falling.rate(3) > 0


def test_decay_multiplies_the_step(task: Classification) -> None:
    data = Rows(torch.ones(4, 1, 8, 8), torch.tensor([0, 1, 0, 1]))
    site = Site("s", {"train": data})
    local = LocalTraining(steps=1, batch_size=4, lr=0.1, lr_decay=0.5)
    steps = [tree.sub(local.fit(task, task.first(0), site, r), task.first(0))["head.bias"] for r in (0, 1)]
    assert torch.allclose(steps[1], 0.5 * steps[0])


def test_models_of_one_task_live_side_by_side_in_slots(task: Classification) -> None:
    a, b = cached_model(task, task.first(0)), cached_model(task, task.first(1), slot="teacher")
    assert a is not b
    assert cached_model(task, task.first(2)) is a


@pytest.mark.parametrize("n", [2, 7, 60])
def test_auc_is_that_of_a_second_library(n: int) -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(n)
    truth = np.r_[0, 1, rng.integers(0, 2, n)]
    score = np.round(rng.random(n + 2), 1)  # many ties
    assert np.isclose(known(auc(torch.tensor(score), torch.tensor(truth))), roc_auc_score(truth, score))
    assert auc(torch.tensor(score), torch.zeros(n + 2)) is None


def test_summaries_leave_out_what_is_undefined() -> None:
    task = Classification(Network("mlp", (3,), 2))
    one_class = {"score": torch.tensor([[0.3, 0.7], [0.6, 0.4]]), "target": torch.tensor([1, 1])}
    assert "auc" not in task.summary(one_class)
    assert task.summary(one_class)["accuracy"] == 0.5
    labels = MultiLabel(Network("mlp", (3,), 2))
    found = labels.summary(
        {"score": torch.tensor([[0.9, 0.2], [0.1, 0.3]]), "target": torch.tensor([[1.0, 0], [0, float("nan")]])}
    )
    assert found["auc"] == 1.0
    ages = Regression(Network("mlp", (3,), 1), center=50, spread=10)
    assert "r2" not in ages.summary({"score": torch.tensor([[3.0]]), "target": torch.tensor([[4.0]])})


def test_regression_learns_in_its_own_unit() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(80, 3, generator=rng)
    site = Site("s", {"train": Rows(x, 60 + 10 * x[:, :1])})
    task = Regression(Network("mlp", (3,), 1), center=60, spread=10)
    end = LocalTraining(epochs=60, lr=0.1).fit(task, task.first(0), site, 0)
    assert task.summary(outputs(task, end, site.data["train"]))["r2"] > 0.9


def test_segmentation_learns_discs() -> None:
    site = segmentation_sites()["site-2"]
    task = Segmentation(Network("unet", (1, 16, 16), 2, (("width", 4), ("norm", "batch"))))
    end = LocalTraining(epochs=15, batch_size=4, optimizer="adam", lr=0.01).fit(task, task.first(0), site, 0)
    found = outputs(task, end, site.data["test"], full_metrics=True)
    assert found["dice"].mean() > 0.8
    usual = {"dice", "empty", "absent", "hd95_px", "volume_error", "volume_px", "blank", "patient"}
    assert set(found) == usual | {
        "overlap",
        "predicted",
        "reference",
        "sliced",
    }  # each example is a patient's only slice
    windows = replace(task, window=(16, 16))
    assert close(outputs(windows, end, site.data["test"])["dice"], found["dice"])


def test_empty_masks_are_decided_not_averaged_away() -> None:
    full, none = torch.zeros(1, 6, 8, dtype=torch.long), torch.zeros(1, 6, 8, dtype=torch.long)
    full[0, 2:4, 3:6] = 1
    diagonal = (6**2 * 2.0**2 + 8**2 * 0.5**2) ** 0.5
    spacing = (2.0, 0.5)
    cases = {
        "same": (full, full, 1.0, 0.0, 1.0, False),
        "both empty": (none, none, 1.0, 0.0, 1.0, False),
        "prediction empty": (none, full, 0.0, diagonal, 0.0, True),
        "truth empty": (full, none, 0.0, diagonal, 0.0, False),
    }
    for name, (p, t, rng, hd95, nsd, empty) in cases.items():
        found = agreement(p, t, 2, spacing, 1.0, full_metrics=True)
        assert found["dice"].item() == rng, name
        assert np.isclose(found["hd95"].item(), hd95), name
        assert found["nsd"].item() == nsd, name
        assert found["empty"].item() is empty, name


def test_absent_classes_do_not_raise_the_mean() -> None:
    """Of five classes one occurs: the Dice is that class's, not 0.8 and more for the four that are nowhere."""
    task = Segmentation(Network("unet", (1, 8, 8), 6, (("width", 4),)))
    truth, predicted = torch.zeros(2, 8, 8, dtype=torch.long), torch.zeros(2, 8, 8, dtype=torch.long)
    truth[:, 2:6], predicted[:, 2:4] = 1, 1
    found = agreement(predicted, truth, 6, None, 1.0, full_metrics=True)
    assert found["absent"].sum() == 2 * 4
    summary = task.summary(found)
    assert summary["dice"] == pytest.approx(2 * 16 / (16 + 32))
    assert summary["loss"] == pytest.approx(1 - summary["dice"])
    assert summary["volume_error"] == pytest.approx(0.5)
    nothing = torch.zeros(2, 8, 8, dtype=torch.long)
    assert task.summary(agreement(nothing, nothing, 6)) == {"empty": 0.0}


def test_pixels_without_annotation_count_in_neither_loss_nor_metrics() -> None:
    from monai.losses import DiceCELoss

    rng = torch.Generator().manual_seed(0)
    task = Segmentation(Network("unet", (1, 8, 8), 3, (("width", 4),)))
    truth = torch.randint(0, 3, (2, 8, 8), generator=rng)
    partly = truth.clone()
    partly[:, :4] = IGNORED
    scores = torch.randn(2, 3, 8, 8, generator=rng)
    other = scores.clone()
    other[:, :, :4] = torch.randn(2, 3, 4, 8, generator=rng)

    class Fixed(torch.nn.Module):
        def __init__(self, output: torch.Tensor) -> None:
            super().__init__()
            self.output = output

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.output

    losses = [float(task.loss(Fixed(s), (torch.zeros(2, 1, 8, 8), partly))) for s in (scores, other)]
    assert losses[0] == losses[1]
    kept = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)(scores[:, :, 4:], truth[:, None, 4:])
    assert losses[0] == pytest.approx(float(kept), rel=1e-5)
    assert float(task.loss(Fixed(scores), (torch.zeros(2, 1, 8, 8), torch.full_like(truth, IGNORED)))) == 0
    a, b = (agreement(s.argmax(1), partly, 3) for s in (scores, other))
    assert torch.equal(a["dice"], b["dice"])
    assert torch.allclose(a["dice"], agreement(scores[:, :, 4:].argmax(1), truth[:, 4:], 3)["dice"])


def test_distances_are_in_millimeters_and_monais() -> None:
    from monai.metrics import compute_hausdorff_distance

    rng = torch.Generator().manual_seed(1)
    blob = torch.nn.functional.avg_pool2d(torch.rand(2, 1, 40, 40, generator=rng), 9, 1, 4)[:, 0]
    p, t = (blob > 0.5).long(), (blob > 0.52).long()
    ours = agreement(p, t, 2, (0.5, 2.0), full_metrics=True)["hd95"]
    theirs = compute_hausdorff_distance(
        p[:, None].float(), t[:, None].float(), include_background=True, percentile=95, spacing=(0.5, 2.0)
    )
    assert torch.allclose(ours.double(), theirs.double(), atol=1e-5)


def test_whose_example_it_is_stays_with_the_outputs(task: Classification) -> None:
    data = little_sites()["site-0"].data["test"]
    data.patients = [f"p{i // 3}" for i in range(len(data))]
    found = outputs(task, task.first(0), data, size=5)
    assert found["patient"].tolist() == [i // 3 for i in range(len(data))]
    assert found["score"].shape == (len(data), 2)


@pytest.mark.parametrize("kind", ["classification", "regression", "multilabel"])
def test_a_model_that_has_diverged_is_taken_for_one_that_guesses(kind: str) -> None:
    """What is no number becomes a guess, and is marked; all else is as it was."""
    network = Network("mlp", (2,), 3, (("depth", 0), ("width", 2)))
    task = {
        "classification": Classification(network),
        "multilabel": MultiLabel(network),
        "regression": Regression(network, center=7.0),
    }[kind]
    x, y = torch.ones(6, 2), torch.arange(6) % 3 if kind == "classification" else torch.zeros(6, 3)
    whole = outputs(task, task.first(0), Rows(x, y))
    assert "silent" not in whole
    x[4] = torch.inf
    said = outputs(task, task.first(0), Rows(x, y))
    assert said["silent"].tolist() == [0, 0, 0, 0, 1, 0]
    assert said["score"][4].tolist() == pytest.approx([{"classification": 1 / 3, "multilabel": 0.5}.get(kind, 7.0)] * 3)
    assert torch.equal(whole["score"][:4], said["score"][:4])
