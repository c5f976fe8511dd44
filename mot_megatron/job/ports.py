"""A free TCP port for the rendezvous of a job on this machine."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_LOWEST = 10_000
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_TRIES = 100


def free_port() -> int:
    """Return an unused port, if possible below those that the kernel gives to sockets.

    The first rank opens it seconds later. Until then, the connections of other jobs could take a
    port that the kernel may choose for them.
    """
    try:
        end = int(_EPHEMERAL.read_text().split()[0])
    except OSError:
        end = _LOWEST
    ports = range(_LOWEST, end)
    # Not the seeded generator, from which another process may draw the same numbers.
    tries = random.SystemRandom().sample(ports, min(len(ports), _TRIES))
    for port in tries:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    with socket.socket() as chosen_by_kernel:
        chosen_by_kernel.bind(("127.0.0.1", 0))
        return chosen_by_kernel.getsockname()[1]
