"""One study before one person: what was offered, what was decided and by whom, under the site's signature.

A decision counts only with the site's signature under it, so that an edited file is no approval. The name is what the
person typed; the account is the operating system's, from the process's user id and the system's list of accounts, and
not from environment variables, which anybody may set.
"""

import hashlib
import json
import os
import pwd
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from polyclinic.engines.flare.pki import certificate_authority, site_keys
from polyclinic.engines.flare.protocol import shared_journals
from polyclinic.engines.flare.protocol.messages import printable
from polyclinic.engines.flare.protocol.paths import SetupError, read_json, read_small
from polyclinic.engines.flare.protocol.run_request import InvalidRunRequest, RunRequest, code_hash
from polyclinic.methods.plugins import Package

WAITING, APPROVED, REFUSED = "waiting", "approved", "refused"
STATEMENT = b"polyclinic decision 1\n"
UNSIGNED = "the decision in this file is not signed by this site's key, so it does not count"


class Person(NamedTuple):
    """Who decides: the name as typed, and the account of the operating system."""

    name: str
    account: str
    uid: int


def this_person(name: str = "") -> Person:
    """The person at this keyboard, called ``name``; by the account's name where none is given.

    Raises:
        SetupError: If the name cannot be shown on one line.
    """
    uid = os.getuid()
    try:
        account = pwd.getpwuid(uid).pw_name
    except KeyError:  # an account that the system does not list, as in a container
        account = f"uid {uid}"
    if name != printable(name, 100):
        raise SetupError("a person's name is at most 100 characters on one line")
    return Person(name.strip() or account, account, uid)


@dataclass(frozen=True)
class Review:
    """One run before one person.

    Attributes:
        order: The order, whole. ``code``: the hash of Polyclinic's code here when it came, and ``packages`` those that
            provide plug-in methods.
        state: ``waiting``, ``approved`` or ``refused``.
        problems: Why it is refused here whatever a person says.
        seen: When it came. ``decided``: when a person decided.
        by: The person, as typed. ``account`` and ``uid``: as whom the operating system knows the person.
        reason: Why the person decided so.
        shown: The hash of what the person had been shown.
        of: The run of the same study that the person decided, where this one takes part in that decision.
        notes: What a person should know besides, such as methods of the study that the policy refuses.
        said: Of a survey that was answered: ``inputs`` and ``outputs`` of the data here.
        data: Why the data here do not fit, if they do not. It may name files and stays here.
        signature: The site's, under the decision.
    """

    order: str
    code: str
    packages: tuple[Package, ...]
    state: str
    problems: tuple[str, ...]
    seen: str
    decided: str = ""
    by: str = ""
    account: str = ""
    uid: int = -1
    reason: str = ""
    shown: str = ""
    of: str = ""
    notes: tuple[str, ...] = ()
    said: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    signature: str = ""

    @cached_property
    def what(self) -> RunRequest:
        """The order, as an object."""
        return RunRequest.from_json(self.order)

    @property
    def group(self) -> str:
        """The same for all parts of one study; of a run without a study, its own."""
        return self.what.study_key or f"run {self.what.run}"

    @property
    def names(self) -> set[str]:
        """What it may be called: by its run or its study."""
        return {self.what.run, *([self.what.study["name"]] if self.what.study else [])}

    @property
    def hash(self) -> str:
        """SHA-256 of what a person is shown of it: the order, the code, the packages, the problems and the notes."""
        shown = [self.what.hash, self.code, self.packages, self.problems, self.notes]
        return hashlib.sha256(json.dumps(shown).encode()).hexdigest()

    @property
    def statement(self) -> dict[str, Any]:
        """What the site signs, as it stands in the journal too."""
        return {
            "order": self.what.hash,
            "code": self.code,
            "packages": [list(package) for package in self.packages],
            "state": self.state,
            "decided": self.decided,
            "by": self.by,
            "account": self.account,
            "uid": self.uid,
            "reason": self.reason,
            "shown": self.shown,
            "of": self.of,
            "said": self.said,
        }

    def is_of(self, order: RunRequest) -> bool:
        """Whether this is a review of exactly ``order``, with exactly the code that is here."""
        return self.order == order.to_json() and self.code == code_hash() and self.packages == order.packages

    def signed(self, folder: Path) -> "Review":
        """With the signature of the site whose keys lie in ``folder``.

        Raises:
            SetupError: If there is no key.
        """
        if not (folder / "site.key").is_file():
            raise SetupError(f"{folder / 'site.key'} is missing, and decisions are signed with it")
        return replace(
            self, signature=shared_journals.sign(site_keys.load(folder / "site.key"), signed_bytes(self.statement))
        )

    def checked(self, folder: Path, certificates: Path) -> "Review":
        """As it counts: what was decided, or said in a survey, counts only under this site's signature."""
        if self.state == WAITING:
            return replace(self, said={}) if self.said else self
        if _signed_by_site(self.signature, self.statement, folder, certificates):
            return self
        return replace(self, state=WAITING, said={}, notes=(*self.notes, UNSIGNED))


def signed_bytes(statement: Mapping[str, Any]) -> bytes:
    """What the signature under ``statement`` is over."""
    return STATEMENT + json.dumps(statement, sort_keys=True, separators=(",", ":")).encode()


def shown_hash(reviews: Iterable[Review]) -> str:
    """SHA-256 of what a person is shown of several reviews together."""
    return hashlib.sha256("\n".join(sorted(review.hash for review in reviews)).encode()).hexdigest()


def read(path: Path) -> Review:
    """The review in the file at ``path``, unchecked.

    Raises:
        SetupError: If it is not one.
    """
    table = read_json(path)
    try:
        lists = {key: tuple(table[key]) for key in ("problems", "notes")}
        packages = tuple(Package(*package) for package in table["packages"])
        review = Review(**{**table, **lists, "packages": packages})
        if review.what.run != path.stem:
            raise SetupError(f"{path} holds the review of another run")
    except (TypeError, KeyError, InvalidRunRequest) as error:
        raise SetupError(f"{path} is not a review ({error}): delete it, and the study will be offered again") from None
    return review


def to_json(review: Review) -> str:
    """The review as text."""
    return json.dumps(asdict(review))


def _signed_by_site(signature: str, statement: Mapping[str, Any], folder: Path, certificates: Path) -> bool:
    """Whether a key that this site has, or had, signed ``statement``."""
    data = signed_bytes(statement)
    if any(shared_journals.signed_by(key, signature, data) for key in site_keys.of_site(folder)):
        return True
    return any(shared_journals.signed_by(one, signature, data) for one in _earlier(certificates))


def _earlier(certificates: Path) -> Sequence[Any]:
    return [certificate_authority.load_certificate(read_small(path)) for path in sorted(certificates.glob("*.crt"))]
