"""What is known of the series after 19.0, and what is not: shown on the real 19.0."""

import contextlib
import json
import os
import re
import signal

import psutil
import pytest

from stack.builds import find_build
from stack.database import DATABASE
from stack.odoo import default_load
from stack.stack import ADDON, Stack
from stack.waiting import wait_until
from tests.support import addonlog, traffic
from tests.support.machine import Machine
from tests.support.payloads import HOSTILE

SERIES = "19.0"

pytestmark = pytest.mark.rest


@contextlib.contextmanager
def _stack_with(addon, workers=0, environment=None, **conf):
    """Yield a stack of 19.0 that loads one of the addons in tests/support/addons too."""
    addons_path = [*find_build(SERIES).addons_paths, ADDON, ADDON / "tests" / "support" / "addons"]
    with Stack(
        SERIES,
        workers,
        jobs=False,
        environment=environment,
        load="%s,bus_alt_connection,%s" % (default_load(SERIES), addon),
        conf={"addons_path": ",".join(map(str, addons_path)), **conf},
    ) as stack:
        yield stack


def _listening_backend(stack):
    """Return the backend that listens directly on Odoo's database, and has been confirmed."""
    (backend,) = (row.pid for row in stack.direct_connections() if row.datname == stack.database)
    addonlog.wait_for_record(stack, r"listening( again)? on imbus at .* \(database \S+, backend pid %d\)" % backend)
    return backend


def _notify(stack, *payloads):
    with contextlib.closing(stack.pooler.connect(stack.database, application_name="tests")) as pooled:
        for payload in payloads:
            with pooled, pooled.cursor() as cr:
                cr.execute("SELECT pg_notify('imbus', %s)", (payload,))


def test_the_dispatcher_of_20_0_hears_directly_what_is_sent_and_what_it_missed_and_no_garbage():
    # It is told that Odoo's own database is the system database.
    with _stack_with("future_dispatcher", db_system=DATABASE) as stack, contextlib.closing(stack.sender()) as sender:
        stack.wait_for_listen("imbus")
        lost = _listening_backend(stack)
        sender.insert("sent", "hello")
        pair = [[stack.database, "sent"], 5]
        lists = [[[stack.database, ["probe"]]], [[stack.database, "sent", []]], [pair, [stack.database, "sent"]]]
        _notify(stack, *HOSTILE.values(), *map(json.dumps, lists), json.dumps([[stack.database, "sent"]]))
        stack.odoo.wait_for_log("on sent: hello")
        stack.odoo.wait_for_log(re.escape("ignored the channel %s" % json.dumps(pair)))
        # What its other threads ask is asked through the pooler.
        asked = [one for one in traffic.statements(stack) if one.text.startswith("SELECT message FROM bus_bus")]
        assert asked
        assert all(one.pooled for one in asked)
        assert not any(one.pooled for one in traffic.statements(stack) if one.listens)

        mark = stack.odoo.log_mark()
        # Without a NOTIFY, as if that had come while nobody listened.
        sender.insert("missed", "hello again")
        stack.server.execute("SELECT pg_terminate_backend(%s)", (lost,))
        stack.odoo.wait_for_log("on missed: hello again", mark)
        assert stack.wait_for_listen("imbus") != lost
        assert " failed\n" not in stack.odoo.log()


def test_gevent_processes_at_one_port_share_a_connection():
    with _stack_with("future_gevent", workers=2, environment={"IMDISPATCHER_CHECK_INTERVAL": "3"}) as stack:
        clients = []
        first, second = wait_until(lambda: len(_gevents(stack)) == 2 and _gevents(stack), 30, "two of them", 0.1)

        def both_listen():
            # Which of them it reaches is up to the kernel.
            clients.append(stack.client(listening=False))
            return {first, second} <= _listening(stack)

        wait_until(both_listen, 30, "both to have clients", 0.2, stack.odoo.log_tail)
        # The cron worker hosts until it has found one of them.
        leader = wait_until(lambda: _only_connection(stack) & {first, second}, 20, "one of them to lead", 0.1).pop()
        stack.send("tests", "hello")
        for client in clients:
            client.wait_for("hello")
        # Each answers for itself.
        assert {_health(stack) for _ in range(40)} == {("pass", "listening"), ("pass", "shared")}

        os.kill(leader, signal.SIGKILL)
        wait_until(lambda: any(client.failures for client in clients), 10, "its clients to notice")
        stack.send("tests", "hello again")
        left = [client for client in clients if not client.failures]
        assert left
        for client in left:
            client.wait_for("hello again")
        wait_until(lambda: _only_connection(stack) == {first, second} - {leader}, 20, "the other to lead", 0.1)


def _gevents(stack):
    return [child.pid for child in psutil.Process(stack.odoo.pid).children() if "gevent" in child.cmdline()]


def _listening(stack):
    """Return the ids of the processes that listen on imbus."""
    return {one.pid for one in addonlog.records(stack) if re.match("listening( again)? on .*imbus", one.message)}


def _only_connection(stack):
    """Return the process that has the only direct connection, in a set; an empty one if there are several."""
    connected = Machine(stack).connected()
    return connected if len(connected) == 1 else set()


def _health(stack):
    says = stack.odoo.health(10)
    return says["status"], says["mode"]
