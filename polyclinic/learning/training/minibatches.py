"""Minibatches whose samples are drawn one by one: random patches, augmentation, and balanced sampling.

One number per sample is drawn in the order of the samples, and everything random about a sample follows from a
generator with this number as its seed. Threads can therefore prepare samples ahead of training without changing a bit
of a result.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.training.image_augmentation import ImageAugmentation

AHEAD = 2
"""Minibatches that threads prepare ahead of the one in training."""


@dataclass(frozen=True)
class Sampler:
    """Draws the sample of an example.

    Attributes:
        data: The examples. They may have ``patch``, the size of a sample, and
            ``draw(i, rng, forced, size) -> (x [C, *size], y)``, a random patch of example i: around a foreground voxel
            if ``forced``, and padded outside of the image; and ``mask_channels``, how many of the last channels of x
            are labels of a mask.
        augmentation: The changes of a sample.
        foreground: The probability that a patch is forced.
    """

    data: Any
    augmentation: ImageAugmentation | None = None
    foreground: float = 0.0

    def __call__(self, i: int, seed: int) -> Batch:
        """Return the sample of example ``i`` that follows from ``seed``: x [C, *spatial], and y."""
        rng = torch.Generator().manual_seed(seed)
        if not hasattr(self.data, "draw"):
            x, y = (leaf[0] for leaf in self.data[torch.tensor([i])])
            return self._changed(x, y, rng)
        forced = float(torch.rand((), generator=rng, dtype=torch.float64)) < self.foreground
        size = tuple(self.data.patch)
        if self.augmentation is None:
            drawn: Batch = self.data.draw(i, rng, forced, size)
            return drawn
        place = self.augmentation.place(size, rng)
        x, y = self.data.draw(i, rng, forced, place.source)
        changed: Batch = self.augmentation(x, y, place, size, rng, getattr(self.data, "mask_channels", 0))
        return changed

    def _changed(self, x: Tensor, y: Tensor, rng: torch.Generator) -> Batch:
        if self.augmentation is None:
            return x, y
        size = tuple(x.shape[1:])
        place = self.augmentation.place(size, rng, margin=False)
        changed: Batch = self.augmentation(x.clone(), y, place, size, rng)
        return changed


def drawn(sampler: Sampler, chunks: Iterator[tuple[Sequence[int], Sequence[int]]], threads: int) -> Iterator[Batch]:
    """Yield the minibatch of each chunk of examples and seeds, prepared by ``threads`` threads (0 for none).

    The threads live as long as the iteration: a process that forks later has none of them.
    """
    if not threads:
        for examples, seeds in chunks:
            yield _stacked([sampler(i, seed) for i, seed in zip(examples, seeds, strict=True)])
        return
    with ThreadPoolExecutor(threads, "samples", torch.set_num_threads, (1,)) as pool:
        queue: deque[list[Future[Batch]]] = deque()
        try:
            for examples, seeds in chunks:
                queue.append([pool.submit(sampler, i, seed) for i, seed in zip(examples, seeds, strict=True)])
                if len(queue) > AHEAD:
                    yield _stacked([future.result() for future in queue.popleft()])
            while queue:
                yield _stacked([future.result() for future in queue.popleft()])
        finally:
            for futures in queue:
                for future in futures:
                    future.cancel()


def weights(data: Any, balance: float, patients: bool) -> Tensor:
    """Return the sampling weight of each example, float64 [n].

    Args:
        data: The examples, with int64 [n] ``targets`` (classes) if ``balance``, and ``patients``.
        balance: The exponent b: with N the weight of a class, its examples have the weight ``N^-b`` each. All classes
            are equally frequent at 1, and as frequent as in the data at 0.
        patients: Whether all patients have equal weight, whatever their number of examples.

    Raises:
        ConfigError: If the data have no classes or no patients.
    """
    found = torch.ones(len(data), dtype=torch.float64)
    if patients:
        names = getattr(data, "patients", None)
        if names is None:
            raise ConfigError("balance_patients: these data do not name the patient of each example")
        number = {name: i for i, name in enumerate(dict.fromkeys(names))}
        place = torch.tensor([number[name] for name in names])
        found /= torch.bincount(place)[place]
    if balance:
        classes = getattr(data, "targets", None)
        if not isinstance(classes, Tensor) or classes.ndim != 1 or classes.dtype not in (torch.int64, torch.uint8):
            raise ConfigError("balance: is for classification, where each example has one class")
        if bool((classes < 0).any()):
            raise ConfigError("balance: the classes of these examples are withheld")
        mass = torch.bincount(classes.long(), found)
        found *= mass.clamp_min(1e-300)[classes.long()] ** -balance
    return found


def _stacked(samples: Sequence[Batch]) -> Batch:
    return torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])
