"""A path that dies without a word, as a listener notices it without Odoo."""

import contextlib
import threading
import time

import psycopg2
import pytest

from bus_alt_connection import connection
from bus_alt_connection.catchup import Backlog, Databases
from bus_alt_connection.listener import DirectSession, Listener
from bus_alt_connection.log import Journal, OutageLog
from bus_alt_connection.settings import Settings
from bus_alt_connection.supervisor import Supervisor
from stack.postgres import USER, PostgreSQL, libpq_parameters
from stack.proxy import Proxy, black_hole
from stack.waiting import wait_until
from tests.support.background import background, in_background  # noqa: F401
from tests.support.network import network
from tests.unit.fakes import FakeFeed


@contextlib.contextmanager
def listening(server, through, settings):
    """A listener with its supervisor in this very process; yields the former, and its feed, once it is confirmed."""

    def pooled(dbname):
        return connection.opening(libpq_parameters(server, dbname))

    def direct(_listener):
        return connection.connect(libpq_parameters(through), DirectSession)

    listener = Listener("postgres", direct, lambda: False, Journal(OutageLog("postgres")))
    feed = FakeFeed("imbus")
    listener.add(feed)
    supervisor = Supervisor(listener, pooled, Databases(), Backlog(pooled), settings)
    for one in (listener, supervisor):
        threading.Thread(target=one.run, daemon=True).start()
    try:
        wait_until(lambda: listener.deaf_since is None, 10, "the first check")
        yield listener, feed
    finally:
        listener.remove(feed)


def seconds_until_dropped(settings, deadline, stop=None, then=lambda listener, feed: None):
    """Swallow the path of a new listener right after its first check, when the next is furthest, and do what follows.

    :return: seconds from then on until the listener has given it up
    """
    with PostgreSQL() as server, Proxy((server.host, server.port)) as proxy:
        with listening(server, proxy, settings) as (listener, feed):
            session = listener.session
            proxy.swallow()
            began = time.monotonic()
            then(listener, feed)

            def dropped():
                return listener.session is not session or stop and stop.is_set()

            wait_until(dropped, deadline, "the listener to give up a silent path", 0.05)
            return time.monotonic() - began


def test_a_silent_path_is_noticed_within_the_configured_interval():
    settings = Settings()
    settings.check_interval = 3.0
    assert seconds_until_dropped(settings, 20) < 4


def test_a_listen_on_a_silent_path_does_not_keep_a_listener_from_giving_it_up():
    settings = Settings()
    settings.check_interval = 3.0

    def want_more(listener, feed):
        listener.listen(feed, feed.channels | {"tests"})

    assert seconds_until_dropped(settings, 20, then=want_more) < 4.5


@in_background
def test_a_silent_path_is_noticed_within_60_s_by_default(stop):
    took = seconds_until_dropped(Settings(), 90, stop)
    assert took < 61


@in_background
def test_connecting_is_given_up_after_5_s_by_default(_stop):
    with black_hole() as (host, port):
        began = time.monotonic()
        with pytest.raises(psycopg2.OperationalError, match="%s:%s: no answer in 5 s" % (host, port)):
            connection.connect({"host": host, "port": port, "user": USER})
        assert 4.9 < time.monotonic() - began < 8


@in_background
def test_lost_packets_are_noticed_while_something_is_on_the_way(_stop):
    with network() as cable, PostgreSQL() as server:
        with Proxy((server.host, server.port), cable.listening()) as proxy:
            direct = connection.connect(libpq_parameters(proxy))
            assert direct.execute("SELECT 1") == [(1,)]
            cable.unplug()
            began = time.monotonic()
            with pytest.raises(psycopg2.OperationalError, match="timed out"):
                # We are more patient than the kernel, whose verdict is to be seen here.
                direct.execute("SELECT 2", timeout=40)
            assert 8 < time.monotonic() - began < 25
            direct.close()
