"""A site's two keys: RSA for FLARE and for signatures, Ed25519 for secure sums. Made here, and they never leave.

```
keys/
  site.key, secure.key   those in use
  next/                  new ones, until a certificate for them has come
  secure-1a2b3c4d.key    earlier ones, for studies that were approved with them
```
"""

import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from polyclinic.engines.flare.protocol.paths import SetupError, private_folder, read_small, sync, write_private

BITS = 3072


def make(folder: Path) -> tuple[rsa.RSAPrivateKey, ed25519.Ed25519PrivateKey]:
    """Both keys, kept in ``folder``; those that are there already are kept."""
    private_folder(folder)
    if not (folder / "site.key").exists():
        write_private(folder / "site.key", pem(rsa.generate_private_key(public_exponent=65537, key_size=BITS)))
    if not (folder / "secure.key").exists():
        write_private(folder / "secure.key", ed25519.Ed25519PrivateKey.generate().private_bytes_raw().hex())
    return load(folder / "site.key"), load_secure(folder / "secure.key")


def upcoming(folder: Path) -> Path:
    """Where new keys wait for their certificate."""
    return folder / "next"


def of_site(folder: Path) -> list[rsa.RSAPrivateKey]:
    """The key in use, and the one that waits for its certificate, if there is one."""
    places = (folder / "site.key", upcoming(folder) / "site.key")
    return [load(path) for path in places if path.exists()]


def take_up(folder: Path) -> None:
    """The keys that waited are those in use from now on. The earlier one for secure sums stays beside them."""
    waiting, secure = upcoming(folder), folder / "secure.key"
    if secure.exists() and (waiting / "secure.key").exists():
        os.replace(secure, folder / f"secure-{_public(load_secure(secure))[:8]}.key")
    for name in ("secure.key", "site.key"):  # the one that says which keys are in use comes last
        if (waiting / name).exists():
            os.replace(waiting / name, folder / name)
    sync(folder)
    shutil.rmtree(waiting, ignore_errors=True)


def for_sums(folder: Path, public: str) -> ed25519.Ed25519PrivateKey:
    """The key for secure sums whose ``public`` half a person approved with a study, though it may be an earlier one.

    Raises:
        SetupError: Where it is not here.
    """
    for path in (folder / "secure.key", upcoming(folder) / "secure.key", *sorted(folder.glob("secure-*.key"))):
        if path.exists() and _public(key := load_secure(path)) == public:
            return key
    raise SetupError("the study names another key of this site for secure sums than those in keys/: has it new keys?")


def load(path: Path) -> rsa.RSAPrivateKey:
    """The RSA key in the file at ``path``.

    Raises:
        SetupError: Where it is none.
    """
    key = _read(read_small(path).encode())
    if not isinstance(key, rsa.RSAPrivateKey):
        raise SetupError(f"{path} is not an RSA key")
    return key


@lru_cache(maxsize=8)
def _read(text: bytes) -> Any:
    """The key in ``text``: checking that its primes are primes takes a fifth of a second, once."""
    return serialization.load_pem_private_key(text, password=None)


def load_secure(path: Path) -> ed25519.Ed25519PrivateKey:
    """The Ed25519 key in the file at ``path``."""
    return ed25519.Ed25519PrivateKey.from_private_bytes(bytes.fromhex(read_small(path)))


def pem(key: rsa.RSAPrivateKey) -> bytes:
    """A private key in the form that FLARE reads."""
    form = serialization.PrivateFormat.TraditionalOpenSSL
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _public(key: ed25519.Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()
