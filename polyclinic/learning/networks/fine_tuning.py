"""Networks with start weights, adapters, and a choice of what is trained.

A network is built, gets the start weights under its own names, then adapters, and then everything that is not chosen is
frozen. To methods it is an ordinary network with fewer tensors.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

import torch
from torch import nn

from polyclinic.errors import ConfigError
from polyclinic.learning.networks.adapters import LowRank, adapt, is_factor
from polyclinic.learning.networks.composite import Composed
from polyclinic.learning.networks.model_tree import BATCH_NORMS, freeze, frozen, inspect
from polyclinic.learning.weights import store
from polyclinic.learning.weights.matching import Matched, Mismatch, StartWeights, match

ALL = ("*",)
WORDS = ("head", "encoder", "adapters")
KINDS = ("norm", "stats", "bias")


@dataclass(frozen=True)
class FineTuned(Composed):
    """``network`` that starts from given weights, of which only some tensors are trained.

    Attributes:
        start: The start weights; None for a random start.
        train: What is trained: patterns of names, the words ``head``, ``encoder`` and ``adapters``, and
            ``norm:PATTERN``, ``stats:PATTERN`` and ``bias:PATTERN`` for normalization layers, their running statistics
            and biases. All other tensors are constants.
        lora: Low-rank adapters.
    """

    start: StartWeights | None = None
    train: tuple[str, ...] = ALL
    lora: LowRank | None = None

    def __call__(self) -> nn.Module:
        """Build the module.

        Raises:
            ConfigError: If the weights do not fit, a pattern matches nothing, or a tensor would be frozen at a random
                value. The message lists every reason.
        """
        model = self.network()
        matched = self.load_start(model)
        self._set_momentum(model)
        adapted = adapt(model, self.lora, self.network.parts.head) if self.lora is not None else ()
        if self.train == ALL:
            return model
        freeze(model, self._chosen(model))
        constant = frozen(model)
        given = _inside(adapted, matched.loaded if matched else ())
        if at_random := sorted(constant - given):
            names = ", ".join(at_random[:5]) + (f" and {len(at_random) - 5} more" if len(at_random) > 5 else "")
            raise ConfigError(
                f"task.train: {len(at_random)} tensors would stay at their random start, because the start weights do "
                f"not provide them: {names}. Add them to train, or let the weights provide them (head = true, skip)"
            )
        return model

    def load_start(self, model: nn.Module) -> Matched | None:
        """Copy the start weights into ``model``, which ``network`` built, and return the account.

        Raises:
            Mismatch: If they do not fit.
            UnknownWeights: If they are not in the store.
        """
        if self.start is None:
            return None
        inspected, state = inspect(model), model.state_dict()
        own = {name: state[name] for name in (*inspected.trainable, *inspected.statistics)}
        try:
            matched = match(
                own, dict(store.tensors(self.start.sha256)), self.start, self.network.in_head, inspected.aliases
            )
        except Mismatch as error:
            name = store.find(self.start.sha256).card.name
            raise Mismatch(f"task.weights: {name} does not fit the network {self.network.name}: {error}") from None
        with torch.no_grad():
            for name, leaf in matched.leaves.items():
                own[name].copy_(leaf)
        return matched

    def account(self) -> Matched | None:
        """Return the account of the start weights; None without any."""
        return _account(self)

    def _set_momentum(self, model: nn.Module) -> None:
        """Set the momentum of batch normalization.

        Raises:
            ConfigError: If the network has none.
        """
        if self.start is None or self.start.norm_momentum is None:
            return
        norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
        if not norms:
            raise ConfigError(
                f"task.weights: norm_momentum has no effect, because {self.network.name} has no batch normalization: "
                "leave it out"
            )
        for norm in norms:
            norm.momentum = self.start.norm_momentum

    def _chosen(self, model: nn.Module) -> Callable[[str], bool]:
        """Return the test of what is trained.

        Raises:
            ConfigError: If a pattern matches no tensor, or nothing is trained.
        """
        inspected = inspect(model)
        names = [*inspected.trainable, *inspected.statistics, *inspected.aliases]
        chosen, problems = set[str](), list[str]()
        for pattern in self.train:
            test = self._test(pattern, inspected.normalization, inspected.running)
            if found := [name for name in names if test(name)]:
                chosen |= set(found)
            else:
                near = difflib.get_close_matches(pattern, names, 1, 0.4)
                hint = f'. Did you mean "{near[0]}"?' if near else f". The names begin with {', '.join(_tops(names))}"
                problems.append(f"task.train: {pattern!r} matches no tensor of {self.network.name}{hint}")
        if not problems and not chosen & set(inspected.trainable):
            problems.append(f"task.train: {', '.join(self.train)} matches statistics only, so that nothing is trained")
        if problems:
            raise ConfigError("; ".join(problems))
        return chosen.__contains__

    def _test(self, pattern: str, normalization: frozenset[str], running: frozenset[str]) -> Callable[[str], bool]:
        match pattern:
            case "head":
                return self.network.in_head
            case "encoder":
                return self.network.in_encoder
            case "adapters":
                return is_factor
        kind, colon, rest = pattern.partition(":")
        if not colon:
            return lambda name: fnmatchcase(name, pattern)
        if kind not in KINDS:
            raise ConfigError(f"task.train: {kind!r} in {pattern!r} is unknown; there are {', '.join(KINDS)}")
        kinds: dict[str, Callable[[str], bool]] = {
            "norm": normalization.__contains__,
            "stats": running.__contains__,
            "bias": lambda name: name.endswith("bias"),
        }
        return lambda name: kinds[kind](name) and fnmatchcase(name, rest)


@lru_cache(maxsize=16)
def _account(network: FineTuned) -> Matched | None:
    with torch.random.fork_rng(devices=[]):
        return network.load_start(network.network())


def _inside(adapted: tuple[str, ...], names: tuple[str, ...]) -> set[str]:
    """Return ``names`` as they are once the ``adapted`` layers are inside adapters."""
    layers, renamed = set(adapted), set[str]()
    for name in names:
        layer, _, last = name.rpartition(".")
        renamed.add(f"{layer}.base.{last}" if layer in layers else name)
    return renamed


def _tops(names: list[str]) -> list[str]:
    return list(dict.fromkeys(name.split(".")[0] for name in names))[:8]
