"""What a policy requires of the transforms that a reply passes: exactly at its bounds, and reported in words."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from polyclinic.compression.downlink import DownlinkPipeline
from polyclinic.compression.quantization import BFloat16
from polyclinic.core.method import Method, MethodWrapper, Request
from polyclinic.core.pipeline import Transform, UplinkPipeline, transforms_of
from polyclinic.engines.policy.requirements import arrived, transform_problems, unknown_transforms
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.privacy.gaussian import AdaptiveClip, Clip, Gaussian
from polyclinic.secure_aggregation import SecureSum

TASK = Classification(Network("mlp", (2,), 2, (("width", 3),)))
AVERAGE = FedAvg(TASK, uniform=True)


@dataclass(frozen=True)
class Wrapped(MethodWrapper[Any]):
    """A wrapper that changes nothing."""

    inner: Method[Any]


def told(wanted: dict[str, Any], *present: Transform) -> list[str]:
    return list(transform_problems([wanted], present))


def test_transforms_are_found_however_deep_from_the_outermost_inwards() -> None:
    clip, noise, secure = Clip(1.0), Gaussian(1.0, step=0.0), SecureSum()
    inner = UplinkPipeline(AVERAGE, (clip, noise))
    assert transforms_of(AVERAGE) == ()
    assert transforms_of(inner) == inner.transforms
    assert [type(t) for t in transforms_of(Wrapped(inner))] == [Clip, Gaussian]
    both = UplinkPipeline(inner, (secure,))
    assert [type(t) for t in transforms_of(both)] == [Clip, Gaussian, SecureSum], "the innermost is passed first"
    assert [type(t) for t in transforms_of(Wrapped(Wrapped(both)))] == [Clip, Gaussian, SecureSum]


def test_an_ask_is_read_as_the_method_reads_it() -> None:
    params = {name: leaf / 3 for name, leaf in TASK.first(0).items()}
    numbers = sum(leaf.numel() for leaf in params.values())
    received = DownlinkPipeline(AVERAGE, (BFloat16(),), numbers)
    request = received.request(received.init(params))
    assert request is not None
    coarse = {name: leaf.bfloat16().float() for name, leaf in params.items()}
    for method in (received, Wrapped(received), Wrapped(Wrapped(received))):
        found = arrived(method, request)
        assert found.trees["params"].keys() == params.keys()
        assert all(torch.equal(found.trees["params"][k], coarse[k]) for k in coarse)
    plain = Request(0, {"params": params})
    for untouched in (AVERAGE, Wrapped(AVERAGE)):
        assert arrived(untouched, plain) is plain


@pytest.mark.parametrize(
    ("wanted", "transform", "fits"),
    [
        ({"multiplier_at_least": 1.0}, Gaussian(1.0), True),
        ({"multiplier_at_least": 1.0}, Gaussian(0.999), False),
        ({"multiplier_at_least": 1.0}, Gaussian(1.001), True),
        ({"multiplier_at_most": 1.0}, Gaussian(1.0), True),
        ({"multiplier_at_most": 1.0}, Gaussian(1.001), False),
        ({"multiplier_at_most": 1.0}, Gaussian(0.5), True),
        ({"share_at_most": 3}, Gaussian(1.0, 3), True),
        ({"share_at_most": 3}, Gaussian(1.0, 4), False),
    ],
)
def test_a_bound_is_met_at_the_bound(wanted: dict[str, Any], transform: Transform, fits: bool) -> None:
    said = told({"name": "gaussian", **wanted}, transform)
    assert (said == []) == fits


def test_a_problem_names_transform_field_value_and_bound() -> None:
    assert told({"name": "gaussian", "multiplier_at_least": 2}, Gaussian(0.5)) == [
        "gaussian: multiplier is 0.5, and the policy requires at least 2 (require.transforms)"
    ]
    assert told({"name": "clip", "bound_at_most": 1.5}, Clip(2.0)) == [
        "clip: bound is 2.0, and the policy requires at most 1.5 (require.transforms)"
    ]


def test_a_field_that_is_not_set_meets_no_bound() -> None:
    for key in ("threshold_at_least", "threshold_at_most"):
        assert len(told({"name": "secure-sum", key: 4}, SecureSum())) == 1
    assert told({"name": "secure-sum", "threshold_at_least": 4}, SecureSum(threshold=4)) == []


def test_what_is_missing_is_named_once_and_others_are_no_substitute() -> None:
    assert told({"name": "clip", "bound_at_most": 1.0}, Gaussian(1.0), AdaptiveClip(1.0)) == [
        "replies must pass the transform 'clip' (require.transforms)"
    ]
    assert told({"name": "clip"}, Clip(99.0)) == []
    assert told({"name": "clip"}) == ["replies must pass the transform 'clip' (require.transforms)"]


def test_each_of_several_must_meet_every_bound() -> None:
    """A second clip that is loose must not hide behind a first that is tight; nor one bound behind another."""
    said = told({"name": "clip", "bound_at_most": 1.0}, Clip(0.5), Clip(2.0), Clip(3.0))
    assert [text.split(",")[0] for text in said] == ["clip: bound is 2.0", "clip: bound is 3.0"]
    both: dict[str, str | float | int] = {"name": "gaussian", "multiplier_at_least": 1.0, "share_at_most": 1}
    assert len(told(both, Gaussian(0.5, 2))) == 2
    assert len(list(transform_problems([both, {"name": "clip"}], ()))) == 2
    assert list(transform_problems([], (Clip(1.0),))) == []


@pytest.mark.parametrize(
    "wanted",
    [
        {"name": "clip"},
        {"name": "clip", "bound_at_most": 1},
        {"name": "gaussian", "multiplier_at_least": 0.5, "share_at_most": 3},
        {"name": "secure-sum", "threshold_at_least": 4},
    ],
)
def test_what_a_policy_may_require(wanted: dict[str, Any]) -> None:
    assert list(unknown_transforms([wanted])) == []


def test_every_unknown_name_key_and_value_is_told_at_once() -> None:
    said = list(
        unknown_transforms(
            [
                {"name": "clipp"},
                {"bound_at_most": 1.0},
                {"name": "clip", "bound": 1.0, "size_at_most": 2.0, "bound_at_most": "x"},
                {"name": "gaussian", "multiplier_at_least": "much", "share_at_most": 2},
            ]
        )
    )
    assert len(said) == 6
    assert 'Did you mean "clip"?' in said[0]
    assert "None" in said[1]
    assert said[2:] == [
        "clip has no 'bound'; write bound_at_least",
        "clip has no 'size_at_most'; write bound_at_least",
        "clip: bound_at_most must be a number",
        "gaussian: multiplier_at_least must be a number",
    ]


def test_both_directions_are_read_from_the_ending_alone() -> None:
    """``bound_at_most_at_least`` is the field ``bound_at_most``, which no transform has."""
    (said,) = unknown_transforms([{"name": "clip", "bound_at_most_at_least": 1.0}])
    assert said.startswith("clip has no 'bound_at_most_at_least'")
