"""Review of one run by a person: what was offered, the decision and the person, signed by the site.

A decision is valid only with the site's signature, so that an edited file is no approval. The name is as typed. The
account is determined from the process's user id and the system's list of accounts, not from environment variables,
which any user can set.
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

from polyclinic.core.plugin_packages import Package
from polyclinic.engines.flare.pki import certificate_authority, site_keys
from polyclinic.engines.flare.protocol import shared_journals
from polyclinic.engines.flare.protocol.messages import printable
from polyclinic.engines.flare.protocol.paths import SetupError, read_json, read_small
from polyclinic.engines.flare.protocol.run_request import InvalidRunRequest, RunRequest, code_hash

WAITING, APPROVED, REFUSED = "waiting", "approved", "refused"
STATEMENT = b"polyclinic decision 1\n"
UNSIGNED = "the decision in this file is not signed by this site's key and is therefore invalid"


class Person(NamedTuple):
    """Person who decides: the name as typed, and the account of the operating system."""

    name: str
    account: str
    uid: int


def this_person(name: str = "") -> Person:
    """Return the person who runs this process, with the given ``name`` or else the account's.

    Raises:
        SetupError: If the name cannot be displayed on one line.
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
    """Review of one run.

    Attributes:
        order: The complete run request. ``code``: hash of the local Polyclinic code when it arrived. ``packages``:
            those that provide plug-in methods.
        state: ``waiting``, ``approved`` or ``refused``.
        problems: Reasons why the site refuses it regardless of a person's decision.
        seen: Time of arrival. ``decided``: time of the decision.
        by: The person, as typed. ``account`` and ``uid``: the person's operating system account.
        reason: Reason for the decision.
        shown: Hash of what the person had been shown.
        of: The run of the same study that the person decided, if this run is covered by that decision.
        notes: Further information for the person, such as methods of the study that the policy refuses.
        said: Answer to a survey: ``inputs`` and ``outputs`` of the local data.
        data: Why the local data do not fit, if they do not. It may name files and is not sent.
        signature: The site's signature of the decision.
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
        """The parsed run request."""
        return RunRequest.from_json(self.order)

    @property
    def group(self) -> str:
        """Key shared by all parts of one study; a key of its own for a run without a study."""
        return self.what.study_key or f"run {self.what.run}"

    @property
    def names(self) -> set[str]:
        """The names by which it can be selected: its run and its study."""
        return {self.what.run, *([self.what.study["name"]] if self.what.study else [])}

    @property
    def hash(self) -> str:
        """SHA-256 of what a person is shown: the run request, the code, the packages, the problems and the notes."""
        shown = [self.what.hash, self.code, self.packages, self.problems, self.notes]
        return hashlib.sha256(json.dumps(shown).encode()).hexdigest()

    @property
    def statement(self) -> dict[str, Any]:
        """The fields that the site signs; they are also written to the journal."""
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
        """Return whether this is a review of exactly ``order`` with exactly the current code."""
        return self.order == order.to_json() and self.code == code_hash() and self.packages == order.packages

    def signed(self, folder: Path) -> "Review":
        """Return a copy signed with the site key in ``folder``.

        Raises:
            SetupError: If there is no key.
        """
        if not (folder / "site.key").is_file():
            raise SetupError(f"{folder / 'site.key'} is missing, and decisions are signed with it")
        return replace(
            self, signature=shared_journals.sign(site_keys.load(folder / "site.key"), signed_bytes(self.statement))
        )

    def checked(self, folder: Path, certificates: Path) -> "Review":
        """Return the review without any decision or survey answer that this site did not sign."""
        if self.state == WAITING:
            return replace(self, said={}) if self.said else self
        if _signed_by_site(self.signature, self.statement, folder, certificates):
            return self
        return replace(self, state=WAITING, said={}, notes=(*self.notes, UNSIGNED))


def signed_bytes(statement: Mapping[str, Any]) -> bytes:
    """Return the bytes that the signature of ``statement`` covers."""
    return STATEMENT + json.dumps(statement, sort_keys=True, separators=(",", ":")).encode()


def shown_hash(reviews: Iterable[Review]) -> str:
    """Return the SHA-256 of what a person is shown of several reviews together."""
    return hashlib.sha256("\n".join(sorted(review.hash for review in reviews)).encode()).hexdigest()


def read(path: Path) -> Review:
    """Return the review in the file at ``path``, unchecked.

    Raises:
        SetupError: If it is not a review.
    """
    table = read_json(path)
    try:
        lists = {key: tuple(table[key]) for key in ("problems", "notes")}
        packages = tuple(Package(*package) for package in table["packages"])
        review = Review(**{**table, **lists, "packages": packages})
        if review.what.run != path.stem:
            raise SetupError(f"{path} contains the review of another run")
    except (TypeError, KeyError, InvalidRunRequest) as error:
        raise SetupError(f"{path} is not a review ({error}): delete it, and the study will be offered again") from None
    return review


def to_json(review: Review) -> str:
    """Return the review as text."""
    return json.dumps(asdict(review))


def _signed_by_site(signature: str, statement: Mapping[str, Any], folder: Path, certificates: Path) -> bool:
    """Return whether a present or earlier key of this site signed ``statement``."""
    data = signed_bytes(statement)
    if any(shared_journals.signed_by(one, signature, data) for one in _certified(certificates)):
        return True  # without reading a private key, whose verification takes a fifth of a second
    return any(shared_journals.signed_by(key, signature, data) for key in site_keys.of_site(folder))


def _certified(certificates: Path) -> Sequence[Any]:
    return [certificate_authority.load_certificate(read_small(path)) for path in sorted(certificates.glob("*.crt"))]
