"""Training that no single patient can change by much: differentially private stochastic gradient descent.

Martin Abadi, Andy Chu, Ian Goodfellow, Brendan McMahan, Ilya Mironov, Kunal Talwar and Li Zhang, "Deep Learning with
Differential Privacy", CCS 2016, Algorithm 1, https://arxiv.org/abs/1607.00133. Batches are Poisson samples, as its
analysis assumes. We depart in where random numbers come from: the samples, the noise and the key of everything else
that is random are drawn from the operating system, since whoever knows a study's seed could otherwise repeat them. So
private training does not repeat itself. Dropout and augmentation of an image follow a key of that image alone (of the
step, the unit and the image's place within the unit), so that one unit does not change what is random for the others:
only then does a unit change the sum by no more than the bound.

What leaves a site protects its patients only if it is made from what ``fit`` returns, and from nothing else of the
data. ``metered`` tells what was spent, so that a policy can refuse a reply that spent nothing; whether a method's
replies hold nothing else is what ``polyclinic.attacks.release_audit`` finds out.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from polyclinic.core.metering import Spend, Unit, Use, hidden, meter, metered
from polyclinic.core.site import SecretRng, Site
from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.functional import at
from polyclinic.learning.networks.model_tree import BATCH_NORMS, params_of
from polyclinic.learning.tasks.task import Batch, cached_model
from polyclinic.learning.training.keyed_random import KeyedRandomness, UnknownRandomness, key_of, may_draw
from polyclinic.learning.training.local import Correct, LocalTraining, Loss, Trainable, seeded

__all__ = ["DPSGD", "Spend", "Unit", "add_noise", "meter", "metered", "per_example_gradients"]


class Member(NamedTuple):
    """One protected unit: its name, and the positions of its images."""

    name: object
    images: Sequence[int]


@dataclass(frozen=True)
class DPSGD(LocalTraining):
    """Local training in which each unit's gradient is clipped, and the sum of them is hidden in noise.

    Of ``LocalTraining``, ``batch_size`` is the expected size of a batch, counted in units; ``epochs`` means as many
    steps as would see each unit once on average. A penalty does not read the data, and is neither clipped nor noised.

    Attributes:
        noise: σ, the deviation of the noise over ``bound``. ``plan`` finds it for a wanted ε.
        bound: C, the largest norm of what one unit adds.
        unit: Who is protected. A ``patient`` may have several images, whose mean gradient is clipped as one; the
            data must then say whose each image is (``patients``). A ``record`` is one image or row.
        chunk: How many images' gradients are held at once; chosen by the model's size where it is None.
    """

    noise: float = 1.0
    bound: float = 1.0
    unit: Literal["record", "patient"] = "patient"
    chunk: int | None = None

    def fit(
        self,
        task: Trainable,
        start: Tree,
        site: Site,
        round: int,
        *,
        role: str = "train",
        data: Any = None,
        loss: Loss | None = None,
        gradient_hook: Correct | None = None,
        trainable: Callable[[str], bool] | None = None,
        after_step: Callable[[nn.Module], None] | None = None,
        slot: str = "",
    ) -> Tree:
        """The parameters after private training from ``start``. Arguments as of ``LocalTraining.fit``.

        Args:
            gradient_hook: Edits each noisy gradient. Neither it nor ``after`` may use the data without privacy.

        Raises:
            ValueError: Where this task, model or data cannot be trained privately; the message says what to change.
        """
        model, data = cached_model(task, start, site.device, slot), site.data[role] if data is None else data
        members = self._members(data)
        problems = self.validate(task, model)
        if problems := [*problems, *([] if members else ["DPSGD: there is no one to train on at this site"])]:
            raise ConfigError("; ".join(problems))
        named = {n: p for n, p in model.named_parameters() if p.requires_grad and (trainable is None or trainable(n))}
        optimizer, rng = self._optimizer(list(named.values()), self.rate(round)), site.secret_rng()
        spend, secret = self.spend(data), rng.entropy(16)
        expected, deviation = spend.rate * len(members), self.noise * self.bound
        origin = {name: leaf.to(site.device) for name, leaf in start.items()} if self.penalty else start
        with seeded(site.rng(round, "train", role, slot), site.device):
            for number in range(spend.steps):
                drawn = (rng.uniform(len(members)) < spend.rate).nonzero()[:, 0].tolist()
                units = [members[i] for i in drawn]
                with no_common_randomness():
                    batches = self._gathered(data, units, model, (secret, number), site.device)
                    total = self._clipped_sum(model, named, loss or task.loss, batches)
                use = Use(
                    total,
                    spend._replace(steps=1),
                    dict.fromkeys(total, deviation),
                    sampled=frozenset(unit.name for unit in units),
                )
                # g̃ = (Σ clip(g_i) + N(0, σ² C²)) / L, with L the expected size: the true one is private
                noisy = hidden(use, lambda value: {n: add_noise(g, deviation, rng) for n, g in value.items()})
                gradient = {n: g / expected for n, g in noisy.items()}
                if self.penalty:
                    model.zero_grad(set_to_none=True)
                    self.penalty(model, origin).backward()  # type: ignore[no-untyped-call]
                    gradient = {n: g if (own := named[n].grad) is None else g + own for n, g in gradient.items()}
                for n, p in named.items():
                    p.grad = gradient_hook(n, gradient[n]) if gradient_hook else gradient[n]
                optimizer.step()
                if after_step:
                    after_step(model)
        meter(spend)
        return params_of(model)

    def validate(self, task: Trainable, model: nn.Module) -> list[str]:
        """Why these cannot be trained privately, in sentences that say what to change."""
        found = []
        if not (self.noise > 0 and self.bound > 0):
            found.append(
                f"DPSGD: noise and bound must be above 0, not {self.noise} and {self.bound}; without noise "
                "there is no privacy: use plain training and claim none"
            )
        if any(isinstance(m, BATCH_NORMS) for m in model.modules()):
            found.append(
                "DPSGD: this network has batch normalization, which mixes patients, so that no one's part can "
                'be bounded: build it with the option norm = "group" or "instance"'
            )
        if getattr(task, "class_weights", None) is not None:
            found.append("DPSGD: class_weights have no effect where every example's loss stands alone: leave them out")
        if self.amp or self.clip_norm is not None:
            found.append("DPSGD: leave amp and clip_norm out; bound clips each unit by itself")
        return found

    def spend(self, data: Any) -> Spend:
        """What one ``fit`` on ``data`` costs. The number of units counts as public."""
        units = len(self._members(data))
        return Spend(self.noise, min(1.0, self.batch_size / units), self.count(data), self.unit)

    def count(self, data: Any) -> int:
        """How many steps ``fit`` takes on ``data``."""
        units = len(self._members(data))
        return self.epochs * -(-units // self.batch_size) if self.steps is None else self.steps

    def stepper(
        self,
        model: nn.Module,
        round: int = 0,
        *,
        gradient_hook: Correct | None = None,
        trainable: Callable[[str], bool] | None = None,
    ) -> NoReturn:
        """Refuses: steps that a method takes by itself are not private."""
        raise ConfigError(BY_ITSELF)

    def batches(self, data: Any, rng: torch.Generator, device: str = "cpu") -> NoReturn:
        """Refuses: batches that a method uses by itself are not private."""
        raise ConfigError(BY_ITSELF)

    def _members(self, data: Any) -> Sequence[Member]:
        """The units, each with a name that does not depend on which others there are, where the data have names."""
        patients = getattr(data, "patients", None)
        if self.unit == "patient" and patients is None:
            raise ConfigError(
                "DPSGD: this data does not say whose each image is, so patients cannot be protected: "
                'name the patient column, or protect records only with unit = "record"'
            )
        if patients is None:
            return [Member(i, [i]) for i in range(len(data))]
        found: dict[Any, list[int]] = {}
        for i, patient in enumerate(patients):
            found.setdefault(patient, []).append(i)
        if self.unit == "patient":
            return [Member(patient, images) for patient, images in found.items()]
        place = {i: (patient, nth) for patient, images in found.items() for nth, i in enumerate(images)}
        return [Member(place[i], [i]) for i in range(len(data))]

    def _gathered(
        self, data: Any, chosen: Sequence[Member], model: nn.Module, step: tuple[bytes, int], device: str
    ) -> Iterator[tuple[Tensor, list[tuple[Tensor, Tensor, Batch]]]]:
        """Some units at a time: how many images each has; and their images, each with its unit's number and its key.

        Args:
            step: The secret of this fit, and the number of the step: an image's key depends on them, on the unit's name
                and on the image's place within the unit, and on nothing else.
        """
        size = sum(p.numel() for p in model.parameters())
        chunk = self.chunk or max(1, min(64, 2**26 // size))  # 256 MiB of gradients at most
        for begin in range(0, len(chosen), chunk):
            units = chosen[begin : begin + chunk]
            of = torch.tensor([u for u, unit in enumerate(units) for _ in unit.images])
            positions = torch.tensor([i for unit in units for i in unit.images])
            keys = torch.tensor([key_of(*step, unit.name, nth) for unit in units for nth in range(len(unit.images))])
            parts = []
            for part in torch.arange(len(positions)).split(chunk):
                x, y = self._viewed(data[positions[part]], keys[part])
                parts.append((of[part].to(device), keys[part].to(device), (x.to(device), y.to(device))))
            yield torch.tensor([float(len(unit.images)) for unit in units], device=device), parts

    def _viewed(self, batch: Batch, keys: Tensor) -> Batch:
        """The augmented batch, each image by itself and with a generator of its own."""
        if self.augment is None:
            return batch
        x, y = batch
        views = [
            self.augment((x[i : i + 1], y[i : i + 1]), torch.Generator().manual_seed(int(key)))
            for i, key in enumerate(keys)
        ]
        return torch.cat([view[0] for view in views]), torch.cat([view[1] for view in views])

    def _clipped_sum(
        self,
        model: nn.Module,
        named: dict[str, nn.Parameter],
        loss: Loss,
        batches: Iterator[tuple[Tensor, list[tuple[Tensor, Tensor, Batch]]]],
    ) -> dict[str, Tensor]:
        """Σ over units of min(1, C / ‖g_i‖) · g_i, with g_i the mean gradient of a unit's images."""
        params = {n: p.detach() for n, p in named.items()}
        total = {n: torch.zeros_like(p) for n, p in params.items()}
        for images, parts in batches:
            sums = {n: torch.zeros(len(images), *p.shape, device=p.device) for n, p in params.items()}
            for of, keys, batch in parts:
                for n, g in per_example_gradients(model, params, loss, batch, keys).items():
                    sums[n].index_add_(0, of, g)
            flat = [g.flatten(1) / images[:, None] for g in sums.values()]
            norm = torch.stack([g.norm(dim=1) for g in flat]).norm(dim=0)
            # One whose gradient is not finite adds nothing: it could not be bounded otherwise. And a little less
            # than C, so that rounding cannot carry a sum above it.
            factor = torch.where(norm.isfinite(), (self.bound / norm).clamp_max(1.0) * (1 - 2.0**-20), 0.0)
            for n, g in zip(total, flat, strict=True):
                total[n] += (factor @ g.nan_to_num(0.0, 0.0, 0.0)).reshape(total[n].shape)
        return total


BY_ITSELF = (
    "DPSGD: this method takes its training steps by itself, and they would not be private. Choose one that "
    "trains once a round, such as fedavg, fedprox, fedopt or scaffold"
)


def per_example_gradients(
    model: nn.Module, params: Tree, loss: Loss, batch: Batch, keys: Tensor | None = None
) -> dict[str, Tensor]:
    """∂loss/∂params for each example of ``batch`` alone. Shapes [b, *shape of the parameter].

    Args:
        keys: int64 [b], from which the random numbers of each example follow (dropout and the like).

    Raises:
        UnknownRandomness: If the model or the loss draws random numbers, and there are no keys, or it draws them in a
            way that cannot be tied to single examples.
    """

    def alone(own: Tree, x: Tensor, y: Tensor) -> Tensor:
        return at(model, own, loss, (x[None], y[None]))

    def each(randomness: str) -> dict[str, Tensor]:
        every = torch.func.vmap(torch.func.grad(alone), in_dims=(None, 0, 0), randomness=randomness)
        found: dict[str, Tensor] = every(dict(params), *batch)
        return {name: g.detach() for name, g in found.items()}

    if keys is None or not may_draw(model):
        try:
            return each("error")
        except RuntimeError as error:
            if "randomness" not in str(error):
                raise
            if keys is None:
                raise UnknownRandomness(f"DPSGD: random numbers are drawn, and there are no keys: {error}") from error
    try:
        with KeyedRandomness(keys, model):
            return each("different")
    except RuntimeError as error:
        if "randomness" not in str(error):
            raise
        raise UnknownRandomness(
            "DPSGD: the model or the loss draws random numbers in a way that cannot be tied to "
            f"each patient alone ({error}): use torch.nn.Dropout, or set its rate to 0"
        ) from error


@contextmanager
def no_common_randomness() -> Iterator[None]:
    """Refuses what draws from a stream of random numbers that all examples share.

    Raises:
        UnknownRandomness: If PyTorch's, NumPy's or Python's global generator was used within.
    """
    before = _global_states()
    yield
    for name, state in _global_states().items():
        if state != before[name]:
            raise UnknownRandomness(
                f"DPSGD: the data or the model draw from {name}'s global random generator, so that "
                "one patient would change what is random for all others: augment with "
                "training.augment, and draw within the model with torch functions"
            )


def _global_states() -> dict[str, object]:
    numbers = np.random.get_state(legacy=False)["state"]
    return {
        "PyTorch": torch.get_rng_state().numpy().tobytes(),
        "NumPy": (numbers["key"].tobytes(), numbers["pos"]),
        "Python": random.getstate(),
    }


def add_noise(leaf: Tensor, deviation: float, rng: SecretRng) -> Tensor:
    """``leaf`` plus normal noise of ``deviation``, added in double precision and rounded to a grid.

    The grid, 2⁻²⁰ deviations or a little less, hides which doubles the noise could have been (Ilya Mironov, "On
    significance of the least significant bits for differential privacy", CCS 2012, rounds for this reason).
    """
    if deviation == 0 or not leaf.numel():
        return leaf
    grid = 2.0 ** (torch.tensor(deviation, dtype=torch.float64).log2().floor().item() - 20)
    noisy = leaf.double() + deviation * rng.normal(*leaf.shape).to(leaf.device)
    return ((noisy / grid).round() * grid).to(leaf.dtype)
