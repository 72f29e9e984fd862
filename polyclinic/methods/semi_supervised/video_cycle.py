"""Temporal cycle consistency between two videos of the same kind of operation.

Dwibedi, Aytar, Tompson, Sermanet and Zisserman, "Temporal Cycle-Consistency Learning", CVPR 2019, section 3.2
(cycle-back classification). https://arxiv.org/abs/1904.07846.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from polyclinic.errors import DataError


def cycle_back(u: Tensor, v: Tensor, temperature: float = 0.1) -> Tensor:
    """Return the cross-entropy of finding each moment of one video again after a cycle through another.

    Args:
        u: Embeddings [n, w] of one video's frames, in order.
        v: Embeddings [m, w] of the other's.
        temperature: Temperature of the soft nearest neighbor.
    """
    # ṽ_i = Σ_j softmax_j(−‖u_i − v_j‖² / τ) v_j;  then u_i must be the nearest of u to ṽ_i
    soft = (-torch.cdist(u, v).square() / temperature).softmax(1) @ v
    back = -torch.cdist(soft, u).square() / temperature
    return F.cross_entropy(back, torch.arange(len(u), device=u.device))


def clip(data: Any, frames: int, rng: torch.Generator, other_than: int | None = None) -> tuple[Tensor, int]:
    """Return up to ``frames`` frames of one video of ``data``, in order, and the number of the video.

    ``data.videos`` gives the video of each example as a number; examples are in temporal order.

    Raises:
        DataError: If the videos are not known.
    """
    if (videos := getattr(data, "videos", None)) is None:
        raise DataError("fedcy compares the frames of videos, and these images name none: set video in [data]")
    of = torch.as_tensor(videos)
    names = [name for name in of.unique().tolist() if name != other_than] or of.unique().tolist()
    name = names[int(torch.randint(len(names), (), generator=rng))]
    mine = (of == name).nonzero()[:, 0]
    chosen = torch.randperm(len(mine), generator=rng)[:frames].sort().values
    return data[mine[chosen]][0], name
