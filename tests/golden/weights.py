"""The final weights of every method, as hashes, to see that a change of the code's layout changes no bit.

``python -m tests.golden.weights --write FILE`` trains every method of the contract table for 3 rounds in process and
writes the hashes; ``--compare FILE`` trains them and names those that differ from FILE. The hashes depend on the build
of PyTorch and on the processor, so compare only on one machine. ``histofl`` draws secret noise and is not compared.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from polyclinic.core.rounds import train
from polyclinic.engines.local.in_process import InProcess
from polyclinic.methods.catalog import METHODS
from tests.laws.test_methods import case, held_by_server

SECRET = ("histofl",)
ROUNDS, MOST_STEPS = 3, 60


def hash_after_training(name: str) -> str:
    """The hash of the trees that the method called ``name`` is evaluated with after 3 rounds."""
    method, task, sites = case(name)
    engine = InProcess(method, sites, server_data=held_by_server(sites))
    state = method.init(task.first(0))
    for count, step in enumerate(train(method, engine, state, rounds=ROUNDS), 1):
        state = step.state
        if count >= MOST_STEPS:
            break
    request = method.evaluation_request(state)
    trees = dict(request.trees) | {
        f"{site}:{key}": tree for site, own in request.per_site.items() for key, tree in own.items()
    }
    digest = hashlib.sha256()
    for key in sorted(trees):
        for leaf in sorted(trees[key]):
            tensor = trees[key][leaf].detach().cpu().contiguous()
            digest.update(f"{key}/{leaf} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hashes(names: list[str]) -> Iterator[tuple[str, str]]:
    """Each method's name and hash, or the error that it raised."""
    torch.set_num_threads(1)
    for name in names:
        try:
            result = hash_after_training(name)
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        print(name, result, flush=True)
        yield name, result


def main() -> int:
    """Write or compare the hashes; 1 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--compare", type=Path, metavar="FILE")
    parser.add_argument("methods", nargs="*", help="all of them by default")
    given = parser.parse_args()
    found = dict(hashes(given.methods or list(METHODS)))
    if given.write:
        given.write.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not given.compare:
        return 0
    before = json.loads(given.compare.read_text(encoding="utf-8"))
    if not given.methods:
        found = {name: found.get(name, "not there any more") for name in {**before, **found}}
    other = [name for name, result in found.items() if name not in SECRET and before.get(name) != result]
    for name in other:
        print(f"{name} differs: {before.get(name, 'not there')} before, {found[name]} now", file=sys.stderr)
    print(f"{len(found) - len(other)} of {len(found)} are as before (not compared: {', '.join(SECRET)})")
    return 1 if other else 0


if __name__ == "__main__":
    sys.exit(main())
