"""A network path that can be made to fail: a TCP proxy in front of a server."""

import contextlib
import selectors
import socket
import struct
import threading
from concurrent.futures import Future

from . import ports

_CHUNK = 65536


class Proxy:
    """Forwards connections to ``target``, until told otherwise; a context manager.

    :param target: ``(host, port)`` of the server; may be changed, which counts for connections that come after
    :param listening: a socket that listens, for a proxy in another network namespace; default: a port of 127.0.0.1.
        Such a proxy can not :meth:`refuse`

    Each of its methods has done what it says when it returns. They change how the path is from now on, except for
    :meth:`cut`, which is over at once:

    - :meth:`forward`: all passes, as at the beginning
    - :meth:`swallow`: nothing passes and nobody is told
    - :meth:`refuse`: nobody listens any more, connections that are there go on
    """

    host = "127.0.0.1"

    def __init__(self, target, listening=None):
        self.target = target
        #: how many connections were accepted so far
        self.accepted = 0
        self._swallowing = False
        self._given = listening
        if listening is None:
            self.port = ports.take_port()
        else:
            self.host, self.port = listening.getsockname()
        self._listening = None
        self._pairs = []
        self._orders = []
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        self._thread = None

    def __enter__(self):
        self._selector.register(self._woken, selectors.EVENT_READ, self._obey)
        self._listen()
        self._thread = threading.Thread(target=self._run, name="proxy %s" % self.port, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_exception):
        self._do(self._end)
        self._thread.join()
        self._selector.close()
        self._waker.close()
        self._woken.close()
        if self._given is None:
            ports.release_port(self.port)

    def forward(self):
        """Let connections pass. Those that were swallowed stay dead, as behind a firewall that has forgotten them."""
        self._do(self._set, False)

    def swallow(self):
        """Forward nothing, in no connection, and tell neither end.

        Who sends has it acknowledged, since the kernel takes it. Connections are still accepted, and nothing comes.
        """
        self._do(self._set, True)

    def refuse(self):
        """Close the port, so that who connects is refused, until :meth:`forward` or :meth:`swallow`."""
        self._do(self._close_port)

    def cut(self):
        """Reset all connections that there are."""
        self._do(self._reset)

    # The thread: it alone touches sockets and pairs ---------------------------

    def _do(self, action, *arguments):
        order = Future()
        self._orders.append((order, action, arguments))
        self._waker.send(b"\0")
        order.result(10)

    def _run(self):
        while self._selector.get_map():
            for key, _events in self._selector.select():
                # What came before it in this round may have closed it.
                if key.fileobj.fileno() >= 0:
                    key.data()

    def _obey(self):
        self._woken.recv(_CHUNK)
        while self._orders:
            order, action, arguments = self._orders.pop(0)
            try:
                order.set_result(action(*arguments))
            except Exception as error:
                order.set_exception(error)

    def _set(self, swallowing):
        self._listen()
        self._swallowing = swallowing
        if swallowing:
            for pair in self._pairs:
                pair.forget()

    def _listen(self):
        if self._listening is None:
            self._listening = self._given or socket.create_server((self.host, self.port), backlog=128)
            self._listening.setblocking(False)
            self._selector.register(self._listening, selectors.EVENT_READ, self._accept)

    def _close_port(self):
        if self._listening is not None:
            self._selector.unregister(self._listening)
            self._listening.close()
            self._listening = None

    def _reset(self):
        while self._pairs:
            self._pairs.pop().reset()

    def _end(self):
        self._close_port()
        self._reset()
        self._selector.unregister(self._woken)

    def _accept(self):
        try:
            client, _address = self._listening.accept()
        except OSError:
            return  # gone again
        self.accepted += 1
        if self._swallowing:
            self._pairs.append(_Pair(self._selector, client))
            return
        try:
            server = socket.create_connection(self.target, timeout=5)
        except OSError:
            _reset(client)
            return
        pair = _Pair(self._selector, client, server)
        pair.gone = lambda: self._pairs.remove(pair)
        self._pairs.append(pair)


class _Pair:
    """A connection, with its continuation on the other side if there is one."""

    def __init__(self, selector, *ends):
        self._selector = selector
        self._ends = ends
        self._open = 2
        self.gone = None
        for end in ends:
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(ends) == 2:
            self._watch(*ends)
            self._watch(*reversed(ends))

    def forget(self):
        """Look at neither end any more, and leave both open."""
        for end in self._ends:
            with contextlib.suppress(KeyError):
                self._selector.unregister(end)

    def reset(self):
        self.forget()
        for end in self._ends:
            _reset(end)

    def _watch(self, source, sink):
        self._selector.register(source, selectors.EVENT_READ, lambda: self._pass_on(source, sink))

    def _pass_on(self, source, sink):
        try:
            data = source.recv(_CHUNK)
            if not data:
                self._selector.unregister(source)
                sink.shutdown(socket.SHUT_WR)
                self._open -= 1
            # A sink that takes nothing for so long is held up by a failure of its own, and its test fails in any case.
            sink.settimeout(10)
            sink.sendall(data)
            sink.setblocking(False)
        except BlockingIOError:
            return
        except OSError:
            self._open = 0
        if not self._open:
            self.reset()
            self.gone()


def _reset(sock):
    # No lingering: the other end gets a reset, not a polite end.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@contextlib.contextmanager
def black_hole():
    """A ``(host, port)`` that answers nothing at all, not even to who wants to connect."""
    # Linux drops the packets of who connects while the queue of those to be accepted is full. It takes one more than
    # it is told to.
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, contextlib.ExitStack() as waiting:
        address = server.getsockname()
        for _ in range(2):
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(address)
        yield address
