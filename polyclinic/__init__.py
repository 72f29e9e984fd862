"""Federated learning for medical image analysis.

The public interface. Names are imported on first use, so that ``import polyclinic`` loads neither PyTorch nor NumPy:

>>> import polyclinic as pc
>>> import torch
>>> mean = pc.WeightedMean.of({"w": torch.tensor([1.0])}, 1) + pc.WeightedMean.of({"w": torch.tensor([4.0])}, 2)
>>> mean.value
{'w': tensor([3.])}

Other modules and names may change in any release; see docs/explanation/release-policy.md.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from polyclinic.core import tree as tree
    from polyclinic.core.aggregates import ElementwiseMean as ElementwiseMean
    from polyclinic.core.aggregates import PerSite as PerSite
    from polyclinic.core.aggregates import PerSiteUniform as PerSiteUniform
    from polyclinic.core.aggregates import Reply as Reply
    from polyclinic.core.aggregates import WeightedMean as WeightedMean
    from polyclinic.core.aggregates import merge as merge
    from polyclinic.core.method import Method as Method
    from polyclinic.core.method import Request as Request
    from polyclinic.core.pipeline import send_through as send_through
    from polyclinic.core.rounds import train as train
    from polyclinic.core.serialization import savable as savable
    from polyclinic.core.site import Site as Site
    from polyclinic.core.tree import Tree as Tree
    from polyclinic.core.tree import Trees as Trees
    from polyclinic.engines.local.in_process import InProcess as InProcess
    from polyclinic.errors import ConfigError as ConfigError
    from polyclinic.errors import DataError as DataError
    from polyclinic.errors import IntegrityError as IntegrityError
    from polyclinic.errors import MissingDependency as MissingDependency
    from polyclinic.errors import PolicyRefusal as PolicyRefusal
    from polyclinic.errors import PolyclinicError as PolyclinicError
    from polyclinic.errors import ProtocolError as ProtocolError
    from polyclinic.errors import RunError as RunError
    from polyclinic.evaluation.records.run_reader import read_run as read_run
    from polyclinic.evaluation.run_evaluation import evaluate as evaluate
    from polyclinic.learning.tasks.classification import Classification as Classification
    from polyclinic.learning.tasks.classification import MultiLabel as MultiLabel
    from polyclinic.learning.tasks.mr_reconstruction import Reconstruction as Reconstruction
    from polyclinic.learning.tasks.regression import Regression as Regression
    from polyclinic.learning.tasks.segmentation import Segmentation as Segmentation
    from polyclinic.learning.tasks.survival import Survival as Survival
    from polyclinic.learning.tasks.task import Task as Task
    from polyclinic.learning.training.local import LocalTraining as LocalTraining
    from polyclinic.methods.optimization.fedavg import FedAvg as FedAvg
    from polyclinic.python_studies import augmentation as augmentation
    from polyclinic.python_studies import experiment as experiment
    from polyclinic.python_studies import loss as loss
    from polyclinic.python_studies import metric as metric
    from polyclinic.python_studies import network as network
    from polyclinic.python_studies import training as training
    from polyclinic.report.report_builder import build_report as build_report
    from polyclinic.studies.config.study_config import Study as Study
    from polyclinic.studies.config.study_config import parse as parse
    from polyclinic.studies.config.study_config import read as load_study  # noqa: F401
    from polyclinic.studies.run.scheduler import run as run
    from polyclinic.testing import check_augmentation as check_augmentation
    from polyclinic.testing import check_method as check_method
    from polyclinic.testing import check_metric as check_metric
    from polyclinic.testing import check_network as check_network

_HOMES = {
    "ElementwiseMean": "core.aggregates",
    "PerSite": "core.aggregates",
    "PerSiteUniform": "core.aggregates",
    "Reply": "core.aggregates",
    "WeightedMean": "core.aggregates",
    "merge": "core.aggregates",
    "Method": "core.method",
    "Request": "core.method",
    "send_through": "core.pipeline",
    "train": "core.rounds",
    "savable": "core.serialization",
    "Site": "core.site",
    "Tree": "core.tree",
    "Trees": "core.tree",
    "InProcess": "engines.local.in_process",
    "ConfigError": "errors",
    "DataError": "errors",
    "IntegrityError": "errors",
    "MissingDependency": "errors",
    "PolicyRefusal": "errors",
    "PolyclinicError": "errors",
    "ProtocolError": "errors",
    "RunError": "errors",
    "read_run": "evaluation.records.run_reader",
    "evaluate": "evaluation.run_evaluation",
    "Classification": "learning.tasks.classification",
    "MultiLabel": "learning.tasks.classification",
    "Reconstruction": "learning.tasks.mr_reconstruction",
    "Regression": "learning.tasks.regression",
    "Segmentation": "learning.tasks.segmentation",
    "Survival": "learning.tasks.survival",
    "Task": "learning.tasks.task",
    "LocalTraining": "learning.training.local",
    "FedAvg": "methods.optimization.fedavg",
    "augmentation": "python_studies",
    "experiment": "python_studies",
    "loss": "python_studies",
    "metric": "python_studies",
    "network": "python_studies",
    "training": "python_studies",
    "build_report": "report.report_builder",
    "Study": "studies.config.study_config",
    "parse": "studies.config.study_config",
    "load_study": "studies.config.study_config",
    "run": "studies.run.scheduler",
    "check_augmentation": "testing",
    "check_method": "testing",
    "check_metric": "testing",
    "check_network": "testing",
}
"""The module that defines each public name, below ``polyclinic``."""
_RENAMED = {"load_study": "read"}

__all__ = ["__version__", "tree", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name == "tree":
        return import_module(f"{__name__}.core.tree")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), _RENAMED.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
