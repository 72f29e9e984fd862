"""Assignment of a site's data to privacy ledgers, by the identity of the data and not by their location.

A site declares a name for its data set (``data_name`` in site.toml). Next to each ledger is a list of keyed hashes of
the data that it counts: of each example's inputs, and of each patient's name. Data are charged to every ledger of the
same name and to every ledger that shares a hash with them, whatever the folder or the name; new hashes are added to the
lists. A folder that was moved, copied or renamed, a subset, or data with one more patient therefore keep their budget,
and so do renamed patients. Inputs are hashed as a study prepares them: if data were prepared differently *and* have no
patient names, only the name of the data set identifies them.

Hashes are BLAKE2b with a key that never leaves the site's folder, so that a list reveals nothing about a patient
without the key. Inputs are hashed without their targets, so that changed labels do not make new data. Names that only
number the examples, or equal the examples' IDs, are not treated as patient names, and constant inputs (empty images)
are ignored.

Files that were deleted or replaced by an older copy are detected through other records: lists are bound to the ledgers'
chains, and the last head of each ledger is kept outside the folder. Replacing the complete site folder is not detected.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyclinic.core.atomic import write_private
from polyclinic.core.audit_log import Broken
from polyclinic.engines.policy.site_policy import BadPolicy, Privacy
from polyclinic.learning.training.dp_sgd import Spend
from polyclinic.privacy.ledger import Ledger, locked

KEY = "members.key"
LIST = ".members"  # suffix of the ledger's file name
HEADS = "ledger-heads.json"  # next to the ledgers' folder
WIDTH = 33  # bytes per line of a list: 32 hexadecimal digits and the newline


@dataclass(frozen=True)
class SiteLedger(Ledger):
    """The ledger of some data. If they belong to several ledgers, all are charged, and this is the first.

    Attributes:
        others: The other ledgers.
        heads: The file with the last head of each of the site's ledgers.
    """

    others: tuple[Ledger, ...]
    heads: Path

    def reserve(self, spends: Iterable[Spend], about: Mapping[str, Any] | None = None) -> float:
        """Charge every ledger, before anything is released, if each of them allows it.

        Returns:
            The largest total spent among the ledgers, as of ``Ledger.reserve``.

        Raises:
            Exhausted: If one of them does not allow it. Another may then have been charged in a race for its budget.
            Broken: If one of them was changed, truncated or rolled back, or is missing.
        """
        given = list(spends)
        every = [Ledger(self.path), *self.others]
        with locked(self.heads.with_name(f"{self.heads.name}.lock")):
            for ledger in every:
                _unless_rolled_back(ledger, _heads(self.heads))
                ledger.check(given)
            totals = [ledger.reserve(given, about) for ledger in every]
            _note_heads(self.heads, every)
        return max(totals)


def ledger_for(folder: Path, name: str, roles: Mapping[str, Any], site: str, privacy: Privacy) -> SiteLedger:
    """Return the ledger to which a site's data are charged. Creates one with the policy's budget if there is none.

    A changed ε in the policy is recorded as a decision of the site.

    Args:
        folder: The folder of the site's ledgers.
        name: The name of the data set.
        roles: The site's examples by role. All roles count, because another study may train on this one's test data.
        site: Name of the site.
        privacy: The policy's budget.

    Raises:
        Broken: If a ledger of this site was changed, truncated, rolled back or deleted. The message says what to do.
        BadPolicy: If a ledger of the data uses another privacy unit or another δ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    heads = folder.parent / HEADS
    with locked(folder / "folder.lock"), locked(heads.with_name(f"{heads.name}.lock")):
        known = _heads(heads)
        ledgers = list(_all(folder, known))
        key = _key(folder, ledgers)
        mine = members_of(key, roles)
        matching = [ledger for ledger in ledgers if ledger.budget()["data"] == name or mine & _listed(ledger)]
        if not matching:
            matching = [Ledger(folder / f"{_digest(key, b'name', name.encode())[:12]}.jsonl")]
            matching[0].begin(site=site, data=name, **privacy.model_dump())
        for ledger in matching:
            _agree(ledger, privacy)
            _add(ledger, key, mine)
        _note_heads(heads, matching)
    return SiteLedger(matching[0].path, tuple(matching[1:]), heads)


_last: tuple[bytes, Mapping[str, Any], frozenset[str]] | None = None


def members_of(key: bytes, roles: Mapping[str, Any]) -> frozenset[str]:
    """Return the keyed hashes that identify data: of each example's inputs, and of each patient's name.

    The result is cached for the next call with the same ``roles``, so that a process reads its data once.
    """
    global _last
    if _last is None or _last[0] != key or _last[1] is not roles:
        _last = key, roles, frozenset(_members(key, roles))
    return _last[2]


def _members(key: bytes, roles: Mapping[str, Any]) -> Iterator[str]:
    for examples in roles.values():
        patients, ids = getattr(examples, "patients", ()), getattr(examples, "ids", ())
        numbered = [str(i) for i in range(len(patients))]
        if list(patients) != numbered and list(patients) != list(ids):  # else the examples have no patient names
            yield from (_digest(key, b"patient", patient.encode()) for patient in set(patients))
        for image in getattr(examples, "inputs", ()):
            if bool((image != image.flatten()[0]).any()):
                shape = f"{image.dtype}{tuple(image.shape)}".encode()
                yield _digest(key, b"inputs", shape, image.contiguous().numpy().tobytes())


def _digest(key: bytes, *parts: bytes) -> str:
    hasher = hashlib.blake2b(key=key, digest_size=16)
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little") + part)
    return hasher.hexdigest()


def _all(folder: Path, known: Mapping[str, str]) -> Iterator[Ledger]:
    """Yield every ledger of the site after checking that it is intact.

    Raises:
        Broken: If one is not intact, or is missing although another record refers to it.
    """
    names = {path.name for path in folder.glob("*.jsonl")} | known.keys()
    names |= {path.name.removesuffix(end) for end in (".head", LIST) for path in folder.glob(f"*.jsonl{end}")}
    for ledger in (Ledger(folder / name) for name in sorted(names)):
        _unless_rolled_back(ledger, known)
        if ledger.begun or _list(ledger).exists():
            yield ledger


def _unless_rolled_back(ledger: Ledger, known: Mapping[str, str]) -> None:
    head = known.get(ledger.path.name)
    if head is not None and not ledger.path.exists():
        raise Broken(
            f"{ledger.path}: the ledger is missing, although {HEADS} lists it, so nothing can be released. "
            "Restore it from a copy"
        )
    if head is not None and not ledger.knows(head):
        raise Broken(
            f"{ledger.path}: this is an older copy or another ledger: it does not contain its last head {head[:16]}, "
            "so nothing can be released. Restore the newest copy of the folder"
        )


def _key(folder: Path, ledgers: list[Ledger]) -> bytes:
    """Return the secret key of the site's lists, which is created with the first ledger.

    Raises:
        Broken: If it is missing or was replaced, although there are lists that were made with it.
    """
    path = folder / KEY
    checks = {str(bound["check"]) for ledger in ledgers if (bound := ledger.members())}
    if not path.exists() and not checks:
        path.touch(mode=0o600)
    if not checks and path.stat().st_size == 0:  # new, or not yet written when a crash occurred
        write_private(path, os.urandom(32))
    key = path.read_bytes() if path.exists() else b""
    if len(key) != 32 or checks - {_check(key)}:
        raise Broken(
            f"{path}: this is not the key with which the lists of the ledgers were made, so nothing can be released. "
            "Restore it from a copy"
        )
    return key


def _check(key: bytes) -> str:
    return _digest(key, b"check")


def _list(ledger: Ledger) -> Path:
    return ledger.path.with_name(ledger.path.name + LIST)


def _listed(ledger: Ledger) -> set[str]:
    """Return the hashes of the data that a ledger counts, including lines not yet bound to the chain after a crash.

    Raises:
        Broken: If the list was changed or truncated.
    """
    path, bound = _list(ledger), ledger.members()
    data = path.read_bytes() if path.exists() else b""
    size = int(bound["size"]) if bound else 0
    if hashlib.sha256(data[:size]).hexdigest() != (bound["sha256"] if bound else hashlib.sha256().hexdigest()):
        raise Broken(
            f"{path}: the list of the data that {ledger.path.name} counts was changed or truncated, so nothing can be "
            "released. Restore it from a copy"
        )
    return set(data.decode("ascii", "replace").split())


def _add(ledger: Ledger, key: bytes, mine: frozenset[str]) -> None:
    """Add new members to a ledger's list, and bind the list to its chain after it is on the disk."""
    before = ledger.members()
    if not (new := mine - _listed(ledger)) and before is not None and _list(ledger).stat().st_size == before["size"]:
        return
    with open(_list(ledger), "ab") as file:
        file.truncate(file.tell() - file.tell() % WIDTH)  # an incomplete last line was never bound
        file.write("".join(f"{member}\n" for member in sorted(new)).encode())
        file.flush()
        os.fsync(file.fileno())
    _list(ledger).chmod(0o600)
    data = _list(ledger).read_bytes()
    facts = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "check": _check(key)}
    ledger.note_members({"members": len(data) // WIDTH, **facts})


def _agree(ledger: Ledger, privacy: Privacy) -> None:
    """Set the policy's ε in a ledger with the same privacy unit and δ.

    Raises:
        BadPolicy: If the ledger uses another privacy unit or another δ.
    """
    known = ledger.budget()
    if (known["unit"], known["delta"]) != (privacy.unit, privacy.delta):
        raise BadPolicy(
            f"privacy: {ledger.path.name} counts for every {known['unit']} with delta = {known['delta']:g}, and a "
            "ledger cannot be recounted: restore both values in the policy"
        )
    if known["epsilon"] != privacy.epsilon:
        ledger.raise_budget(privacy.epsilon, "policy.toml says so")


def _heads(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        heads: dict[str, str] = json.loads(path.read_bytes())
        return {str(name): str(head) for name, head in heads.items()}
    except (ValueError, AttributeError) as error:
        raise Broken(f"{path}: not a list of ledger heads ({error}): restore it from a copy") from None


def _note_heads(path: Path, ledgers: Iterable[Ledger]) -> None:
    heads = _heads(path) | {ledger.path.name: ledger.head() for ledger in ledgers}
    write_private(path, json.dumps(heads, indent=1, sort_keys=True).encode())
