"""Transforms that a site's policy requires of every reply, and their minimum strength."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from polyclinic.compression import transform_table as transforms
from polyclinic.compression.downlink import DownlinkPipeline
from polyclinic.core.method import Method, Request, unwrap
from polyclinic.core.pipeline import Transform

Wanted = Mapping[str, str | float | int]


def arrived(method: Method[Any], request: Request) -> Request:
    """Return the request as the inner method receives it, with the downlink codecs decoded.

    Raises:
        ValueError: If it cannot be decoded.
    """
    downlink = unwrap(method, DownlinkPipeline)
    return request if downlink is None else downlink.arrived(request)


def transform_problems(required: Sequence[Wanted], present: tuple[Transform, ...]) -> Iterator[str]:
    for wanted in required:
        made = transforms.maker(transforms.entry(str(wanted["name"])))
        having = [t for t in present if isinstance(t, made)]
        if not having:
            yield f"replies must pass the transform {wanted['name']!r} (require.transforms)"
        for key, bound in wanted.items():
            field, least = _bound(key)
            if field is None:
                continue
            for t in having:
                value = getattr(t, field)
                if value is None or (value < float(bound) if least else value > float(bound)):
                    required_value = f"at {'least' if least else 'most'} {bound}"
                    yield (
                        f"{wanted['name']}: {field} is {value}, and the policy requires {required_value} "
                        "(require.transforms)"
                    )


def unknown_transforms(required: Sequence[Wanted]) -> Iterator[str]:
    for wanted in required:
        try:
            known = transforms.options(transforms.entry(str(wanted.get("name"))))
        except ValueError as error:
            yield str(error)
            continue
        for key, value in wanted.items():
            field, _ = _bound(key)
            if key != "name" and (field is None or field not in known):
                could = " or ".join(f"{k}_at_least" for k in known) or "only its name"
                yield f"{wanted['name']} has no {key!r}; write {could}"
            elif field is not None and isinstance(value, str):
                yield f"{wanted['name']}: {key} must be a number"


def _bound(key: str) -> tuple[str | None, bool]:
    """Return the field of ``multiplier_at_least`` or ``bound_at_most``, and whether it is a lower bound."""
    for ending, least in (("_at_least", True), ("_at_most", False)):
        if key.endswith(ending):
            return key.removesuffix(ending), least
    return None, True
