"""Free ports are not those that the kernel gives away, unless there are no others."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from mot_megatron.job import ports


def test_ports_in_use_and_those_of_the_kernel_are_avoided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as used:
        while True:
            port = ports.free_port()
            try:
                used.bind(("127.0.0.1", port))
                break
            except OSError:  # somebody else took it meanwhile
                continue
        limits = tmp_path / "limits"
        monkeypatch.setattr(ports, "_EPHEMERAL", limits)
        monkeypatch.setattr(ports, "_LOWEST", port - 5)
        limits.write_text(f"{port + 1}\t60999\n")
        found = {ports.free_port() for _ in range(20)}
        assert port not in found
        assert max(found) < port
        # No port is left below the kernel's, or their limits are unknown.
        monkeypatch.setattr(ports, "_LOWEST", port)
        assert ports.free_port() != port
        limits.unlink()
        assert ports.free_port() > 0
