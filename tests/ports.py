"""A port of loopback that nobody listens on."""

import socket


def free_port() -> int:
    """Return its number; another may take it before it is used."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
