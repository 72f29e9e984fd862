"""Differentially private stochastic gradient descent (DP-SGD).

Martin Abadi, Andy Chu, Ian Goodfellow, Brendan McMahan, Ilya Mironov, Kunal Talwar and Li Zhang, "Deep Learning with
Differential Privacy", CCS 2016, Algorithm 1, https://arxiv.org/abs/1607.00133. Batches are Poisson samples, as its
analysis assumes. Departure: the samples, the noise and the key of all other random numbers are drawn from the operating
system, since a person with a study's seed could otherwise reproduce them. Private training is therefore not
reproducible. Dropout and augmentation of an image follow a key of that image alone (of the step, the unit and the
image's index within the unit), so that one unit does not change the random numbers of the others. Only then does a unit
change the sum by at most the bound.

A reply protects the patients only if it is computed from the result of ``fit`` and from nothing else of the data.
``metered`` records what was spent, so that a policy can refuse a reply without any spending. Whether a method's replies
contain anything else is tested by ``polyclinic.attacks.release_audit``.
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
from polyclinic.core.site import Compute, SecretRng, Site
from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.functional import at
from polyclinic.learning.networks.model_tree import cached_model, live_batch_norms, params_of
from polyclinic.learning.networks.model_tree import trainable as trainable_of
from polyclinic.learning.threads import one_thread
from polyclinic.learning.training.keyed_random import KeyedRandomness, UnknownRandomness, key_of, may_draw
from polyclinic.learning.training.local import Correct, LocalTraining, Loss, Trainable
from polyclinic.learning.training.minibatches import Sampler
from polyclinic.learning.training.seeding import seeded
from polyclinic.learning.training.step_progress import counted

__all__ = ["DPSGD", "Spend", "Unit", "add_noise", "meter", "metered", "per_example_gradients"]


def refuse_private(local: LocalTraining, method: str, reason: str) -> None:
    """Refuse private training for a method whose loss is not a sum over examples.

    Raises:
        ConfigError: If ``local`` is private. The message is ``reason`` and what to change.
    """
    if isinstance(local, DPSGD):
        raise ConfigError(
            f"{method}: {reason}, which private training (DP-SGD) cannot bound by patient: remove training.private, or "
            "use another method"
        )


class Member(NamedTuple):
    """One protected unit: its name, and the indices of its images."""

    name: object
    images: Sequence[int]


@dataclass(frozen=True)
class DPSGD(LocalTraining):
    """Local training in which each unit's gradient is clipped and Gaussian noise is added to their sum.

    Of ``LocalTraining``, ``batch_size`` is the expected size of a batch, counted in units; ``epochs`` gives the number
    of steps in which each unit is drawn ``epochs`` times on average. A penalty does not depend on the data, and is
    neither clipped nor noised.

    Attributes:
        noise: σ, the standard deviation of the noise divided by ``bound``. ``plan`` computes it for a given ε.
        bound: C, the largest norm of one unit's contribution.
        unit: The unit of protection. A ``patient`` may have several images, whose mean gradient is clipped as one; the
            data must then name the patient of each image (``patients``). A ``record`` is one image or row.
        chunk: Number of images whose gradients are in memory at once; None to choose it by the model's size.
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
        result: Callable[[nn.Module, Tree], Tree] = params_of,
    ) -> Tree:
        """Return the parameters after private training from ``start``. Arguments as in ``LocalTraining.fit``.

        Args:
            gradient_hook: Edits each noisy gradient. Neither it nor ``after_step`` may use the data without privacy.

        Raises:
            ValueError: If the task, model or data cannot be trained privately. The message gives the necessary changes.
        """
        model, data = cached_model(task, start, site.device, slot), site.data[role] if data is None else data
        members = self._members(data)
        problems = self.validate(task, model)
        if problems := [*problems, *([] if members else ["DPSGD: this site has no training examples"])]:
            raise ConfigError("; ".join(problems))
        named = {n: p for n, p in trainable_of(model).items() if trainable is None or trainable(n)}
        optimizer, rng = self._optimizer(list(named.values()), self.rate(round)), site.secret_rng()
        spend, secret = self.spend(data), rng.entropy(16)
        expected, deviation = spend.rate * len(members), self.noise * self.bound
        origin = {name: leaf.to(site.device) for name, leaf in start.items()} if self.penalty else start
        with seeded(site.rng(round, "train", role, slot), site.device):
            for number in counted(range(spend.steps), spend.steps):
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
                if self.schedule:
                    optimizer.lr = self.rate(round, number / spend.steps)
                for n, p in named.items():
                    p.grad = gradient_hook(n, gradient[n]) if gradient_hook else gradient[n]
                optimizer.step()
                if after_step:
                    after_step(model)
        meter(spend)
        return result(model, {})

    def validate(self, task: Trainable, model: nn.Module) -> list[str]:
        """Return the reasons why the task and model cannot be trained privately, with the necessary changes."""
        problems = []
        if not (self.noise > 0 and self.bound > 0):
            problems.append(
                f"DPSGD: noise and bound must be above 0, not {self.noise} and {self.bound}; without noise "
                "there is no privacy: use plain training and claim none"
            )
        if live_batch_norms(model):
            problems.append(
                "DPSGD: this network has batch normalization, which mixes patients, so that the contribution of one "
                'cannot be bounded: build it with the option norm = "group" or "instance"'
            )
        if getattr(task, "class_weights", None) is not None:
            problems.append("DPSGD: class_weights have no effect on the loss of a single example: remove them")
        if not getattr(task, "by_example", True):
            problems.append(
                'DPSGD: the loss of hazards = "proportional" compares patients, and is 0 for a single one: set '
                'hazards = "discrete"'
            )
        if self.amp or self.clip_norm is not None:
            problems.append("DPSGD: remove amp and clip_norm; bound clips the gradient of each unit")
        if changed := [k for k in ("foreground", "balance", "balance_patients") if getattr(self, k)]:
            problems.append(
                f"DPSGD: remove {' and '.join(changed)}: the privacy accounting assumes that every unit is drawn with "
                "the same probability, and a patch without regard to its content"
            )
        if self.keep_optimizer:
            problems.append("DPSGD: remove keep_optimizer: private training begins each round with a new optimizer")
        return problems

    @property
    def keeps_optimizer(self) -> bool:
        """False: each round begins with a new optimizer."""
        return False

    def trial(self, task: Trainable, data: Any) -> list[str]:
        """Return why ``task`` cannot be trained privately, and what to change, by a trial on two of ``data``."""
        model = task.model()
        if problems := self.validate(task, model):
            return problems
        batch = data[torch.arange(min(2, len(data)))]
        params = {name: p.detach() for name, p in trainable_of(model).items()}
        try:
            with one_thread():  # a process that has used OpenMP's threads cannot fork workers that use them
                per_example_gradients(model, params, task.loss, batch, torch.arange(len(batch[0])))
        except UnknownRandomness as error:
            return [str(error)]
        except RuntimeError as error:
            reason = str(error).splitlines()[0].split(". ")[0]
            return [
                f"DPSGD: the gradients of single examples cannot be computed for this network and loss ({reason}): "
                "choose another network, or send replies through clip and gaussian instead of training privately"
            ]
        return []

    def spend(self, data: Any) -> Spend:
        """Return the privacy cost of one ``fit`` on ``data``. The number of units is treated as public."""
        units = len(self._members(data))
        return Spend(self.noise, min(1.0, self.batch_size / units), self.count(data), self.unit)

    def count(self, data: Any) -> int:
        """Return the number of steps of ``fit`` on ``data``."""
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
        """Refuse individual steps, which are not private."""
        raise ConfigError(BY_ITSELF)

    def batches(self, data: Any, rng: torch.Generator, device: str = "cpu", compute: Compute = Compute()) -> NoReturn:
        """Refuse individual batches, which are not private."""
        raise ConfigError(BY_ITSELF)

    def _members(self, data: Any) -> Sequence[Member]:
        """Return the units, with names that do not depend on the other units if the data have patient names."""
        patients = getattr(data, "patients", None)
        if self.unit == "patient" and patients is None:
            raise ConfigError(
                "DPSGD: these data do not name the patient of each image, so patients cannot be protected: "
                'name the patient column, or protect records only with unit = "record"'
            )
        if patients is None:
            return [Member(i, [i]) for i in range(len(data))]
        images_of: dict[Any, list[int]] = {}
        for i, patient in enumerate(patients):
            images_of.setdefault(patient, []).append(i)
        if self.unit == "patient":
            return [Member(patient, images) for patient, images in images_of.items()]
        place = {i: (patient, nth) for patient, images in images_of.items() for nth, i in enumerate(images)}
        return [Member(place[i], [i]) for i in range(len(data))]

    def _gathered(
        self, data: Any, chosen: Sequence[Member], model: nn.Module, step: tuple[bytes, int], device: str
    ) -> Iterator[tuple[Tensor, list[tuple[Tensor, Tensor, Batch]]]]:
        """Yield chunks of units: the number of images of each, and minibatches with unit indices and image keys.

        Args:
            step: The secret of this fit, and the number of the step. An image's key depends only on these, on the
                unit's name and on the image's index within the unit.
        """
        size = sum(p.numel() for p in trainable_of(model).values())
        chunk = self.chunk or max(1, min(64, 2**26 // size))  # at most 256 MiB of gradients
        for begin in range(0, len(chosen), chunk):
            units = chosen[begin : begin + chunk]
            of = torch.tensor([u for u, unit in enumerate(units) for _ in unit.images])
            positions = torch.tensor([i for unit in units for i in unit.images])
            keys = torch.tensor([key_of(*step, unit.name, nth) for unit in units for nth in range(len(unit.images))])
            parts = []
            for part in torch.arange(len(positions)).split(chunk):
                x, y = self._sampled(data, positions[part], keys[part])
                parts.append((of[part].to(device), keys[part].to(device), (x.to(device), y.to(device))))
            yield torch.tensor([float(len(unit.images)) for unit in units], device=device), parts

    def _sampled(self, data: Any, positions: Tensor, keys: Tensor) -> Batch:
        """Return the images at ``positions``, each drawn and augmented with a generator of its own."""
        if hasattr(data, "draw") or self.augmentation is not None:
            sampler = Sampler(data, self.augmentation)
            samples = [sampler(i, key) for i, key in zip(positions.tolist(), keys.tolist(), strict=True)]
            batch = torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])
        else:
            batch = data[positions]
        if self.augment is None:
            return batch
        x, y = batch
        views = [
            self.augment((x[i : i + 1], y[i : i + 1]), torch.Generator().manual_seed(key))
            for i, key in enumerate(keys.tolist())
        ]
        return torch.cat([view[0] for view in views]), torch.cat([view[1] for view in views])

    def _clipped_sum(
        self,
        model: nn.Module,
        named: dict[str, nn.Parameter],
        loss: Loss,
        batches: Iterator[tuple[Tensor, list[tuple[Tensor, Tensor, Batch]]]],
    ) -> dict[str, Tensor]:
        """Return ``Σ min(1, C / ‖g_i‖) · g_i`` over units, with g_i the mean gradient of a unit's images."""
        params = {n: p.detach() for n, p in named.items()}
        total = {n: torch.zeros_like(p) for n, p in params.items()}
        for images, parts in batches:
            sums = {n: torch.zeros(len(images), *p.shape, device=p.device) for n, p in params.items()}
            for of, keys, batch in parts:
                for n, g in per_example_gradients(model, params, loss, batch, keys).items():
                    sums[n].index_add_(0, of, g)
            flat = [g.flatten(1) / images[:, None] for g in sums.values()]
            # Single precision would give a norm that is too small by up to 1 percent for millions of numbers.
            norms = [torch.linalg.vector_norm(g, dim=1, dtype=torch.float64) for g in flat]
            ratio = self.bound / torch.stack(norms).norm(dim=0)
            # A unit whose gradient is not finite, or so large that the factor would lose digits, contributes nothing,
            # since it could not be bounded. The factor is slightly smaller than necessary, so that rounding cannot
            # raise the norm above C.
            bounded = ratio >= torch.finfo(torch.float32).tiny
            factor = torch.where(bounded, ratio.clamp_max(1.0) * (1 - 2.0**-20), 0.0)
            for n, g in zip(total, flat, strict=True):
                total[n] += (factor.to(g.dtype) @ g.nan_to_num(0.0, 0.0, 0.0)).reshape(total[n].shape)
        return total


BY_ITSELF = (
    "DPSGD: this method takes individual training steps, which would not be private. Choose one that trains once per "
    "round, such as fedavg, fedprox, fedopt or scaffold"
)


def per_example_gradients(
    model: nn.Module, params: Tree, loss: Loss, batch: Batch, keys: Tensor | None = None
) -> dict[str, Tensor]:
    """Compute ∂loss/∂params for each example of ``batch`` alone. Shapes [b, *shape of the parameter].

    Args:
        keys: int64 [b], keys of the random numbers of each example (dropout and the like).

    Raises:
        UnknownRandomness: If the model or the loss draws random numbers and there are no keys, or draws them in a way
            that cannot be separated by example.
    """

    def alone(own: Tree, x: Tensor, y: Tensor) -> Tensor:
        return at(model, own, loss, (x[None], y[None]))

    def each(randomness: str) -> dict[str, Tensor]:
        every = torch.func.vmap(torch.func.grad(alone), in_dims=(None, 0, 0), randomness=randomness)
        gradients: dict[str, Tensor] = every(dict(params), *batch)
        return {name: g.detach() for name, g in gradients.items()}

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
            "DPSGD: the model or the loss draws random numbers in a way that cannot be separated by "
            f"patient ({error}): use torch.nn.Dropout, or set its rate to 0"
        ) from error


@contextmanager
def no_common_randomness() -> Iterator[None]:
    """Refuse the use of global random generators, which all examples share.

    Raises:
        UnknownRandomness: If PyTorch's, NumPy's or Python's global generator was used within the context.
    """
    before = _global_states()
    yield
    for name, state in _global_states().items():
        if state != before[name]:
            raise UnknownRandomness(
                f"DPSGD: the data or the model draw from {name}'s global random generator, so that "
                "one patient would change the random numbers of all others: augment with "
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
    """Add normal noise of standard deviation ``deviation`` in double precision, and round to a grid.

    The grid of at most 2⁻²⁰ deviations hides which floating-point numbers the noise can take (Ilya Mironov, "On
    Significance of the Least Significant Bits for Differential Privacy", CCS 2012, rounds for this reason).
    """
    if deviation == 0 or not leaf.numel():
        return leaf
    grid = 2.0 ** (torch.tensor(deviation, dtype=torch.float64).log2().floor().item() - 20)
    noisy = leaf.double() + deviation * rng.normal(*leaf.shape).to(leaf.device)
    return ((noisy / grid).round() * grid).to(leaf.dtype)
