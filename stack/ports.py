"""Free TCP ports that parallel runs do not take from each other."""

import socket

_holders = {}


def take_port():
    """Return a port of 127.0.0.1 that is ours until :func:`release_port`, or until this process ends.

    Who connects to it is refused. A server may come to it, leave it and come back: a socket that is bound holds it, but
    does not listen, so that Linux lets another one listen beside it if both have SO_REUSEADDR, as all our servers do.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    port = holder.getsockname()[1]
    _holders[port] = holder
    return port


def release_port(port):
    _holders.pop(port).close()
