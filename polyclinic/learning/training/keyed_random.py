"""Random numbers for each example of a batch, from a key of its own and from nothing else.

Differentially private training bounds what one patient adds to a sum of gradients. If examples drew their dropout
masks one after another from a common stream, one patient more would shift the masks of everybody else and change the
sum by far more than that bound. Here every random number inside a vectorized computation is a function of the key of
its example and of its place in the computation; the other examples of the batch have no part in it.

Random operations are recognized below ``torch.func.vmap``, by the tag that PyTorch gives to all of them, so none is
overlooked: one that is not known here is refused. The numbers come from SplitMix64 (Guy Steele, Doug Lea and Christine
Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, figure 16, https://doi.org/10.1145/2660193.2660195)
in counter mode. They serve dropout and the like; privacy noise comes from the operating system (``SecretRng``).
"""

import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from polyclinic.errors import ConfigError

GAMMA: Final = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number; products wrap around at 64 bits
MIX1: Final = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
MIX2: Final = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


class UnknownRandomness(ConfigError):
    """A model or loss draws random numbers in a way that cannot be tied to single examples."""


def key_of(secret: bytes, *place: object) -> int:
    """A key of 63 bits that depends on ``secret`` (16 bytes) and ``place``, and on nothing else."""
    digest = hashlib.blake2b(repr(place).encode(), key=secret, digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def bits(keys: Tensor, size: int) -> Tensor:
    """``size`` numbers of 64 random bits for each of ``keys`` [b], as int64 [b, size]."""
    return _mixed(torch.arange(1, size + 1, device=keys.device).mul_(GAMMA) + keys[:, None])


def _mixed(z: Tensor) -> Tensor:
    """SplitMix64's finalizer, in the memory of ``z``."""
    shifted = torch.empty_like(z)
    for by, factor in ((30, MIX1), (27, MIX2), (31, 1)):
        # The logical shift to the right: >> on int64 repeats the sign
        torch.bitwise_right_shift(z, by, out=shifted).bitwise_and_((1 << (64 - by)) - 1)
        z.bitwise_xor_(shifted)
        if factor != 1:
            z.mul_(factor)
    return z


class KeyedRandomness(TorchDispatchMode):
    """Within it, and within ``vmap(..., randomness="different")``, random numbers follow the keys of the examples.

    A generator that the caller passes to a random operation is not used.

    Raises:
        UnknownRandomness: If an operation draws random numbers in a way that is not known here.
    """

    def __init__(self, keys: Tensor, model: nn.Module) -> None:
        """For one vectorized computation over the examples that ``keys``, int64 [b], belong to.

        Args:
            model: Names the module in messages.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._keys, self._model, self._drawn = keys, model, 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replaces random operations; runs all others."""
        given = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or _draws_nothing(func, args, given):
            return func(*args, **given)
        draw = DRAWS.get(func.__name__.replace("_generator", "").replace(".generator", ".default"))
        if draw is None:
            raise UnknownRandomness(self._refusal(func))
        return draw(self, args, given)

    def uniform(self, shape: Sequence[int], like: torch.dtype, device: torch.device) -> Tensor:
        """Numbers in [0, 1) of ``shape`` [b, ...], each row from its example's key; float32 unless ``like`` is double.

        Only as many bits are used as the type holds: more would be rounded up to 1.
        """
        rows, size = len(self._keys), math.prod(shape[1:])
        if like == torch.float64:
            z = (self._bits(shape, size, device) >> 11).bitwise_and_(2**53 - 1).double() * 2.0**-53
        else:  # two numbers from each word
            z = self._bits(shape, -(-size // 2), device).view(torch.int32)[:, :size]
            z = z.bitwise_and(2**24 - 1).float().mul_(2.0**-24)
        return z.reshape(rows, *shape[1:])

    def normal(self, shape: Sequence[int], like: torch.dtype, device: torch.device) -> Tensor:
        """Standard normal numbers of ``shape`` [b, ...], by Box and Muller's transform."""
        radius = (-2 * torch.log1p(-self.uniform(shape, torch.float64, device))).sqrt()
        return (radius * (2 * math.pi * self.uniform(shape, torch.float64, device)).cos()).to(like)

    def _bits(self, shape: Sequence[int], size: int, device: torch.device) -> Tensor:
        if not len(shape) or shape[0] != len(self._keys):
            raise UnknownRandomness(self._refusal(f"a random operation of shape {tuple(shape)}"))
        self._drawn += 1
        return bits(_mixed(self._keys.to(device) ^ (self._drawn * GAMMA & (2**63 - 1))), size)

    def _refusal(self, what: object) -> str:
        return (
            f"DPSGD: {self._whose()} draws random numbers with {what}, which cannot be drawn for each patient "
            "alone, so that one patient would change what is random for all others: replace it by "
            "torch.nn.Dropout, or set its rate to 0"
        )

    def _whose(self) -> str:
        """The innermost module that is running, by its name in the model; else the loss."""
        frame = sys._getframe(1)
        while frame is not None:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and frame.f_code.co_name == "forward":
                name = next((n for n, m in self._model.named_modules() if m is module), "")
                return f"the module {name} ({type(module).__name__})" if name else f"the module {type(module).__name__}"
            frame = cast(Any, frame.f_back)
        return "the loss"


def may_draw(model: nn.Module) -> bool:
    """Whether ``model`` has a module with a rate of dropout above 0. It saves trying without; it decides nothing."""
    rates = [getattr(module, name, 0) for module in model.modules() for name in ("p", "dropout")]
    return any(isinstance(rate, float | int) and rate > 0 for rate in rates)


def _draws_nothing(func: Any, args: tuple[Any, ...], given: dict[str, Any]) -> bool:
    """Whether an operation that can drop out does not: attention is tagged as random at every rate."""
    values = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | given
    rates = [a for a in func._schema.arguments if a.name in ("dropout_p", "dropout")]
    return bool(rates) and all(values.get(a.name, a.default_value) == 0 for a in rates)


Draw = Callable[[KeyedRandomness, tuple[Any, ...], dict[str, Any]], Any]


def _in_place(make: Callable[..., Tensor]) -> Draw:
    """An operation that fills its first argument."""

    def draw(keyed: KeyedRandomness, args: tuple[Any, ...], given: dict[str, Any]) -> Tensor:
        target: Tensor = args[0]
        more = {key: value for key, value in given.items() if key != "generator"}
        return target.copy_(make(keyed, target.shape, target.dtype, target.device, *args[1:], **more))

    return draw


def _like(make: Callable[..., Tensor]) -> Draw:
    """An operation that returns numbers of the form of its first argument."""

    def draw(keyed: KeyedRandomness, args: tuple[Any, ...], given: dict[str, Any]) -> Tensor:
        like: Tensor = args[0]
        dtype, device = given.get("dtype") or like.dtype, torch.device(given.get("device") or like.device)
        found: Tensor = make(keyed, like.shape, dtype, device, *args[1:])
        converted: Tensor = found.to(dtype)
        return converted

    return draw


def _new(make: Callable[..., Tensor], shape_at: int, usual: torch.dtype | None = None) -> Draw:
    """An operation that makes a tensor of the shape in argument ``shape_at``."""

    def draw(keyed: KeyedRandomness, args: tuple[Any, ...], given: dict[str, Any]) -> Tensor:
        dtype = given.get("dtype") or usual or torch.get_default_dtype()
        device = torch.device(given.get("device") or "cpu")
        found: Tensor = make(keyed, args[shape_at], dtype, device, *args[:shape_at])
        converted: Tensor = found.to(dtype)
        return converted

    return draw


def _bernoulli(k: KeyedRandomness, shape: Any, dtype: Any, device: Any, p: float | Tensor = 0.5) -> Tensor:
    wide = torch.float64 if isinstance(p, Tensor) and p.dtype == torch.float64 else torch.float32
    return (k.uniform(shape, wide, device) < p).to(dtype)


def _uniform(k: KeyedRandomness, shape: Any, dtype: Any, device: Any, low: float = 0.0, high: float = 1.0) -> Tensor:
    return k.uniform(shape, dtype, device) * (high - low) + low


def _normal(
    k: KeyedRandomness, shape: Any, dtype: Any, device: Any, mean: float | Tensor = 0.0, std: float | Tensor = 1.0
) -> Tensor:
    return k.normal(shape, dtype, device) * std + mean


def _exponential(k: KeyedRandomness, shape: Any, dtype: Any, device: Any, lambd: float = 1.0) -> Tensor:
    # 1 - u is in (0, 1], and 0 itself is left out, as in PyTorch
    return -(1 - k.uniform(shape, torch.float64, device)).clamp(2.0**-53, 1 - 2.0**-53).log() / lambd


def _integer(k: KeyedRandomness, shape: Any, dtype: Any, device: Any, low: int, high: int) -> Tensor:
    return (k.uniform(shape, torch.float64, device) * (high - low)).floor().long() + low


DRAWS: Final[dict[str, Draw]] = {
    "bernoulli.default": lambda k, a, g: _bernoulli(k, a[0].shape, a[0].dtype, a[0].device, a[0]),
    "bernoulli.p": lambda k, a, g: _bernoulli(k, a[0].shape, a[0].dtype, a[0].device, a[1]),
    "bernoulli_.float": _in_place(_bernoulli),
    "bernoulli_.Tensor": _in_place(_bernoulli),
    "uniform_.default": _in_place(_uniform),
    "normal_.default": _in_place(_normal),
    "exponential_.default": _in_place(_exponential),
    "rand.default": _new(_uniform, 0),
    "randn.default": _new(_normal, 0),
    "rand_like.default": _like(_uniform),
    "randn_like.default": _like(_normal),
    "randint.default": _new(lambda k, s, t, d, high: _integer(k, s, t, d, 0, high), 1, torch.int64),
    "randint.low": _new(lambda k, s, t, d, low, high: _integer(k, s, t, d, low, high), 2, torch.int64),
    "randint_like.default": _like(lambda k, s, t, d, high: _integer(k, s, t, d, 0, high)),
    "randint_like.low_dtype": _like(_integer),
    "normal.float_float": _new(lambda k, s, t, d, mean, std: _normal(k, s, t, d, mean, std), 2),
    "normal.Tensor_float": lambda k, a, g: _normal(k, a[0].shape, a[0].dtype, a[0].device, *a),
}
"""How each known random operation is drawn, by its name below ``vmap``, with or without a generator."""
