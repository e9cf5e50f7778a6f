"""Are the simulated sockets like Linux's, and does a seed determine a run?"""

import contextlib
import itertools
import pathlib
import selectors
import socket
import subprocess
import sys
import types
import uuid

from . import kernel, machine, plan
from .faults import KINDS
from .kernel import Kernel, Task
from .machine import Process

_ROOT = pathlib.Path(__file__).resolve().parents[2]


#: what the steps below use of the real machine, and of the simulated one
_LINUX = types.SimpleNamespace(
    socket=socket.socket, socketpair=socket.socketpair, selector=selectors.DefaultSelector, name="\0%s" % uuid.uuid4()
)
_SIMULATED = types.SimpleNamespace(
    socket=machine.Socket, socketpair=machine.socketpair, selector=machine.Selector, name="\0name"
)


def _outcomes(system):
    """Do all steps, and return what comes of each: its result, or the name of an exception."""
    found = []
    with contextlib.ExitStack() as opened:
        for what, step in _Steps(system, opened).all():
            try:
                found.append((what, step()))
            except (OSError, KeyError) as error:
                found.append((what, type(error).__name__))
    return found


class _Steps:
    """Calls of sockets: each method yields names and functions, each of which is called before the next one."""

    def __init__(self, system, opened):
        self._system, self._opened = system, opened

    def new(self, timeout=None):
        created = self._opened.enter_context(self._system.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        created.settimeout(timeout)
        return created

    def connect(self, timeout=None):
        return self.new(timeout).connect(self._system.name)

    def bind(self):
        return self.new().bind(self._system.name)

    def pair(self, server):
        client = self.new()
        client.connect(self._system.name)
        return client, self._opened.enter_context(server.accept()[0])

    def all(self):
        server = self.new()
        server.bind(self._system.name)
        yield "connect before listen", self.connect
        yield "bind a name twice", self.bind
        server.listen(1)
        for steps in (self.closing, self.shutting_down, self.waiting, self.selecting, self.refusing):
            yield from steps(server)
        yield from self.streaming()

    def closing(self, server):
        client, other = self.pair(server)
        client.send(b"unread")
        other.close()
        yield "receive after the peer closed without reading", lambda: client.recv(10)
        yield "receive again", lambda: client.recv(10)
        yield "send to a closed peer", lambda: client.send(b"x")
        client, other = self.pair(server)
        other.send(b"last")
        other.close()
        yield "receive what was sent before close", lambda: client.recv(10)
        yield "receive the end", lambda: client.recv(10)
        client.close()
        yield "send on a closed socket", lambda: client.send(b"x")

    def shutting_down(self, server):
        client, other = self.pair(server)
        other.send(b"last")
        other.shutdown(socket.SHUT_RDWR)
        yield "receive what was sent before shutdown", lambda: client.recv(10)
        yield "receive after shutdown of the peer", lambda: client.recv(10)
        yield "receive after one's own shutdown", lambda: other.recv(10)
        yield "send after shutdown of the peer", lambda: client.send(b"x")

    def waiting(self, server):
        client, other = self.pair(server)
        client.setblocking(False)
        yield "nothing is there", lambda: client.recv(10)
        client.settimeout(0.05)
        yield "nothing comes in time", lambda: client.recv(10)
        client.setblocking(False)
        yield "a message longer than the buffer", lambda: client.send(b"x" * 2000000)
        other.send(b"a message")
        yield "a message longer than asked for", lambda: client.recv(3)
        yield "its rest is gone", lambda: client.recv(10)
        for _message in range(10):
            client.send(b"x" * 1000)
        yield (
            "the buffer is full after more than ten messages",
            lambda: [client.send(b"x" * 1000) for _ in range(100000)],
        )

    def selecting(self, server):
        client, other = self.pair(server)
        selector = self._opened.enter_context(self._system.selector())
        selector.register(client, selectors.EVENT_READ, "data")
        yield "nothing to read", lambda: selector.select(0)
        other.send(b"x")
        yield "something to read", lambda: [key.data for key, _events in selector.select(1)]
        yield "register twice", lambda: selector.register(client, selectors.EVENT_READ)
        yield "register itself", lambda: selector.register(selector.fileno(), selectors.EVENT_READ)
        client.close()
        yield "what is closed is forgotten", lambda: selector.select(0)

    def refusing(self, server):
        first = self.new(0.05)
        yield "connect while nobody accepts", lambda: first.connect(self._system.name)
        yield "connect while another one waits", lambda: self.connect(0.05)
        yield "connect while two wait", lambda: self.connect(0.05)
        yield "send before anybody accepts", lambda: first.send(b"early")
        server.shutdown(socket.SHUT_RDWR)
        yield "connect to what is shut down", self.connect
        yield "bind the name of what is shut down", self.bind
        server.close()
        yield "receive from who never accepted", lambda: first.recv(10)
        yield "connect to what is closed", self.connect
        yield "bind the name anew", self.bind

    def streaming(self):
        reader, writer = map(self._opened.enter_context, self._system.socketpair())
        reader.setblocking(False)
        writer.send(b"ab")
        writer.send(b"cd")
        yield "a stream: several messages", lambda: reader.recv(10)
        yield "a stream: nothing is there", lambda: reader.recv(10)
        writer.close()
        yield "a stream: the end", lambda: reader.recv(10)


def test_simulated_sockets_are_like_those_of_linux():
    simulated = []
    Kernel(1)
    Task(Process("p"), lambda: simulated.extend(_outcomes(_SIMULATED)), (), "t")
    kernel.K.run(kernel.K.now + 100)
    assert not kernel.K.problems
    assert simulated == _outcomes(_LINUX)
    assert len(simulated) > 30


def test_each_kind_of_fault_has_its_turn_alone_with_each_other_one_and_with_all():
    seen = {tuple(plan.kinds_of(seed)) for seed in range(2700)}
    faults = {name for name, kind in KINDS.items() if not kind.is_setting}
    assert {(name,) for name in KINDS} < seen
    assert {pair for pair in itertools.combinations(sorted(KINDS), 2) if faults.intersection(pair)} < seen
    assert any(faults < set(kinds) for kinds in seen)


def _trace(seed):
    command = [sys.executable, "-m", "tests.simulation", "--seed", str(seed)]
    return subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, check=False).stdout


def test_a_seed_determines_a_run():
    first = _trace(2)
    assert len(first) > 10000
    assert _trace(2) == first
    assert _trace(5) != first
