"""Server-side verification of answer signatures against the keys that were certified for each site.

FLARE's TLS authenticates the connection. The signature in addition binds the answer to the site's own key,
independently of intermediaries, and is kept in the run's journal for later verification. After a key renewal the
earlier key remains valid for ``GRACE``, so that work in progress is accepted.
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
    """Public keys in ``admitted.json``, reread whenever the file changes."""

    def __init__(self, admitted: Path) -> None:
        self.path = admitted
        self._known: tuple[int, dict[str, Any]] = (-1, {})

    def check(self, answer: Answer) -> None:
        """Check the signature of an answer.

        Raises:
            BadMessage: If it is missing or wrong, or the site is not admitted or was revoked. The message says which.
        """
        entry = self._admitted().get(answer.site)
        if entry is None:
            raise BadMessage(f"{answer.site} is not admitted here")
        if entry.get("revoked"):
            raise BadMessage(f"{answer.site} was revoked on {str(entry['revoked'])[:10]}")
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
    """Return the entry of ``admitted.json`` for a site's public key."""
    from cryptography.hazmat.primitives import serialization

    form = serialization.PublicFormat.SubjectPublicKeyInfo
    text = public.public_bytes(serialization.Encoding.PEM, form).decode()
    return {"key": text, "expires": expires.isoformat()}


def added(before: list[dict[str, str]], new: dict[str, str]) -> list[dict[str, str]]:
    """Return the signers ``before`` plus a ``new`` one, without those that have expired.

    An earlier key remains valid for ``GRACE``, for answers in progress. A renewed certificate of the same key replaces
    its entry.
    """
    now = datetime.now(UTC)
    valid = []
    for one in before:
        expires = min(datetime.fromisoformat(one["expires"]), now + GRACE)
        if one["key"] != new["key"] and expires > now:
            valid.append({**one, "expires": expires.isoformat()})
    return [*valid, new]


@lru_cache(maxsize=256)
def _key(text: str) -> Any:
    from cryptography.hazmat.primitives import serialization

    return serialization.load_pem_public_key(text.encode())
