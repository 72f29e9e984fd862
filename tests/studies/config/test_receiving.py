"""``receive`` in a study file: what sites get is smaller, on both engines, after a stop, with attackers, and by policy."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.known import known

pytest.importorskip("zstandard", reason="needs polyclinic[privacy]")

from pathlib import Path

from polyclinic.core import tree
from polyclinic.core.execution import Refused, execute
from polyclinic.core.site import Site
from polyclinic.engines.plan import Plan
from polyclinic.engines.policy.site_policy import DEFAULT, Enforced
from polyclinic.engines.policy.site_policy import parse as policy_of
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.config.validation import method_problems
from tests.conftest import blobs
from tests.support.small_runs import facts, go, npz, stopped_and_resumed

STUDY = """\
name = "small"
rounds = 3
seeds = [0]
[data]
path = "{path}"
kind = "npz"
sites = "site"
[task]
options = {{ width = 4, depth = 2 }}
[training]
batch_size = 8
[engine]
kind = "{engine}"
workers = 2
parallel = "sites"
{more}
[[methods]]
name = "fedavg"
label = "whole"
[[methods]]
name = "fedavg"
uplink = [{{ name = "int8" }}]
downlink = [{{ name = "int8" }}, {{ name = "zstd" }}]
"""


def ran(folder: Any, engine: Any = "in-process", more: Any = "") -> Any:
    go(STUDY.format(path=npz(folder), engine=engine, more=more), folder / "run")
    return folder / "run"


def model(run: Any) -> Any:
    from safetensors.torch import load_file

    return load_file(run / "arms" / "fedavg-seed0" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process."""
    return ran(tmp_path_factory.mktemp("whole"))


def test_both_engines_give_the_same_bits_and_count_what_travels(whole: Path, tmp_path: Path) -> None:
    ours, theirs = model(whole), model(ran(tmp_path, "workers"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    down = {line["method"]: sum(line["bytes_down"].values()) for line in facts(whole) if line["kind"] == "round"}
    assert down["fedavg"] < 0.8 * down["whole"]  # a model this small is names and frames for the most part


def test_stopped_anywhere_it_goes_on_to_the_same_bits(whole: Path, tmp_path: Path) -> None:
    expected = model(whole)
    text = STUDY.format(path=npz(tmp_path), engine="in-process", more="")
    for stop_after in (3, 7):
        path = tmp_path / f"stopped-{stop_after}"
        stopped_and_resumed(text, path, stop_after)
        again = model(path)
        assert all(torch.equal(expected[name], again[name]) for name in expected), stop_after


def test_attackers_receive_it_too(tmp_path: Path) -> None:
    attack = '[attack]\nname = "sign-flip"\nattackers = 1'
    text = STUDY.format(path=npz(tmp_path), engine="in-process", more=attack).replace(
        'uplink = [{ name = "int8" }]\n', ""
    )
    go(text, tmp_path / "run")
    assert model(tmp_path / "run")


def test_mistakes_are_told_and_studies_without_it_keep_their_hash(tmp_path: Path) -> None:
    said = method_problems(
        {"name": "fedavg", "downlink": [{"name": "int9"}, {"name": "zstd", "levle": 1}]}, ("methods", 0)
    )
    assert [problem.path[:4] for problem in said] == [("methods", 0, "downlink", 0), ("methods", 0, "downlink", 1)]
    text = STUDY.format(path="x.npz", engine="in-process", more="")
    without = text.replace('downlink = [{ name = "int8" }, { name = "zstd" }]\n', "")
    assert "receive" not in without
    assert parse(text).hash != parse(without).hash == parse(without + "downlink = []\n").hash
    wrong = text.replace('[{ name = "int8" }, { name = "zstd" }]', '[{ name = "sign" }]')
    with pytest.raises(ValueError, match="Sign cannot compress requests"):
        go(wrong.replace("x.npz", str(npz(tmp_path))), tmp_path / "run")


def test_a_policy_looks_at_the_model_behind_it() -> None:
    plan = Plan(
        "classification",
        "cnn",
        (1, 8, 8),
        2,
        "fedavg",
        ("a", "b", "c"),
        3,
        network_options={"width": 8, "norm": "group"},
        training={"batch_size": 8},
        downlink=({"name": "bf16"}, {"name": "zstd"}),
    )
    assert Plan.from_json(plan.to_json()).hash == plan.hash
    method, rules = plan.build_method(), Enforced(policy_of(DEFAULT.encode()), plan)
    first = plan.build_task().first(0)
    request, site = known(method.request(method.init(first))), Site("a", {"train": blobs(0, 12, (1, 8, 8))})
    reply, _ = execute(method, request, {}, site, rules)
    assert reply.mean("update").weight == 12
    for wrong, why in (
        (tree.scale(first, float("nan")), "NaN or infinity"),
        ({"other": torch.ones(3)}, "does not have"),
    ):
        with pytest.raises(Refused, match=why):
            execute(method, known(method.request(method.init(wrong))), {}, site, rules)
    torn = {"received": {"zstd": request.trees["received"]["zstd"][:40]}}
    with pytest.raises(Refused, match="the server's message cannot be read"):
        execute(method, replace(request, trees=torn), {}, site, rules)
