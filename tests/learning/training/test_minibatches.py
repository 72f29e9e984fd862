"""Samples drawn one by one: the same bits with any number of threads, balanced sampling, and what DP-SGD refuses."""

import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from polyclinic.core.site import Compute, Site
from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.training.dp_sgd import DPSGD
from polyclinic.learning.training.image_augmentation import RECIPES
from polyclinic.learning.training.local import LocalTraining
from polyclinic.learning.training.minibatches import AHEAD, Sampler, drawn, weights
from tests.conftest import Rows, blobs

SIZE = (16, 16)


class Volumes:
    """Images of unequal size with random patches, as data on disk are."""

    patch = SIZE

    def __init__(self, count: int = 7, seed: int = 0, slow: bool = False) -> None:
        g = torch.Generator().manual_seed(seed)
        self.images = [torch.randn(1, 20 + 2 * i, 24, generator=g) for i in range(count)]
        self.masks = [(image[0] > 1).long() for image in self.images]
        self.slow, self.forced, self.names = slow, list[bool](), set[str]()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The central patches."""
        low = [((x.shape[1] - 16) // 2, 4) for x in self.images]
        picks = [(i, *low[i]) for i in index.tolist()]
        x = torch.stack([self.images[i][:, a : a + 16, b : b + 16] for i, a, b in picks])
        return x, torch.stack([self.masks[i][a : a + 16, b : b + 16] for i, a, b in picks])

    def draw(self, i: int, rng: torch.Generator, forced: bool, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        self.forced.append(forced)
        self.names.add(threading.current_thread().name)
        if self.slow:
            time.sleep(0.002 * (i % 3))
        spots = self.masks[i].nonzero() if forced else torch.tensor([list(self.masks[i].shape)]) // 2
        spot = spots[int(torch.randint(len(spots), (), generator=rng))]
        x, y = self.images[i], self.masks[i]
        pad = [side for n in reversed(size) for side in (n, n)]
        x, y = torch.nn.functional.pad(x, pad), torch.nn.functional.pad(y, pad)
        low = [int(s) + n - n // 2 for s, n in zip(spot, size, strict=True)]
        box = tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))
        return x[(slice(None), *box)].clone(), y[box].clone()


TASK = Segmentation(Network("unet", (1, *SIZE), 2, (("width", 8), ("norm", "group"), ("dropout", 0.1))))
LOCAL = LocalTraining(epochs=2, batch_size=3, lr=0.05, augmentation=RECIPES["nnunet"], foreground=0.5)


def trained(local: LocalTraining, threads: int, data: object, task: Classification | Segmentation = TASK) -> Tree:
    site = Site("lyon", {"train": data}, compute=Compute(threads))
    return local.fit(task, task.first(0), site, 2)


def test_the_bits_are_those_of_no_threads_with_one_or_four() -> None:
    """Slow and fast samples, so that threads finish out of order; and dropout, which uses the global generator."""
    ends = [trained(LOCAL, threads, Volumes(slow=threads > 0)) for threads in (0, 1, 4)]
    assert all(torch.equal(ends[0][name], end[name]) for end in ends[1:] for name in ends[0])
    other = replace(LOCAL, foreground=0.0)
    assert any(not torch.equal(ends[0][name], leaf) for name, leaf in trained(other, 0, Volumes()).items())


def test_a_method_that_draws_between_minibatches_gets_the_same_bits() -> None:
    def batches(threads: int) -> list[Tensor]:
        rng = torch.Generator().manual_seed(1)
        stream = LOCAL.batches(Volumes(), rng, "cpu", Compute(threads))
        return [leaf for x, y in stream for leaf in (x, y.float(), torch.rand(3, generator=rng))]

    assert all(torch.equal(a, b) for a, b in zip(batches(0), batches(3), strict=True))


def test_threads_work_ahead_by_two_minibatches_and_end_with_the_iteration() -> None:
    data = Volumes(12)
    chunks = iter([([i], [i]) for i in range(12)])
    stream = drawn(Sampler(data), chunks, 2)
    next(stream)
    time.sleep(0.05)
    assert len(data.forced) == 1 + AHEAD
    assert all(name.startswith("samples") for name in data.names)
    stream.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("samples")]


def test_an_error_in_a_thread_is_raised() -> None:
    class Broken(Volumes):
        def draw(self, i: int, rng: torch.Generator, forced: bool, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
            raise OSError("the file is truncated")

    with pytest.raises(OSError, match="truncated"):
        trained(LOCAL, 2, Broken())
    assert not [t for t in threading.enumerate() if t.name.startswith("samples")]


def test_foreground_is_drawn_for_each_sample() -> None:
    data = Volumes(40)
    list(replace(LOCAL, epochs=25, foreground=0.33).batches(data, torch.Generator().manual_seed(0)))
    assert 0.28 < sum(data.forced) / len(data.forced) < 0.38
    data = Volumes(10)
    list(replace(LOCAL, foreground=1.0, augmentation=None).batches(data, torch.Generator().manual_seed(0)))
    assert all(data.forced)


def test_augmentation_without_changes_is_no_augmentation_but_for_the_order() -> None:
    """And images held in memory are augmented one by one, without being changed themselves."""
    data = blobs(0, 13, (1, 9, 7))
    kept = data.x.clone()
    plain = LocalTraining(batch_size=4)
    still = list(replace(plain, augmentation=RECIPES["none"]).batches(data, torch.Generator().manual_seed(0)))
    sums = [round(float(row.sum()), 4) for x, _ in still for row in x]
    assert len(set(sums)) == 12  # the last minibatch of one example is left out
    assert set(sums) <= {round(float(row.sum()), 4) for row in kept}
    list(replace(plain, augmentation=RECIPES["nnunet"], epochs=3).batches(data, torch.Generator().manual_seed(0)))
    assert torch.equal(data.x, kept)


def test_studies_without_new_keys_draw_what_they_drew() -> None:
    """The order of examples is that of a permutation from the given generator, and nothing else is drawn."""
    data, g = blobs(0, 10, (1, 4, 4)), torch.Generator().manual_seed(5)
    found = torch.cat([y for _, y in LocalTraining(batch_size=4, epochs=2).batches(data, g)])
    again = torch.Generator().manual_seed(5)
    orders = [torch.randperm(10, generator=again) for _ in range(2)]
    assert torch.equal(found, data.y[torch.cat(orders)])
    assert torch.equal(torch.rand(1, generator=g), torch.rand(1, generator=again))


class Known(Rows):
    """Rows with classes and patients."""

    def __init__(self, classes: list[int], patients: list[str]) -> None:
        super().__init__(torch.arange(len(classes)).float()[:, None], torch.tensor(classes))
        self.targets, self.patients = self.y, tuple(patients)


def test_classes_and_patients_are_balanced() -> None:
    data = Known([0] * 90 + [1] * 10, ["a"] * 60 + [f"b{i}" for i in range(40)])
    assert torch.allclose(weights(data, 0.0, False), torch.ones(100, dtype=torch.float64))

    def share(**options: float) -> float:
        local = LocalTraining(batch_size=10, epochs=60, **options)  # type: ignore[arg-type]
        drawn = torch.cat([y for _, y in local.batches(data, torch.Generator().manual_seed(0))])
        return float(drawn.float().mean())

    assert share() == pytest.approx(0.1)
    assert abs(share(balance=1.0) - 0.5) < 0.03
    assert abs(share(balance=0.5) - 10**0.5 / (10**0.5 + 90**0.5)) < 0.03  # n^-1/2 an example: sqrt(n) a class
    local = LocalTraining(batch_size=10, epochs=60, balance_patients=True)
    who = Counter(data.patients[int(i)] for x, _ in local.batches(data, torch.Generator().manual_seed(0)) for i in x)
    assert abs(who["a"] / sum(who.values()) - 1 / 41) < 0.01
    both = weights(data, 1.0, True)
    assert torch.allclose(both[:90].sum(), both[90:].sum())


def test_what_cannot_be_balanced_is_refused() -> None:
    masks = Rows(torch.zeros(4, 1, 3, 3), torch.zeros(4, 3, 3).long())
    with pytest.raises(ConfigError, match="balance: is for classification"):
        weights(masks, 1.0, False)
    with pytest.raises(ConfigError, match="do not name the patient"):
        weights(masks, 0.0, True)
    with pytest.raises(ConfigError, match="withheld"):
        weights(Known([0, -1], ["a", "b"]), 1.0, False)


def test_a_balanced_site_without_data_takes_no_step() -> None:
    assert not list(LocalTraining(balance=1.0).batches(Known([], []), torch.Generator()))


def test_private_training_draws_patches_and_refuses_what_breaks_its_accounting() -> None:
    network = (("width", 8), ("norm", "group"))
    task = Segmentation(Network("unet", (1, *SIZE), 2, network))
    data = Volumes()
    data.patients = tuple(f"p{i}" for i in range(7))  # type: ignore[attr-defined]
    private = DPSGD(epochs=1, batch_size=3, augmentation=RECIPES["nnunet"])
    trained(private, 0, data, task)
    assert data.forced
    assert not any(data.forced)
    wrong = replace(private, foreground=0.5, balance=0.5, balance_patients=True, keep_optimizer=True)
    problems = " ".join(wrong.validate(task, task.model()))
    assert "remove foreground and balance and balance_patients" in problems
    assert "remove keep_optimizer" in problems
    assert not replace(private, momentum=0.99).keeps_optimizer


def test_one_patient_does_not_change_the_patches_of_others_in_private_training() -> None:
    local = DPSGD(augmentation=RECIPES["nnunet"])
    data, keys = Volumes(), torch.tensor([11, 12, 13])
    x, y = local._sampled(data, torch.tensor([0, 1, 2]), keys)
    fewer = local._sampled(data, torch.tensor([0, 2]), keys[[0, 2]])
    assert torch.equal(x[[0, 2]], fewer[0])
    assert torch.equal(y[[0, 2]], fewer[1])
