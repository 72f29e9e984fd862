"""Selection of the methods that a study can run without changes, for a panel of data sets with every such method."""

from collections.abc import Mapping
from typing import Any

from polyclinic.data.federation import federate
from polyclinic.methods import registry
from polyclinic.studies.config.method_plan import plan_of
from polyclinic.studies.config.study_config import checked


def with_every_method(data: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Add every compatible method to the study ``data`` if it names none. Also return a note on each omitted method.

    A method is compatible if it supports the task, has no required options, and can be built with the study's network,
    training and sites. This reads the data.

    Raises:
        DataError: If the data cannot be read.
    """
    whole = dict(data)
    if "methods" in whole:
        return whole, ()
    study, problems = checked({**whole, "methods": [{"name": "fedavg"}]})
    if problems or study is None:
        return whole, ()  # the problems are reported when the study is read
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
