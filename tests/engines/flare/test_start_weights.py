"""Start weights between hospitals: each site has its own copy, and nothing but trained tensors travels."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from polyclinic.cli import site as commands
from polyclinic.cli import weights as weight_commands
from polyclinic.engines.flare.client import training_process
from polyclinic.engines.flare.client.reviews import Reviews
from polyclinic.engines.flare.protocol.paths import WEIGHTS, ServerFolder, SiteFolder
from polyclinic.engines.flare.protocol.run_request import InvalidRunRequest
from polyclinic.engines.flare.server import server_setup
from polyclinic.engines.flare.server.job_queue import FAILED
from polyclinic.engines.flare.server.run_coordinator import write_failure
from polyclinic.engines.local.in_process import InProcess
from polyclinic.engines.policy.site_policy import parse
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.task_evaluation import evaluate
from polyclinic.learning.weights import store
from polyclinic.testing import equal
from tests.conftest import little_sites
from tests.engines.flare.test_exchange import reference, run, state_of
from tests.support.local_deployment import approve, hospital, order
from tests.support.start_weights import weights_of

NET = Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2)))


@pytest.fixture(autouse=True)
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(WEIGHTS, str(tmp_path / "weights"))
    return tmp_path / "weights"


def tuning(sha256: str, **more: Any) -> dict[str, Any]:
    return {"plan": {"tuning": {"weights": {"sha256": sha256}, **more}}}


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("fedavg", {"train": ["head"]}),
        ("rolora", {"train": ["adapters", "head"], "lora": {"rank": 2, "alpha": 4.0}}),
    ],
)
def test_three_sites_train_what_was_chosen_and_give_the_bits_of_one_process(
    method: str, more: dict[str, Any], tmp_path: Path
) -> None:
    an = order(method, **tuning(weights_of(NET).sha256, **more))
    homes = hospital(tmp_path)
    for home in homes.values():
        approve(home, an)
    _, carrier = run(tmp_path, an, homes)
    state = state_of(tmp_path, an)
    assert equal(state, reference(an)[0])
    assert all(name.startswith("head.") or ".lora_" in name for name in state.params)
    assert {call.job for call in carrier.calls} >= {"train"}


def test_a_site_without_the_weights_refuses_before_anything_is_built(tmp_path: Path) -> None:
    sha256 = weights_of(NET).sha256
    plan = order(**tuning(sha256, train=["head"])).build_plan()
    policy = parse(b"")
    assert policy.weights_problems(plan, {}) == []
    assert parse(f"[allow]\nweights = ['{sha256}']".encode()).weights_problems(plan, {}) == []
    (reason,) = parse(b"[allow]\nweights = []").refusals(plan)
    assert reason == f"the plan needs the start weights {sha256}, which the policy does not allow (allow.weights)"
    store.remove(store.find(sha256))
    (reason,) = policy.refusals(plan)
    assert reason.startswith(f"the start weights {sha256[:12]}... are not in the store")
    assert "polyclinic site weights add" in reason


def test_a_server_without_the_weights_queues_nothing_and_a_run_that_lost_them_fails(tmp_path: Path) -> None:
    sha256 = weights_of(NET).sha256
    an = order(**tuning(sha256, train=["head"]))
    server_setup.check_buildable(an.build_plan())
    store.remove(store.find(sha256))
    with pytest.raises(InvalidRunRequest, match=f"cannot be built: the start weights {sha256[:12]}.* not in the store"):
        server_setup.order(ServerFolder(tmp_path), an)
    write_failure(tmp_path / "run", "the start weights are gone")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["phase"], status["why"], status["round"]) == (FAILED, "the start weights are gone", 0)


def test_the_hash_of_a_method_covers_its_start_weights() -> None:
    plain, other = order(), order(**tuning("1" * 64))
    assert plain.method_hash != other.method_hash != order(**tuning("2" * 64)).method_hash
    assert "tuning" not in plain.build_plan().to_json()


def test_a_review_shows_the_weights_and_whether_they_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = hospital(tmp_path, count=1)["site-0"]
    source = store.find(weights_of(NET).sha256).path
    an = order(**tuning(store.hash_of(source), train=["head"]))
    Reviews(home.reviews).offer(an, ())
    commands.review(an.run, home=home.path)
    text = capsys.readouterr().out
    assert f"{store.hash_of(source)}: NOT here. Add the file" in text
    assert 'tuning.train = ["head"]' in text
    weight_commands.add_at_site(source, name="uni", license="CC-BY-NC-4.0", origin="a colleague", home=home.path)
    assert (home.weights / store.hash_of(source) / "weights.safetensors").is_file()
    capsys.readouterr()
    commands.review(an.run, home=home.path)
    text = capsys.readouterr().out
    assert f"{store.hash_of(source)}: here" in text
    assert "uni, 0.0 MB, license CC-BY-NC-4.0; a colleague" in text


def test_training_processes_use_the_store_of_their_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}

    class Stop(Exception):
        pass

    def start(*args: Any, env: dict[str, str], **more: Any) -> None:
        seen.update(env)
        raise Stop

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(Stop):
        training_process.TrainingProcess(tmp_path / "site", "run-1", tmp_path / "log", lambda: False).warm()
    assert seen[WEIGHTS] == str(SiteFolder(tmp_path / "site").weights)
    assert store.VARIABLE == WEIGHTS


def test_a_frozen_model_scores_at_hospitals_as_on_one_machine(tmp_path: Path) -> None:
    """External validation without training: the start weights with their head are evaluated as they are, bit for bit."""
    start = {"sha256": weights_of(NET).sha256, "head": True}
    an = order("frozen", rounds=1, test="score/test", score_every=1, plan={"tuning": {"weights": start}})
    homes = hospital(tmp_path)
    for home in homes.values():
        approve(home, an)
    run(tmp_path, an, homes)
    state = state_of(tmp_path, an)
    method = an.build_plan().build_method()
    params = method.task.first(an.build_plan().seed)
    assert equal(state.params, params)
    engine = InProcess(method, little_sites())
    here = evaluate(method, engine, method.init(params), sorted(homes), "score/test")
    lines = next(tmp_path.rglob("records.jsonl")).read_text().splitlines()
    there = {fact["site"]: fact["metrics"] for fact in map(json.loads, lines) if fact["kind"] == "test"}
    assert there == {s: {k: float(v) for k, v in leaves.items() if k != "n"} for s, leaves in here.items()}
    assert len(there) == 3
