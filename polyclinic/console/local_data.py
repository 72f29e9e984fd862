"""Count of a site's patients for a study, as JSON, in a process of its own because reading data needs PyTorch.

``python -m polyclinic.console.local_data HOME RUN``
"""

import json
import sys
from pathlib import Path

from polyclinic.engines.flare.client import site_setup
from polyclinic.engines.flare.client.reviews import Reviews
from polyclinic.engines.flare.client.study_description import look
from polyclinic.engines.flare.protocol.paths import SiteFolder


def main(home: Path, run: str) -> None:
    """Print the number of patients by role, and why the local data do not fit the study."""
    site = SiteFolder(home)
    first, *_ = Reviews(site.reviews).subject(run)
    here = look(site, first.what, Path(site_setup.settings(site)["data"]))
    counts = None if here.patients is None else dict(here.patients)
    print(json.dumps({"patients": counts, "problems": list(here.problems)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
