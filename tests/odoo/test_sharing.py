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
from bus_alt_connection.sharing import AVOID_SILENT
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
        first_leader = Machine(stack).settle()
        with stack.another() as other:
            machine = Machine(stack, other)
            with other.client(listening=False):
                machine.settle()
                machine.joined_at_once = set(Machine(other).ways(first=True).values()) == {first_leader}
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
    leader = machine.settle()
    listeners = machine.listeners()
    (row,) = machine.stacks[0].direct_connections()
    for pid, stack in listeners.items():
        said = [one.message for one in records(stack, pid=pid) if one.message.startswith("listening")]
        way = "at" if pid == leader else "through process %d at" % leader
        place = r"%s:%s \(database postgres, backend pid %d\)" % (stack.proxy.host, stack.proxy.port, row.pid)
        assert re.match(r"listening(?: again)? on [^(]+ %s %s, confirmed in [\d.]+ ms" % (way, place), said[-1])
    # Health is served where there is HTTP.
    for stack in machine.stacks:
        says = stack.odoo.health()
        mode = "listening" if listeners[leader] is stack else "shared"
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


# Something happens to the leader ------------------------------------------------


def others(machine, clients, leader):
    """Return the clients of the Odoos that go on without ``leader``."""
    return [client for stack, client in clients.items() if machine.listeners()[leader] is not stack]


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


def stream(stack, channel, seconds):
    """Send numbers for so many seconds; return what was sent."""
    sent, end = [], time.monotonic() + seconds
    with contextlib.closing(stack.sender()) as sender:
        while time.monotonic() < end:
            sent.append(sender.send(channel, len(sent)))
            time.sleep(0.1)
    return sent


def longest_delay(client, sent):
    """Return the seconds from sending to arrival of that which took longest."""
    arrived = {received.id: received.at for received in client.received}
    return max(arrived[one.id] - one.at for one in sent)


@pytest.mark.matrix
def test_followers_leave_a_leader_that_stands_still_and_come_back(machine, clients, channel):
    leader = machine.settle()
    followers, rest = others(machine, clients, leader), set(machine.listeners()) - {leader}
    marks = mark_all(machine)
    with contextlib.ExitStack() as end:
        os.kill(leader, signal.SIGSTOP)
        end.callback(os.kill, leader, signal.SIGCONT)
        sent = stream(machine.stacks[0], channel, 12)
        wait_for_all(followers, len(sent) - 1)
        assert max(longest_delay(client, sent) for client in followers) < 6

        def together():
            ways = {way for pid, way in machine.ways().items() if pid != leader}
            return len(ways) == 1 and machine.connected() - {leader} == ways

        wait_until(together, SOON, "the others to have one connection", 0.1)
    machine.settle(deadline=INTERVAL + AVOID_SILENT)
    machine.stacks[0].send(channel, "shared")
    wait_for_all(clients.values(), "shared")
    assert [client.messages for client in clients.values()] == [[*range(len(sent)), "shared"]] * len(clients)
    # A check may be the first to find out.
    left = r"lost the listener of .*: process %d, through which it listened, (has been silent|did not deliver)" % leader
    lost = [one for one in complaints(marks) if re.match(left, one.message)]
    assert {one.pid for one in lost} == rest
    assert complaints(marks) == lost


def test_a_leader_that_ends_costs_its_followers_nothing(machine, clients, channel):
    leader = machine.settle(lasting=LONGEST_DELAY)
    ending, (follower,) = machine.listeners()[leader], others(machine, clients, leader)
    marks = mark_all(machine)
    with flowing(ending, follower, channel):
        assert ending.odoo.stop() == 0
        assert machine.settle() != leader
    assert complaints(marks) == []
    assert "Traceback" not in ending.odoo.log_since(marks[ending])


def test_after_a_restart_of_postgresql_one_process_connects(machine, clients, channel):
    leader, first = machine.settle(), machine.stacks[0]
    mark, attempts = first.server.log_mark(), first.proxy.accepted
    first.server.stop()
    # Followers that wait rely on their leader through the half minute that many take; two processes show that at once.
    wanted = 2 if len(machine.listeners()) == 2 else 9
    wait_until(lambda: first.proxy.accepted > attempts + wanted, 60, "some attempts to connect")
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


# Odoo itself does not survive it at its look at its own memory, once a minute: it has to have been started just before.
@one_kind
def test_a_leader_without_descriptors_is_gone_without(machine, clients, channel):
    for stack in machine.stacks:
        stack.odoo.stop()
    leading, joining = machine.stacks
    # For as long as it relies on its leader.
    usual = joining.odoo.variables
    joining.odoo.variables = {**usual, "IMDISPATCHER_POLL_INTERVAL": "1"}
    leading.odoo.start()
    leader = leading.odoo.pid
    wait_until(lambda: machine.connected() == {leader}, SOON, "the leader to listen")
    with out_of_descriptors(leader):
        # Who comes gets no answer.
        joining.odoo.start()
        wait_until(lambda: machine.ways().get(joining.odoo.pid) == joining.odoo.pid, SOON, "the other to listen")
    assert machine.settle() == leader
    with joining.client([channel]) as follower:
        with out_of_descriptors(leader):
            # It can't connect again: who relies on it looks into bus_bus meanwhile.
            joining.server.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s",
                ("odoo-listener-%d" % leader,),
            )
            joining.send(channel, "alone")
            follower.wait_for("alone", SOON)
        machine.settle()
        assert follower.messages == ["alone"]
    joining.odoo.stop()
    joining.odoo.variables = usual


# Something happens to followers --------------------------------------------------


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
def test_a_follower_that_does_not_read_holds_up_nobody_and_catches_up(machine, clients, channel):
    pid = machine.settle()
    leader = machine.listeners()[pid]
    (follower,) = (stack for stack in machine.stacks if stack is not leader)
    usual, sent = percentile(leader, clients[leader], channel, "usual")
    mark, (name, followers) = follower.odoo.log_mark(), sharing_socket(pid)
    with follower.client(["missed"], listening=False) as missing:
        os.kill(follower.odoo.pid, signal.SIGSTOP)
        try:
            late, more = percentile(leader, clients[leader], channel, "late")
            wait_until(lambda: sharing_socket(pid) == (name, followers - 1), AT_ONCE, "it to let go of its follower")
            # Of this one nothing is on its way to it.
            leader.send("missed", "alone")
        finally:
            os.kill(follower.odoo.pid, signal.SIGCONT)
        assert late < usual + 0.5
        missing.wait_for("alone", SOON)
        assert missing.messages == ["alone"]
        clients[follower].wait_for(more[-1], SOON)
    assert machine.settle() == pid
    assert [client.messages for client in clients.values()] == [sent + more] * 2
    assert troubles(follower, mark) == []


@both_kinds
def test_fifty_comings_and_goings_leave_no_descriptor_open(machine, clients, channel):
    leader = machine.settle()
    name, followers = sharing_socket(leader)
    before = psutil.Process(leader).num_fds()
    for turn in range(50):
        with contextlib.closing(connect(name)) as sock:
            if turn % 3:
                assert sock.recv(1 << 16)
                sock.send(json.dumps([channel]).encode())
            if turn % 3 == 2:
                end = time.monotonic() + AT_ONCE
                while channel.encode() not in sock.recv(1 << 16):
                    assert time.monotonic() < end, "it does not listen"
    wait_until(lambda: psutil.Process(leader).num_fds() <= before, AT_ONCE, "the descriptors to be closed", 0.1)
    assert sharing_socket(leader) == (name, followers)
    assert machine.settle() == leader


# Somebody else is at the socket -----------------------------------------------

#: a leader hangs up at these; the last one is nested deeper than a reader may go
GARBAGE = [b"", b"\xff\xfe", b"{", b"null", b"{}", b'"imbus"', b"[" * 100000]
#: no names of channels: a leader serves the others
BAD_NAMES = [1, [], "", "\0", "\ud800", "x" * 64]


@both_kinds
def test_garbage_on_the_socket_disturbs_nobody(machine, clients, channel):
    leader = machine.settle()
    marks = mark_all(machine)
    name, followers = sharing_socket(leader)
    for number, garbage in enumerate(GARBAGE):
        with contextlib.closing(connect(name)) as sock:
            sock.send(garbage)
            end = time.monotonic() + AT_ONCE
            while sock.recv(1 << 16):
                # Heartbeats would go on and on.
                assert time.monotonic() < end, "it did not hang up"
        machine.stacks[0].send(channel, number)
        wait_for_all(clients.values(), number)
    with contextlib.closing(connect(name)) as sock:
        sock.send(json.dumps([*BAD_NAMES, channel]).encode())
        in_force, end = [], time.monotonic() + AT_ONCE
        while not in_force and time.monotonic() < end:
            # Those of heartbeats have no state.
            state, _notifications = json.loads(sock.recv(1 << 16))
            in_force = state[1] if state else []
        assert in_force == [channel]
    assert machine.settle() == leader
    wait_until(lambda: sharing_socket(leader) == (name, followers), AT_ONCE, "it to be as before", 0.1)
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
    leader = machine.settle()
    name, followers = sharing_socket(leader)
    with program(LISTEN_IN, "nobody", name[1:]) as listening_in:
        while listening_in.poll() is None:
            machine.stacks[0].send(channel, "secret")
            time.sleep(0.05)
        assert listening_in.stdout.read() == "0\n"
    assert sharing_socket(leader) == (name, followers)


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
def test_nobody_relies_on_a_leader_that_is_none_of_ours(machine, clients, channel, manners, user):
    # The best of all names, which those who came after another test may not have.
    name = re.sub("(?<=/evented)-2$", "", sharing_socket(machine.settle())[0])
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
    leader, (first, *_) = machine.settle(), machine.stacks
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
        assert machine.connected() == {leader, other.odoo.pid}
        # Nor is it a leader to any of them.
        assert (sharing_socket(other.odoo.pid) or ("", 0))[1] == 0
        first.send(channel, "for all")
        wait_for_all([client, *clients.values()], "for all")
    assert machine.settle() == leader


def test_it_takes_no_check_to_find_out_that_a_leader_stands_still(channel):
    interval = 20
    environment = {"IMDISPATCHER_CHECK_INTERVAL": str(interval), "IMDISPATCHER_POLL_INTERVAL": "0"}
    with contextlib.ExitStack() as exits:
        stack = exits.enter_context(Stack("19.0", 2, environment=environment, jobs=False))
        machine = Machine(stack, exits.enter_context(stack.another()))
        clients = {stack: exits.enter_context(stack.client([channel])) for stack in machine.stacks}
        leader = machine.settle(deadline=2 * interval)
        (follower,), rest = others(machine, clients, leader), set(machine.listeners()) - {leader}
        marks = mark_all(machine)
        os.kill(leader, signal.SIGSTOP)
        exits.callback(os.kill, leader, signal.SIGCONT)
        sent = stream(stack, channel, 8)
        follower.wait_for(len(sent) - 1, AT_ONCE)
        assert longest_delay(follower, sent) < 6
        silent = r"lost the listener of .*: process %d, through which it listened, has been silent for 4.5 s " % leader
        lost = complaints(marks)
        assert [one for one in lost if not re.match(silent, one.message)] == []
        assert {one.pid for one in lost} == rest
