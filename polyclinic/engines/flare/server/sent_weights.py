"""Start weights that the server sends once to the sites of a run, as a file, before the first round."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyclinic.engines.flare.protocol.paths import SetupError
from polyclinic.engines.flare.protocol.run_request import RunRequest


def stated(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run request states of the start weights of ``plan``, so that sites may receive them.

    Raises:
        SetupError: If the plan names none, or their license forbids to pass them on.
        UnknownWeights: If they are not in the server's store.
    """
    from polyclinic.learning.weights import store  # loads PyTorch

    sha256 = plan.get("tuning", {}).get("weights", {}).get("sha256", "")
    if not sha256:
        raise SetupError("--send-weights: the study names no start weights ([task] weights)")
    item = store.find(sha256)
    card = item.card
    if not card.redistribute:
        raise SetupError(
            f"--send-weights: the license of {card.name} ({card.license}) forbids to pass them on. Every site adds the "
            "file: polyclinic site weights add FILE"
        )
    texts = {"license": " ".join(card.license.split())[:100], "source": " ".join(card.source.split())[:100]}
    return {"sha256": sha256, "bytes": item.size, "name": card.name, **texts}


def file_of(order: RunRequest) -> Path | None:
    """Return the file of start weights that the server sends for a run; None if it sends none.

    Raises:
        UnknownWeights: If they are no longer in the server's store.
        IntegrityError: If the file was changed.
    """
    if not order.weights:
        return None
    from polyclinic.learning.weights import store  # loads PyTorch

    store.tensors(order.weights["sha256"])  # verifies the hash
    return store.find(order.weights["sha256"]).path
