"""Comparison of a method's step with the same step written again."""

from collections.abc import Mapping

from torch import Tensor


def agree(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], most: float = 1e-5) -> None:
    """Assert that both trees have the same names, and that no element differs by more than ``most``."""
    assert found.keys() == wanted.keys()
    gaps = {name: float((leaf.double() - wanted[name].double()).abs().max()) for name, leaf in found.items()}
    assert max(gaps.values()) <= most, {name: gap for name, gap in gaps.items() if gap > most}
