"""Which methods a study can run as it stands: for a panel of every data set with every method that fits."""

from collections.abc import Mapping
from typing import Any

from polyclinic.data.federation import federate
from polyclinic.methods import registry
from polyclinic.studies.config.method_plan import plan_of
from polyclinic.studies.config.study_config import checked


def with_every_method(data: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The study ``data`` with every method that fits, where it names none; and who was left out, each with the reason.

    A method fits where it is for the task, needs nothing that only a person can say, and can be built with the
    study's network, training and sites. Reads the data to know them.

    Raises:
        DataError: Where they cannot be read.
    """
    whole = dict(data)
    if "methods" in whole:
        return whole, ()
    study, problems = checked({**whole, "methods": [{"name": "fedavg"}]})
    if problems or study is None:
        return whole, ()  # whoever reads the study tells them
    found = federate(study.data, study.seeds[0])
    kept, out = [], []
    for name in registry.names():
        one, wrong = checked({**whole, "methods": [{"name": name}]})
        reason = "; ".join(problem.says for problem in wrong)
        if one is not None:
            try:
                plan_of(one, one.methods[0], found, study.seeds[0]).build_method()
            except ValueError as error:
                reason = str(error)
        if reason:
            out.append(f"{name} is left out: {reason}")
        else:
            kept.append({"name": name})
    return {**whole, "methods": kept}, tuple(out)
