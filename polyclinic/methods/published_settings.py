"""Settings with which methods were published: ``polyclinic new --method`` writes them into a study.

They were chosen for other data. They are a starting point, not a recommendation; a comparison of methods should tune
all of them with the same number of trials (``[search]``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from polyclinic.methods.catalog import canonical


@dataclass(frozen=True)
class Published:
    """The settings of one method in one experiment.

    Attributes:
        source: The paper or code that states them, and for which data.
        rounds: Number of rounds.
        options: Options of the method.
        training: Keys of ``[training]``.
    """

    source: str
    rounds: int
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)


_ISIC = "FLamby (NeurIPS 2022), config_isic2019.json: skin lesions of six hospitals, EfficientNet"
_DIGITS = "federated/fed_digits.py of the authors' code: digits of five data sets, a small CNN"


def _isic(local_lr: float, **options: Any) -> Published:
    """Return settings of FLamby's benchmark of skin lesions: 9 rounds of 100 steps of SGD."""
    return Published(_ISIC, 9, options, {"steps": 100, "batch_size": 64, "optimizer": "sgd", "lr": local_lr})


PUBLISHED: Mapping[str, Published] = {
    "fedavg": _isic(0.01),
    "fedprox": _isic(0.01, mu=0.001),
    "scaffold": _isic(0.01, lr=1.0, uniform=False),
    "cyclic": _isic(0.0031622776601683),
    "fedadagrad": _isic(0.01, lr=0.0316227766016837, beta1=0.9),
    "fedadam": _isic(0.01, lr=0.0031622776601683, beta2=0.999),
    "fedyogi": _isic(0.01, lr=0.0031622776601683, beta2=0.999),
    "fedbn": Published(
        _DIGITS, 100, {"uniform": True}, {"epochs": 1, "batch_size": 32, "optimizer": "sgd", "lr": 0.01}
    ),
    "moon": Published(
        "README of the authors' code: CIFAR-10 at ten sites, a small CNN",
        100,
        {"mu": 5.0},
        {"epochs": 10, "optimizer": "sgd", "lr": 0.01},
    ),
    "cfl": Published(
        "clustered_federated_learning.ipynb of the authors' code: EMNIST at ten sites, a small CNN",
        80,
        {"mean_below": 0.4, "largest_above": 1.6, "start_round": 20},
        {"epochs": 1, "batch_size": 128, "lr_decay": 0.99},
    ),
    "harmofl": Published(
        "federated/fed_train.py of the authors' code: histology of five hospitals, DenseNet-121",
        100,
        {"alpha": 0.05, "uniform": True},
        {
            "epochs": 1,
            "batch_size": 128,
            "optimizer": "sgd",
            "lr": 0.001,
            "momentum": 0.9,
            "weight_decay": 0.0001,
            "keep_optimizer": True,
        },
    ),
    "feddg": Published(
        "train_ELCFS.py of the authors' code: fundus photographs of four hospitals, one of them unseen, a U-Net",
        100,
        {"step": 0.001, "boundary": 0.1, "temperature": 0.05},
        {"epochs": 1, "batch_size": 5, "optimizer": "adam", "lr": 0.001, "keep_optimizer": True},
    ),
    "iop-fl": Published(
        "federated/configs.py of the authors' code: prostate MRI of six hospitals, one of them unseen, a U-Net",
        500,
        {"alpha": 0.1},
        {"epochs": 1, "batch_size": 5, "optimizer": "adam", "lr": 0.001},
    ),
    "fedirm": Published(
        "options.py and local_unsupervised.py of the authors' code: hemorrhage in head CT at ten sites, DenseNet-121",
        200,
        {"consistency": 15.0, "growth": 0.15, "keep": 0.99, "confidence": 0.3},
        {
            "epochs": 1,
            "batch_size": 48,
            "optimizer": "adam",
            "lr": 0.0002,
            "weight_decay": 0.0005,
            "keep_optimizer": True,
        },
    ),
    "fednoro": Published(
        "utils/options.py of the authors' code: hemorrhage in head CT at twenty sites, ResNet-18",
        100,
        {"warmup": 0.1, "growth": 0.4, "most": 0.8, "temperature": 0.8},
        {"epochs": 5, "batch_size": 16, "optimizer": "adam", "lr": 0.0003, "weight_decay": 0.0005},
    ),
    "lc-fed": Published(
        "scripts/train_multi_lcfed.py of the authors' code: fundus, prostate and polyps at four to six sites",
        300,
        {"head_steps": 10},
        {"epochs": 1, "batch_size": 6, "optimizer": "adam", "lr": 0.001},
    ),
    "fediic": Published(
        "train_FedIIC.py of the authors' code: skin lesions at ten sites, EfficientNet",
        200,
        {"within_weight": 2.0, "across_weight": 2.0, "difficulty": 0.25},
        {"epochs": 1, "batch_size": 2, "optimizer": "adam", "lr": 0.0003, "weight_decay": 0.0005},
    ),
    "fedism": Published(
        "code/utils/options.py of the authors' code: hemorrhage in head CT and skin lesions at twenty sites, ResNet-18",
        300,
        {"rho": 0.05, "surrogate": 0.1, "q": 1.0, "beta": 0.5},
        {"epochs": 1, "batch_size": 32, "optimizer": "adam", "lr": 0.0003, "weight_decay": 0.0005},
    ),
    "fedcorr": Published(
        "util/options.py of the authors' code: CIFAR-10 at a hundred sites, a residual network; 5 + 200 + 200 rounds",
        405,
        {"first": 5 / 405, "second": 200 / 405, "beta": 5.0, "ratio": 0.5, "confidence": 0.5, "clean": 0.1},
        {"epochs": 5, "batch_size": 10, "optimizer": "sgd", "lr": 0.03, "momentum": 0.5},
    ),
    "feda3i": Published(
        "code/utils/options.py of the authors' code: skin lesions, a U-Net",
        100,
        {"warmup": 0.1, "enlarging": 0.5},
        {"epochs": 5, "batch_size": 8, "optimizer": "adam", "lr": 0.005},
    ),
    "fedmlp": Published(
        "utils/options.py of the authors' code: findings in head CT at eight sites, ResNet-18",
        500,
        {"warmup": 0.1, "without": 0.005, "having": 0.01},
        {"epochs": 1, "batch_size": 32, "optimizer": "adam", "lr": 0.00003, "weight_decay": 0.0005},
    ),
}
"""By method. Others have no entry: their settings were not found, or cannot be written as a study."""


def published(name: str) -> Published | None:
    """Return the published settings of the method called ``name``; None if there is no entry."""
    return PUBLISHED.get(canonical(name))
