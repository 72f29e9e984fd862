"""What waits for a person at a site, what was decided, and how two orders differ. Nothing here needs PyTorch."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from polyclinic.engines.flare.homes import BadHome, private_folder, read_json, write_private
from polyclinic.engines.flare.order import Order, code_hash

WAITING, APPROVED, REFUSED = "waiting", "approved", "refused"


@dataclass(frozen=True)
class Review:
    """One study before one person.

    Attributes:
        order: The order, whole. ``code``: the hash of the code here when it was seen.
        state: ``waiting``, ``approved`` or ``refused``.
        problems: Why the policy refuses it; nobody can approve it then.
        patients: How many patients would take part, by role.
        seen: When it came. ``decided``: when a person decided. ``by``: who. ``reason``: why.
        notes: What a person should know besides, such as methods of the study that the policy refuses.
    """

    order: str
    code: str
    state: str
    problems: tuple[str, ...]
    patients: Mapping[str, int]
    seen: str
    decided: str = ""
    by: str = ""
    reason: str = ""
    notes: tuple[str, ...] = ()

    @property
    def what(self) -> Order:
        """The order, as an object."""
        return Order.from_json(self.order)


class Reviews:
    """The folder of reviews at one site, one file a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = private_folder(folder)

    def get(self, run: str) -> Review | None:
        """The review of a run, if it has come."""
        path = self._path(run)
        if not path.exists():
            return None
        table = read_json(path)
        return Review(**{**table, "problems": tuple(table["problems"]), "notes": tuple(table.get("notes", ()))})

    def all(self) -> list[Review]:
        """Every review, the latest last."""
        found = [review for path in sorted(self.folder.glob("*.json")) if (review := self.get(path.stem))]
        return sorted(found, key=lambda review: review.decided or review.seen)

    def named(self, text: str) -> list[Review]:
        """The reviews of the run called ``text``, or of the study called so, the latest last."""
        return [r for r in self.all() if text in (r.what.run, r.what.study.get("name"))]

    def offer(
        self, order: Order, problems: tuple[str, ...], patients: Mapping[str, int], notes: Sequence[str] = ()
    ) -> Review:
        """Puts an order before a person, unless the same one stands there already with the same code.

        What was decided of one part of a study holds for its other parts, if nothing but the part differs.
        """
        review = self.get(order.run)
        if review and review.order == order.to_json() and review.code == code_hash() and review.problems == problems:
            return review
        fresh = Review(order.to_json(), code_hash(), WAITING, problems, dict(patients), _now(), notes=tuple(notes))
        kin = [r for r in self.all() if r.state != WAITING and r.code == fresh.code and r.what.same_study(order)]
        if kin and not (problems and kin[-1].state == APPROVED):
            last = kin[-1]
            fresh = replace(fresh, state=last.state, decided=last.decided, by=last.by, reason=last.reason)
        self._put(order.run, fresh)
        return fresh

    def decide(self, name: str, state: str, by: str, reason: str) -> list[Review]:
        """Writes down a person's decision of a run, or of a study and so of all its parts that have come.

        Raises:
            BadHome: Where nothing waits under this name, the code has changed since, or the policy refuses it.
        """
        found = self.named(name)
        if not found:
            waiting = ", ".join(r.what.run for r in self.all() if r.state == WAITING) or "nothing"
            raise BadHome(f"no study called {name!r} has come; {waiting} waits")
        kin = [r for r in self.all() if any(r.what.same_study(other.what) for other in found)]
        parts = {r.what.run: r for r in (*found, *kin)}.values()
        allowed = [self._decided(r, state, by, reason) for r in parts if not (state == APPROVED and r.problems)]
        if not allowed:
            self._decided(found[-1], state, by, reason)
        for review in allowed:
            self._put(review.what.run, review)
        return allowed

    def _decided(self, review: Review, state: str, by: str, reason: str) -> Review:
        if state == APPROVED and review.problems:
            raise BadHome(
                "the policy refuses this study, so approving it would change nothing: " + "; ".join(review.problems)
            )
        if state == APPROVED and review.code != code_hash():
            raise BadHome("polyclinic was changed here since this study came: wait until the server offers it again")
        return replace(review, state=state, by=by, reason=reason, decided=_now())

    def stands(self, order: Order) -> Review | None:
        """The approval of exactly this order with exactly this code, if a person gave it."""
        review = self.get(order.run)
        same = review is not None and review.order == order.to_json() and review.code == code_hash()
        return review if same else None

    def _path(self, run: str) -> Path:
        return self.folder / f"{run}.json"

    def _put(self, run: str, review: Review) -> None:
        write_private(self._path(run), json.dumps(asdict(review)))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def flat(value: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """A nested table as pairs of dotted key and value."""
    if isinstance(value, Mapping):
        for key in sorted(value):
            yield from flat(value[key], f"{at}.{key}" if at else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for i, item in enumerate(value):
            yield from flat(item, f"{at}[{i}]")
    else:
        yield at, json.dumps(value)


def differences(new: Order, old: Order) -> list[str]:
    """What a person should look at: ``-`` what was approved before, ``+`` what is asked now."""
    ours, theirs = dict(flat(asdict(old))), dict(flat(asdict(new)))
    lines = []
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            lines += [f"- {key} = {ours[key]}"] if key in ours else []
            lines += [f"+ {key} = {theirs[key]}"] if key in theirs else []
    return lines
