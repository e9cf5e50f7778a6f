"""A path that dies without a word: packets vanish, and nobody is told."""

import json
import time

import pytest
import requests

from stack.builds import find_build, run_python
from stack.postgres import PostgreSQL, libpq_parameters
from stack.proxy import black_hole
from stack.stack import ADDON, Stack
from tests.support.background import background, in_background  # noqa: F401
from tests.support.machine import Machine
from tests.support.network import network

SILENT = r"WARNING .*lost the listener of database postgres: the path to \S+ is silent, nothing comes through"


pytestmark = pytest.mark.variants("14.0-prefork", "19.0-threaded", "19.0-prefork")


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
    proxied.odoo.wait_for_log(r"listening on .*imbus (through process \d+ )?at %s " % proxy, mark, 20)
    proxied.send("tests", "heard")
    client.wait_for("heard")
    assert client.messages == ["polled", "heard"]
    client.close()


def test_a_silent_path_is_noticed_and_replaced_and_nothing_is_lost(proxied):
    client = proxied.client(["others"])
    # Who joins the listener meanwhile would have it ask for something.
    Machine(proxied).settle()
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

        direct = connection.connect(json.loads(sys.argv[2]))
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
        libpq, options = run_python(find_build(variant[0]), script, ADDON, json.dumps(libpq_parameters(server)))
    assert options == [1, 15, 5, 3, 10000 if libpq >= 120000 else 0]


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
