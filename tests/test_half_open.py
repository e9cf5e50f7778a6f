"""A path that dies without a word: packets vanish, and nobody is told."""

import contextlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg2
import pytest
import requests

from bus_alt_connection import connection
from bus_alt_connection.listener import Listener
from bus_alt_connection.settings import Settings
from bus_alt_connection.supervisor import Supervisor
from stack.builds import find_build, run_python
from stack.namespaces import Network, Unavailable
from stack.postgres import PASSWORD, USER, PostgreSQL
from stack.proxy import Proxy, black_hole
from stack.stack import ADDON, Stack
from stack.waiting import wait_until

SILENT = r"ERROR .*can't listen on database postgres: the path to \S+ is silent"


pytestmark = pytest.mark.variants("14.0-prefork", "19.0-threaded", "19.0-prefork")


class Feed:
    """One who listens to the bus, as far as a listener knows."""

    channels = frozenset(["imbus"])

    def put(self, notifications):
        pass


def parameters(server, dbname="postgres"):
    return {"host": server.host, "port": server.port, "user": USER, "password": PASSWORD, "dbname": dbname}


@contextlib.contextmanager
def listening(server, through, settings):
    """A listener with its supervisor in this very process; yields the former once it is confirmed."""
    listener = Listener("postgres", parameters(through), lambda: False)
    feed = Feed()
    listener.add(feed)
    Supervisor(listener, lambda dbname: parameters(server, dbname), set(), settings)
    try:
        wait_until(lambda: listener.session and listener.session.confirmed, 10, "the first check")
        yield listener
    finally:
        listener.remove(feed)


def seconds_until_dropped(settings, deadline, stop=None):
    """Swallow the path of a new listener right after its first check, when the next is furthest."""
    with PostgreSQL() as server, Proxy((server.host, server.port)) as proxy:
        with listening(server, proxy, settings) as listener:
            session = listener.session
            proxy.swallow()
            began = time.monotonic()

            def dropped():
                return listener.session is not session or stop and stop.is_set()

            wait_until(dropped, deadline, "the listener to give up a silent path", 0.05)
            return time.monotonic() - began


# What takes long, though it does next to nothing, runs while the other tests do -------------------------------------

_waits = {}


def in_background(function):
    """Make a test of ``function``, which begins with this module and runs beside it."""

    def test(background):
        background(function)

    test.__name__ = function.__name__
    _waits[function.__name__] = function
    return test


@pytest.fixture(scope="module", autouse=True)
def background(request):
    stop = threading.Event()
    wanted = {item.originalname for item in request.session.items if item.module is request.module}
    with ThreadPoolExecutor(len(_waits)) as executor:
        running = {function: executor.submit(function, stop) for name, function in _waits.items() if name in wanted}
        yield lambda function: running[function].result()
        stop.set()


# On real Odoo ---------------------------------------------------------------


@pytest.fixture(scope="module")
def proxied(variant):
    """A stack that finds one host that takes no packets, and another one that is up to its ``proxy``: it swallows."""
    with black_hole() as (host, port):

        def environment(stack):
            stack.proxy.swallow()
            return {
                "IMDISPATCHER_CHECK_INTERVAL": "2",
                "IMDISPATCHER_DB_CONNECT_TIMEOUT": "2",
                "IMDISPATCHER_DB_HOST": "%s,%s" % (host, stack.proxy.host),
                "IMDISPATCHER_DB_PORT": "%s,%s" % (port, stack.proxy.port),
            }

        with Stack(*variant, environment=environment, proxy=True) as stack:
            stack.hole = "%s:%s" % (host, port)
            yield stack


def test_connecting_to_a_host_that_swallows_packets_is_given_up_and_holds_up_nobody(proxied):
    mark = 0 if not proxied.odoo.workers else proxied.odoo.log_mark()
    client = proxied.client(listening=False)
    proxy = "%s:%s" % (proxied.proxy.host, proxied.proxy.port)
    given_up = "can't listen on database postgres: %s: no answer in 2 s, %s: no answer in 2 s" % (proxied.hole, proxy)
    began = time.monotonic()
    answers = []
    # The very process that is connecting answers meanwhile: under gevent one that blocks stops them all.
    while given_up not in proxied.odoo.log_since(mark):
        assert time.monotonic() - began < 12
        asked = time.monotonic()
        requests.get(proxied.odoo.event_url + "/bus_alt_connection/health", timeout=20)
        answers.append(time.monotonic() - asked)
        time.sleep(0.1)
    assert max(answers) < 1.5, "the process was held up"
    # There is no way but polling.
    proxied.send("tests", "polled")
    client.wait_for("polled", 12)
    # Once the second of them lives it is found behind the first.
    proxied.proxy.forward()
    proxied.odoo.wait_for_log("listening on .*imbus at %s " % proxy, mark, 20)
    proxied.send("tests", "heard")
    client.wait_for("heard")
    assert client.messages == ["polled", "heard"]
    client.close()


def test_a_silent_path_is_noticed_and_replaced_and_nothing_is_lost(proxied):
    client = proxied.client(["others"])
    mark = proxied.odoo.log_mark()
    proxied.proxy.swallow()
    swallowed = time.monotonic()
    sent = [str(number) for number in range(5)]
    for message in sent:
        proxied.send("others", message)
    proxied.odoo.wait_for_log(SILENT, mark)
    # An interval, half of which is for the answer, and what a busy machine takes.
    assert time.monotonic() - swallowed < 6
    assert client.messages == [], "the path was not silent"

    proxied.proxy.forward()
    client.wait_for_count(5, 20)
    proxied.odoo.wait_for_log(r"INFO .*listening again on .*imbus", mark, 20)
    proxied.send("others", "after")
    client.wait_for("after")
    assert client.messages == [*sent, "after"]
    assert "Traceback" not in proxied.odoo.log_since(mark)


# In this process ------------------------------------------------------------


def test_a_silent_path_is_noticed_within_the_configured_interval():
    settings = Settings()
    settings.check_interval = 3.0
    assert seconds_until_dropped(settings, 20) < 4


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


@pytest.mark.matrix
@pytest.mark.variants(spare=["14.0-prefork", "19.0-prefork"])
def test_the_kernel_watches_every_connection_as_far_as_libpq_can_tell_it(variant):
    script = """
        import json
        import socket
        import sys

        from psycopg2 import extensions

        sys.path.append(sys.argv[1])
        from bus_alt_connection import connection

        direct, _ = connection.connect(json.loads(sys.argv[2]))
        sock = socket.socket(fileno=direct.fileno())
        options = [
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
        ]
        print(json.dumps([extensions.libpq_version(), options]))
    """
    with PostgreSQL() as server:
        # With the psycopg2, and so the libpq, of this very Odoo.
        libpq, options = run_python(find_build(variant[0]), script, ADDON, json.dumps(parameters(server)))
    assert options == [1, 15, 5, 3, 10000 if libpq >= 120000 else 0]


# With packets that really get lost --------------------------------------------


@contextlib.contextmanager
def network():
    try:
        with Network() as network, network.near():
            yield network
    except Unavailable as error:
        pytest.skip(str(error))


@in_background
def test_lost_packets_are_noticed_without_a_check_as_well(_stop):
    # The checks would be faster than the kernel, and what is not known to be lost is not polled for.
    environment = {"IMDISPATCHER_CHECK_INTERVAL": "0", "IMDISPATCHER_DB_CONNECT_TIMEOUT": "2"}
    with network() as cable:
        proxy = {"listening": cable.listening()}
        with Stack("19.0", 2, environment=environment, proxy=proxy) as stack:
            client = stack.client()
            stack.send("tests", "before")
            client.wait_for("before")

            mark = stack.odoo.log_mark()
            cable.unplug()
            unplugged = time.monotonic()
            stack.odoo.wait_for_log(r"WARNING .*lost the listener of database postgres: .*timed out", mark, 40)
            # Idle for 15 s, and then three answers that fail to come.
            assert 10 < time.monotonic() - unplugged < 35
            stack.send("tests", "polled")
            client.wait_for("polled", 15)

            cable.plug()
            stack.odoo.wait_for_log(r"INFO .*listening again on .*imbus", mark, 20)
            stack.send("tests", "after")
            client.wait_for("after")
            assert client.messages == ["before", "polled", "after"]


@in_background
def test_lost_packets_are_noticed_while_something_is_on_the_way(_stop):
    with network() as cable, PostgreSQL() as server:
        with Proxy((server.host, server.port), cable.listening()) as proxy:
            direct, _ = connection.connect(parameters(proxy))
            assert direct.execute("SELECT 1") == [(1,)]
            cable.unplug()
            began = time.monotonic()
            with pytest.raises(psycopg2.OperationalError, match="timed out"):
                # We are more patient than the kernel, whose verdict is to be seen here.
                direct.execute("SELECT 2", timeout=40)
            assert 8 < time.monotonic() - began < 25
            direct.close()
