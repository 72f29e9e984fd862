"""Methods that have no effect, or nothing to send, unless certain parts of the network are trained.

Every method runs on a network of which parts are frozen, because frozen tensors are in no tree. But FedBN without a
trained normalization layer is FedAvg, and FedPer with only the head trained shares nothing. Such studies are refused.
"""

from collections.abc import Mapping
from typing import Literal

from polyclinic.learning.networks.adapters import DOWN, is_factor
from polyclinic.learning.networks.fine_tuning import FineTuned
from polyclinic.learning.networks.model_tree import inspect
from polyclinic.learning.tasks.task import Task
from polyclinic.methods.catalog import canonical

Part = Literal["adapters", "body", "encoder", "head", "layers", "normalization", "statistics"]
WORDS: Mapping[Part, str] = {
    "adapters": "adapters ([task.lora])",
    "body": "tensors before the head",
    "encoder": "tensors of the encoder",
    "head": "tensors of the head",
    "layers": 'weights of the layers that have adapters (train = ["adapters", "head", "*.base.weight"])',
    "normalization": 'normalization layers (train = [..., "norm:*"])',
    "statistics": 'running statistics of batch normalization (train = [..., "stats:*"])',
}
NEEDS: Mapping[str, tuple[tuple[Part, ...], str]] = {
    "fedavg-recomputed": (("statistics",), "it recomputes them at unseen sites"),
    "fedbn": (("normalization",), "they stay at the sites"),
    "silobn": (("statistics",), "they stay at the sites"),
    "fednorm": (("normalization",), "each modality has its own"),
    "fedper": (("body", "head"), "the first are shared, and the head stays at the sites"),
    "fedrep": (("body", "head"), "the first are shared, and the head stays at the sites"),
    "lg-fedavg": (("encoder", "head"), "the encoder stays at the sites, and the head is shared"),
    "fedbabu": (("body",), "they are trained against a fixed head"),
    "fedproto": (("body",), "it draws their features to prototypes"),
    "fedrod": (("head",), "it has a second one at each site"),
    "ccvr": (("head",), "the server trains them anew"),
    "feddecorr": (("body",), "it decorrelates their features"),
    "moon": (("encoder",), "it contrasts their representations"),
    "fedmri": (("encoder",), "it shares and contrasts them"),
    "fed-align": (("encoder",), "it aligns their features"),
    "fedharmony": (("encoder",), "it aligns their features"),
    "fl-mrcm": (("encoder",), "it aligns their features"),
    "fedmoco": (("encoder",), "it pretrains them"),
    "fedmae": (("encoder",), "it pretrains them"),
    "fcl": (("encoder",), "it pretrains them"),
    "fedcy": (("encoder",), "it learns them from unlabeled videos"),
    "fmtl": (("body", "head"), "the first are shared, and gates and towers stay at the sites"),
    "private-heads": (("body", "head"), "the first are shared, and the head stays at the sites"),
    "rolora": (("adapters",), "their factors are trained in turn"),
    "ffa-lora": (("adapters",), "one of their factors is trained"),
    "fedsa-lora": (("adapters",), "one of their factors is shared"),
    "flexlora": (("adapters",), "it averages their products"),
    "flora": (("adapters", "layers"), "it adds their products to the layers"),
    "site-graph": (("body",), "they are shared, and the head stays at the sites"),
    "split": (("body",), "the sites train the first layers"),
    "u-split": (("body",), "the sites train the first layers"),
}
"""By method: the parts that must be trained, and why."""


def frozen_problem(method: str, task: Task) -> str:
    """Return why ``method`` makes no sense with the frozen parts of the task's network; empty if it does.

    Raises:
        ConfigError: If the network cannot be built.
    """
    name = canonical(method)
    if name not in NEEDS:
        return ""
    parts, why = NEEDS[name]
    if "adapters" not in parts and not isinstance(task.network, FineTuned):
        return ""
    inspected, network = inspect(task.model()), task.network
    trained = {*inspected.trainable, *inspected.statistics}
    has: dict[Part, bool] = {
        "adapters": any(is_factor(leaf) for leaf in trained),
        "body": any(not network.in_head(leaf) for leaf in trained),
        "encoder": any(network.in_encoder(leaf) for leaf in trained),
        "head": any(network.in_head(leaf) for leaf in trained),
        "layers": all(f"{leaf.removesuffix(DOWN)}.base.weight" in trained for leaf in trained if leaf.endswith(DOWN)),
        "normalization": bool(inspected.normalization & trained),
        "statistics": bool(inspected.running & trained),
    }
    missing = [WORDS[part] for part in parts if not has[part]]
    if not missing:
        return ""
    return f"{name} needs trained {' and '.join(missing)}, because {why}: extend task.train, or choose fedavg"
