"""The simulator of NVIDIA FLARE, with a thread for each site: with fewer, it starts a process for each task."""

import sys
import tempfile
from pathlib import Path

import numpy as np
from flare_parts import Server, TrainedSite
from nvflare.job_config.api import FedJob
from work import Work, main


def run(work: Work):
    job = FedJob(name="peers", min_clients=work.sites)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "final.npz"
        job.to_server(Server(sys.argv[1], str(file)))
        job.to_clients(TrainedSite(sys.argv[1]), tasks=["train"])
        code = job.simulator_run(f"{folder}/workspace", clients=work.names(), threads=work.sites, log_config="error")
        if not file.exists():
            raise RuntimeError(f"FLARE's simulator ended with code {code} and no final weights")
        with np.load(file) as found:
            return dict(found), None


if __name__ == "__main__":
    main("flare", run)
