"""CPU seconds of secure summation, for each site and for the server: ``python benchmarks/secure_sum.py``.

Target: 10 million numbers, 10 sites, 2 of them lost after they shared their secrets: at most 1 CPU-second a site and
1 for the server. Encoding to the ring is part of a site's time.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from polyclinic.core.aggregates import WeightedMean
from polyclinic.core.site import Site
from polyclinic.secure_aggregation import SecureSum
from polyclinic.secure_aggregation.in_memory import secure_sum


class Clock:
    """CPU seconds by who works; who is called by another stops the other's clock."""

    def __init__(self) -> None:
        """Set all times to zero."""
        self.seconds: dict[str, float] = defaultdict(float)
        self._working: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, who: str) -> Iterator[None]:
        """While ``who`` works."""
        self._turn()
        self._working.append(who)
        try:
            yield
        finally:
            self._turn()
            self._working.pop()

    def _turn(self) -> None:
        now = time.process_time()
        if self._working:
            self.seconds[self._working[-1]] += now - self._since
        self._since = now


def main() -> None:
    """Prints one line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the numbers")
    size = 1_000_000 if parser.parse_args().quick else 10_000_000
    torch.set_num_threads(1)
    print(
        f"{'numbers':>10} {'sites':>5} {'lost':>4} {'worst site, CPU s':>18} {'server, CPU s':>14} {'MB up a site':>12}"
    )
    for sites, threshold, lost in ((10, 7, 0), (10, 7, 2), (5, 4, 1), (30, 20, 3)):
        clock, names = Clock(), [f"site-{i:02}" for i in range(sites)]
        update = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 0.01
        vectors = {}
        for name in names:
            with clock(name):
                sent, _ = SecureSum().encode(WeightedMean({"m/update/w": update}, 1.0), {}, {}, Site(name), 0)
                vectors[name] = sent.total["m/update/w"]
        gone = dict.fromkeys(names[1 : 1 + lost], "mask")
        total, alive = secure_sum(vectors, threshold=threshold, lost=gone, clock=clock)
        with clock("server"):
            rest = {name: leaf * len(alive) for name, leaf in sent.total.items() if name != "m/update/w"}
            SecureSum().decode(WeightedMean({**rest, "m/update/w": total}, float(len(alive))), {})
        expected = sum(vectors[name].long() for name in alive)
        assert torch.equal(total.long(), (expected + 2**31) % 2**32 - 2**31), "the sum is not exact"
        worst = max(clock.seconds[name] for name in names)
        print(
            f"{size:>10} {sites:>5} {lost:>4} {worst:>18.2f} {clock.seconds['server']:>14.2f} {4 * size / 1e6:>12.0f}"
        )


if __name__ == "__main__":
    main()
