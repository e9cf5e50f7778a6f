"""All listening processes of a machine share one direct connection, and lose nothing by it, whatever becomes of it."""

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bus_alt_connection.listener import LONGEST_DELAY
from stack.stack import ADDON, Stack
from stack.waiting import wait_until
from tests.support.addonlog import bus_pid, records, troubles
from tests.support.descriptors import out_of_descriptors
from tests.support.flow import flowing
from tests.support.machine import Machine, connect, sharing_socket

INTERVAL = 3
#: seconds until what happens at once is there, and what happens by the next check; generous, for a busy machine
AT_ONCE, SOON = 5, INTERVAL + 10

pytestmark = pytest.mark.variants(spare=["14.0-threaded"])
one_kind = pytest.mark.parametrize("variant", ["19.0-threaded"], indirect=True, scope="module")
both_kinds = pytest.mark.parametrize("variant", ["19.0-threaded", "19.0-prefork"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def machine(variant):
    """Two Odoos beside each other, of which the second has come when the first had settled."""
    # Without polling: what arrives here was pushed, or caught up with.
    environment = {"IMDISPATCHER_CHECK_INTERVAL": str(INTERVAL), "IMDISPATCHER_POLL_INTERVAL": "0"}
    options = {
        "conf": {"max_cron_threads": 2},
        "options": ["--log-handler=odoo.service.server:DEBUG"],
        "server_options": {"settings": {"log_connections": "on"}},
    }
    with Stack(*variant, environment=environment, jobs=False, proxy=True, **options) as stack, stack.client():
        first_host = Machine(stack).settle()
        with stack.another() as other:
            machine = Machine(stack, other)
            with other.client(listening=False):
                machine.settle()
                machine.joined_at_once = set(Machine(other).ways(first=True).values()) == {first_host}
            yield machine


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


@pytest.mark.matrix
def test_all_settle_on_one_connection_and_say_so(machine, clients, channel):
    host = machine.settle()
    listeners = machine.listeners()
    (row,) = machine.stacks[0].direct_connections()
    for pid, stack in listeners.items():
        said = [one.message for one in records(stack, pid=pid) if one.message.startswith("listening")]
        way = "at" if pid == host else "through process %d at" % host
        place = r"%s:%s \(database postgres, backend pid %d\)" % (stack.proxy.host, stack.proxy.port, row.pid)
        assert re.match(r"listening(?: again)? on [^(]+ %s %s, confirmed in [\d.]+ ms" % (way, place), said[-1])
    # Health is served where there is HTTP.
    for stack in machine.stacks:
        says = stack.odoo.health()
        mode = "listening" if listeners[host] is stack else "shared"
        assert (says["mode"], says["status"], says["listening"], says["confirmed"]) == (mode, "pass", True, True)
    assert machine.joined_at_once, "the second Odoo came to it by way of something else"
    for message in ("one", "two"):
        machine.stacks[0].send(channel, message)
        wait_for_all(clients.values(), message)
    assert [client.messages for client in clients.values()] == [["one", "two"]] * len(clients)
    machine.trigger_cron()


def mark_all(machine):
    """Return marks for `complaints`: here end the logs now."""
    return {stack: stack.odoo.log_mark() for stack in machine.stacks}


def complaints(marks):
    return [found for stack, mark in marks.items() for found in troubles(stack, mark)]


# Something happens to the host ------------------------------------------------


def others(machine, clients, host):
    """Return the clients of the Odoos that go on without ``host``."""
    return [client for stack, client in clients.items() if machine.listeners()[host] is not stack]


@pytest.mark.matrix
def test_if_the_host_is_killed_the_others_hear_again_and_nothing_is_lost(machine, clients, channel):
    # Who has just come waits longer before the next attempt.
    host = machine.settle(lasting=LONGEST_DELAY)
    guests, listeners = others(machine, clients, host), machine.listeners()
    marks = mark_all(machine)
    os.kill(host, signal.SIGKILL)
    killed = time.monotonic()
    machine.stacks[0].send(channel, "alone")
    # Within a second, and what a busy machine takes.
    assert wait_for_all(guests, "alone") - killed < 3
    if not listeners[host].odoo.workers:
        listeners[host].odoo.kill()
    rest = set(listeners) - {host}
    wait_until(lambda: all(machine.ways().get(pid) not in (None, host) for pid in rest), AT_ONCE, "the others to hear")
    machine.stacks[0].send(channel, "after")
    wait_for_all(guests, "after")
    assert [client.messages for client in guests] == [["alone", "after"]] * len(guests)
    # Nor did it take a check to find out.
    assert complaints(marks) == []


@pytest.mark.matrix
def test_nobody_relies_on_a_host_that_is_stopped(machine, clients, channel):
    host = machine.settle()
    guests, rest = others(machine, clients, host), set(machine.listeners()) - {host}
    with contextlib.ExitStack() as end:
        os.kill(host, signal.SIGSTOP)
        end.callback(os.kill, host, signal.SIGCONT)
        machine.stacks[0].send(channel, "alone")
        wait_for_all(guests, "alone", SOON)

        def apart():
            ways = machine.ways()
            return all(ways[pid] not in (None, host) for pid in rest)

        wait_until(apart, SOON, "the others to have connections of their own", 0.1)
        assert machine.connected() - {host} == set(machine.ways().values()) - {host}
        machine.stacks[0].send(channel, "pushed")
        wait_for_all(guests, "pushed")
    machine.settle()
    machine.stacks[0].send(channel, "shared")
    wait_for_all(clients.values(), "shared")
    assert [client.messages for client in clients.values()] == [["alone", "pushed", "shared"]] * len(clients)


def test_a_host_that_ends_costs_its_guests_nothing(machine, clients, channel):
    host = machine.settle(lasting=LONGEST_DELAY)
    ending, (guest,) = machine.listeners()[host], others(machine, clients, host)
    marks = mark_all(machine)
    with flowing(ending, guest, channel):
        assert ending.odoo.stop() == 0
        assert machine.settle() != host
    assert complaints(marks) == []
    assert "Traceback" not in ending.odoo.log_since(marks[ending])


def test_after_a_restart_of_postgresql_one_process_connects(machine, clients, channel):
    host, first = machine.settle(), machine.stacks[0]
    mark, attempts = first.server.log_mark(), first.proxy.accepted
    first.server.stop()
    # Guests that wait rely on their host through the half minute that many take; two processes show that at once.
    wanted = 2 if len(machine.listeners()) == 2 else 9
    wait_until(lambda: first.proxy.accepted > attempts + wanted, 60, "some attempts to connect")
    first.server.start()
    with contextlib.closing(first.sender(direct=True)) as sender:
        sender.send(channel, "alone")
    wait_for_all(clients.values(), "alone", SOON)
    assert machine.settle() == host
    authorized = r"connection authorized: .* application_name=odoo-listener-(\d+)"
    connected = re.findall(authorized, first.server.log_since(mark))
    assert [int(pid) for pid in connected] == [host]
    with contextlib.closing(first.sender(direct=True)) as sender:
        sender.send(channel, "pushed")
    wait_for_all(clients.values(), "pushed")
    assert [client.messages for client in clients.values()] == [["alone", "pushed"]] * len(clients)


# Odoo itself does not survive it at its look at its own memory, once a minute: it has to have been started just before.
@one_kind
def test_a_host_without_descriptors_is_gone_without(machine, clients, channel):
    for stack in machine.stacks:
        stack.odoo.stop()
    hosting, joining = machine.stacks
    # For as long as it relies on its host.
    usual = joining.odoo.variables
    joining.odoo.variables = {**usual, "IMDISPATCHER_POLL_INTERVAL": "1"}
    hosting.odoo.start()
    host = hosting.odoo.pid
    wait_until(lambda: machine.connected() == {host}, SOON, "the host to listen")
    with out_of_descriptors(host):
        # Who comes gets no answer.
        joining.odoo.start()
        wait_until(lambda: machine.ways().get(joining.odoo.pid) == joining.odoo.pid, SOON, "the other to listen")
    assert machine.settle() == host
    with joining.client([channel]) as guest:
        with out_of_descriptors(host):
            # It can't connect again: who relies on it looks into bus_bus meanwhile.
            joining.server.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s",
                ("odoo-listener-%d" % host,),
            )
            joining.send(channel, "alone")
            guest.wait_for("alone", SOON)
        machine.settle()
        assert guest.messages == ["alone"]
    joining.odoo.stop()
    joining.odoo.variables = usual


# Something happens to guests --------------------------------------------------


class Returning:
    """A client that comes back to where it was when its Odoo's gevent process is another one."""

    def __init__(self, stack, channel):
        self.stack, self.channel = stack, channel
        self.last = stack.last_id()
        self.clients = [stack.client([channel], self.last, listening=False)]

    @property
    def messages(self):
        return [message for client in self.clients for message in client.messages]

    def come_back(self):
        self.clients[-1].close()
        self.last = max([self.last, *(received.id for received in self.clients[-1].received)])
        self.clients.append(self.stack.client([self.channel], self.last, listening=False))


@pytest.mark.parametrize("variant", ["19.0-prefork"], indirect=True, scope="module")
def test_nothing_is_lost_while_processes_are_recycled(machine, clients, channel):
    first, second = machine.stacks
    client, other = Returning(first, channel), Returning(second, channel + " of the other")
    marks = mark_all(machine)
    with flowing(first, client, channel, 0.05), flowing(second, other, other.channel, 0.05):
        for turn in range(18):
            stack = machine.stacks[turn % 2]
            processes = stack.odoo.processes()
            victim = [processes.gevent, *processes.cron][turn // 2 % 3]
            os.kill(victim, signal.SIGTERM)

            def replaced(stack=stack, victim=victim):
                now = stack.odoo.processes()
                return now.gevent and len(now.cron) == 2 and victim not in (now.gevent, *now.cron)

            wait_until(replaced, SOON, "another in its place")
            wait_until(stack.odoo.is_up, SOON, "Odoo to answer")
            for one in (client, other):
                if one.stack is stack and victim == processes.gevent:
                    one.come_back()
            machine.settle()
    machine.trigger_cron()
    assert complaints(marks) == []
    for stack, mark in marks.items():
        assert "Traceback" not in stack.odoo.log_since(mark)


def percentile(stack, client, channel, label):
    """Return the 99th of 100 messages amid others: the seconds that it took to arrive; and those messages."""
    flood = json.dumps([[stack.database, "x" * 7000]])
    took, sent = [], []
    with contextlib.closing(stack.sender()) as sender:
        for number in range(100):
            for _ in range(4):
                sender.notify(flood)
            sent.append("%s %d" % (label, number))
            at = sender.send(channel, sent[-1]).at
            took.append(client.wait_for(sent[-1]).at - at)
    return statistics.quantiles(took, n=100)[-1], sent


@one_kind
def test_a_guest_that_does_not_read_holds_up_nobody_and_catches_up(machine, clients, channel):
    pid = machine.settle()
    host = machine.listeners()[pid]
    (guest,) = (stack for stack in machine.stacks if stack is not host)
    usual, sent = percentile(host, clients[host], channel, "usual")
    mark, (name, guests) = guest.odoo.log_mark(), sharing_socket(pid)
    with guest.client(["missed"], listening=False) as missing:
        os.kill(guest.odoo.pid, signal.SIGSTOP)
        try:
            late, more = percentile(host, clients[host], channel, "late")
            wait_until(lambda: sharing_socket(pid) == (name, guests - 1), AT_ONCE, "the host to let go of its guest")
            # Of this one nothing is on its way to it.
            host.send("missed", "alone")
        finally:
            os.kill(guest.odoo.pid, signal.SIGCONT)
        assert late < usual + 0.5
        missing.wait_for("alone", SOON)
        assert missing.messages == ["alone"]
        clients[guest].wait_for(more[-1], SOON)
    assert machine.settle() == pid
    assert [client.messages for client in clients.values()] == [sent + more] * 2
    assert troubles(guest, mark) == []


@both_kinds
def test_fifty_comings_and_goings_leave_no_descriptor_open(machine, clients, channel):
    host = machine.settle()
    name, guests = sharing_socket(host)
    before = psutil.Process(host).num_fds()
    for turn in range(50):
        with contextlib.closing(connect(name)) as sock:
            if turn % 3:
                assert sock.recv(1 << 16)
                sock.send(json.dumps([channel]).encode())
            if turn % 3 == 2:
                while channel.encode() not in sock.recv(1 << 16):
                    pass
    wait_until(lambda: psutil.Process(host).num_fds() <= before, AT_ONCE, "the descriptors to be closed", 0.1)
    assert sharing_socket(host) == (name, guests)
    assert machine.settle() == host


# Somebody else is at the socket -----------------------------------------------

GARBAGE = [
    b"",
    b"\xff\xfe",
    b"{",
    b"null",
    b"{}",
    b'"imbus"',
    b"[1]",
    b"[[]]",
    b'[""]',
    b'["\\u0000"]',
    b'["\\ud800"]',
    json.dumps(["x" * 64]).encode(),
    b"[" * 100000,
]


@both_kinds
def test_garbage_on_the_socket_disturbs_nobody(machine, clients, channel):
    host = machine.settle()
    marks = mark_all(machine)
    name, guests = sharing_socket(host)
    for number, garbage in enumerate(GARBAGE):
        with contextlib.closing(connect(name)) as sock:
            sock.send(garbage)
            while sock.recv(1 << 16):  # until it hangs up
                pass
        machine.stacks[0].send(channel, number)
        wait_for_all(clients.values(), number)
    assert machine.settle() == host
    assert sharing_socket(host) == (name, guests)
    assert complaints(marks) == []


@contextlib.contextmanager
def program(text, user, *arguments):
    """Run a program in Python as ``user``, None: as ourselves; skip the test if we must not."""
    if user and os.geteuid():
        pytest.skip("only root can be another user")
    uid = pwd.getpwnam(user).pw_uid if user else os.geteuid()
    # Which it becomes by itself, since that one need not have a right to this interpreter.
    text = "import contextlib, json, os, socket, struct, sys, threading\nos.setuid(%d)\n%s" % (uid, text)
    command = [sys.executable, "-I", "-S", "-c", text, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


LISTEN_IN = """
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


@both_kinds
def test_another_user_is_refused_and_told_nothing(machine, clients, channel):
    host = machine.settle()
    name, guests = sharing_socket(host)
    with program(LISTEN_IN, "nobody", name[1:]) as listening_in:
        while listening_in.poll() is None:
            machine.stacks[0].send(channel, "secret")
            time.sleep(0.05)
        assert listening_in.stdout.read() == "0\n"
    assert sharing_socket(host) == (name, guests)


# Says who came, one pid a line.
PRETEND = """
name, manners = sys.argv[1:]
facts = ["db-01:5432", 1, False, False, "postgres", "15", 1]

def serve(sock):
    print(struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0], flush=True)
    if manners == "garbage":
        sock.send(b"\\xff{")
    channels = []
    while manners == "fair words":
        sock.send(json.dumps([[facts, channels], []]).encode())
        channels = json.loads(sock.recv(1 << 20) or "null")
        if channels is None:
            break
    sock.recv(1 << 20)

server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.bind("\\0" + name)
server.listen(128)
while True:
    threading.Thread(target=serve, args=server.accept()[:1], daemon=True).start()
"""


@pytest.mark.parametrize("variant", ["19.0-prefork"], indirect=True, scope="module")
@pytest.mark.parametrize("manners, user", [("garbage", None), ("silence", None), ("fair words", "nobody")])
def test_nobody_relies_on_a_host_that_is_none_of_ours(machine, clients, channel, manners, user):
    name, _guests = sharing_socket(machine.settle())
    assert name.endswith("/evented")
    # From now on there is none, until somebody comes and wants to hear of the bus.
    for pid in [bus_pid(stack) for stack in machine.stacks]:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: name not in Path("/proc/net/unix").read_text(), AT_ONCE, "the name to be free")
    with program(PRETEND, user, name[1:], manners) as pretending:
        machine.settle(bus=False)
        marks, came = mark_all(machine), set()
        while not came >= set(machine.listeners(bus=False)):
            came.add(int(pretending.stdout.readline()))
        machine.start()
        with contextlib.ExitStack() as exits:
            back = [exits.enter_context(stack.client([channel], listening=False)) for stack in machine.stacks]
            machine.stacks[0].send(channel, "heard")
            wait_for_all(back, "heard", SOON)
            machine.trigger_cron()
            # Whom they can't trust they leave alone.
            assert complaints(marks) == []
            pretending.kill()
            assert machine.settle() in [bus_pid(stack) for stack in machine.stacks]


@one_kind
@pytest.mark.parametrize("difference", ["another version", "IMDISPATCHER_SHARE=0"])
def test_who_is_different_has_a_connection_of_its_own(machine, clients, channel, tmp_path, difference):
    host, (first, *_) = machine.settle(), machine.stacks
    if difference == "another version":
        tmp_path.chmod(0o755)
        shutil.copytree(ADDON / "bus_alt_connection", tmp_path / "bus_alt_connection")
        with open(tmp_path / "bus_alt_connection" / "payload.py", "a") as code:
            code.write("# as it was before\n")
        other = first.another(addon=tmp_path)
    else:
        other = first.another(IMDISPATCHER_SHARE="0")
    with other as other, other.client([channel]) as client:
        alone = Machine(other)
        wait_until(lambda: alone.ways() == {other.odoo.pid: other.odoo.pid}, SOON, "the other to listen by itself")
        assert machine.connected() == {host, other.odoo.pid}
        # Nor is it a host to any of them.
        assert (sharing_socket(other.odoo.pid) or ("", 0))[1] == 0
        first.send(channel, "for all")
        wait_for_all([client, *clients.values()], "for all")
    assert machine.settle() == host
