"""Certificate authority of a project: the requests of sites, and the join files with which they are admitted.

A site generates its keys itself and sends a request. The coordinator admits it and returns a join file: the site's
certificate, the authority's certificate and the server's address, signed by the authority. Private keys never leave the
site. The two parties compare the authority's fingerprint by telephone.

FLARE's identity checks require X.509 and RSA (RSA-PSS). The join file also names the site's Ed25519 key for secure
summation, which is thereby certified by the authority.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from polyclinic.core.atomic import write_private
from polyclinic.engines.flare.pki import site_keys
from polyclinic.engines.flare.protocol.paths import SetupError, host, name, private_folder, read_small

REQUEST, JOIN = "polyclinic request 1", "polyclinic join 1"
CA_DAYS, DAYS, WARN_DAYS = 3650, 730, 30
_PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=padding.PSS.MAX_LENGTH)


class BadFile(SetupError):
    """Invalid request or join file. The message names the file and the reason."""


@dataclass(frozen=True)
class Authority:
    """Root keys of a project. The holder of ``ca.key`` decides which sites are admitted."""

    certificate: x509.Certificate
    key: rsa.RSAPrivateKey

    @classmethod
    def make(cls, folder: Path, project: str, days: int = CA_DAYS) -> "Authority":
        """Create an authority in ``folder``.

        Raises:
            SetupError: If the folder already contains one.
        """
        if (folder / "ca.key").exists():
            raise SetupError(f"{folder} already contains an authority: a new one would exclude every site")
        key = rsa.generate_private_key(public_exponent=65537, key_size=site_keys.BITS)
        certificate = _certificate(
            key, key.public_key(), _subject(project), _subject(project), days=days, authority=True
        )
        private_folder(folder)
        write_private(folder / "ca.key", site_keys.pem(key))
        write_private(folder / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM))
        return cls(certificate, key)

    @classmethod
    def load(cls, folder: Path) -> "Authority":
        """Load the authority in ``folder``."""
        return cls(load_certificate(read_small(folder / "ca.crt")), site_keys.load(folder / "ca.key"))

    def issue(
        self,
        public: rsa.RSAPublicKey,
        who: str,
        organization: str,
        *,
        role: str = "",
        hosts: tuple[str, ...] = (),
        days: float = DAYS,
    ) -> x509.Certificate:
        """Issue a certificate for ``who``: a server if it has ``hosts``, a person if it has a ``role``, otherwise a
        site.
        """
        issuer = self.certificate.subject
        subject = _subject(who, organization, role)
        return _certificate(self.key, public, subject, issuer, days=days, hosts=hosts, until=self.certificate)

    def sign(self, table: Mapping[str, Any]) -> str:
        """Return a signature of ``table``, in base 64."""
        return base64.b64encode(self.key.sign(_plain(table), _PSS, hashes.SHA256())).decode()


def _certificate(
    key: rsa.RSAPrivateKey,
    public: rsa.RSAPublicKey,
    subject: x509.Name,
    issuer: x509.Name,
    *,
    days: float,
    authority: bool = False,
    hosts: tuple[str, ...] = (),
    until: x509.Certificate | None = None,
) -> x509.Certificate:
    now = datetime.now(UTC)
    end = now + timedelta(days=days)
    if until is not None:
        end = min(end, until.not_valid_after_utc)
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=not authority,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number(), now - timedelta(minutes=5), end)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    if not authority:
        eku = (
            [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            if hosts
            else [ExtendedKeyUsageOID.CLIENT_AUTH]
        )
        names = hosts or (str(subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value),)
        builder = builder.add_extension(x509.ExtendedKeyUsage(eku), critical=False)
        builder = builder.add_extension(x509.SubjectAlternativeName([_name_of(n) for n in names]), critical=False)
    return builder.sign(key, hashes.SHA256())


def _name_of(text: str) -> x509.GeneralName:
    import ipaddress

    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text.partition("@")[0])


def _subject(who: str, organization: str = "", role: str = "") -> x509.Name:
    parts = [(NameOID.COMMON_NAME, who), (NameOID.ORGANIZATION_NAME, organization), (NameOID.UNSTRUCTURED_NAME, role)]
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts if value])


def request(folder: Path, site: str, organization: str, version: str) -> dict[str, Any]:
    """Return the request with which a site asks the coordinator to be admitted."""
    key, secure = site_keys.make(folder)
    csr = x509.CertificateSigningRequestBuilder(_subject(site, organization)).sign(key, hashes.SHA256())
    return {
        "format": REQUEST,
        "site": site,
        "organization": organization,
        "polyclinic": version,
        "secure": secure.public_key().public_bytes_raw().hex(),
        "csr": csr.public_bytes(serialization.Encoding.PEM).decode(),
    }


def check_request(table: Any) -> tuple[x509.CertificateSigningRequest, rsa.RSAPublicKey]:
    """Return the certificate request in ``table`` and its key.

    Raises:
        BadFile: If the request is incomplete, not signed by the key it names, or of another format.
    """
    _fields(table, REQUEST, ("site", "organization", "polyclinic", "secure", "csr"), "request")
    site, organization = name(table["site"]), check_organization(table["organization"])
    try:
        csr = x509.load_pem_x509_csr(table["csr"].encode())
        signed, public = csr.is_signature_valid, csr.public_key()
        ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(table["secure"]))
    except Exception as error:  # a certificate parser may raise anything on untrusted bytes
        raise BadFile(f"its certificate request or key cannot be read ({type(error).__name__}: {error})") from None
    if not signed:
        raise BadFile("its certificate request is not signed by its own key")
    if not isinstance(public, rsa.RSAPublicKey) or public.key_size < 2048:
        raise BadFile("its key must be RSA of at least 2048 bits")
    if csr.subject != _subject(site, organization):
        raise BadFile(
            f"its certificate request is for {csr.subject.rfc4514_string()!r}, not for {site} of {organization}"
        )
    return csr, public


def join_file(
    authority: Authority, request: Mapping[str, Any], server: Mapping[str, Any], days: float = DAYS
) -> dict[str, Any]:
    """Return the join file of an admitted site. ``server``: ``project``, ``host``, ``port``, ``scheme``."""
    _, public = check_request(request)
    certificate = authority.issue(public, request["site"], request["organization"], days=days)
    table = {
        "format": JOIN,
        "site": request["site"],
        "organization": request["organization"],
        "secure": request["secure"],
        "project": server["project"],
        "host": server["host"],
        "port": server["port"],
        "scheme": server["scheme"],
        "certificate": certificate.public_bytes(serialization.Encoding.PEM).decode(),
        "authority": authority.certificate.public_bytes(serialization.Encoding.PEM).decode(),
        "expires": certificate.not_valid_after_utc.isoformat(),
    }
    return {**table, "signature": authority.sign(table)}


def check_join(table: Any, own: Sequence[rsa.RSAPrivateKey], site: str) -> tuple[x509.Certificate, x509.Certificate]:
    """Return the site's certificate and the authority's, if the join file is intact and for ``site`` and one of its
    keys.

    Raises:
        BadFile: If it is not. The message names the problem.
    """
    wanted = (
        "site",
        "organization",
        "secure",
        "project",
        "host",
        "port",
        "scheme",
        "certificate",
        "authority",
        "expires",
        "signature",
    )
    _fields(table, JOIN, wanted, "join file")
    name(table["project"], "a project's name")
    host(table["host"])
    if not isinstance(table["port"], int) or not 0 < table["port"] < 65536:
        raise BadFile(f"its port is {str(table['port'])[:20]!r}, not a number from 1 to 65535")
    if table["scheme"] not in ("grpc", "tcp", "http"):
        raise BadFile(f"its scheme is {table['scheme'][:20]!r}: grpc, tcp or http are known")
    if table["site"] != site:
        raise BadFile(f"it is for {table['site'][:64]!r}, and this site is named {site!r}")
    mine, root = load_certificate(table["certificate"]), load_certificate(table["authority"])
    public = key_of(root)
    body = {k: v for k, v in table.items() if k != "signature"}
    try:
        if not isinstance(public, rsa.RSAPublicKey):
            raise BadFile("its authority does not use RSA")
        public.verify(base64.b64decode(table["signature"]), _plain(body), _PSS, hashes.SHA256())
        mine.verify_directly_issued_by(root)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError) as error:
        if isinstance(error, BadFile):
            raise
        raise BadFile("it was changed after the coordinator made it, or is not signed by the authority in it") from None
    if key_of(mine) not in [key.public_key() for key in own]:
        raise BadFile("its certificate is not for this site's key: was the request made in another folder?")
    check_dates(mine)
    return mine, root


def check_dates(certificate: x509.Certificate, now: datetime | None = None) -> int:
    """Return the number of days until a certificate expires.

    Raises:
        BadFile: If it is not yet valid or has expired.
    """
    now = now or datetime.now(UTC)
    if now < certificate.not_valid_before_utc:
        raise BadFile(
            f"the certificate begins at {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC and this "
            f"machine's clock says {now:%Y-%m-%d %H:%M}: set the clock"
        )
    if now > certificate.not_valid_after_utc:
        raise BadFile(
            f"the certificate ended at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC: renew it with "
            "`polyclinic site init --renew`, or set the clock if it is wrong"
        )
    return (certificate.not_valid_after_utc - now).days


def fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate in groups of four characters, for people to compare."""
    text = certificate.fingerprint(hashes.SHA256()).hex()
    return ":".join(text[i : i + 4] for i in range(0, 64, 4))


def load_certificate(text: str) -> x509.Certificate:
    """Return the certificate in PEM ``text``.

    Raises:
        BadFile: If it is not a certificate.
    """
    try:
        return x509.load_pem_x509_certificate(text.encode())
    except Exception as error:  # a certificate parser may raise anything on untrusted bytes
        raise BadFile(f"a certificate cannot be read ({str(error)[:100]})") from None


def key_of(certificate: x509.Certificate) -> Any:
    """Return the public key of a certificate. A certificate that parses may still contain an invalid key.

    Raises:
        BadFile: If the key cannot be read.
    """
    try:
        return certificate.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadFile(f"the key in a certificate cannot be read ({str(error)[:100]})") from None


def check_organization(text: object) -> str:
    """Return ``text`` if it can name an organization: FLARE accepts letters, digits and underscores.

    Raises:
        BadFile: If it cannot.
    """
    if isinstance(text, str) and 0 < len(text) <= 64 and text.isascii() and text.replace("_", "").isalnum():
        return text
    raise BadFile(f"an organization's name has up to 64 letters, digits and underscores, not {str(text)[:80]!r}")


def digest(text: str) -> str:
    """Return the SHA-256 of ``text``."""
    return hashlib.sha256(text.encode()).hexdigest()


def _fields(table: Any, kind: str, wanted: tuple[str, ...], what: str) -> None:
    if not isinstance(table, dict) or not isinstance(table.get("format"), str):
        raise BadFile(f"it is not a {what} of polyclinic")
    if table["format"] != kind:
        raise BadFile(f"it is a {table['format'][:40]!r} and this version reads a {kind!r}")
    if table.keys() - {"format"} != set(wanted):
        odd = sorted(table.keys() ^ {*wanted, "format"})[0]
        raise BadFile(f"the field {odd[:40]!r} is {'missing' if odd in wanted else 'not known'}")
    for field in wanted:
        kinds = int if field == "port" else str
        if not isinstance(table[field], kinds) or isinstance(table[field], bool):
            raise BadFile(f"the field {field!r} is not {'a number' if field == 'port' else 'text'}")


def _plain(table: Mapping[str, Any]) -> bytes:
    return json.dumps(table, sort_keys=True, separators=(",", ":")).encode()
