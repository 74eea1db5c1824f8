"""Ports for servers that tests start, and start again."""

from __future__ import annotations

import random
import socket
from pathlib import Path

LOWEST = 15000
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """A TCP port that nobody listens on, and that the kernel gives to no connection as its own end.

    One from bind(0) may be taken by a connection of another test between two starts of a server.
    """
    end = int(RANGE.read_text().split()[0]) if RANGE.exists() else 32768
    while True:
        port = random.SystemRandom().randrange(LOWEST, end)
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
            return port
