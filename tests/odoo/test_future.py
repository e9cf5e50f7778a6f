"""A dispatcher like that of Odoo 20.0, in two gevent processes, as ``--gevent-workers 2`` starts them: on Odoo 19.0."""

import contextlib
import json
import os
import re
import signal

import psutil
import pytest

from stack.builds import find_build
from stack.odoo import default_load
from stack.stack import ADDON, DEFAULT_SERIES, Stack
from stack.waiting import wait_until
from tests.support import addonlog, traffic
from tests.support.machine import Machine
from tests.support.payloads import HOSTILE

pytestmark = pytest.mark.rest


@pytest.fixture(scope="module")
def stack():
    addons_path = [*find_build(DEFAULT_SERIES).addons_paths, ADDON, ADDON / "tests" / "support" / "addons"]
    with Stack(
        workers=2,
        jobs=False,
        # Without polling: what arrives here was pushed, or caught up with.
        environment={"IMDISPATCHER_CHECK_INTERVAL": "3", "IMDISPATCHER_POLL_INTERVAL": "0"},
        load="%s,bus_alt_connection,future" % default_load(DEFAULT_SERIES),
        conf={"addons_path": ",".join(map(str, addons_path))},
    ) as stack:
        yield stack


@pytest.fixture(scope="module")
def clients(stack):
    """Clients of both gevent processes, of which one leads; which of them a client reaches is up to the kernel."""
    found = []

    def both_listen():
        found.append(stack.client(listening=False))
        listening = {
            one.pid for one in addonlog.records(stack) if re.match("listening( again)? on .*imbus", one.message)
        }
        return len(listening & _gevents(stack)) == 2

    wait_until(both_listen, 30, "both to have clients", 0.2, stack.odoo.log_tail)
    return found


def test_it_hears_directly_what_is_sent_and_what_it_missed_and_no_garbage(stack, clients):
    _leader(stack)
    nested = [[[stack.database, ["x"]]], [[stack.database, "tests", []]], [[[stack.database, "tests"], 5]]]
    with contextlib.closing(stack.sender()) as sender:
        for payload in [*HOSTILE.values(), *map(json.dumps, nested)]:
            sender.notify(payload)
        stack.send("tests", "hello")
        _wait_for_all(clients, "hello")
        # Without a NOTIFY, as if that had come while nobody listened.
        sender.insert("tests", "missed")
        (lost,) = stack.direct_connections()
        stack.server.execute("SELECT pg_terminate_backend(%s)", (lost.pid,))
        _wait_for_all(clients, "missed")
    assert "the dispatcher failed" not in stack.odoo.log()
    said = traffic.statements(stack)
    assert {one.pooled for one in said if one.text == "SELECT 'worker'"} == {True}
    assert {one.pooled for one in said if one.listens} == {False}


def test_if_the_leading_gevent_process_is_killed_another_leads_and_nothing_is_lost(stack, clients):
    leader = _leader(stack)
    os.kill(leader, signal.SIGKILL)
    wait_until(lambda: any(client.failures for client in clients), 10, "its clients to notice")
    stack.send("tests", "hello again")
    _wait_for_all(clients, "hello again")
    assert {tuple(client.messages) for client in clients} == {("hello", "missed", "hello again")}
    assert _leader(stack) != leader


def _gevents(stack):
    return {child.pid for child in psutil.Process(stack.odoo.pid).children() if "gevent" in child.cmdline()}


def _leader(stack):
    """Return the gevent process that has the only direct connection; a cron worker may lead until it has found one."""

    def find():
        connected = Machine(stack).connected()
        return len(connected) == 1 and connected & _gevents(stack)

    return wait_until(find, 20, "a gevent process to lead", 0.1, stack.odoo.log_tail).pop()


def _wait_for_all(clients, message):
    for client in clients:
        client.wait_for(message, 10)
