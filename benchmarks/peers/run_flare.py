"""NVIDIA FLARE's simulator, with one process for each site."""

import sys
import tempfile
from pathlib import Path

import torch
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv
from work import Work, main

HERE = Path(__file__).parent


def run(work: Work):
    with tempfile.TemporaryDirectory() as folder:
        recipe = FedAvgRecipe(
            name="work",
            model={"class_path": "flare_site.Network", "args": {"work": sys.argv[1]}},
            min_clients=work.sites,
            num_rounds=work.rounds,
            train_script=str(HERE / "flare_site.py"),
            train_args=sys.argv[1],
            server_expected_format="pytorch",
        )
        recipe.execute(SimEnv(clients=work.names(), workspace_root=folder))
        (file,) = Path(folder).rglob("FL_global_model.pt")
        found = torch.load(file, weights_only=True)["model"]
    return {name.removeprefix("inner."): torch.as_tensor(leaf).numpy() for name, leaf in found.items()}, None


if __name__ == "__main__":
    main("flare", run)
