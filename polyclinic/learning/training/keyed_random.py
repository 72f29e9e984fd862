"""Random numbers for each example of a batch, derived from the example's own key.

Differentially private training bounds the contribution of one patient to a sum of gradients. If examples drew their
dropout masks from a common stream, one additional patient would shift the masks of all others and change the sum by far
more than that bound. Here every random number in a vectorized computation is a function of its example's key and of its
position in the computation, independent of the other examples of the batch.

Random operations are recognized below ``torch.func.vmap`` by the tag that PyTorch gives to all of them, so that none is
missed; unknown ones are refused. The numbers come from SplitMix64 (Guy Steele, Doug Lea and Christine Flood, "Fast
Splittable Pseudorandom Number Generators", OOPSLA 2014, figure 16, https://doi.org/10.1145/2660193.2660195) in counter
mode. They are used for dropout and the like; privacy noise comes from the operating system (``SecretRng``).
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
    """A model or loss draws random numbers in a way that cannot be separated by example."""


def key_of(secret: bytes, *place: object) -> int:
    """Derive a key of 63 bits from ``secret`` (16 bytes) and ``place`` alone."""
    digest = hashlib.blake2b(repr(place).encode(), key=secret, digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def bits(keys: Tensor, size: int) -> Tensor:
    """Return ``size`` words of 64 random bits for each of ``keys`` [b], as int64 [b, size]."""
    return _mixed(torch.arange(1, size + 1, device=keys.device).mul_(GAMMA) + keys[:, None])


def _mixed(z: Tensor) -> Tensor:
    """Apply SplitMix64's finalizer to ``z`` in place."""
    shifted = torch.empty_like(z)
    for by, factor in ((30, MIX1), (27, MIX2), (31, 1)):
        # Logical right shift: >> on int64 extends the sign.
        torch.bitwise_right_shift(z, by, out=shifted).bitwise_and_((1 << (64 - by)) - 1)
        z.bitwise_xor_(shifted)
        if factor != 1:
            z.mul_(factor)
    return z


class KeyedRandomness(TorchDispatchMode):
    """Context in which random numbers within ``vmap(..., randomness="different")`` follow the examples' keys.

    A generator that is passed to a random operation is ignored.

    Raises:
        UnknownRandomness: If an operation draws random numbers in an unknown way.
    """

    def __init__(self, keys: Tensor, model: nn.Module) -> None:
        """Prepare one vectorized computation over the examples with ``keys``, int64 [b].

        Args:
            model: The model, for the names of modules in messages.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._keys, self._model, self._drawn = keys, model, 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace random operations, and run all others unchanged."""
        given = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or _draws_nothing(func, args, given):
            return func(*args, **given)
        draw = DRAWS.get(func.__name__.replace("_generator", "").replace(".generator", ".default"))
        if draw is None:
            raise UnknownRandomness(self._refusal(func))
        return draw(self, args, given)

    def uniform(self, shape: Sequence[int], like: torch.dtype, device: torch.device) -> Tensor:
        """Return numbers in [0, 1) of ``shape`` [b, ...], each row from its key; float32 unless ``like`` is double.

        Only as many bits are used as the type can represent, because more would be rounded up to 1.
        """
        rows, size = len(self._keys), math.prod(shape[1:])
        if like == torch.float64:
            z = (self._bits(shape, size, device) >> 11).bitwise_and_(2**53 - 1).double() * 2.0**-53
        else:  # two numbers from each 64-bit word
            z = self._bits(shape, -(-size // 2), device).view(torch.int32)[:, :size]
            z = z.bitwise_and(2**24 - 1).float().mul_(2.0**-24)
        return z.reshape(rows, *shape[1:])

    def normal(self, shape: Sequence[int], like: torch.dtype, device: torch.device) -> Tensor:
        """Return standard normal numbers of ``shape`` [b, ...], by the Box-Muller transform."""
        radius = (-2 * torch.log1p(-self.uniform(shape, torch.float64, device))).sqrt()
        return (radius * (2 * math.pi * self.uniform(shape, torch.float64, device)).cos()).to(like)

    def _bits(self, shape: Sequence[int], size: int, device: torch.device) -> Tensor:
        if not len(shape) or shape[0] != len(self._keys):
            raise UnknownRandomness(self._refusal(f"a random operation of shape {tuple(shape)}"))
        self._drawn += 1
        return bits(_mixed(self._keys.to(device) ^ (self._drawn * GAMMA & (2**63 - 1))), size)

    def _refusal(self, what: object) -> str:
        return (
            f"DPSGD: {self._whose()} draws random numbers with {what}, which cannot be separated by patient, so that "
            "one patient would change the random numbers of all others: replace it by torch.nn.Dropout, or set its "
            "rate to 0"
        )

    def _whose(self) -> str:
        """Return the innermost running module by its name in the model; else the loss."""
        frame = sys._getframe(1)
        while frame is not None:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and frame.f_code.co_name == "forward":
                name = next((n for n, m in self._model.named_modules() if m is module), "")
                return f"the module {name} ({type(module).__name__})" if name else f"the module {type(module).__name__}"
            frame = cast(Any, frame.f_back)
        return "the loss"


def may_draw(model: nn.Module) -> bool:
    """Return whether ``model`` has a module with a dropout rate above 0. A hint that saves one attempt."""
    rates = [getattr(module, name, 0) for module in model.modules() for name in ("p", "dropout")]
    return any(isinstance(rate, float | int) and rate > 0 for rate in rates)


def _draws_nothing(func: Any, args: tuple[Any, ...], given: dict[str, Any]) -> bool:
    """Return whether an operation with dropout has rate 0: attention is tagged as random at every rate."""
    values = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | given
    rates = [a for a in func._schema.arguments if a.name in ("dropout_p", "dropout")]
    return bool(rates) and all(values.get(a.name, a.default_value) == 0 for a in rates)


Draw = Callable[[KeyedRandomness, tuple[Any, ...], dict[str, Any]], Any]


def _in_place(make: Callable[..., Tensor]) -> Draw:
    """Return the replacement of an operation that fills its first argument."""

    def draw(keyed: KeyedRandomness, args: tuple[Any, ...], given: dict[str, Any]) -> Tensor:
        target: Tensor = args[0]
        more = {key: value for key, value in given.items() if key != "generator"}
        return target.copy_(make(keyed, target.shape, target.dtype, target.device, *args[1:], **more))

    return draw


def _like(make: Callable[..., Tensor]) -> Draw:
    """Return the replacement of an operation whose result has the form of its first argument."""

    def draw(keyed: KeyedRandomness, args: tuple[Any, ...], given: dict[str, Any]) -> Tensor:
        like: Tensor = args[0]
        dtype, device = given.get("dtype") or like.dtype, torch.device(given.get("device") or like.device)
        numbers: Tensor = make(keyed, like.shape, dtype, device, *args[1:])
        converted: Tensor = numbers.to(dtype)
        return converted

    return draw


def _new(make: Callable[..., Tensor], shape_at: int, usual: torch.dtype | None = None) -> Draw:
    """Return the replacement of an operation that creates a tensor with the shape in argument ``shape_at``."""

    def draw(keyed: KeyedRandomness, args: tuple[Any, ...], given: dict[str, Any]) -> Tensor:
        dtype = given.get("dtype") or usual or torch.get_default_dtype()
        device = torch.device(given.get("device") or "cpu")
        numbers: Tensor = make(keyed, args[shape_at], dtype, device, *args[:shape_at])
        converted: Tensor = numbers.to(dtype)
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
    # 1 - u is in (0, 1]; 0 is excluded, as in PyTorch.
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
"""The replacement of each known random operation, by its name below ``vmap``, with or without a generator."""
