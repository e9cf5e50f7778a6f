"""A path that drops all packets silently: neither end gets an error."""

import time

import pytest
import requests

from stack.proxy import black_hole
from stack.stack import Stack
from tests.support.machine import Machine

pytestmark = pytest.mark.variants("14.0-prefork", "19.0-prefork")

SILENT = r"WARNING .*lost the listener of database postgres: nothing arrives from \S+, and"


@pytest.fixture(scope="module")
def proxied(variant):
    """A stack that finds one host that takes no packets, and another one that is up to its ``proxy``: it swallows."""
    with black_hole() as (host, port):

        def environment(stack):
            stack.proxy.swallow()
            return {
                "IMDISPATCHER_CHECK_INTERVAL": "3",
                "IMDISPATCHER_DB_CONNECT_TIMEOUT": "2",
                "IMDISPATCHER_DB_HOST": "%s,%s" % (host, stack.proxy.host),
                "IMDISPATCHER_DB_PORT": "%s,%s" % (port, stack.proxy.port),
            }

        with Stack(*variant, environment=environment, jobs=False, proxy=True) as stack:
            stack.hole = "%s:%s" % (host, port)
            yield stack


def test_connecting_to_a_host_that_swallows_packets_is_given_up_and_holds_up_nobody(proxied):
    mark = 0 if not proxied.odoo.workers else proxied.odoo.log_mark()
    proxy = "%s:%s" % (proxied.proxy.host, proxied.proxy.port)
    given_up = "can't listen on database postgres: %s: no answer in 2 s, %s: no answer in 2 s" % (proxied.hole, proxy)
    with proxied.client(listening=False) as client:
        began = time.monotonic()
        answers = []
        # The very process that is connecting answers meanwhile: under gevent one that blocks stops them all.
        while not answers or given_up not in proxied.odoo.log_since(mark):
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


def test_a_silent_path_is_noticed_within_the_interval_and_nothing_is_lost(proxied):
    proxied.proxy.forward()
    with proxied.client(["others"]) as client:
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
        assert time.monotonic() - swallowed < 7
        assert client.messages == [], "the path was not silent"

        proxied.proxy.forward()
        client.wait_for_count(5, 20)
        proxied.odoo.wait_for_log(r"INFO .*listening again on .*imbus", mark, 20)
        proxied.send("others", "after")
        client.wait_for("after")
        assert client.messages == [*sent, "after"]
