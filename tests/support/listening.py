"""A listener and its supervisor in this very process, on real servers."""

import contextlib
import threading
from typing import NamedTuple

from bus_alt_connection import catchup, connection, settings
from bus_alt_connection.listener import DirectSession, Listener
from bus_alt_connection.supervisor import Supervisor
from stack.postgres import libpq_parameters
from tests.unit.fakes import Events, FakeFeed


class Running(NamedTuple):
    listener: Listener
    supervisor: Supervisor
    feed: FakeFeed
    events: Events  # what the log would tell
    backlog: catchup.Backlog


def directly(place):
    """Return a function that connects a session to ``place``."""
    return lambda: connection.connect(libpq_parameters(place), DirectSession)


@contextlib.contextmanager
def listening(pooler, connect, channels=("imbus",), databases=(), **options):
    """Run listener and supervisor during the block, each in a thread; yield what there is of them.

    :param pooler: by which Odoo reaches its databases
    :param connect: returns a session that listens
    :param databases: on which Odoo works
    :param options: of the addon, without their prefix: ``CHECK_INTERVAL=3``
    """

    def opening(database):
        return connection.opening(libpq_parameters(pooler, database))

    configured = settings.read({"IMDISPATCHER_" + name: str(value) for name, value in options.items()}, {})
    feed, events, backlog = FakeFeed(*channels), Events(), catchup.Backlog(opening)
    listener = Listener("postgres", lambda _listener: connect(), lambda: False, events, 19)
    listener.add(feed)
    supervisor = Supervisor(listener, opening, catchup.Databases(databases), backlog, configured)
    threads = [threading.Thread(target=one.run, daemon=True) for one in (supervisor, listener)]
    for thread in threads:
        thread.start()
    try:
        yield Running(listener, supervisor, feed, events, backlog)
    finally:
        listener.close()
        for thread in threads:
            thread.join(20)
