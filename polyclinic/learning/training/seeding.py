"""Seeds of PyTorch's global generators, which dropout and some augmentations use."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(rng: torch.Generator, device: str = "cpu") -> Iterator[None]:
    """Seed PyTorch's global generators (for dropout and the like) from ``rng``, and restore them afterwards."""
    seed = int(torch.randint(2**62, (), generator=rng))
    before = torch.default_generator.get_state()
    try:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed formats the stack three times without a GPU
        if device.startswith("cuda"):
            with torch.random.fork_rng(devices=[torch.device(device)]):
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
                yield
        else:
            yield
    finally:
        torch.default_generator.set_state(before)
