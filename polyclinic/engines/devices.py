"""The compute device of a site or a run: chosen, and checked before data are read."""

import os

import torch

from polyclinic.errors import ConfigError


def chosen_device(name: str) -> str:
    """Return the device called ``name``; for ``auto``, ``cuda`` if PyTorch finds a GPU, and ``cpu`` otherwise.

    Raises:
        ConfigError: If there is no such device here. The message says what to do.
    """
    # Without it, asking for GPUs would initialize CUDA, and processes forked later could not use it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f'device = "{name}" is no device of PyTorch: use auto, cpu, cuda or cuda:0') from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            why = "this PyTorch was built without CUDA" if torch.version.cuda is None else "no GPU or driver was found"
            raise ConfigError(f'device = "{name}": {why}. Use "cpu" or "auto", or install PyTorch for your GPU')
        if (count := torch.cuda.device_count()) <= (device.index or 0):
            raise ConfigError(f'device = "{name}": there are {count} GPUs here, cuda:0 to cuda:{count - 1}')
    elif device.type != "cpu":
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ConfigError(f'device = "{name}" cannot be used here: use auto, cpu or cuda') from error
    return name


def worker_device(name: str, worker: int) -> str:
    """Return the device of a worker process: for ``cuda``, the GPUs of this machine in turn; others are shared.

    Args:
        name: The device of the run.
        worker: The number of the worker, from 0.
    """
    count = torch.cuda.device_count() if name == "cuda" else 0
    return f"cuda:{worker % count}" if count > 1 else name
