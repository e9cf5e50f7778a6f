"""Free TCP ports that parallel runs do not take from each other."""

import fcntl
import os
import random
import socket
import tempfile

# Below what Linux hands out to outgoing connections (32768 and up), so that no client sits on one of ours by chance.
_RANGE = range(20000, 32000)
_locks = {}


def take_port():
    """Return a port of 127.0.0.1 that is ours until :func:`release_port`, or until this process ends.

    A server may leave it and come back to it: the lock on a file holds it, not the socket.

    :raise RuntimeError: none is left
    """
    folder = os.path.join(tempfile.gettempdir(), "bus_alt_connection-ports")
    try:
        os.mkdir(folder)
        os.chmod(folder, 0o1777)
    except FileExistsError:
        pass
    for port in random.sample(_RANGE, len(_RANGE)):
        try:
            lock = open(os.path.join(folder, "%d.lock" % port), "w")
        except PermissionError:
            continue  # another user's
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            lock.close()
            continue
        _locks[port] = lock
        return port
    raise RuntimeError("no free port between %d and %d" % (_RANGE[0], _RANGE[-1]))


def release_port(port):
    _locks.pop(port).close()
