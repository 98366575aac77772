"""How two nodes prove to each other that they know the cluster's token, which itself never travels.

::

    caller                                            listener
    HELLO   kind of link, own id, nonce, TLS?     ->
                                                  <-  CHALLENGE  own id, nonce
    PROOF   mac("caller", both messages)          ->
                                                  <-  WELCOME    mac("listener", both messages)

The key of the macs is derived from the token by scrypt, so that guessing a token from a recorded handshake costs 16 MiB
and tens of milliseconds a guess. A proof holds for the two nonces it was made of, so a recorded one proves nothing
later. The caller proves first: whoever only connects learns nothing that depends on the token.

Where the cluster encrypts (`cluster.tls`), all of this is said inside of TLS, and the macs also cover the certificate
that the listener has shown, as each side knows it. Somebody in between, who shows each side a certificate of his own,
can pass the messages on, and neither side takes the other's proof. What kind of connection it is, is up to each side's
settings and never negotiated; HELLO says what the caller's are, so that a cluster of which one half encrypts says so.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Annotated, Literal, TypeVar

import msgspec

from core.decoding import UNREADABLE
from core.defaults import MIN_CLUSTER_TOKEN_LENGTH
from core.errors import ClusterRefusedError, ProtocolError

NONCE_BYTES = 32
_SALT = b"vramancer cluster token, version 1"

LinkKind = Literal["control", "data", "blocks", "guests", "probe"]
Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Mac = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
NodeId = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a caller says first. `kind` is what the link is for, `tls` whether it encrypts."""

    kind: LinkKind
    node: NodeId
    nonce: Nonce
    tls: bool = False


class Challenge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A listener's answer to it."""

    node: NodeId
    nonce: Nonce


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of either side; the listener's is its welcome."""

    mac: Mac


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why there will be no link, in one line."""

    reason: Annotated[str, msgspec.Meta(max_length=512)]


Message = TypeVar("Message", Hello, Challenge, Proof, Refused)


def derive_key(token: str) -> bytes:
    """What proofs are made with. Takes some tens of milliseconds, on purpose. Raises `ValueError` for a short token."""
    if len(token) < MIN_CLUSTER_TOKEN_LENGTH:
        raise ValueError(f"a cluster token has at least {MIN_CLUSTER_TOKEN_LENGTH} characters")
    return hashlib.scrypt(token.encode(), salt=_SALT, n=1 << 14, r=8, p=1, dklen=32)


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def encode_message(message: Hello | Challenge | Proof | Refused) -> bytes:
    return msgspec.msgpack.encode(message)


def decode_message(data: bytes | bytearray | memoryview, kind: type[Message]) -> Message:
    """Raises `ProtocolError` for anything else."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except UNREADABLE as error:
        raise ProtocolError(f"a {kind.__name__} cannot be read: {error}") from error


def prove(
    key: bytes, side: Literal["caller", "listener"], hello: bytes, challenge: bytes, binding: bytes = b""
) -> Proof:
    """That this side knows the key; of exactly these two messages, over exactly this connection. `binding` is what
    identifies it where it is encrypted: 32 bytes, `TlsEnd.binding`."""
    told = hashlib.sha256(hashlib.sha256(hello).digest() + hashlib.sha256(challenge).digest() + binding).digest()
    return Proof(hmac.new(key, side.encode() + b"\0" + told, hashlib.sha256).digest())


def check_proof(
    proof: Proof, key: bytes, side: Literal["caller", "listener"], hello: bytes, challenge: bytes, binding: bytes = b""
) -> None:
    """Raises `ClusterRefusedError` if the other side does not know the key, or is at the end of another connection."""
    if not hmac.compare_digest(proof.mac, prove(key, side, hello, challenge, binding).mac):
        between = ", or somebody is between the two" if binding else ""
        raise ClusterRefusedError(f"the other side has another cluster token{between}")
