"""The checkpoint of a method run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polyclinic.core.serialization import savable
from polyclinic.core.tree import Trees


@savable("study.Checkpoint", 1)
@dataclass(frozen=True)
class Checkpoint:
    """The resumable state of a method run.

    Attributes:
        state: The state of the server.
        memory: The site state of each site.
        round: The number of completed rounds.
        records: The length of the run's records.jsonl at that moment, in bytes.
        best_round: The best round so far by validation score; 0 if none has been scored.
        best_score: The score of that round.
        done: Whether the test data have been opened.
        clock: Virtual seconds since the beginning, if machines are simulated.
    """

    state: Any
    memory: Mapping[str, Trees]
    round: int
    records: int
    best_round: int
    best_score: float
    done: bool
    clock: float = 0.0
