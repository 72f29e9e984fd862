"""The two keys of a site: RSA for FLARE and for signatures, Ed25519 for secure sums. Generated here and never sent.

```
keys/
  site.key, secure.key   keys in use
  next/                  new keys, until their certificate has arrived
  secure-1a2b3c4d.key    earlier keys, for studies that were approved with them
```
"""

import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from polyclinic.core.atomic import sync_folder, write_private
from polyclinic.engines.flare.protocol.paths import SetupError, private_folder, read_small

BITS = 3072


def make(folder: Path) -> tuple[rsa.RSAPrivateKey, ed25519.Ed25519PrivateKey]:
    """Create both keys in ``folder``, or load them if they exist."""
    private_folder(folder)
    if not (folder / "site.key").exists():
        write_private(folder / "site.key", pem(rsa.generate_private_key(public_exponent=65537, key_size=BITS)))
    if not (folder / "secure.key").exists():
        write_private(folder / "secure.key", ed25519.Ed25519PrivateKey.generate().private_bytes_raw().hex())
    return load(folder / "site.key"), load_secure(folder / "secure.key")


def upcoming(folder: Path) -> Path:
    """Return the folder of new keys that have no certificate yet."""
    return folder / "next"


def of_site(folder: Path) -> list[rsa.RSAPrivateKey]:
    """Return the key in use, and the new one without a certificate if there is one."""
    places = (folder / "site.key", upcoming(folder) / "site.key")
    return [load(path) for path in places if path.exists()]


def take_up(folder: Path) -> None:
    """Make the new keys those in use. The earlier key for secure sums is kept."""
    waiting, secure = upcoming(folder), folder / "secure.key"
    if secure.exists() and (waiting / "secure.key").exists():
        os.replace(secure, folder / f"secure-{_public(load_secure(secure))[:8]}.key")
    for name in ("secure.key", "site.key"):  # site.key decides which keys are in use, so it is last
        if (waiting / name).exists():
            os.replace(waiting / name, folder / name)
    sync_folder(folder)
    shutil.rmtree(waiting, ignore_errors=True)


def for_sums(folder: Path, public: str) -> ed25519.Ed25519PrivateKey:
    """Return the key for secure sums, possibly an earlier one, whose ``public`` half was approved with a study.

    Raises:
        SetupError: If this site does not have it.
    """
    for path in (folder / "secure.key", upcoming(folder) / "secure.key", *sorted(folder.glob("secure-*.key"))):
        if path.exists() and _public(key := load_secure(path)) == public:
            return key
    raise SetupError("the study names a key of this site for secure sums that is not in keys/: were the keys replaced?")


def load(path: Path) -> rsa.RSAPrivateKey:
    """Return the RSA key in the file at ``path``.

    Raises:
        SetupError: If it is not an RSA key.
    """
    key = _read(read_small(path).encode())
    if not isinstance(key, rsa.RSAPrivateKey):
        raise SetupError(f"{path} is not an RSA key")
    return key


@lru_cache(maxsize=8)
def _read(text: bytes) -> Any:
    """Return the key in ``text``. Cached, because verifying the primes takes a fifth of a second."""
    return serialization.load_pem_private_key(text, password=None)


def load_secure(path: Path) -> ed25519.Ed25519PrivateKey:
    """Return the Ed25519 key in the file at ``path``."""
    return ed25519.Ed25519PrivateKey.from_private_bytes(bytes.fromhex(read_small(path)))


def pem(key: rsa.RSAPrivateKey) -> bytes:
    """Return a private key in the format that FLARE reads."""
    form = serialization.PrivateFormat.TraditionalOpenSSL
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _public(key: ed25519.Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()
