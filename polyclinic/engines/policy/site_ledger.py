"""Which privacy budget a site's data are charged to: found by what the data are, not by where they lie.

A site declares a name for its data set (``data_name`` in site.toml). Beside each ledger lies a list of keyed hashes of
whose data it counts: of each example's inputs, and of each patient's name. Data are charged to every ledger of the same
name and to every ledger that shares a single hash with them, whatever the folder or the name; what is new is added to
the lists. So a folder that was moved, copied or renamed, a subset, or one patient more has the budget that it had,
and so have patients who were renamed. Inputs are hashed as a study prepares them: of data that were prepared in
another way *and* have no names of patients, only the data set's name tells.

Hashes are BLAKE2b with a key that never leaves the site's home, so that a list tells nothing of a patient to whoever
does not have both. Inputs are hashed without their targets, so that other labels are no other data. Names that only
number the examples, or are the examples' own, are no patients', and inputs of one value only (an empty image) are no
one's.

What is deleted or put back from an older copy is noticed where something else still speaks of it: lists are bound to
the ledgers' chains, and the last head of each ledger is kept outside the folder. Whoever can replace all of the
site's home can begin anew.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyclinic.core.audit_log import Broken
from polyclinic.core.serialization import write_bytes
from polyclinic.engines.policy.site_policy import BadPolicy, Privacy
from polyclinic.learning.training.dp_sgd import Spend
from polyclinic.privacy.ledger import Ledger, locked

KEY = "members.key"
LIST = ".members"  # behind the ledger's name
HEADS = "ledger-heads.json"  # beside the ledgers' folder
WIDTH = 33  # bytes in a line of a list: 32 hexadecimal digits and the end


@dataclass(frozen=True)
class SiteLedger(Ledger):
    """The ledger of some data; if they belong to several, all of them pay, and this is the first.

    Attributes:
        others: The other ledgers.
        heads: The file that holds the last head of each of the site's ledgers.
    """

    others: tuple[Ledger, ...]
    heads: Path

    def reserve(self, spends: Iterable[Spend], about: Mapping[str, Any] | None = None) -> float:
        """Spends from every ledger, before anything is released, if each of them allows it.

        Returns:
            The largest of what was spent in all, as of ``Ledger.reserve``.

        Raises:
            Exhausted: If one of them does not allow it. A race for the last budget may then have cost another's.
            Broken: If one of them was changed, cut or rolled back, or is missing.
        """
        given = list(spends)
        every = [Ledger(self.path), *self.others]
        with locked(self.heads.with_name(f"{self.heads.name}.lock")):
            for ledger in every:
                _unless_rolled_back(ledger, _heads(self.heads))
                ledger.check(given)
            said = [ledger.reserve(given, about) for ledger in every]
            _note_heads(self.heads, every)
        return max(said)


def ledger_for(folder: Path, name: str, roles: Mapping[str, Any], site: str, privacy: Privacy) -> SiteLedger:
    """The ledger that a site's data are charged to; begun with the policy's budget if the data are in none.

    Another ε in the policy is noted as a person's decision.

    Args:
        folder: The folder of the site's ledgers.
        name: What the site calls the data set.
        roles: The site's examples by role; all of them count, for another study may train on what this one tests on.
        site: The site's name.
        privacy: The policy's budget.

    Raises:
        Broken: If a ledger of this site was changed, cut, rolled back or deleted: which one, and what to do.
        BadPolicy: If a ledger of the data counts for another unit or with another δ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    heads = folder.parent / HEADS
    with locked(folder / "folder.lock"), locked(heads.with_name(f"{heads.name}.lock")):
        known = _heads(heads)
        ledgers = list(_all(folder, known))
        key = _key(folder, ledgers)
        mine = members_of(key, roles)
        found = [ledger for ledger in ledgers if ledger.budget()["data"] == name or mine & _listed(ledger)]
        if not found:
            found = [Ledger(folder / f"{_digest(key, b'name', name.encode())[:12]}.jsonl")]
            found[0].begin(site=site, data=name, **privacy.model_dump())
        for ledger in found:
            _agree(ledger, privacy)
            _add(ledger, key, mine)
        _note_heads(heads, found)
    return SiteLedger(found[0].path, tuple(found[1:]), heads)


_last: tuple[bytes, Mapping[str, Any], frozenset[str]] | None = None


def members_of(key: bytes, roles: Mapping[str, Any]) -> frozenset[str]:
    """The keyed hashes by which data are known again: of each example's inputs, and of each patient's name.

    They are kept for the next call with the same ``roles``, so that a process reads its data once.
    """
    global _last
    if _last is None or _last[0] != key or _last[1] is not roles:
        _last = key, roles, frozenset(_members(key, roles))
    return _last[2]


def _members(key: bytes, roles: Mapping[str, Any]) -> Iterator[str]:
    for examples in roles.values():
        patients, ids = getattr(examples, "patients", ()), getattr(examples, "ids", ())
        numbered = [str(i) for i in range(len(patients))]
        if list(patients) != numbered and list(patients) != list(ids):  # else each example stands for itself
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
    """Every ledger of the site, each whole.

    Raises:
        Broken: If one is not, or is missing while something speaks of it.
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
            f"{ledger.path}: the ledger is missing, and {HEADS} knows of it: nothing can be released. "
            "Restore it from a copy"
        )
    if head is not None and not ledger.knows(head):
        raise Broken(
            f"{ledger.path}: this is an older copy or another ledger: its last head was {head[:16]}, which is "
            "not in it, so nothing can be released. Restore the newest copy of the folder"
        )


def _key(folder: Path, ledgers: list[Ledger]) -> bytes:
    """The secret key of the site's lists, made with the first ledger.

    Raises:
        Broken: If it is missing or was replaced, while there are lists that were made with it.
    """
    path = folder / KEY
    checks = {str(bound["check"]) for ledger in ledgers if (bound := ledger.members())}
    if not path.exists() and not checks:
        path.touch(mode=0o600)
    if not checks and path.stat().st_size == 0:  # new, or a crash came before it was written
        write_bytes(path, os.urandom(32))
        path.chmod(0o600)
    key = path.read_bytes() if path.exists() else b""
    if len(key) != 32 or checks - {_check(key)}:
        raise Broken(
            f"{path}: this is not the key with which the ledgers here know data again, so nothing can be "
            "released. Restore it from a copy"
        )
    return key


def _check(key: bytes) -> str:
    return _digest(key, b"check")


def _list(ledger: Ledger) -> Path:
    return ledger.path.with_name(ledger.path.name + LIST)


def _listed(ledger: Ledger) -> set[str]:
    """The hashes of whose data a ledger counts. Lines that a crash kept from being bound to the chain count, too.

    Raises:
        Broken: If the list was changed or cut.
    """
    path, bound = _list(ledger), ledger.members()
    data = path.read_bytes() if path.exists() else b""
    size = int(bound["size"]) if bound else 0
    if hashlib.sha256(data[:size]).hexdigest() != (bound["sha256"] if bound else hashlib.sha256().hexdigest()):
        raise Broken(
            f"{path}: the list of whose data {ledger.path.name} counts was changed or cut, so nothing can be "
            "released. Restore it from a copy"
        )
    return set(data.decode("ascii", "replace").split())


def _add(ledger: Ledger, key: bytes, mine: frozenset[str]) -> None:
    """Puts new members on a ledger's list, and binds the list to its chain; the list is on the disk first."""
    before = ledger.members()
    if not (new := mine - _listed(ledger)) and before is not None and _list(ledger).stat().st_size == before["size"]:
        return
    with open(_list(ledger), "ab") as file:
        file.truncate(file.tell() - file.tell() % WIDTH)  # a torn last line was never bound
        file.write("".join(f"{member}\n" for member in sorted(new)).encode())
        file.flush()
        os.fsync(file.fileno())
    _list(ledger).chmod(0o600)
    data = _list(ledger).read_bytes()
    facts = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "check": _check(key)}
    ledger.note_members({"members": len(data) // WIDTH, **facts})


def _agree(ledger: Ledger, privacy: Privacy) -> None:
    """Sets the policy's ε in a ledger that counts the same.

    Raises:
        BadPolicy: If it counts for another unit or with another δ.
    """
    known = ledger.budget()
    if (known["unit"], known["delta"]) != (privacy.unit, privacy.delta):
        raise BadPolicy(
            f"privacy: {ledger.path.name} counts for every {known['unit']} with delta = "
            f"{known['delta']:g}, and a ledger cannot be recounted: set both back"
        )
    if known["epsilon"] != privacy.epsilon:
        ledger.raise_budget(privacy.epsilon, "policy.toml says so")


def _heads(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        found: dict[str, str] = json.loads(path.read_bytes())
        return {str(name): str(head) for name, head in found.items()}
    except (ValueError, AttributeError) as error:
        raise Broken(f"{path}: this does not list the heads of ledgers ({error}): restore it from a copy") from None


def _note_heads(path: Path, ledgers: Iterable[Ledger]) -> None:
    heads = _heads(path) | {ledger.path.name: ledger.head() for ledger in ledgers}
    write_bytes(path, json.dumps(heads, indent=1, sort_keys=True).encode())
