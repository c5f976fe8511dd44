"""How a rank and the hub of its job recognize each other without sending their secret.

The hub sends a random challenge, the rank answers with its own and a proof (an HMAC of both under
the secret of the launch), and the hub's welcome carries a proof as well. Strangers, and ranks of
another job that reached this port, have another secret.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import time
from dataclasses import asdict
from typing import Any

from mot_megatron.job.verdict import Lines, Peer, encode


class RefusedError(Exception):
    """The hub refused this rank; carries the hub's reason."""


def new_challenge() -> str:
    """Return a random challenge."""
    return secrets.token_hex(16)


def prove(key: bytes, role: str, *parts: str) -> str:
    """Return the proof that the sender, in ``role``, knows the key."""
    return hmac.new(key, json.dumps([role, *parts]).encode(), "sha256").hexdigest()


def is_proof(proof: object, key: bytes, role: str, *parts: str) -> bool:
    """Return whether ``proof`` is one, in constant time."""
    return isinstance(proof, str) and hmac.compare_digest(
        proof.encode(), prove(key, role, *parts).encode()
    )


def hello(key: bytes, peer: Peer, challenge: str, own_challenge: str) -> bytes:
    """Encode a rank's answer to the hub's challenge."""
    proof = prove(key, "rank", challenge, own_challenge, str(peer.rank))
    return encode("hello", peer=asdict(peer), challenge=own_challenge, proof=proof)


def peer_of_hello(message: dict[str, Any], key: bytes, challenge: str) -> Peer | None:
    """Return the peer that a hello describes; None if its proof is wrong.

    Raises:
        ValueError: The message is no hello.
    """
    try:
        peer, own = Peer(**message["peer"]), str(message["challenge"])
    except (KeyError, TypeError) as error:
        raise ValueError("not a hello") from error
    proof = message.get("proof")
    return peer if is_proof(proof, key, "rank", challenge, own, str(peer.rank)) else None


def introduce(connection: socket.socket, key: bytes, peer: Peer, seconds: float) -> Peer:
    """Introduce this rank to the hub and return the hub's process.

    Raises:
        RefusedError: The hub refused this rank, or does not know the key.
        OSError: The connection was lost, or the hub did not answer within ``seconds``.
    """
    lines, deadline, own = Lines(), time.monotonic() + seconds, new_challenge()
    challenge = str(_receive(connection, lines, deadline).get("challenge"))
    connection.sendall(hello(key, peer, challenge, own))
    answer = _receive(connection, lines, deadline)
    if answer.get("kind") == "refused":
        raise RefusedError(str(answer.get("reason")))
    if not is_proof(answer.get("proof"), key, "hub", challenge, own):
        raise RefusedError("it is not this job's")
    return Peer(**answer["peer"])


def _receive(connection: socket.socket, lines: Lines, deadline: float) -> dict[str, Any]:
    """Receive one message; during a handshake, each side waits for the other's."""
    while True:
        connection.settimeout(max(0.1, deadline - time.monotonic()))
        # Byte by byte up to the end of the line: what follows belongs to the watchdog.
        received = connection.recv(1)
        if not received:
            raise ConnectionError("the connection was closed")
        try:
            messages = lines.feed(received)
        except ValueError as error:
            raise RefusedError("it is no watchdog's") from error
        if messages:
            return messages[0]
