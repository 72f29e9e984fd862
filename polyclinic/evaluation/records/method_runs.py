"""Names of method runs and of baselines. Imports nothing, so that readers of a run folder start quickly."""

BASELINES = ("local", "pooled", "cross")
LINEAR_LOCAL, LINEAR_POOLED = "linear-local", "linear-pooled"
"""Linear models of tables that every simulated run adds: of each training site alone, and of all in one place."""
LINEAR_FOLDER = "linear"
"""Folder of their predictions in a run folder."""
PLAN = "run-plan.toml"
"""A run's own copy of the plan that its study names, next to its study file."""


def arm_name(label: str, seed: int, fold: int | None = None) -> str:
    """Return the name of a method run's folder."""
    return f"{label}-seed{seed}" + ("" if fold is None else f"-fold{fold}")
