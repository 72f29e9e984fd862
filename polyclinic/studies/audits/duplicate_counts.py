"""Numbers of images that the sites of a study share, from the method ``duplicate-search``."""

from dataclasses import dataclass
from pathlib import Path

from polyclinic.core import serialization
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.data.config import DataSpec
from polyclinic.data.federation import federate
from polyclinic.engines.local.in_process import InProcess
from polyclinic.errors import DataError
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.methods.registry import import_methods
from polyclinic.methods.statistics.duplicate_search import EXACT, NEAR, DuplicateSearch, State, shared_by

METHOD = "duplicate-search"
MIN_COUNT = 5
"""Smaller counts are hidden, as in a survey: a site that guesses one image must not learn whether another has it."""


@dataclass(frozen=True)
class SharedImages:
    """Numbers of images that two sites share.

    Attributes:
        sites: The names of the sites, in order.
        equal: Images with equal values; None if the number is below ``min_count``.
        nearly_equal: Images of equal appearance, those with equal values among them; None as above.
        compared: Whether the two sites were compared.
        min_count: Smaller numbers are hidden.
    """

    sites: tuple[str, str]
    equal: int | None
    nearly_equal: int | None
    compared: bool
    min_count: int

    @property
    def found(self) -> bool:
        """Whether a shown number is above 0."""
        return bool(self.equal or self.nearly_equal)

    def line(self) -> str:
        """Return a sentence for the reader."""
        one, other = self.sites
        if not self.compared:
            return f"{one} and {other} were not compared: one of them sent no valid answer"
        hidden = f"fewer than {self.min_count}"
        equal, near = (hidden if count is None else str(count) for count in (self.equal, self.nearly_equal))
        return f"{one} and {other}: {equal} equal, {near} nearly equal"


def search(spec: DataSpec, seed: int = 0) -> State:
    """Return the counts over the sites of ``spec``, found on this machine by the messages of a deployment.

    Args:
        spec: The data. Copies are searched before the study would drop or refuse them.
        seed: Seed of the split and of simulated sites.

    Raises:
        DataError: If the data cannot be read, or there is one site only.
    """
    data = federate(spec.model_copy(update={"duplicates": "report", "near_duplicates": "ignore"}), seed)
    sites = {name: Site(name, roles, seed=seed) for name, roles in data.sites.items()}
    if len(sites) < 2:
        raise DataError("there is one site only: `polyclinic data check` finds the duplicates within a folder")
    most = max(sum(len(examples) for examples in roles.values()) for roles in data.sites.values())
    method = DuplicateSearch(Classification(Network("mlp", (1,), 1)), tuple(sites), most=most)
    state = method.init({})
    for step in train(method, InProcess(method, sites), state, rounds=1, min_replies=len(sites)):
        state = step.state
    return state


def read(checkpoint: Path) -> State:
    """Return the counts of a run between hospitals, from its checkpoint.

    Raises:
        DataError: If the file is no such checkpoint, or the run is not complete.
    """
    from polyclinic.engines.flare.server import run_coordinator  # noqa: F401 - registers its checkpoint

    import_methods([METHOD])
    try:
        state = serialization.load(checkpoint).state
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{checkpoint} is not a checkpoint of a run of {METHOD} ({error})") from None
    if not isinstance(state, State) or not state.shared:
        raise DataError(f"{checkpoint} is not the checkpoint of a complete run of {METHOD}")
    return state


def pairs(state: State, min_count: int) -> list[SharedImages]:
    """Return what each pair of sites shares, without numbers below ``min_count``."""
    equal, near = shared_by(state, EXACT), shared_by(state, NEAR)

    def shown(count: int | None) -> int | None:
        return None if count is None or count < min_count else count

    return [
        SharedImages(pair, shown(count), shown(near.get(pair)), count is not None, min_count)
        for pair, count in equal.items()
    ]
