"""Studies that wait for a person's decision at a site, and the decisions. Requires no PyTorch.

```
reviews/
  <run>.json             the review of one run
  records/shown-<uid>    what was last shown to an account, by name
  records/parts          which run took which part of an approved study
```

A person decides about exactly what was shown: its hash is part of the decision. A decision about one part of a study
also covers its other parts, each once. Reading and then writing happens under one lock, because the site agent offers
studies while people decide.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from polyclinic.core.atomic import write_private
from polyclinic.engines.flare.client.decisions import (
    APPROVED,
    REFUSED,
    WAITING,
    Review,
    read,
    shown_hash,
    this_person,
    to_json,
)
from polyclinic.engines.flare.protocol import data_restrictions
from polyclinic.engines.flare.protocol.messages import printable
from polyclinic.engines.flare.protocol.paths import SetupError, SiteFolder, private_folder, read_json, read_toml
from polyclinic.engines.flare.protocol.run_request import RunRequest, code_hash
from polyclinic.engines.flare.protocol.shared_journals import SharedJournal

__all__ = ["APPROVED", "REFUSED", "WAITING", "NotShown", "Review", "Reviews", "record_decision"]
PREFIX = 8
COUNTED = {"classification": "classes", "segmentation": "classes", "multilabel": "labels"}


class NotShown(SetupError):
    """A decision about something else than what the person was shown."""


class Reviews:
    """Folder of reviews at one site, one file per run."""

    def __init__(self, folder: Path) -> None:
        """Open or create ``folder``; the site's keys and certificates are in its parent folder."""
        self.folder = private_folder(folder)
        self._keys, self._certificates = folder.parent / "keys", folder.parent / "certificates"

    def get(self, run: str) -> Review | None:
        """Return the review of a run, if there is one, without decisions that this site did not sign."""
        path = self._path(run)
        return read(path).checked(self._keys, self._certificates) if path.exists() else None

    def all(self) -> list[Review]:
        """Return every review, the latest last."""
        reviews = [review for path in sorted(self.folder.glob("*.json")) if (review := self.get(path.stem))]
        return sorted(reviews, key=lambda review: review.decided or review.seen)

    def named(self, text: str) -> list[Review]:
        """Return the reviews of the run or study ``text``, or whose run request's hash begins with it."""
        long = len(text) >= PREFIX
        return [r for r in self.all() if text in r.names or (long and r.what.hash.startswith(text))]

    def subject(self, text: str) -> list[Review]:
        """Return what a person reviews and decides under the name ``text``: the waiting runs of one study, or else all
        of them.

        Raises:
            SetupError: If the name matches nothing or two different studies.
        """
        found = self.named(text)
        if not found:
            waiting = ", ".join(r.what.run for r in self.all() if r.state == WAITING) or "nothing"
            raise SetupError(f"no study called {text!r} has come; {waiting} waits")
        if len({review.group for review in found}) > 1:
            raise SetupError(_ambiguous(text, found))
        group = self.group(found[0])
        return [review for review in group if review.state == WAITING] or group

    def group(self, review: Review) -> list[Review]:
        """Return all parts that have arrived of the study of ``review``, the latest last."""
        return [other for other in self.all() if other.group == review.group]

    def remember(self, reviews: Sequence[Review]) -> str:
        """Record that ``reviews`` were shown to this account, and return the hash of what was shown."""
        with self._locked():
            known: dict[str, str] = read_json(self._shown, default={})
            now = shown_hash(reviews)
            names = {name for review in self.all() for name in review.names}
            fresh = dict.fromkeys((name for review in reviews for name in review.names), now)
            write_private(self._shown, json.dumps({k: v for k, v in {**known, **fresh}.items() if k in names}))
        return now

    def offer(self, order: RunRequest, problems: Sequence[str], notes: Sequence[str] = ()) -> Review:
        """Offer a run request to a person, unless the same one was offered already with the same code.

        A decision about one part of a study covers its other parts: an approval covers each part once, and only if the
        plan states the local data's shape as this site reported it.
        """
        with self._locked():
            review = self.get(order.run)
            if review and review.is_of(order) and review.problems == tuple(problems):
                return review
            fresh = Review(
                order.to_json(), code_hash(), order.packages, WAITING, tuple(problems), _now(), notes=tuple(notes)
            )
            fresh = self._taking_part(fresh)
            self._put(fresh)
            if fresh.state == APPROVED:
                self._take(fresh)
            return fresh

    def decide(self, name: str, state: str, by: str, reason: str, shown: str = "") -> list[Review]:
        """Record a person's decision about a run or a study, signed by the site.

        Args:
            name: A run, a study, or the first characters of a run request's hash.
            state: ``approved`` (exactly what was shown) or ``refused`` (the whole study).
            by: The person's name; empty for the account's.
            reason: Reason of the decision.
            shown: Hash of what was shown, or its beginning; empty for what was last shown to this account. A refusal
                without it covers whatever has arrived.

        Raises:
            NotShown: If the content differs from what was shown.
            SetupError: If the name matches nothing, the code has changed since it arrived, or the policy refuses it.
        """
        person = this_person(by)
        if reason != printable(reason, 2000):
            raise SetupError("a reason is at most 2000 characters on one line")
        with self._locked():
            found, now = self.subject(name), ""
            if state == APPROVED or shown:
                now = self._check_shown(name, found, shown)
            if state == APPROVED:
                found = _approvable(found)
            else:
                found = self.group(found[0])
            decided = [
                replace(
                    review,
                    state=state,
                    by=person.name,
                    account=person.account,
                    uid=person.uid,
                    reason=reason,
                    decided=_now(),
                    shown=now,
                    of="",
                ).signed(self._keys)
                for review in found
            ]
            for review in decided:
                self._put(review)
                if state == APPROVED:
                    self._take(review)
        return decided

    def current(self, order: RunRequest) -> Review | None:
        """Return the review of exactly this run request with exactly this code, or None."""
        review = self.get(order.run)
        return review if review is not None and review.is_of(order) else None

    def answered(self, order: RunRequest, said: dict[str, Any]) -> None:
        """Record this site's answer to a survey: ``inputs`` and ``outputs`` of its data."""
        with self._locked():
            review = self.current(order)
            if review is not None and review.state == APPROVED and review.said != said:
                self._put(replace(review, said=said).signed(self._keys))

    def note_data(self, run: str, data: str) -> None:
        """Record why the local data do not fit a run, for people at this site; empty if they do."""
        with self._locked():
            review = self.get(run)
            if review is not None and review.data != data:
                self._put(replace(review, data=data))

    def _taking_part(self, fresh: Review) -> Review:
        """Return ``fresh`` with its study's decision if that covers it, and otherwise with notes on why it does not."""
        order = fresh.what
        group = self.group(fresh) if order.study_key else []
        kin = [r for r in group if r.state != WAITING and (r.code, r.packages) == (fresh.code, fresh.packages)]
        why = [*self._taken(order), *_unlike(order, group)]
        if not kin or (kin[-1].state == APPROVED and (why or fresh.problems)):
            return replace(fresh, notes=(*fresh.notes, *why))
        last = kin[-1]
        return replace(
            fresh,
            state=last.state,
            decided=last.decided,
            by=last.by,
            account=last.account,
            uid=last.uid,
            reason=last.reason,
            shown=last.shown,
            of=last.of or last.what.run,
        ).signed(self._keys)

    def _check_shown(self, name: str, found: Sequence[Review], shown: str) -> str:
        """Return the hash of the current content, if it is what the person was shown."""
        now, again = shown_hash(found), f"read it again: `polyclinic site review {name}`"
        if shown:
            if len(shown) < PREFIX or not now.startswith(shown):
                raise NotShown(f"this is not what you were shown (now {now[:16]}, not {shown[:16]}); {again}")
            return now
        names = {known for review in found for known in review.names}
        last = read_json(self._shown, default={}).get(name if name in names else found[0].what.run)
        if last is None:
            raise NotShown(f"this is not what you were shown: nothing was shown to you under this name yet; {again}")
        if last != now:
            raise NotShown(f"this is not what you were shown: it has changed since; {again}")
        return now

    def _taken(self, order: RunRequest) -> list[str]:
        """Return why an approval was used up: the other runs that took the same part or the same name."""
        parts: dict[str, list[list[str]]] = read_json(self._parts, default={})
        what = "this survey" if order.mode == "survey" else "this method run"
        mine = [order.run, order.hash]
        same = dict.fromkeys(run for run, hash in parts.get(_part(order), []) if [run, hash] != mine)
        reused = any(run == order.run and hash != order.hash for taken in parts.values() for run, hash in taken)
        return [f"{what} was already executed as {run}" for run in same if order.study_key] + [
            f"another run request was already executed under the name {order.run}"
        ] * reused

    def _take(self, review: Review) -> None:
        """Record that a run takes its part of its study, so that another run needs a new decision."""
        parts: dict[str, list[list[str]]] = read_json(self._parts, default={})
        taken, mine = parts.setdefault(_part(review.what), []), [review.what.run, review.what.hash]
        if mine not in taken:
            taken.append(mine)
            write_private(self._parts, json.dumps(parts))

    @property
    def _records(self) -> Path:
        return private_folder(self.folder / "records")

    @property
    def _shown(self) -> Path:
        return self._records / f"shown-{os.getuid()}"

    @property
    def _parts(self) -> Path:
        return self._records / "parts"

    def _path(self, run: str) -> Path:
        return self.folder / f"{run}.json"

    def _put(self, review: Review) -> None:
        write_private(self._path(review.what.run), to_json(review))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder's lock, across processes."""
        with open(self._records / ".lock", "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def record_decision(
    home: SiteFolder, name: str, state: str, reason: str, by: str = "", shown: str = "", place: str = ""
) -> list[Review]:
    """Record a person's decision in the reviews and in the journal of the site in ``home``.

    Args:
        home: The site.
        name: A run, a study, or the first characters of a run request's hash.
        state: ``approved`` or ``refused``.
        reason: Reason of the decision.
        by: The person's name; empty for the account's.
        shown: Hash of what was shown, as of ``Reviews.decide``.
        place: Place of the decision, for the journal; empty for the command line.

    Raises:
        SetupError: As of ``Reviews.decide``, or if an approved study contradicts this hospital's data.toml, so that it
            could not run.
    """
    reviews = Reviews(home.reviews)
    if state == APPROVED:
        order = reviews.subject(name)[0].what
        data = Path(read_toml(home.settings, "polyclinic site init")["data"])
        own = None if order.rehearsal else data_restrictions.of_hospital(data)
        if own and (differ := data_restrictions.conflicts(own, order.data)):
            raise SetupError("\n".join(differ.values()))
    decided = reviews.decide(name, state, by, reason, shown)
    journal = SharedJournal(home.journal)
    for review in decided:
        about = {"run": review.what.run, "rehearsal": review.what.rehearsal, **({"place": place} if place else {})}
        journal.write(f"{state} by a person", {**about, **review.statement, "signature": review.signature})
    journal.close()
    return decided


def _approvable(reviews: Sequence[Review]) -> list[Review]:
    """Return those of ``reviews`` that a person may approve.

    Raises:
        SetupError: If there are none, or the code at this site has changed since they arrived.
    """
    may = [review for review in reviews if not review.problems]
    if not may:
        why = "; ".join(dict.fromkeys(problem for review in reviews for problem in review.problems))
        raise SetupError(f"this study is refused here, so approving it would change nothing: {why}")
    for review in may:
        if review.code != code_hash():
            raise SetupError("polyclinic was changed here since this study came: wait until the server offers it again")
        if review.packages != review.what.packages:
            raise SetupError(
                "a package that this study needs was changed here since it came: wait until the server offers it again"
            )
    return may


def _unlike(order: RunRequest, group: Sequence[Review]) -> list[str]:
    """Return a sentence for each statement of the plan about the local data that differs from this site's survey
    answer.
    """
    if not order.filled:
        return []
    reported = next((review.said for review in reversed(group) if review.said), None)
    if reported is None:
        return [f"{' and '.join(order.filled)}: this site has answered no survey of the study that could confirm them"]
    counted = COUNTED.get(str(order.plan.get("kind")), "values")
    local = {"inputs": f"are {json.dumps(reported['inputs'])}", "outputs": f"have {reported['outputs']} {counted}"}
    return [
        f"{key} = {json.dumps(order.plan.get(key))}; the data here {local[key]}"
        for key in order.filled
        if order.plan.get(key) != reported[key]
    ]


def _part(order: RunRequest) -> str:
    """Return the key of the study part that a run is; a run without a study is its own part."""
    return f"{order.study_key} {order.part}" if order.study_key else f"run {order.run}"


def _ambiguous(text: str, found: Sequence[Review]) -> str:
    lines = [f"  {r.what.run:24} {r.state:10} since {r.seen[:16]}  order {r.what.hash[:16]}" for r in found]
    return "\n".join(
        [
            f"{text!r} is the name of {len({r.group for r in found})} different studies:",
            *lines,
            "name one by its run, or by the first characters of its run request's hash",
        ]
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
