"""Connections that do nothing but LISTEN, in a process of their own, and how many NOTIFYs a server takes beside them.

:class:`BareListeners` is the side that measures; ``python -m benchmarks.bare`` is the other one, which it starts.
"""

import json
import os
import re
import selectors
import sys
import time
import uuid

import psycopg2

from stack.commands import run
from stack.postgres import SUPERUSER, SUPERUSER_PASSWORD
from stack.servers import postgres_programs
from stack.stack import ADDON

from . import child

CHANNEL = "imbus"
_SENDERS = 4
# For a thousand backends to read what they are behind with.
_DEADLINE = 120
_TAIL = 200


def notifies_per_second(server, seconds, cpus=None):
    """Return how many NOTIFYs a second ``server`` takes, each in a transaction of its own, straight to it.

    :param cpus: numbers of those to send from; default: all
    """
    options = ["-n", "-c", _SENDERS, "-T", seconds, "-f", ADDON / "benchmarks" / "notify.sql"]
    place = ["-h", server.host, "-p", server.port, "-U", SUPERUSER, "postgres"]
    # That of this machine for all versions of servers: the sender is not what is compared.
    environment = {**os.environ, "PGPASSWORD": SUPERUSER_PASSWORD}
    only = ["taskset", "-c", ",".join(map(str, cpus))] if cpus else []
    printed = run([*only, postgres_programs() / "pgbench", *options, *place], env=environment, timeout=seconds + 60)
    return float(re.search(r"^tps = ([\d.]+)", printed, re.MULTILINE)[1])


class BareListeners(child.Child):
    """Any number of them at ``server``; they read what they are sent and look at none of it."""

    def __init__(self, server, count=0, channel=CHANNEL):
        self._server = server
        self._channel = None
        super().__init__("bare", server.port)
        self.listen(count, channel)

    def listen(self, count, channel=CHANNEL):
        """Have ``count`` of them, no fewer than before, LISTEN on ``channel`` and on no other."""
        self._channel = channel
        self.ask({"count": count, "channel": channel})

    def catch_up(self):
        """Return when each of them has read all that was sent so far."""
        token = uuid.uuid4().hex
        self._server.execute("SELECT pg_notify(%s, %s)", (self._channel, token))
        if not self.ask({"token": token})["read"]:
            raise TimeoutError("the bare listeners are behind by more than %d s" % _DEADLINE)


def _serve(port):
    parameters = {"host": "127.0.0.1", "port": port, "user": SUPERUSER, "password": SUPERUSER_PASSWORD}
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    # The end of what each has read.
    connections, tails = [], {}
    token, end = None, None
    while True:
        for key, _ in selector.select(token and max(end - time.monotonic(), 0)):
            if key.data is not None:
                # Past libpq, which would make more of a notification than there is to it.
                read = os.read(key.fd, 65536)
                if not read:
                    raise ConnectionError("the server has ended a listener")
                tails[key.data] = (tails[key.data] + read)[-_TAIL:]
                continue
            line = sys.stdin.readline()
            if not line:
                return
            question = json.loads(line)
            if "token" in question:
                token, end = question["token"].encode(), time.monotonic() + _DEADLINE
                continue
            for number in range(len(connections), question["count"]):
                connections.append(psycopg2.connect(dbname="postgres", **parameters))
                connections[number].autocommit = True
                tails[number] = b""
                selector.register(connections[number], selectors.EVENT_READ, number)
            for connection in connections:
                connection.cursor().execute('UNLISTEN *; LISTEN "%s"' % question["channel"])
            child.answer({})
        if token and (all(token in tail for tail in tails.values()) or time.monotonic() > end):
            child.answer({"read": time.monotonic() <= end})
            token = None


if __name__ == "__main__":
    _serve(*map(int, sys.argv[1:]))
