"""Are the simulated sockets like Linux's, and does a seed determine a run?"""

import itertools
import pathlib
import selectors
import socket
import subprocess
import sys

from . import kernel, machine, plan
from .faults import KINDS
from .kernel import Kernel, Task
from .machine import Process

_ROOT = pathlib.Path(__file__).resolve().parents[2]


class _Linux:
    """What the steps below use of the real machine."""

    socket, socketpair, selector = socket.socket, staticmethod(socket.socketpair), selectors.DefaultSelector
    name = "\0bus_alt_connection/simulation/%s" % id(socket)


class _Simulated:
    """The same of the simulated one."""

    socket, socketpair, selector = machine.Socket, staticmethod(machine.socketpair), machine.Selector
    name = "\0same"


def _outcome(step):
    try:
        result = step()
    except OSError as error:
        return type(error).__name__
    return result if isinstance(result, (bytes, int, list)) else "done"


class _Steps:
    """Calls of sockets and what comes of each: bytes, a number, or the name of an exception."""

    def __init__(self, system):
        self._system, self.outcomes, self._opened = system, [], []

    def do(self, what, step):
        self.outcomes.append((what, _outcome(step)))

    def new(self, timeout=None):
        one = self._system.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        one.settimeout(timeout)
        self._opened.append(one)
        return one

    def listening(self):
        one = self.new()
        one.bind(self._system.name)
        return one

    def pair(self, server):
        client = self.new()
        client.connect(self._system.name)
        self._opened.append(server.accept()[0])
        return client, self._opened[-1]

    def run(self):
        server = self.listening()
        self.do("connect before listen", lambda: self.new().connect(self._system.name))
        self.do("bind a name twice", self.listening)
        server.listen(1)
        self.closing(server)
        self.shutting_down(server)
        self.waiting(server)
        self.selecting(server)
        self.refusing(server)
        self.streaming()
        for one in self._opened:
            one.close()
        return self.outcomes

    def closing(self, server):
        client, other = self.pair(server)
        client.send(b"unread")
        other.close()
        self.do("receive after the peer closed without reading", lambda: client.recv(10))
        self.do("receive again", lambda: client.recv(10))
        self.do("send to a closed peer", lambda: client.send(b"x"))
        client, other = self.pair(server)
        other.send(b"last")
        other.close()
        self.do("receive what was sent before close", lambda: client.recv(10))
        self.do("receive the end", lambda: client.recv(10))
        client.close()
        self.do("send on a closed socket", lambda: client.send(b"x"))

    def shutting_down(self, server):
        client, other = self.pair(server)
        other.send(b"last")
        other.shutdown(socket.SHUT_RDWR)
        self.do("receive what was sent before shutdown", lambda: client.recv(10))
        self.do("receive after shutdown of the peer", lambda: client.recv(10))
        self.do("receive after one's own shutdown", lambda: other.recv(10))
        self.do("send after shutdown of the peer", lambda: client.send(b"x"))
        self.do("shut down what is not connected", lambda: self.new().shutdown(socket.SHUT_RDWR))

    def waiting(self, server):
        client, other = self.pair(server)
        client.setblocking(False)
        self.do("nothing is there", lambda: client.recv(10))
        client.settimeout(0.05)
        self.do("nothing comes in time", lambda: client.recv(10))
        client.setblocking(False)
        self.do("a message longer than the buffer", lambda: client.send(b"x" * 2000000))
        other.send(b"a message")
        self.do("a message longer than asked for", lambda: client.recv(3))
        self.do("its rest is gone", lambda: client.recv(10))
        number = 0
        while number < 100000 and _outcome(lambda: client.send(b"x" * 1000)) == 1000:
            number += 1
        self.do("the buffer is full after more than ten messages", lambda: [number > 10])

    def selecting(self, server):
        client, other = self.pair(server)
        with self._system.selector() as selector:
            key = selector.register(client, selectors.EVENT_READ, "data")
            self.do("nothing to read", lambda: len(selector.select(0)))
            other.send(b"x")
            self.do("something to read", lambda: [found[0].data for found in selector.select(1)])
            self.do("register twice", lambda: _key_error(lambda: selector.register(client, selectors.EVENT_READ)))
            client.close()
            self.do("what is closed is forgotten", lambda: len(selector.select(0)))
            del key

    def refusing(self, server):
        waiting = [self.new(0.05) for _socket in range(3)]
        for number, one in enumerate(waiting):
            self.do("connect number %d, nobody accepts" % number, lambda one=one: one.connect(self._system.name))
        self.do("send before anybody accepts", lambda: waiting[0].send(b"early"))
        server.shutdown(socket.SHUT_RDWR)
        self.do("connect to what is shut down", lambda: self.new(0.05).connect(self._system.name))
        self.do("bind the name of what is shut down", self.listening)
        server.close()
        self.do("receive from who never accepted", lambda: waiting[0].recv(10))
        self.do("connect to what is closed", lambda: self.new(0.05).connect(self._system.name))
        self.do("bind the name anew", self.listening)

    def streaming(self):
        reader, writer = self._system.socketpair()
        self._opened += [reader, writer]
        reader.setblocking(False)
        writer.send(b"ab")
        writer.send(b"cd")
        self.do("a stream: parts of a message", lambda: reader.recv(1))
        self.do("a stream: several messages", lambda: reader.recv(10))
        self.do("a stream: nothing is there", lambda: reader.recv(10))
        writer.close()
        self.do("a stream: the end", lambda: reader.recv(10))


def _key_error(step):
    try:
        step()
    except KeyError:
        return [True]
    return [False]


def test_simulated_sockets_are_like_those_of_linux():
    simulated = []
    Kernel(1)
    Task(Process("p"), lambda: simulated.extend(_Steps(_Simulated).run()), (), "t")
    kernel.K.run(kernel.K.now + 100)
    assert not kernel.K.problems
    assert simulated == _Steps(_Linux).run()


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
