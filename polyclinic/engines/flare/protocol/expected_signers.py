"""At the server, whose signature an answer must carry: that of the site, by a key for which it was given a certificate.

FLARE's TLS says which house a message came from. The signature says that the house's own key holds for it, whatever
lies between; it is kept in the run's journal, where anybody can check it later. Sites that renewed their keys may sign
by the earlier one for ``GRACE``, because what they were doing when they changed goes on.
"""

from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from polyclinic.engines.flare.protocol.messages import Answer, BadMessage
from polyclinic.engines.flare.protocol.paths import SetupError, read_json
from polyclinic.engines.flare.protocol.shared_journals import signed_by_key

GRACE = timedelta(days=7)


class Signers:
    """The public keys in ``admitted.json``, read again whenever the file changes."""

    def __init__(self, admitted: Path) -> None:
        self.path = admitted
        self._known: tuple[int, dict[str, Any]] = (-1, {})

    def check(self, answer: Answer) -> None:
        """Checks the signature under an answer.

        Raises:
            BadMessage: If it is missing or wrong, or the site has no right to take part. The message says which.
        """
        entry = self._admitted().get(answer.site)
        if entry is None:
            raise BadMessage(f"{answer.site} is not admitted here")
        if entry.get("revoked"):
            raise BadMessage(f"{answer.site} was shut out on {str(entry['revoked'])[:10]}")
        if not answer.signature:
            raise BadMessage("it is not signed")
        now = datetime.now(UTC)
        good = [signer for signer in entry["signers"] if datetime.fromisoformat(signer["expires"]) > now]
        if not any(signed_by_key(_key(signer["key"]), answer.signature, answer.signed) for signer in good):
            raise BadMessage(f"it is not signed by a key of {answer.site} that has a certificate")

    def _admitted(self) -> dict[str, Any]:
        try:
            stamp = self.path.stat().st_mtime_ns
            if stamp != self._known[0]:
                self._known = stamp, read_json(self.path)
        except (OSError, SetupError) as error:
            raise BadMessage(f"signatures cannot be checked: {error}") from None
        return self._known[1]


def signer(public: Any, expires: datetime) -> dict[str, str]:
    """What ``admitted.json`` keeps of a site's key."""
    from cryptography.hazmat.primitives import serialization

    form = serialization.PublicFormat.SubjectPublicKeyInfo
    text = public.public_bytes(serialization.Encoding.PEM, form).decode()
    return {"key": text, "expires": expires.isoformat()}


def added(before: list[dict[str, str]], new: dict[str, str]) -> list[dict[str, str]]:
    """``before`` with a ``new`` signer, without those that have ended.

    An earlier key holds for ``GRACE`` more, for answers that are under way; a renewed certificate of one key replaces
    it.
    """
    now = datetime.now(UTC)
    kept = []
    for one in before:
        expires = min(datetime.fromisoformat(one["expires"]), now + GRACE)
        if one["key"] != new["key"] and expires > now:
            kept.append({**one, "expires": expires.isoformat()})
    return [*kept, new]


@lru_cache(maxsize=256)
def _key(text: str) -> Any:
    from cryptography.hazmat.primitives import serialization

    return serialization.load_pem_public_key(text.encode())
