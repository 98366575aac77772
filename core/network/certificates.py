"""The certificate that a process encrypts with: made when it starts, signed by itself, gone when it ends.

Nobody manages it, and nobody trusts it: who is at the other end is proved by the cluster's token, and the proof covers
the certificate (`handshake.py`).
"""

from __future__ import annotations

import datetime as dt
import hashlib
import secrets
import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path

from core.errors import ConfigError

_DAYS = 36500
"""Nobody looks at it: a process that runs for long, or whose clock is wrong, must not fail by it."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a process needs for TLS. `fingerprint` is the SHA-256 of its own certificate, DER-encoded."""

    as_listener: ssl.SSLContext
    as_caller: ssl.SSLContext
    fingerprint: bytes


def new_identity() -> Identity:
    """A new key (ECDSA, P-256) and its certificate. Takes some milliseconds. Raises `ConfigError` where the package
    that makes them is missing."""
    try:
        pem, der, password = _certificate()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("cryptography", "cffi", "_cffi_backend"):
            raise
        raise ConfigError(
            f"cluster.tls (VRM_CLUSTER_TLS) needs a package that makes certificates, and {error.name} is not "
            "installed: pip install 'vramancer[tls]'."
        ) from error
    listener = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    listener.minimum_version = ssl.TLSVersion.TLSv1_3
    listener.num_tickets = 0  # a session that is resumed shows no certificate, and there is nothing to bind to
    with tempfile.TemporaryDirectory(prefix="vramancer-") as directory:  # `ssl` reads files alone
        path = Path(directory) / "certificate.pem"
        path.write_bytes(pem)  # the key in it is encrypted, with a password that is on no disk
        listener.load_cert_chain(path, password=password)
    caller = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    caller.minimum_version = ssl.TLSVersion.TLSv1_3
    # No authority has signed what a listener shows. That it has the certificate's key is checked all the same, as
    # always in TLS 1.3; that the certificate is the right one is what the token's proof says.
    caller.check_hostname = False
    caller.verify_mode = ssl.CERT_NONE
    return Identity(listener, caller, hashlib.sha256(der).digest())


def _certificate() -> tuple[bytes, bytes, bytes]:
    """Certificate and encrypted key as PEM, the certificate as DER, and the key's password."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a node of a VRAMancer cluster")])
    now = dt.datetime.now(dt.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=_DAYS))
        .sign(key, hashes.SHA256())
    )
    password = secrets.token_hex(32).encode()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password))
    return certificate.public_bytes(Encoding.PEM) + private, certificate.public_bytes(Encoding.DER), password
