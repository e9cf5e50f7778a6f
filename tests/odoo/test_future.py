"""A dispatcher like that of Odoo 20.0, on Odoo 19.0: two gevent processes of one machine, both with clients."""

import contextlib
import json
import os
import signal

import pytest

from stack.builds import find_build
from stack.odoo import default_load
from stack.stack import ADDON, DEFAULT_SERIES, Stack
from stack.waiting import wait_until
from tests.support import traffic
from tests.support.machine import Machine
from tests.support.payloads import HOSTILE


@pytest.fixture(scope="module")
def machine():
    addons_path = [*find_build(DEFAULT_SERIES).addons_paths, ADDON, ADDON / "tests" / "support" / "addons"]
    stack = Stack(
        workers=1,
        jobs=False,
        # Without polling: what arrives here was pushed, or caught up with.
        environment={"IMDISPATCHER_CHECK_INTERVAL": "3", "IMDISPATCHER_POLL_INTERVAL": "0"},
        load="%s,bus_alt_connection,future" % default_load(DEFAULT_SERIES),
        conf={"addons_path": ",".join(map(str, addons_path)), "max_cron_threads": 0},
    )
    with stack, stack.another() as other:
        yield Machine(stack, other)


@pytest.fixture(scope="module")
def clients(machine):
    """A client of each gevent process, of which one leads."""
    clients = [stack.client(listening=False) for stack in machine.stacks]
    machine.settle()
    return clients


def test_it_hears_directly_what_is_sent_and_what_it_missed_and_no_garbage(machine, clients):
    stack = machine.stacks[0]
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
    assert not any("the dispatcher failed" in each.odoo.log() for each in machine.stacks)
    said = traffic.statements(stack)
    assert {one.pooled for one in said if one.text == "SELECT 'worker'"} == {True}
    assert {one.pooled for one in said if one.listens} == {False}


def test_if_the_leading_gevent_process_is_killed_another_leads_and_nothing_is_lost(machine, clients):
    leader = machine.settle()
    os.kill(leader, signal.SIGKILL)
    wait_until(lambda: any(client.failures for client in clients), 10, "its client to notice")
    machine.stacks[0].send("tests", "hello again")
    _wait_for_all(clients, "hello again")
    assert {tuple(client.messages) for client in clients} == {("hello", "missed", "hello again")}
    assert machine.settle() != leader


def _wait_for_all(clients, message):
    for client in clients:
        client.wait_for(message, 10)
