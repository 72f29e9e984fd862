"""De-identification of a DICOM folder: a new folder without identifying information, and a separate key file.

The rules are in ``element_rules``, the processing of one image in ``image_deidentification``, the final scan in
``residual_scan``. This module guarantees that nothing is overwritten or changed in place, that a file is written only
after its bytes were searched for the original's identifiers, that every written file is read back from disk and
searched again for all identifiers of its patient, and that names of files and folders are pseudonyms and random
numbers. This reduces the risk of re-identification but does not guarantee anonymity; a person must inspect a sample
(see docs/how-to/hospital-data.md).
"""

import io
import json
import os
import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from polyclinic.core import atomic
from polyclinic.data.deidentification.image_deidentification import (
    Cleaned,
    Deidentification,
    Pseudonyms,
    clean,
    letters,
)
from polyclinic.data.deidentification.residual_scan import Identifiers
from polyclinic.data.formats.dicom.file import looks_like_dicom, open_dicom, quiet, require_pydicom
from polyclinic.data.formats.safe_reading import Unreadable, read_text, read_whole, refusing
from polyclinic.errors import ConfigError


@dataclass(frozen=True)
class Released:
    """Result of a run. Contains no value of any element, and source names only under ``refused``.

    Attributes:
        destination: The new folder.
        key: The key file, to be kept at the site.
        written: Files written, relative to ``destination``.
        patients: Number of patients in them.
        removed: Number of removed or changed elements, by tag number.
        refused: Refused files with reasons and source paths, for use at the site only.
        left: Number of files that are not DICOM, indexes (DICOMDIR) and links to folders, which were not copied.
    """

    destination: Path
    key: Path
    written: tuple[str, ...]
    patients: int
    removed: Counter[int] = field(repr=False)
    refused: tuple[Unreadable, ...] = ()
    left: int = 0

    def lines(self) -> list[str]:
        """Return a summary for the screen."""
        out = [f"wrote {len(self.written)} files of {self.patients} patients to {self.destination}"]
        tags = sorted(self.removed.items())
        shown = ", ".join(f"({t >> 16:04x},{t & 0xFFFF:04x}) x{n}" for t, n in tags[:12])
        out.append(f"removed or changed {sum(self.removed.values())} elements of {len(tags)} kinds: {shown}")
        if self.left:
            out.append(
                f"did not copy {self.left} files that are not DICOM images (other files, indexes, links to folders)"
            )
        reasons = Counter(refusal.reason for refusal in self.refused)
        out += [f"refused {count}: {reason}" for reason, count in reasons.most_common()]
        if reasons:
            out.append("the key file lists the refused files")
        out.append(
            f"key file (pseudonyms to patients, the secret): {self.key}; keep it at the site, separate from the data"
        )
        out.append("inspect a sample before anything leaves: text drawn into a picture and faces are not detected")
        return out


def deidentify_folder(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    key: str | os.PathLike[str],
    options: Deidentification = Deidentification(),
) -> Released:
    """De-identify every DICOM image under ``source`` into the new folder ``destination``.

    Args:
        source: Source folder, which is never changed.
        destination: Must not exist or be empty, and be separate from ``source``.
        key: The key file: read if it exists (same secret, same pseudonyms), otherwise created, readable by its owner
            only.
        options: Decisions of the site.

    Raises:
        ValueError: If a folder or the key file is in an invalid place; nothing was written.
    """
    source, destination, key = Path(source), Path(destination), Path(key)
    problems = list(_places(source, destination, key))
    if problems:
        raise ConfigError("\n".join(problems))
    require_pydicom()
    store = _KeyFile.open(key)
    pseudonyms = Pseudonyms(store.secret)
    files = list(_walk(source))
    destination.mkdir(parents=True, exist_ok=True)
    refused: list[Unreadable] = []
    removed: Counter[int] = Counter()
    known: dict[str, Identifiers] = {}
    written: dict[str, str] = {}
    left = 0
    store.save()  # the secret is on disk before the first pseudonym
    try:
        for path in files:
            named = path.suffix.lower() in (".dcm", ".dicom", ".ima") and not path.is_dir()
            if path.name.upper() == "DICOMDIR" or not (named or looks_like_dicom(path)):
                left += 1
                continue
            try:
                cleaned = clean(path, open_dicom(path), pseudonyms, options)
                name = _write(destination, cleaned, pseudonyms, checked_bytes(path, cleaned))
            except Unreadable as refusal:
                refused.append(refusal)
                continue
            removed.update(cleaned.removed)
            written[name] = cleaned.pseudonym
            known[cleaned.pseudonym] = known.get(cleaned.pseudonym, Identifiers()) | cleaned.identifiers
            store.add(cleaned.pseudonym, cleaned.patient, name, str(path.relative_to(source)))
        for name, why in list(_read_back(destination, written, known)):
            refused.append(Unreadable(source / store.files.pop(name), why))
            (destination / name).unlink()
            del written[name]
    finally:
        store.refused = {str(refusal.path.relative_to(source)): refusal.reason for refusal in refused}
        store.save()
    return Released(destination, key, tuple(sorted(written)), len(set(written.values())), removed, tuple(refused), left)


def default_key() -> Path:
    """Return the default path of this user's key file."""
    import platformdirs

    return Path(platformdirs.user_config_dir("polyclinic")) / "deidentify-key.json"


def checked_bytes(path: Path, cleaned: Cleaned) -> bytes:
    """Return the bytes of the new file after checking that they contain no identifier of the original."""
    buffer = io.BytesIO()
    with quiet(), refusing(path, "the de-identified file cannot be written"):
        cleaned.dataset.save_as(buffer, enforce_file_format=True)
    data = buffer.getvalue()
    if why := _leak(data, len(cleaned.dataset.PixelData), cleaned.identifiers):
        raise Unreadable(path, why)
    return data


def _leak(data: bytes, pixels: int, identifiers: Identifiers) -> str | None:
    """Return why these bytes may not be released: where an identifier was found, never which."""
    if any(data[:128]) or data[128:132] != b"DICM":
        return "its preamble is not empty"
    if identifiers.in_header(data[: len(data) - pixels]):
        return "an identifier of the original is still in its header"
    if identifiers.in_pixels(data[len(data) - pixels :]):
        return "the bytes of its pixels spell an identifier of the original"
    return None


def _read_back(destination: Path, written: dict[str, str], known: dict[str, Identifiers]) -> Iterator[tuple[str, str]]:
    """Yield files on disk that contain an identifier of the same patient, from any of its files, with the reason."""
    for name, pseudonym in list(written.items()):
        data = read_whole(destination / name)
        pixels = len(open_dicom(destination / name).PixelData)
        if why := _leak(data, pixels, known[pseudonym]):
            yield name, why


def _walk(source: Path) -> Iterator[Path]:
    """Yield every file, and every link to a folder, which is not followed."""
    for folder, folders, names in os.walk(source):
        folders.sort()
        links = [name for name in folders if Path(folder, name).is_symlink()]
        yield from (Path(folder, name) for name in sorted([*names, *links]))


def _write(destination: Path, cleaned: Cleaned, pseudonyms: Pseudonyms, data: bytes) -> str:
    """Write a new file atomically under a random name, and return its name relative to ``destination``."""
    series = str(cleaned.dataset.get("SeriesInstanceUID") or "")
    folder = destination / cleaned.pseudonym / pseudonyms.folder(series)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{letters(secrets.token_bytes(8))}.dcm"
    atomic.write(path, data)
    return str(path.relative_to(destination))


def _places(source: Path, destination: Path, key: Path) -> Iterator[str]:
    """Yield the problems of the three paths."""
    if not source.is_dir():
        yield f"{source} is not a folder"
    inside, outside, place = source.resolve(), destination.resolve(), key.resolve()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        yield f"{destination} exists and is not an empty folder: name a new one (nothing is ever overwritten)"
    if inside == outside or inside in outside.parents or outside in inside.parents:
        yield f"{destination} and {source} must be separate, neither inside the other"
    if outside == place or outside in place.parents or inside in place.parents:
        yield f"the key file {key} must be outside both folders: it allows re-identification of the pseudonyms"
    if key.is_symlink():
        yield f"the key file {key} is a link: name the file itself"
    elif key.exists():
        if not key.is_file():
            yield f"the key file {key} is not a file"
        elif key.stat().st_mode & 0o077:
            yield f"the key file {key} can be read by others: chmod 600 it"


@dataclass
class _KeyFile:
    """Secret of the site, and the patient of each pseudonym. Never leaves the site."""

    path: Path
    secret: bytes = field(repr=False)
    patients: dict[str, str] = field(repr=False, default_factory=dict)
    files: dict[str, str] = field(repr=False, default_factory=dict)
    refused: dict[str, str] = field(repr=False, default_factory=dict)
    earlier: list[dict[str, dict[str, str]]] = field(repr=False, default_factory=list)

    @staticmethod
    def open(path: Path) -> "_KeyFile":
        if not path.exists():
            return _KeyFile(path, secrets.token_bytes(32))
        try:
            table = json.loads(read_text(path))
            secret, patients, earlier = bytes.fromhex(table["secret"]), dict(table["patients"]), list(table["runs"])
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"the key file {path} is damaged: restore it, or name a new one") from None
        if len(secret) != 32:
            raise ConfigError(f"the key file {path} contains no secret of 32 bytes")
        return _KeyFile(path, secret, patients, {}, {}, earlier)

    def add(self, pseudonym: str, patient: str, name: str, source: str) -> None:
        self.patients[pseudonym], self.files[name] = patient, source

    def save(self) -> None:
        """Write the file atomically, readable by its owner only."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        run = {"files": self.files, "refused": self.refused}
        content = {"secret": self.secret.hex(), "patients": self.patients, "runs": [*self.earlier, run]}
        atomic.write_json(self.path, content, private=True)
