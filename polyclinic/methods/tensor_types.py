"""Methods that need certain tensors of a network in single precision.

A network of one's own may compute some layers in another type, and cast between them. Most methods train it as it is.
Others attach modules of their own to what the encoder returns, to what enters the head, or to the predictions, and
these are in single precision. Such studies are refused.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polyclinic.learning.networks.architectures import ARCHITECTURES
from polyclinic.learning.networks.fine_tuning import FineTuned
from polyclinic.learning.networks.latent import encoded, represent
from polyclinic.learning.tasks.task import Task
from polyclinic.methods.catalog import canonical

Seam = Literal["encoder", "head", "predictions", "weights"]
WORDS: Mapping[Seam, str] = {
    "encoder": "what the encoder returns",
    "head": "what enters the head",
    "predictions": "what the network returns",
    "weights": "its weights",
}
FFT = (torch.float32, torch.float64)
"""The types of which PyTorch computes spectra on every processor."""
NEEDS: Mapping[str, tuple[tuple[Seam, ...], str]] = {
    "fedmlp": (("encoder",), "it compares them with prototypes"),
    "fed-align": (("encoder",), "discriminators take it"),
    "fedharmony": (("encoder",), "a classifier of sites takes it"),
    "fl-mrcm": (("encoder",), "discriminators take it"),
    "fedmoco": (("encoder",), "a projection takes it"),
    "fcl": (("encoder",), "a projection takes it"),
    "fedmae": (("head",), "a decoder takes it"),
    "site-graph": (("head", "predictions"), "a graph network joins both"),
    "ccvr": (("head",), "the server trains the head on features of its own"),
    "fedetf": (("head",), "a projection takes it"),
    "fediic": (("head",), "a projection takes it"),
    "fmtl": (("head",), "gates and experts take it"),
    "fedmic": (("head",), "a projection compares it with that of a mentor"),
    "fedkd": (("head",), "a projection compares it with that of a mentor"),
    "fedni": (("head",), "a generator of neighbors takes it"),
    "fedirm": (("predictions",), "it multiplies them with class relations"),
    "pfa": (("weights",), "it averages their spectra"),
    "prr-fl": (("weights",), "it averages their spectra"),
}
"""By method: the tensors whose type matters, and why. ``tests/laws/test_tensor_types.py`` tries all other methods."""


def precision_problem(method: str, task: Task) -> str:
    """Return why ``method`` cannot train the task's network with the types of its tensors; empty if it can.

    Polyclinic's own networks are in single precision and are not tried.
    """
    network: Any = task.network
    inner = network.network if isinstance(network, FineTuned) else network
    name = canonical(method)
    if name not in NEEDS or getattr(inner, "name", "") in ARCHITECTURES:
        return ""
    with torch.random.fork_rng(devices=[]):
        model = task.model().eval()
    others = {n: p.dtype for n, p in model.named_parameters() if p.dtype != torch.float32}
    if not others:
        return ""
    seams, why = NEEDS[name]
    parameter, dtype = next(iter(others.items()))
    if seams == ("weights",):
        wrong = {n: d for n, d in others.items() if d not in FFT}
        found = next(iter(wrong.items()), None)
        return _says(name, "weights", why, *found, found[1]) if found else ""
    try:
        given = _tensors(network, model)
    except Exception:  # whatever the network raises: another check tries it, and says so
        return ""
    for seam in seams:
        if given[seam].dtype != torch.float32:
            return _says(name, seam, why, parameter, dtype, given[seam].dtype)
    return ""


def _tensors(network: Any, model: nn.Module) -> dict[Seam, Tensor]:
    """Return the tensors at the seams for two inputs of zeros."""
    x = torch.zeros(2, *network.inputs)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        entering, predictions = represent(network, model, x)
        return {"encoder": encoded(network, model, x), "head": entering, "predictions": predictions}


def _says(method: str, seam: Seam, why: str, parameter: str, dtype: torch.dtype, found: torch.dtype) -> str:
    names = [str(kind).removeprefix("torch.") for kind in (dtype, found)]
    return (
        f"{method} needs {WORDS[seam]} in float32, because {why}, and the parameter {parameter} of the network is "
        f"{names[0]}"
        + (f", so that this is {names[1]}" if seam != "weights" else "")
        + ": keep these layers in float32, or choose another method, such as fedavg"
    )
