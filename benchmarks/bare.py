"""Connections that only LISTEN, and how many NOTIFYs a server takes beside them."""

import concurrent.futures
import os
import re
import resource
import selectors
import time
import uuid

from stack.commands import run
from stack.postgres import SUPERUSER, SUPERUSER_PASSWORD
from stack.servers import postgres_programs
from stack.stack import ADDON

CHANNEL = "imbus"
_SENDERS = 4
# Seconds for a thousand backends to read all notifications.
_DEADLINE = 120
# Bytes, enough for a notification with a token.
_TAIL = 200


def notifies_per_second(server, seconds=1, cpus=None):
    """Return how many NOTIFYs a second ``server`` takes, each in a transaction of its own, sent straight to it.

    :param cpus: numbers of the CPUs to send from; default: all
    """
    options = ["-n", "-c", _SENDERS, "-T", seconds, "-f", ADDON / "benchmarks" / "notify.sql"]
    place = ["-h", server.host, "-p", server.port, "-U", SUPERUSER, "postgres"]
    # All servers get the pgbench of this machine, since the sender is not what is compared.
    environment = {**os.environ, "PGPASSWORD": SUPERUSER_PASSWORD}
    pinned = ["taskset", "-c", ",".join(map(str, cpus))] if cpus else []
    printed = run([*pinned, postgres_programs() / "pgbench", *options, *place], env=environment, timeout=seconds + 60)
    found = re.search(r"^tps = ([\d.]+)", printed, re.MULTILINE)
    if not found:
        raise RuntimeError("pgbench sent nothing within %d s: the machine is too busy" % seconds)
    return float(found[1])


class BareListeners:
    """Connections to ``server`` that LISTEN. Nothing looks at what they receive."""

    def __init__(self, server):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self._server = server
        self._connections = []
        self._selector = selectors.DefaultSelector()
        #: descriptor -> the last bytes that were read from it
        self._tails = {}
        self._channel = None

    def listen(self, count, channel=CHANNEL):
        """Have ``count`` connections, at least as many as before, LISTEN on ``channel`` and on no other."""
        while len(self._connections) < count:
            connection = self._server.connect(application_name="tests")
            connection.autocommit = True
            self._connections.append(connection)
            self._selector.register(connection, selectors.EVENT_READ)
            self._tails[connection.fileno()] = b""
        for connection in self._connections:
            connection.cursor().execute('UNLISTEN *; LISTEN "%s"' % channel)
        self._channel = channel

    def beside(self, measure):
        """Return what ``measure()`` returns; meanwhile, read what arrives, and then the rest of it."""
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            measuring = pool.submit(measure)
            self._read_until(measuring.done)
        token = uuid.uuid4().hex
        self._server.execute("SELECT pg_notify(%s, %s)", (self._channel, token))
        self._read_until(lambda: all(token.encode() in tail for tail in self._tails.values()))
        return measuring.result()

    def close(self):
        for connection in self._connections:
            connection.close()

    def _read_until(self, condition):
        end = time.monotonic() + _DEADLINE
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError("after %d s the bare listeners have not read all" % _DEADLINE)
            for key, _ in self._selector.select(0.1):
                # Past libpq, which spends more time on a notification than the server does.
                received = os.read(key.fd, 65536)
                if not received:
                    raise ConnectionError("the server has ended a listener")
                self._tails[key.fd] = (self._tails[key.fd] + received)[-_TAIL:]
