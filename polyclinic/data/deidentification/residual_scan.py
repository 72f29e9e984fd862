"""Final scan of de-identification: search for the original's identifiers in the bytes about to be released.

Searches for names (complete and each part of at least 3 letters), identifiers, addresses and telephone numbers, the
birth date, original UIDs, and long numbers from any removed text, in the encodings that DICOM allows. It cannot find
shorter fragments, other spellings, and text drawn into the picture.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from polyclinic.data.deidentification.element_rules import BIRTH_DATE

_DIRECT = {  # text whose whole value identifies a person, a visit or a place
    0x00080050,
    0x00080080,
    0x00080081,
    0x00080090,
    0x00080092,
    0x00080094,
    0x00081010,
    0x00081040,
    0x00100020,
    0x00100021,
    0x00101000,
    0x00101001,
    0x00101005,
    0x00101040,
    0x00101060,
    0x00101090,
    0x00102150,
    0x00102152,
    0x00102154,
    0x00102180,
    0x00120040,
    0x00120042,
    0x00181000,
    0x00200010,
    0x00321032,
    0x00321033,
    0x00380010,
    0x00380300,
    0x00380400,
    0x00400006,
    0x00401001,
    0x00402016,
    0x00402017,
    0x40080114,
}
_FREE = {"LO", "SH", "ST", "LT", "UT", "UC", "AE", "PN", "UR"}
_EVERYWHERE = (
    "anonymous",
    "anonymized",
    "anon",
    "unknown",
    "none",
    "null",
    "test",
    "patient",
    "phantom",
    "name",
    "the",
)
_OURS = (  # words of the standard, or of this module, that may equal a name
    b"ORIGINAL",
    b"PRIMARY",
    b"DERIVED",
    b"SECONDARY",
    b"AXIAL",
    b"LOCALIZER",
    b"MONOCHROME1",
    b"MONOCHROME2",
    b"MODIFIED",
    b"Basic Application Confidentiality Profile",
    b"Retain Longitudinal Temporal Information Modified Dates Option",
    b"Retain Patient Characteristics Option",
    b"Polyclinic: PS3.15 Basic, keyed pseudonyms, shifted dates",
)


@dataclass(frozen=True)
class Identifiers:
    """Identifiers that must not occur in the output. Excluded from ``repr``, never written or logged.

    Attributes:
        words: Lower-case text: names, identifiers, addresses.
        digits: Runs of at least 6 digits, searched for as whole numbers.
        own: Identifiers of one file only (its UIDs and the numbers in its name), searched for in its own header.
    """

    words: frozenset[str] = field(default=frozenset(), repr=False)
    digits: frozenset[str] = field(default=frozenset(), repr=False)
    own: frozenset[str] = field(default=frozenset(), repr=False)

    def __or__(self, other: "Identifiers") -> "Identifiers":
        """Merge the identifiers of a patient from two files, without those specific to one file."""
        return Identifiers(self.words | other.words, self.digits | other.digits)

    def in_text(self, text: str) -> bool:
        """Return whether a text contains any of them."""
        low = text.lower()
        if any(_found(word, low) for word in self.words) or any(text in low for text in self.own):
            return True
        return any(digits in low and _number(digits).search(low) for digits in self.digits)

    def in_header(self, data: bytes) -> bool:
        """Return whether the bytes of a header contain any of them, in ASCII, Latin-1, UTF-8 or UTF-16."""
        for ours in _OURS:
            data = data.replace(ours, b"\0")
        texts = [data.decode("latin-1"), data.decode("utf-8", "ignore")]
        texts += [data[start:].decode(code, "ignore") for code in ("utf-16-le", "utf-16-be") for start in (0, 1)]
        return any(self.in_text(text) for text in texts)

    def in_pixels(self, data: bytes) -> bool:
        """Return whether the pixel bytes contain a word of at least 6 letters or a number of at least 8 digits."""
        long = {w for w in self.words if len(w) >= 6} | {d for d in self.digits if len(d) >= 8}
        return any(
            form.encode("latin-1", "ignore") in data
            for w in long
            for form in {w, w.upper(), w.title()}
            if len(form) >= 6
        )


def _found(word: str, text: str) -> bool:
    at = text.find(word)
    if len(word) > 4 or at < 0:
        return at >= 0
    return re.search(rf"(?<![^\W\d_]){re.escape(word)}(?![^\W\d_])", text) is not None


def _number(digits: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![0-9.]){digits}(?![0-9])")


def elements(dataset: Any) -> Iterator[Any]:
    """Yield every element at every depth that can be decoded."""
    for tag in list(dataset.keys()):
        try:
            element = dataset[tag]
        except Exception:  # a damaged element contains no readable text
            continue
        yield element
        if element.VR == "SQ":
            for item in element.value or []:
                yield from elements(item)


def collect(dataset: Any, removed: Iterable[int], extra: Iterable[str] = ()) -> Identifiers:
    """Return the identifiers of an original data set.

    Args:
        dataset: The data set as read, unchanged.
        removed: Tags whose text was removed or changed; their long numbers are searched for.
        extra: Further removed text, such as the preamble's or the file's name.
    """
    gone, words, digits, own = set(removed), set[str](), set[str](), set[str]()
    for element in elements(dataset):
        tag, values = int(element.tag), _texts(element)
        if element.VR == "PN":
            for value in values:
                words.update(_name(value))
        elif tag in _DIRECT:
            words.update(value.lower() for value in values if len(value) >= (3 if not value.isdigit() else 99))
            digits.update(value for value in values if value.isdigit() and len(value) >= 6)
        elif element.VR == "UI" and tag in gone:
            own.update(value for value in values if not value.startswith("1.2.840.10008.") and len(value) > 10)
        if tag == BIRTH_DATE:
            for value in values:
                digits.add(value)
                words.add(f"{value[:4]}-{value[4:6]}-{value[6:8]}")
        if tag in gone and element.VR in _FREE:
            for value in values:
                words.update(_codes(value))
                digits.update(re.findall(r"(?<!\d)\d{6,}(?!\d)", value))
    for text in extra:
        own.update(_codes(text))
        own.update(n for n in re.findall(r"\d{8,}", text) if n.count("0") <= len(n) / 2)  # not a slice's counter
    return Identifiers(
        frozenset(w for w in words if len(w) >= (3 if w.isascii() else 2) and w not in _EVERYWHERE),
        frozenset(d for d in digits if len(set(d)) > 1 and len(d) >= 6),
        frozenset(own),
    )


def _texts(element: Any) -> list[str]:
    value = element.value
    if value is None or isinstance(value, bytes) or element.VR == "SQ":
        return []
    many = value if isinstance(value, list | tuple) or type(value).__name__ == "MultiValue" else [value]
    return [text for text in (str(v).strip() for v in many) if text]


def _name(value: str) -> set[str]:
    """Return a person's full name and its parts of at least 3 letters."""
    parts = {part.strip().lower() for part in re.split(r"[\^=,\s_]+", value)}
    return {value.lower(), *parts}


def _codes(text: str) -> set[str]:
    """Return words that mix letters and at least 4 digits, as record numbers do."""
    words = re.findall(r"[A-Za-z0-9][A-Za-z0-9_/-]{4,}", text)
    return {w.lower() for w in words if sum(c.isdigit() for c in w) >= 4 and any(c.isalpha() for c in w)}
