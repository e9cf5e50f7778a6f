"""One Odoo behind PgBouncer, one client, some messages: what happens to them, and who is connected to what."""

import contextlib
import re
import statistics
import time
from typing import NamedTuple, Optional

from stack.odoo import series_number
from stack.waiting import wait_until

MESSAGES = 20
#: Seconds from one message to the next, arrived or not: both Odoos are to get the same. A client that polls (up to
#: 15.0) needs some time to ask again.
PACE = 0.1
#: Seconds after the last message that are given to those not delivered yet. They take milliseconds if they come at all.
PATIENCE = 5.0
# Seconds for Odoo to carry out its LISTEN, before anything is sent.
_LISTEN_DEADLINE = 10.0
# Seconds for all that listen to find the best one to do it for all of them.
_SETTLE_DEADLINE = 15.0


class Connections(NamedTuple):
    """Who is connected to PostgreSQL, and Odoo to PgBouncer; without those of the demo itself."""

    pooled: set  # process ids of the backends that serve PgBouncer
    direct: dict  # process id of the backend -> application_name
    clients: int  # of Odoo, at PgBouncer

    def kind(self, backend):
        if backend in self.direct:
            return "direct"
        return "pooled" if backend in self.pooled else "gone"


class Facts(NamedTuple):
    """What was measured with one Odoo."""

    delivered: int  # in time
    reloaded: int  # only after the client has subscribed again
    repeated: int
    median: Optional[float]  # seconds from NOTIFY to client
    listens: dict  # channel -> process id of the backend that has carried out its LISTEN, None if none has
    connections: Connections
    listeners: dict  # process id of Odoo -> what it is; those that have to listen
    failures: list  # of the client, as text
    log: list  # the addon's own lines, (level, logger, text)


def measure(stack, tell, shares):
    """Return the :class:`Facts` for a running stack.

    :param tell: function that is given lines on how it goes
    :param shares: whether its processes are to settle on one direct connection, which is waited for
    """
    known = stack.last_id()
    client = stack.client(listening=False)
    # Nobody shall say that it was sent too early.
    listens = _wait_for_listens(stack)

    tell("sending %d messages, one each %g s ..." % (MESSAGES, PACE))
    sent = _send(stack)
    _arrive(client, len(sent))
    in_time = {received.id: received.at for received in reversed(client.received)}
    tell("%d of %d arrived" % (len(in_time), len(sent)))
    if shares and len(_listeners(stack)) > 1:
        tell("waiting for the processes to settle on one direct connection ...")
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: len(stack.direct_connections()) == 1, _SETTLE_DEADLINE)
        listens = _wait_for_listens(stack)
    connections = _connections(stack)

    if len(in_time) < len(sent):
        client.subscribe(["tests"], known)
        _arrive(client, len(sent))
        tell("the client reconnects, as after reloading the page: now it has %d" % len(client.received))
    all_ids = [received.id for received in client.received]
    return Facts(
        delivered=len(in_time),
        reloaded=len(set(all_ids)) - len(in_time),
        repeated=len(all_ids) - len(set(all_ids)),
        median=statistics.median(in_time[one.id] - one.at for one in sent if one.id in in_time) if in_time else None,
        listens=listens,
        connections=connections,
        listeners=_listeners(stack),
        failures=list(client.failures),
        log=re.findall(
            r"^\S+ \S+ \d+ ([A-Z]+) \S+ odoo\.addons\.(bus_alt_connection\S*): (.*?) *$", stack.odoo.log(), re.M
        ),
    )


def versions(stack):
    """Return lines on what runs, as the servers themselves tell."""
    pool_mode = next(row["value"] for row in stack.pooler.show("config") if row["key"] == "pool_mode")
    workers = stack.odoo.workers
    return [
        "Odoo        %s (%s), %s"
        % (stack.series, stack.build.version, "--workers %d" % workers if workers else "threaded"),
        "PgBouncer   %s, pool_mode = %s" % (stack.pooler.show("version")[0]["version"].split()[-1], pool_mode),
        "PostgreSQL  %s" % stack.server.value("SHOW server_version"),
    ]


def _cron_listens(stack):
    return series_number(stack.series) >= 15


def _listeners(stack):
    processes = stack.odoo.processes()
    if not stack.odoo.workers:
        return {processes.main: "server"}
    listeners = dict.fromkeys(processes.cron, "cron worker") if _cron_listens(stack) else {}
    if processes.gevent:
        listeners[processes.gevent] = "gevent"
    return listeners


def _wait_for_listens(stack):
    listens = dict.fromkeys(["imbus", "cron_trigger"] if _cron_listens(stack) else ["imbus"])
    end = time.monotonic() + _LISTEN_DEADLINE
    for channel in listens:
        with contextlib.suppress(TimeoutError):
            listens[channel] = stack.wait_for_listen(channel, deadline=max(0, end - time.monotonic()))
    return listens


def _send(stack):
    sent = []
    for number in range(1, MESSAGES + 1):
        sent.append(stack.send("tests", "message %d" % number))
        time.sleep(PACE)
    return sent


def _arrive(client, count):
    """Wait until the client has so many messages, or for :data:`PATIENCE`."""
    with contextlib.suppress(TimeoutError):
        client.wait_for_count(count, PATIENCE)


def _connections(stack):
    direct = {row.pid: row.application_name for row in stack.direct_connections()}
    ports = stack.pooler.server_ports()
    pooled = {row.pid for row in stack.server.activity() if row.client_port in ports}
    clients = [row for row in stack.pooler.show("clients") if row["database"] != "pgbouncer"]
    return Connections(pooled, direct, sum(row["application_name"] != "tests" for row in clients))
