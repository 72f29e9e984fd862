"""Pictures of test cases with outlines of truth and prediction, for the report.

Each site draws its best, median and worst case (``learning.tasks.case_pictures``) in the job ``show/test``. The model
is final, and nothing is chosen by these pictures, so that they are no second use of the test data.
"""

from collections.abc import Mapping
from pathlib import Path

from polyclinic.core.execution import Policy
from polyclinic.errors import RunError
from polyclinic.studies.records.pictured_cases import FILE
from polyclinic.studies.run.finished_method import finished_method
from polyclinic.studies.run.run_directory import write_tensors

JOB = "show/test"


class NotPictured(RunError, ValueError):
    """A run of which no site sent pictures. The message gives the reason."""


def draw(
    run_dir: str | Path, label: str = "", seed: int | None = None, policies: Mapping[str, Policy] | None = None
) -> tuple[Path, dict[str, str]]:
    """Request pictures of the best, the median and the worst test case of one method run from every site.

    They are written to the folder of the method run, where the report finds them. Arguments as those of ``explain``.

    Returns:
        The file, and the sites without pictures with their reasons.

    Raises:
        NotARun: If the folder is not a run.
        DataChanged: If the data are not those that the run began with.
        NotFinished: If the method run is not finished.
        NotPictured: If no site sent pictures.
    """
    run = finished_method(run_dir, label, seed, policies)
    found, refused = run.ask(JOB, [s for s, roles in run.data.sites.items() if len(roles.get("test", ()))])
    if not found:
        why = "; ".join(f"{s}: {reason}" for s, reason in refused.items())
        raise NotPictured(f"{run_dir}: no site sent pictures: {why}")
    leaves = {f"{site}/{key}": leaf for site, pictures in found.items() for key, leaf in pictures.items()}
    write_tensors(run.folder / FILE, leaves)
    return run.folder / FILE, refused
