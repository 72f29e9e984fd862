"""Where an ε would be printed, a method whose releases it does not cover is refused: in studies, at sites, and by the command."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polyclinic.cli.app import app
from polyclinic.core.aggregates import PerSite, Reply
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.engines.policy import site_policy as policies
from polyclinic.engines.policy.coverage import typical
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods import registry
from polyclinic.methods.catalog import METHODS, Entry
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.studies.audits.release_command import audit_release
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run import deployment
from polyclinic.studies.run.scheduler import run
from tests.support.small_runs import npz

TEXT = """
name = "private"
rounds = 2
[data]
kind = "npz"
path = "{path}"
sites = "site"
[task]
network = "cnn"
options = {{ width = 4, depth = 2, norm = "group" }}
[training]
batch_size = 8
"""
DP = 'private = { noise = 1.0, bound = 1.0, unit = "record" }\n'
NOISE = 'uplink = [{ name = "clip", bound = 1.0 }, { name = "gaussian", multiplier = 1.0 }]\n'


@dataclass(frozen=True)
class Tells(FedAvg):
    """FedAvg that also says how bright its brightest image is."""

    tells: bool = True

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        reply, memory = super().site_update(request, memory, site)
        x, _ = site.data["train"][torch.arange(len(site.data["train"]))]
        more = {"bright": PerSite({site.name: {"x": x.amax()[None]}})} if self.tells else {}
        return Reply({**reply.parts, **more}), memory


def mine(task: Task, local: LocalTraining, *, tells: bool = True) -> Tells:
    """A method of another package."""
    return Tells(task, local, tells=tells)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Entry("mine", f"{__name__}:mine", "from an installed package", "mine")
    monkeypatch.setattr(registry, "plugins", lambda: {"mine": made})


@pytest.mark.parametrize(
    ("method", "how", "why"),
    [
        (
            "mime-lite",
            DP,
            r"private training .* does not cover what mime-lite sends \(in addition to the update it sends the exact grad",
        ),
        ("ifca", DP, "which cluster a site chose"),
        ("krum", NOISE, "noise on its replies does not cover what krum sends"),
        ("q-ffl", DP, r"use fedavg, [\w-]+, [\w-]+ or another"),
    ],
)
def test_a_study_refuses_what_its_noise_does_not_cover(tmp_path: Path, method: str, how: str, why: str) -> None:
    body = TEXT.format(path=tmp_path)
    for budget in ("", "[privacy]\nepsilon = 8.0\ndelta = 1e-3\n"):
        text = (
            (body + how if how == DP else body)
            + budget
            + f'[[methods]]\nname = "{method}"\n'
            + (how if how != DP else "")
        )
        with pytest.raises(BadStudy, match=why) as refused:
            parse(text)
        assert any(key.startswith("methods[1].name") for _, key, _ in refused.value.lines)
        assert parse(text, covered=False).methods[0].name == method
        open_ = text.replace(how, "")
        assert parse(open_).methods[0].name == method, "without noise no ε is printed, and the method runs"


def test_covered_methods_and_local_training_are_not_refused(tmp_path: Path) -> None:
    names = [name for name, line in METHODS.items() if "dp-sgd" in line.private and not (line.tasks or line.network)]
    assert len(names) > 40
    for name in [*names, "local"]:
        assert parse(TEXT.format(path=tmp_path) + DP + f'[[methods]]\nname = "{name}"\n').methods[0].name == name


def test_all_uncovered_methods_are_told_at_once_and_nothing_goes_to_hospitals(tmp_path: Path) -> None:
    text = TEXT.format(path=tmp_path) + DP + "".join(f'[[methods]]\nname = "{n}"\n' for n in ("afl", "fedavg", "fedce"))
    with pytest.raises(BadStudy, match="2 problems, nothing was run"):
        parse(text)
    found, _ = deployment.method_runs(
        parse(text.replace('name = "afl"', 'name = "fedprox"').replace("fedce", "moon")), ["a", "b"]
    )
    assert len(found) == 3


def test_a_site_refuses_what_noise_does_not_cover() -> None:
    for rules in (b"", b"[privacy]\nepsilon = 8.0\ndelta = 1e-3\n"):
        policy = policies.parse(rules)
        for name in ("mime-lite", "fedsm", "q-ffl"):
            [problem] = policy.refusals(typical(name, "dp-sgd"))
            assert f"does not cover what {name} sends" in problem
        [problem] = policy.refusals(typical("ccvr", "gaussian"))
        assert "noise on its replies does not cover what ccvr sends" in problem
        with pytest.raises(ValueError, match="needs each site's reply, and Gaussian is decoded on a sum"):
            policy.refusals(replace(typical("ida", "dp-sgd"), uplink=typical("fedavg", "gaussian").uplink))
        assert policy.refusals(typical("fedavg", "dp-sgd")) == []
        assert policy.refusals(typical("fedavg", "gaussian")) == []
    open_ = replace(typical("mime-lite", "dp-sgd"), training={"lr": 0.1})
    assert policies.parse(b"").refusals(open_) == []


@pytest.mark.usefixtures("plugin")
def test_a_method_of_another_package_is_audited_and_refused(tmp_path: Path) -> None:
    path = npz(tmp_path)
    text = TEXT.format(path=path) + DP + '[[methods]]\nname = "mine"\n'
    study = parse(text)
    with pytest.raises(
        BadStudy,
        match=r"the part 'bright' of the job 'train' contains numbers that do not come from mechanisms.*: use fedavg",
    ):
        list(run(study, text, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    plan = replace(typical("fedavg", "dp-sgd"), method="mine")
    assert any("'bright'" in problem for problem in policies.parse(b"").refusals(plan))
    honest = replace(plan, options={"tells": False})
    assert policies.parse(b"").refusals(honest) == []
    assert policies.parse(b"").refusals(replace(plan, training={"lr": 0.1})) == [], "no noise, no ε"
    [dp, _] = audit_release("mine")
    assert not dp.verdict.covered
    [one] = audit_release(str(written(tmp_path, text)))
    assert (one.label, one.noise, one.verdict.covered) == ("mine", "private training (DP-SGD)", False)


def written(folder: Path, text: str) -> Path:
    file = folder / "study.toml"
    file.write_text(text)
    return file


def command(*args: str) -> int:
    try:
        app(["audit", "release", *args], result_action="return_value")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command_tells_and_exits_with_one(capsys: Any, tmp_path: Path) -> None:
    assert command("fedavg") == 0
    told = capsys.readouterr().out
    assert "✓ fedavg, private training (DP-SGD)" in told
    assert "✓ fedavg, clip and noise on replies" in told
    assert command("fedsm") == 1
    told = capsys.readouterr().out
    assert "the part 'selector' of the job 'train'" in told
    assert "use fedavg, " in told
    assert command("fedsm", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["covered"] is False
    assert found["audits"][0]["findings"][0]["part"] == "selector"
    with pytest.raises(registry.UnknownMethod, match='Did you mean "fedavg"'):
        command("fedavgg")
    path = npz(tmp_path)
    text = TEXT.format(path=path) + '[[methods]]\nname = "mime-lite"\n' + f"training = {{ {DP.strip()} }}\n"
    text += '[[methods]]\nname = "fedavg"\n'
    assert command(str(written(tmp_path, text))) == 1
    told = capsys.readouterr().out
    assert "✗ mime-lite" in told
    assert "✗ fedavg" not in told, "fedavg adds no noise here"
    assert command(str(written(tmp_path, text.replace("mime-lite", "fedprox")))) == 0
    with pytest.raises(BadStudy, match="no ε is claimed and none is audited"):
        command(str(written(tmp_path, TEXT.format(path=tmp_path) + '[[methods]]\nname = "fedavg"\n')))
