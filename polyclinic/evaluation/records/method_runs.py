"""Names of method runs and of baselines. Imports nothing, so that readers of a run folder start quickly."""

BASELINES = ("local", "pooled", "cross")


def arm_name(label: str, seed: int, fold: int | None = None) -> str:
    """Return the name of a method run's folder."""
    return f"{label}-seed{seed}" + ("" if fold is None else f"-fold{fold}")
