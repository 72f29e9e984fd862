"""A finished method run, of which the sites are asked something more: attribution maps, or pictures of cases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from polyclinic.core import serialization as states
from polyclinic.core.execution import Policy
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.data.federation import Federated
from polyclinic.data.source import Source
from polyclinic.engines.local.in_process import InProcess
from polyclinic.errors import RunError
from polyclinic.evaluation.records.method_runs import arm_name
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.studies.run.data_identity import read_again
from polyclinic.studies.run.run_directory import read_plan


class NotFinished(RunError, ValueError):
    """A run without a model that sites could be asked about. The message gives the reason."""


@dataclass(frozen=True)
class FinishedMethod:
    """A finished method run with its sites.

    Attributes:
        folder: The folder of the method run.
        method: The method.
        state: Its state in the round that was tested.
        seed: Its seed.
        data: Its data.
        source: The source of these.
        engine: The sites, with what they keep between rounds.
        untrained: The sites as before the first round.
    """

    folder: Path
    method: Any
    state: Any
    seed: int
    data: Federated
    source: Source
    engine: InProcess
    untrained: InProcess

    def ask(self, job: str, sites: Sequence[str], trained: bool = True) -> tuple[dict[str, Tree], dict[str, str]]:
        """Request ``job`` from ``sites`` one by one, so that each refusal has its own reason.

        Args:
            job: The job, such as ``explain/val``.
            sites: The sites.
            trained: Whether the models that were tested are used, or those before training.

        Returns:
            The answers by site, and the reasons of the sites without one.
        """
        answers, refused = dict[str, Tree](), dict[str, str]()
        engine = self.engine if trained else self.untrained
        state = self.state if trained else self.method.init(self.method.task.first(self.seed))
        request = self.method.evaluation_request(state)
        for site in sites:
            engine.send(replace(request, job=job, secure=False, recipients=None), [site])
            for arrival in engine.replies():
                if arrival.reply is None:
                    refused[site] = arrival.lost
                elif (verb := job.partition("/")[0]) in arrival.reply.parts:
                    answers |= arrival.reply.gather(verb)
        return answers, refused


def finished_method(
    run_dir: str | Path, label: str = "", seed: int | None = None, policies: Mapping[str, Policy] | None = None
) -> FinishedMethod:
    """Return a finished method run whose data are still available.

    Args:
        run_dir: The run.
        label: Label of the method; by default the headline method of the report.
        seed: Seed of the method run; by default the first.
        policies: Policies of sites. A site without one allows everything.

    Raises:
        NotARun: If the folder is not a run.
        DataChanged: If the data are not those that the run began with.
        NotFinished: If the method run is not finished.
    """
    from polyclinic.evaluation.run_evaluation import evaluate

    run = read_run(run_dir)
    if not label and (headline := evaluate(run).headline) is None:
        raise NotFinished(f"{run.path}: no method has been tested yet")
    label, seed = label or str(headline), run.info.seeds[0] if seed is None else seed
    folder = run.path / "arms" / arm_name(label, seed, 0 if run.info.folds else None)
    if not (folder / "model.safetensors").is_file():
        raise NotFinished(f"{folder}: no model; the method run is not finished, or the run has no method {label!r}")
    _, source, data = read_again(run, seed)
    method = read_plan(folder / "model.safetensors").build_method()
    end = states.load(folder / "checkpoint.safetensors")
    kept = states.load(folder / "best.safetensors") if end.best_round else end  # the model that was tested
    make = partial(Site, device="cpu", seed=seed)
    sites = {name: make(name, dict(roles)) for name, roles in data.sites.items()}
    engine, untrained = (InProcess(method, sites, memory, policies, seed) for memory in (kept.memory, None))
    return FinishedMethod(folder, method, kept.state, seed, data, source, engine, untrained)
