"""Distances between the surfaces of two masks, by MONAI, with defined values for empty masks."""

import warnings

import torch
from torch import Tensor


def surfaces(p: Tensor, t: Tensor, spacing: tuple[float, ...], tolerance: float | None) -> dict[str, Tensor]:
    """Return the 95th percentile of surface distances, and the fraction of surfaces within ``tolerance``, if given."""
    axes = tuple(range(2, p.ndim))
    diagonal = sum((side * mm) ** 2 for side, mm in zip(p.shape[2:], spacing, strict=True)) ** 0.5
    some_p, some_t = p.any(dim=axes), t.any(dim=axes)
    distance = torch.where(some_p == some_t, 0.0, diagonal)
    share = (some_p == some_t).float()
    with warnings.catch_warnings():  # MONAI warns about its internal use of a deprecated option
        warnings.simplefilter("ignore", FutureWarning)
        _fill(p, t, some_p & some_t, spacing, tolerance, distance, share)
    return {"hd95": distance, "nsd": share}


def _fill(
    p: Tensor,
    t: Tensor,
    both: Tensor,
    spacing: tuple[float, ...],
    tolerance: float | None,
    distance: Tensor,
    share: Tensor,
) -> None:
    """Fill in ``distance`` and ``share`` where both surfaces exist."""
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    for case, label in both.nonzero().tolist():
        pair = [mask[case, label][None, None].float() for mask in (p, t)]
        distance[case, label] = compute_hausdorff_distance(
            *pair, include_background=True, percentile=95, spacing=spacing
        )
        if tolerance is not None:
            share[case, label] = compute_surface_dice(
                *pair, class_thresholds=[tolerance], include_background=True, spacing=spacing
            )
