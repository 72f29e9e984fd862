"""Catalog of transforms that a study may put between a site and the server. Plain data, as for methods."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, get_type_hints

from polyclinic.core.pipeline import Transform
from polyclinic.core.plugin_packages import entry_points_in
from polyclinic.errors import ConfigError


@dataclass(frozen=True)
class Entry:
    """A transform: ``make`` is its ``module:class``; ``pays`` is whether it spends ε."""

    name: str
    make: str
    summary: str
    paper: str = ""
    pays: bool = False


TRANSFORMS: Mapping[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            "clip", "polyclinic.privacy.gaussian:Clip", "bounds the norm of what a site sends", "McMahan et al. 2018"
        ),
        Entry(
            "adaptive-clip",
            "polyclinic.privacy.gaussian:AdaptiveClip",
            "clips at a bound that tracks the median norm",
            "Andrew et al. 2021",
        ),
        Entry(
            "gaussian",
            "polyclinic.privacy.gaussian:Gaussian",
            "unpredictable Gaussian noise",
            "Dwork and Roth 2014",
            pays=True,
        ),
        Entry(
            "sparse-vector",
            "polyclinic.privacy.sparse_vector:SparseVector",
            "large changes, each with noise",
            "Li et al. 2019",
            pays=True,
        ),
        Entry(
            "uncalibrated-noise",
            "polyclinic.privacy.sparse_vector:UncalibratedNoise",
            "NOT privacy: noise without a bound or an ε",
        ),
        Entry(
            "secure-sum",
            "polyclinic.secure_aggregation:SecureSum",
            "the server learns only the sum over sites",
            "Bonawitz et al. 2017",
        ),
        Entry("bf16", "polyclinic.compression.quantization:BFloat16", "half the bytes: 8 bits of precision"),
        Entry(
            "int8",
            "polyclinic.compression.quantization:Int8",
            "a quarter of the bytes: 8 bits, a scale for each channel",
        ),
        Entry(
            "qsgd",
            "polyclinic.compression.quantization:QSGD",
            "2, 4 or 8 bits, stochastic and unbiased",
            "Alistarh et al. 2017",
        ),
        Entry(
            "sign",
            "polyclinic.compression.quantization:Sign",
            "one bit per number, with error feedback",
            "Karimireddy et al. 2019",
        ),
        Entry(
            "top-k",
            "polyclinic.compression.topk:TopK",
            "the largest coordinates, with error feedback",
            "Stich et al. 2018",
        ),
        Entry(
            "low-rank",
            "polyclinic.compression.quantization:LowRank",
            "factors with a given fraction of the energy",
            "Wu et al. 2022",
        ),
        Entry(
            "power-sgd",
            "polyclinic.compression.powersgd:PowerSGD",
            "factors of fixed rank, with error feedback",
            "Vogels et al. 2019",
        ),
        Entry("zstd", "polyclinic.compression.zstd:Zstd", "lossless, last in a pipeline", "RFC 8878"),
    )
}


def entry(name: str) -> Entry:
    """Return the catalog's entry for ``name``.

    Raises:
        ValueError: If there is none. The message suggests one.
    """
    if name in TRANSFORMS:
        return TRANSFORMS[name]
    for point in entry_points_in("transforms"):
        if point.name == name:
            return Entry(name, f"{point.module}:{point.attr}", "from an installed package")
    near = difflib.get_close_matches(name, TRANSFORMS, 1)
    hint = f' Did you mean "{near[0]}"?' if near else ""
    raise ConfigError(f'unknown transform "{name}".{hint} The transforms are {", ".join(TRANSFORMS)}')


def maker(of: Entry) -> type[Transform]:
    """Return the class of a transform."""
    module, _, name = of.make.partition(":")
    cls: type[Transform] = getattr(import_module(module), name)
    return cls


def options(of: Entry) -> Mapping[str, dataclasses.Field[Any]]:
    """Return the options of a transform, by name."""
    return {field.name: field for field in dataclasses.fields(maker(of))}


def build(item: Mapping[str, Any]) -> Transform:
    """Build the transform that ``item`` describes by its ``name`` and options."""
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in item.items() if key != "name"}
    return maker(entry(item["name"]))(**given)


def types(of: Entry) -> Mapping[str, Any]:
    """Return the type of each option."""
    return get_type_hints(maker(of))


def default(field: dataclasses.Field[Any]) -> Any:
    """Return the default of an option; ``...`` if it is required."""
    return ... if field.default is dataclasses.MISSING else field.default
