"""All listening processes of a machine share one direct connection, and lose nothing by it, whatever becomes of it."""

import contextlib
import os
import pwd
import re
import signal
import subprocess
import sys
import time

import pytest

from bus_alt_connection.listener import LONGEST_DELAY
from bus_alt_connection.sharing import AVOID_SILENT
from stack.stack import Stack
from stack.waiting import wait_until
from tests.support.addonlog import bus_pid, records, troubles
from tests.support.machine import Machine, sharing_socket

pytestmark = pytest.mark.variants("14.0-prefork", "19.0-prefork")

INTERVAL = 3
GO = "listeners go to %s:%s, all other cursors to %s:%s"
#: seconds until what happens at once is there, and what happens by the next check; generous, for a busy machine
AT_ONCE, SOON = 5, INTERVAL + 10


@pytest.fixture(scope="module")
def machine(variant):
    """Two Odoos beside each other."""
    # Without polling: what arrives here was pushed, or caught up with.
    environment = {"IMDISPATCHER_CHECK_INTERVAL": str(INTERVAL), "IMDISPATCHER_POLL_INTERVAL": "0"}
    options = {
        "conf": {"max_cron_threads": 2},
        "options": ["--log-handler=odoo.service.server:DEBUG"],
        "server_options": {"settings": {"log_connections": "on"}},
    }
    with Stack(*variant, environment=environment, jobs=False, proxy=True, **options) as stack:
        with stack.another() as other:
            yield Machine(stack, other)


@pytest.fixture
def channel(request):
    return request.node.originalname[:50]


@pytest.fixture
def clients(machine, channel):
    """A client of each Odoo, by its stack; all listen through one process."""
    machine.start()
    with contextlib.ExitStack() as exits:
        found = {stack: exits.enter_context(stack.client([channel], listening=False)) for stack in machine.stacks}
        machine.settle()
        yield found


def wait_for_all(clients, message, deadline=AT_ONCE):
    """Wait until each has got it; return when the last of them has."""
    return max(client.wait_for(message, deadline).at for client in clients)


def mark_all(machine):
    """Return marks for `complaints`: here end the logs now."""
    return {stack: stack.odoo.log_mark() for stack in machine.stacks}


def complaints(marks):
    return [found for stack, mark in marks.items() for found in troubles(stack, mark)]


def others(machine, clients, leader):
    """Return the clients of the Odoos that go on without ``leader``."""
    return [client for stack, client in clients.items() if machine.listeners()[leader] is not stack]


@pytest.mark.matrix
def test_all_settle_on_one_connection_and_say_so(machine, clients, channel):
    leader = machine.settle()
    listeners = machine.listeners()
    (row,) = machine.stacks[0].direct_connections()
    for pid, stack in listeners.items():
        said = [one.message for one in records(stack, pid=pid) if one.message.startswith("listening")]
        way = "at" if pid == leader else "through process %d at" % leader
        place = r"%s:%s \(database postgres, backend pid %d\)" % (stack.proxy.host, stack.proxy.port, row.pid)
        assert re.match(r"listening(?: again)? on [^(]+ %s %s, confirmed in [\d.]+ ms" % (way, place), said[-1])
    for stack in machine.stacks:
        pooler = stack.pooler
        places = (stack.proxy.host, stack.proxy.port, pooler.host, pooler.port)
        # Each process says at its start where its listeners will go. All but these are forks.
        started = [one.pid for one in records(stack) if one.message.startswith(GO % places)]
        assert sorted(started) == sorted({stack.odoo.pid, bus_pid(stack)})
        # Health is served where there is HTTP.
        says = stack.odoo.health()
        mode = "listening" if listeners[leader] is stack else "shared"
        assert (says["mode"], says["status"], says["listening"], says["confirmed"]) == (mode, "pass", True, True)
    for message in ("one", "two"):
        machine.stacks[0].send(channel, message)
        wait_for_all(clients.values(), message)
    assert [client.messages for client in clients.values()] == [["one", "two"]] * len(clients)
    machine.trigger_cron()


@pytest.mark.matrix
def test_if_the_leader_is_killed_the_others_hear_again_and_nothing_is_lost(machine, clients, channel):
    # Who has just come waits longer before the next attempt.
    leader = machine.settle(lasting=LONGEST_DELAY)
    followers, listeners = others(machine, clients, leader), machine.listeners()
    marks = mark_all(machine)
    os.kill(leader, signal.SIGKILL)
    killed = time.monotonic()
    machine.stacks[0].send(channel, "alone")
    # Within a second, and what a busy machine takes.
    assert wait_for_all(followers, "alone") - killed < 3
    if not listeners[leader].odoo.workers:
        listeners[leader].odoo.kill()
    rest = set(listeners) - {leader}
    wait_until(lambda: all(machine.ways().get(pid) not in (None, leader) for pid in rest), AT_ONCE, "others to hear")
    machine.stacks[0].send(channel, "after")
    wait_for_all(followers, "after")
    assert [client.messages for client in followers] == [["alone", "after"]] * len(followers)
    # Nor did it take a check to find out.
    assert complaints(marks) == []


@pytest.mark.matrix
def test_followers_leave_a_leader_that_stands_still_and_come_back(machine, clients, channel):
    leader = machine.settle()
    followers, rest = others(machine, clients, leader), set(machine.listeners()) - {leader}
    marks = mark_all(machine)
    with contextlib.ExitStack() as end:
        os.kill(leader, signal.SIGSTOP)
        end.callback(os.kill, leader, signal.SIGCONT)
        stopped = time.monotonic()
        machine.stacks[0].send(channel, "alone")
        # It is left within 5 s.
        assert wait_for_all(followers, "alone", 10) - stopped < 6.5

        def together():
            ways = {way for pid, way in machine.ways().items() if pid != leader}
            return len(ways) == 1 and machine.connected() - {leader} == ways

        wait_until(together, SOON, "the others to have one connection", 0.1)
    machine.settle(deadline=INTERVAL + AVOID_SILENT)
    machine.stacks[0].send(channel, "shared")
    wait_for_all(clients.values(), "shared")
    assert [client.messages for client in clients.values()] == [["alone", "shared"]] * len(clients)

    # A check may be the first to find out.
    left = r"lost the listener of .*: process %d, through which it listened, (has been silent|did not deliver)" % leader
    # The leader itself may have had a check on its way.
    said = [one for one in complaints(marks) if one.pid != leader]
    assert [one for one in said if not re.match(left, one.message)] == []
    assert {one.pid for one in said} == rest


def test_after_a_restart_of_postgresql_one_process_connects(machine, clients, channel):
    leader, first = machine.settle(), machine.stacks[0]
    mark, attempts = first.server.log_mark(), first.proxy.accepted
    first.server.stop()
    wait_until(lambda: first.proxy.accepted > attempts + 5, 60, "some attempts to connect")
    first.server.start()
    with contextlib.closing(first.sender(direct=True)) as sender:
        sender.send(channel, "alone")
    wait_for_all(clients.values(), "alone", SOON)
    assert machine.settle() == leader
    authorized = r"connection authorized: .* application_name=odoo-listener-(\d+)"
    connected = re.findall(authorized, first.server.log_since(mark))
    assert [int(pid) for pid in connected] == [leader]
    with contextlib.closing(first.sender(direct=True)) as sender:
        sender.send(channel, "pushed")
    wait_for_all(clients.values(), "pushed")
    assert [client.messages for client in clients.values()] == [["alone", "pushed"]] * len(clients)


# It becomes another user by itself, since that one need not have a right to this interpreter.
LISTEN_IN = """
import contextlib, os, socket, sys
os.setuid(int(sys.argv[2]))
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
    sock.settimeout(20)
    sock.connect("\\0" + sys.argv[1])
    said = b""
    with contextlib.suppress(ConnectionError):
        sock.send(b'["imbus", "cron_trigger"]')
        while said[-1:] != b"!":
            said += sock.recv(1 << 16) or b"!"
    print(len(said.rstrip(b"!")))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.variants("19.0-prefork")
def test_another_user_is_refused_and_told_nothing(machine, clients, channel):
    leader = machine.settle()
    name, followers = sharing_socket(leader)
    arguments = [name[1:], str(pwd.getpwnam("nobody").pw_uid)]
    command = [sys.executable, "-I", "-S", "-c", LISTEN_IN, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listening_in:
        while listening_in.poll() is None:
            machine.stacks[0].send(channel, "secret")
            time.sleep(0.05)
        assert listening_in.stdout.read() == "0\n"
    assert sharing_socket(leader) == (name, followers)


@pytest.mark.variants("19.0-prefork")
def test_who_does_not_share_has_a_connection_of_its_own(machine, clients, channel):
    leader, (first, *_) = machine.settle(), machine.stacks
    with first.another(IMDISPATCHER_SHARE="0") as other, other.client([channel]) as client:
        alone = Machine(other)
        wait_until(lambda: all(pid == way for pid, way in alone.ways().items()), SOON, "each to listen by itself")
        assert machine.connected() == {leader, *alone.ways()}
        assert not any(map(sharing_socket, alone.ways()))
        first.send(channel, "for all")
        wait_for_all([client, *clients.values()], "for all")
    assert machine.settle() == leader
