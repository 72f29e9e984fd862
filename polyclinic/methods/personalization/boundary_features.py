"""Contrast between the features on a structure's boundary and those just outside it.

The boundary-oriented contrast of Liu et al., "FedDG", CVPR 2021, equations 5 and 6, https://arxiv.org/abs/2103.06030.
All foreground classes count as one structure.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def edges(masks: Tensor, inner: int = 1, outer: int = 5) -> tuple[Tensor, Tensor]:
    """Return the rim of each structure, and the surrounding ring of background: two bool tensors [b, *spatial].

    Args:
        masks: Label maps [b, *spatial], 0 for background.
        inner: Depth of the rim in pixels.
        outer: Width of the ring in pixels.
    """
    inside = (masks > 0).float().unsqueeze(1)
    grow = F.max_pool2d if masks.ndim == 3 else F.max_pool3d
    eroded = -grow(-inside, 2 * inner + 1, 1, inner)
    dilated = grow(inside, 2 * outer + 1, 1, outer)
    return (inside > eroded).squeeze(1), (dilated > inside).squeeze(1)


def boundary_contrast(features: Tensor, masks: Tensor, temperature: float = 0.05) -> Tensor:
    """Return the boundary contrast, averaged over pairs i ≠ j of images.

    ``−log( e^{⟨r_i, r_j⟩/τ} / (e^{⟨r_i, r_j⟩/τ} + Σ_k e^{⟨r_i, o_k⟩/τ}) )``, where r and o are the mean features on the
    rim and on the ring, with unit length. Images without a structure are omitted; with fewer than two others it is 0.

    Args:
        features: [b, F, *spatial].
        masks: [b, *spatial], of the same or another size.
    """
    if features.shape[2:] != masks.shape[1:]:
        masks = F.interpolate(masks.unsqueeze(1).float(), features.shape[2:]).squeeze(1)
    rim, ring = (part.flatten(1).float() for part in edges(masks))
    some = (rim.sum(1) > 0) & (ring.sum(1) > 0)
    if int(some.sum()) < 2:
        return features.sum() * 0
    flat = features.flatten(2)[some]
    r, o = (
        F.normalize(torch.einsum("bfp,bp->bf", flat, part[some]) / part[some].sum(1, keepdim=True))
        for part in (rim, ring)
    )
    together, apart = r @ r.T / temperature, torch.logsumexp(r @ o.T / temperature, 1, keepdim=True)
    pairs = ~torch.eye(len(r), dtype=torch.bool, device=r.device)
    return (torch.logaddexp(together, apart.expand_as(together)) - together)[pairs].mean()
