"""A port that stays ours from the choice to the listener: otherwise the kernel may give it to someone in between.

Seen with two replicas that start a server each: both are given the same free port, and one server dies of it, or worse,
answers for the other.
"""

from __future__ import annotations

import socket


def reserve(host: str, port: int = 0) -> socket.socket:
    """A socket bound to `port` of `host`, or to a free one for 0, that never listens; OSError where it is taken.

    While it is open the kernel gives the port to nobody who asks for a free one. One listener that names the port and
    sets SO_REUSEADDR, as servers do, may still have it.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((host, port))
    except OSError:
        held.close()
        raise
    return held
