"""CPU time of summing the replies of a round, with all checks, over that of a loop of ``add_``.

The loop sums the replies into zeros, ``total.add_(reply, alpha=1 / n)``, and checks nothing. Polyclinic checks the form,
the weights and every number of each reply, and adds the replies in the order of sites. Both run in alternation in one
process. One JSON line for each size.

    python benchmarks/merging.py [--times 15] [--large-pages {0,1}] [COUNTxPARAMETERS...]
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable

SIZES = ("8x11200000", "32x1000000", "64x50000")
LAYERS = 6


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds that ``work`` takes."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def measure(count: int, parameters: int, times: int) -> dict[str, object]:
    """Compare the sums of ``count`` replies of ``parameters`` numbers in several layers."""
    import torch

    from polyclinic.core.aggregates import Reply, WeightedMean
    from polyclinic.core.method import Request
    from polyclinic.core.reply_validation import ReplySum, ReplyValidator, Spare

    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    large = parameters * 9 // 10 // (LAYERS // 2)
    shapes = [(large,), (parameters // 10 // (LAYERS // 2),)] * (LAYERS // 2)  # weights and biases
    trees = [{f"layer-{i}": torch.randn(shape, generator=rng) for i, shape in enumerate(shapes)} for _ in range(count)]
    spare: Spare = {}  # kept from round to round, as in training

    def floor() -> object:
        total = {name: torch.zeros_like(leaf) for name, leaf in trees[0].items()}
        for leaves in trees:
            for name, leaf in total.items():
                leaf.add_(leaves[name], alpha=1 / count)
        return total

    def ours() -> object:
        total = ReplySum(ReplyValidator(), Request(0, {}), spare)
        for i, leaves in enumerate(trees):
            total.add(f"site-{i:03}", Reply({"update": WeightedMean(leaves, 1.0)}))  # a new reply, as in every round
        refused, merged = total.result()
        assert not refused
        return merged

    floor(), ours()
    ratios = []
    for i in range(times):
        pair = {f: seconds(f) for f in ((floor, ours), (ours, floor))[i % 2]}
        ratios.append(pair[ours] / pair[floor])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return {"replies": count, "parameters": parameters, "peak_mb": round(peak)} | {
        k: round(v, 3) for k, v in found.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=SIZES, metavar="COUNTxPARAMETERS")
    parser.add_argument("--times", type=int, default=15)
    parser.add_argument("--large-pages", choices=["0", "1"], default="1", help="whether PyTorch asks for pages of 2 MB")
    given = parser.parse_args()
    os.environ["THP_MEM_ALLOC_ENABLE"] = given.large_pages  # before PyTorch allocates
    for size in given.sizes:
        count, parameters = map(int, size.split("x"))
        line = measure(count, parameters, given.times)
        print(json.dumps(line | {"large_pages": given.large_pages, "load": os.getloadavg()[0]}), flush=True)
