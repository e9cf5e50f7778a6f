"""A network path that can be made to fail: a TCP proxy in front of a server."""

import asyncio
import contextlib
import socket
import struct
import threading

from . import ports

_CHUNK = 65536
# Closed like this, a socket sends a reset, not a polite end.
_NO_LINGERING = struct.pack("ii", 1, 0)


class Proxy:
    """Forwards connections to ``target``, until told otherwise; a context manager.

    :param target: ``(host, port)`` of the server; may be changed, which counts for connections that come after

    Each of its methods has done what it says when it returns. They change how the path is from now on, except for
    :meth:`cut`, which is over at once:

    - :meth:`forward`: all passes, as at the beginning
    - :meth:`swallow`: nothing passes and nobody is told
    - :meth:`refuse`: nobody listens any more, connections that are there go on
    """

    host = "127.0.0.1"

    def __init__(self, target):
        self.target = target
        #: how many connections were accepted so far
        self.accepted = 0
        self.port = ports.take_port()
        self._swallowing = False
        self._server = None
        self._tasks = set()  # one for each connection that passes
        self._writers = set()  # of both ends of each connection
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy %s" % self.port, daemon=True)

    def __enter__(self):
        self._thread.start()
        self.forward()
        return self

    def __exit__(self, *_exception):
        self.refuse()
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        ports.release_port(self.port)

    def forward(self):
        """Let connections pass. Those that were swallowed stay dead, as behind a firewall that has forgotten them."""
        self._do(self._forward())

    def swallow(self):
        """Forward nothing, in no connection, and tell neither end.

        Who sends has it acknowledged, since the kernel takes it. Connections are still accepted, and nothing comes.
        """
        self._do(self._swallow())

    def refuse(self):
        """Close the port, so that who connects is refused, until :meth:`forward` or :meth:`swallow`."""
        self._do(self._refuse())

    def cut(self):
        """Reset all connections that there are."""
        self._do(self._cut())

    def _do(self, action):
        asyncio.run_coroutine_threadsafe(action, self._loop).result(10)

    # In the thread of the loop ------------------------------------------------

    async def _forward(self):
        self._swallowing = False
        await self._listen()

    async def _swallow(self):
        self._swallowing = True
        await self._listen()
        await self._forget()

    async def _refuse(self):
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _cut(self):
        await self._forget()
        for writer in list(self._writers):
            self._reset(writer)
        # The loop closes the sockets in its next round.
        await asyncio.sleep(0)

    async def _forget(self):
        """Look at no connection any more, and leave both ends open."""
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _listen(self):
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, self.host, self.port, backlog=128)

    def _accept(self, reader, writer):
        self.accepted += 1
        self._writers.add(writer)
        if not self._swallowing:
            task = self._loop.create_task(self._connect(reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self, client_reader, client):
        with contextlib.suppress(OSError):
            server_reader, server = await asyncio.open_connection(*self.target)
            self._writers.add(server)
            with contextlib.suppress(OSError):
                await asyncio.gather(_pump(client_reader, server), _pump(server_reader, client))
            self._reset(server)
        self._reset(client)

    def _reset(self, writer):
        self._writers.discard(writer)
        with contextlib.suppress(OSError):
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGERING)
        writer.transport.abort()


async def _pump(reader, writer):
    while True:
        data = await reader.read(_CHUNK)
        if not data:
            break
        writer.write(data)
        await writer.drain()
    writer.write_eof()


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
