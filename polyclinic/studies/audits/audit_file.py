"""The file audit.json: the results of an audit of one model, in the folder of the model. The report reads it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from polyclinic.attacks import canary, membership
from polyclinic.attacks.separation import Found
from polyclinic.errors import IntegrityError

FORMAT = 2


@dataclass(frozen=True)
class Leak:
    """How well one image was drawn from its gradient (``attacks.inversion``)."""

    psnr_db: float
    guess_db: float
    rdlv: float


@dataclass(frozen=True)
class Inverted:
    """An image from its gradient: at a control that leaks, and at the run's model.

    Attributes:
        site: Whose image it was.
        control: Of the network that is known to leak.
        found: Of the run's model.
        says: The verdict.
    """

    site: str
    control: Leak
    found: Leak
    says: str


@dataclass(frozen=True)
class Members:
    """Who was trained on.

    Attributes:
        control: A network that was made to memorize.
        sites: By site and attack.
        shadows: How many shadow models LiRA and RMIA used; 0 where they were not tried.
        limit: How many patients of each kind and site were tried at most.
    """

    control: Found
    sites: Mapping[str, Mapping[str, Found]]
    shadows: int
    limit: int

    @property
    def verdict(self) -> membership.Verdict:
        """What follows from it."""
        return membership.Verdict(self.control, self.sites)


@dataclass(frozen=True)
class Audit:
    """Results of the audit of one model.

    Attributes:
        method: Label of the method.
        seed: Seed of the method run.
        arm: Name of the folder of its model, in the folder ``arms`` of the run.
        membership: Results of the membership attacks.
        inversion: Results of the reconstruction of an image from its gradient.
        privacy: The lower bound on ε and the claimed ε; None if not audited, with the reason in ``not_done``.
        privacy_site: The site whose training was audited.
        not_done: What was not audited, each a sentence.
    """

    method: str
    seed: int
    arm: str
    membership: Members
    inversion: Inverted
    privacy: canary.Verdict | None
    privacy_site: str
    not_done: tuple[str, ...]

    def file(self, run: Path) -> Path:
        """Return the path of the file in the run folder ``run``."""
        return run / "arms" / self.arm / "audit.json"

    def to_json(self) -> dict[str, Any]:
        """Return the content of the file, with the verdicts as sentences. It contains no image."""
        value: dict[str, Any] = {"format": FORMAT, **json.loads(_AUDIT.dump_json(self))}
        value["membership"]["says"] = self.membership.verdict.says
        adjusted = self.membership.verdict.adjusted
        for (site, attack), (area, exposed) in adjusted.items():
            value["membership"]["sites"][site][attack] |= {"adjusted_p_auc": area, "adjusted_p_exposed": exposed}
        if self.privacy is not None:
            value["privacy"]["says"] = self.privacy.says
        return value


_AUDIT: TypeAdapter[Audit] = TypeAdapter(Audit)


class NotAnAudit(IntegrityError):
    """A file that is not an audit of this version. The message names it."""


def read_audit(file: Path) -> Audit:
    """Read the audit in ``file``.

    Raises:
        NotAnAudit: If it is damaged, or of another version.
    """
    try:
        value = json.loads(file.read_bytes())
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise NotAnAudit(f"{file}: not an audit of this version: run polyclinic audit again")
        return _AUDIT.validate_python(value)
    except (ValidationError, ValueError) as error:
        if isinstance(error, NotAnAudit):
            raise
        raise NotAnAudit(f"{file}: a damaged audit: delete it, and run polyclinic audit again") from error
