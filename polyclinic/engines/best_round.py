"""Choice of the best round by validation scores. Every engine uses this rule (ADR 0010)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class BestRound:
    """The best round so far.

    A round's score is the mean of the latest score of each site that has been scored so far. A site that is absent in a
    round keeps its last score, so that its absence neither improves nor worsens the round.

    Attributes:
        higher_is_better: Whether a higher score is better.
        round: The best round; 0 before any site was scored.
        score: Its score.
        scores: The latest score of each site.
    """

    higher_is_better: bool
    round: int = 0
    score: float = math.nan
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """The mean of the latest scores, or the worst possible score if there are none."""
        if not self.scores:
            return -math.inf if self.higher_is_better else math.inf
        return sum(self.scores[site] for site in sorted(self.scores)) / len(self.scores)

    def after(self, round: int, scores: Mapping[str, float]) -> "BestRound":
        """Return the best round after ``round``, in which the sites in ``scores`` were scored.

        Of rounds with equal scores, the earlier one is the best. Scores must be finite.
        """
        now = BestRound(self.higher_is_better, self.round, self.score, {**self.scores, **scores})
        if not now.scores:
            return now
        better = now.mean > self.score if self.higher_is_better else now.mean < self.score
        return now.with_best(round) if better or not self.round else now

    def with_best(self, round: int) -> "BestRound":
        """Return this with ``round`` as the best round, scored by the latest scores."""
        return BestRound(self.higher_is_better, round, self.mean, self.scores)
