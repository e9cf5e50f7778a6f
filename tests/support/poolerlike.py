"""A small pooler of our own, for what PgBouncer does not do: it can hand on the server's pid, as pgagroal does."""

import contextlib
import selectors
import socket
import struct
import threading

_CHUNK = 65536
# In place of a protocol's version, a client that connects may begin with one of these.
_CANCEL, _TLS, _GSS = 80877102, 80877103, 80877104
_MADE_UP_KEY = struct.pack("!ii", 99, 0)


class _Gone(Exception):
    """The other end has closed the connection."""


class PoolerLike:
    """Pools connections to ``server`` for each transaction; a context manager with ``host`` and ``port``.

    Who connects logs in at the server itself, on a new connection that then is the pool's, up to ``size`` of them for
    each user and database. The one that was given back last is handed out first. Nothing is reset in between: a LISTEN
    stays with a server connection, and what comes by it goes to whichever client has that one next.

    :param server: what has ``host`` and ``port``
    :param size: of each pool
    :param hands_on_pid: whether clients are told the pid and the key of the first server connection that they get, as
        by pgagroal; else they are made up, as by PgBouncer
    :param pins: whether a client that says LISTEN keeps its server connection from then on, as with Odyssey's
        ``pool_pin_on_listen``; there ought to be more than one in the pool, then
    :param first_only: whether of several statements that are sent as one all but the first are lost if that is LISTEN,
        as with PgDog's ``pub_sub_channel_size``
    """

    host = "127.0.0.1"

    def __init__(self, server, size=2, hands_on_pid=True, pins=False, first_only=False):
        self.server = server
        self.size = size
        self.hands_on_pid = hands_on_pid
        self.pins = pins
        self.first_only = first_only
        self.port = None
        self._changed = threading.Condition()
        self._closed = False
        self._pools = {}  # (user, database) -> _Pool
        self._open = set()  # all sockets
        self._threads = []

    def __enter__(self):
        self._listening = socket.create_server((self.host, 0), backlog=128)
        self.port = self._listening.getsockname()[1]
        self._start(self._accept)
        return self

    def __exit__(self, *_exception):
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            # A thread that waits for one of them wakes up.
            for sock in [self._listening, *self._open]:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in [self._listening, *self._open]:
            sock.close()

    def _start(self, target, *arguments):
        thread = threading.Thread(target=target, args=arguments, name="pooler %s" % self.port, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _adopt(self, sock):
        """Have ``sock`` end with us."""
        with self._changed:
            if self._closed:
                sock.close()
                raise _Gone
            self._open.add(sock)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def _drop(self, sock):
        with self._changed:
            self._open.discard(sock)
        sock.close()

    def _accept(self):
        while True:
            try:
                client = self._adopt(self._listening.accept()[0])
            except (OSError, _Gone):
                return
            self._start(self._serve, client)

    def _serve(self, client):
        # Either end may go at any time, which is the end of it.
        with contextlib.suppress(OSError, _Gone):
            pool = self._log_in(client)
            if pool:
                self._hand_on(client, pool)
        self._drop(client)

    def _log_in(self, client):
        """Let the server decide on ``client``; return its pool, or None if it wanted no more than to cancel."""
        while True:
            (length,) = struct.unpack("!i", _exactly(client, 4))
            startup = _exactly(client, length - 4)
            (code,) = struct.unpack("!i", startup[:4])
            if code not in (_TLS, _GSS):
                break
            client.sendall(b"N")
        server = self._adopt(socket.create_connection((self.server.host, self.server.port), timeout=10))
        try:
            server.sendall(struct.pack("!i", length) + startup)
            if code == _CANCEL:
                self._drop(server)
                return None
            server.settimeout(None)
            held, key = b"", None
            while True:
                kind, body = _message(server)
                if kind == b"K":
                    key = body
                elif kind == b"Z":
                    break
                elif kind == b"R" and struct.unpack("!i", body[:4])[0] not in (0, 12):  # done, or SCRAM's last word
                    client.sendall(_framed(kind, body))
                    server.sendall(_framed(*_message(client)))
                elif kind == b"E":
                    client.sendall(_framed(kind, body))
                    raise _Gone
                else:
                    held += _framed(kind, body)
            pool = self._put_into_pool(startup, server, key)
        except BaseException:
            self._drop(server)
            raise
        told = pool.next_key() if self.hands_on_pid and pool.keys else _MADE_UP_KEY
        client.sendall(held + _framed(b"K", told) + _framed(b"Z", b"I"))
        return pool

    def _put_into_pool(self, startup, server, key):
        words = startup[4:].split(b"\0")
        settings = dict(zip(words[::2], words[1::2]))
        user = settings[b"user"]
        name = user, settings.get(b"database", user)
        with self._changed:
            pool = self._pools.setdefault(name, _Pool())
            if len(pool.keys) < self.size:
                pool.keys[server] = key
                pool.idle.append(server)
                self._changed.notify_all()
                return pool
        self._drop(server)
        return pool

    def _hand_on(self, client, pool):
        """Give ``client`` a server connection for each transaction."""
        while True:
            message = _message(client)
            if message[0] == b"X":
                return
            server = self._take(pool)
            try:
                end = self._transact(client, server, message)
            except BaseException:
                # Left within a transaction it is of no use to others.
                self._discard(pool, server)
                raise
            # In this order: who knows of the end may count on who gets the connection next.
            self._give_back(pool, server)
            client.sendall(end)

    def _take(self, pool):
        with self._changed:
            while pool.keys and not self._closed:
                if not pool.idle:
                    self._changed.wait()
                    continue
                server = pool.idle.pop()
                if not _has_ended(server):
                    return server
                self._discard(pool, server)
        raise _Gone  # and the client comes back, with a new one

    def _give_back(self, pool, server):
        with self._changed:
            pool.idle.append(server)
            self._changed.notify_all()

    def _discard(self, pool, server):
        with self._changed:
            del pool.keys[server]
            self._changed.notify_all()
        self._drop(server)

    def _transact(self, client, server, message):
        """Pass all on until the transaction is over; return the message that says so. Once pinned it never is."""
        pinned = False
        # An end of extended statements ("S") is answered by one more "Z", just as each simple query is.
        awaited = 0
        with selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ)
            selector.register(server, selectors.EVENT_READ)
            while True:
                if message:
                    kind, body = message
                    if kind == b"X":
                        raise _Gone
                    pinned = pinned or self.pins and b"LISTEN" in body.upper()
                    if self.first_only and body.upper().startswith(b"LISTEN"):
                        body = body.partition(b";")[0].rstrip(b"\0") + b"\0"
                    awaited += kind in b"QS"
                    server.sendall(_framed(kind, body))
                    message = None
                for key, _events in selector.select():
                    if key.fileobj is client:
                        try:
                            message = _message(client)
                        except _Gone:
                            message = b"X", b""
                        continue
                    kind, body = _message(server)
                    awaited -= kind == b"Z"
                    if (kind, body, awaited) == (b"Z", b"I", 0) and not pinned and not message:
                        return _framed(kind, body)
                    client.sendall(_framed(kind, body))


class _Pool:
    def __init__(self):
        self.keys = {}  # server connection -> its key
        self.idle = []  # the last is the next

    def next_key(self):
        # None is idle: the first that comes back will do.
        return self.keys[(self.idle or list(self.keys))[-1]]


def _has_ended(sock):
    """Return whether the other end has closed it; an unread notification is no end."""
    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _exactly(sock, length):
    data = b""
    while len(data) < length:
        piece = sock.recv(min(length - len(data), _CHUNK))
        if not piece:
            raise _Gone
        data += piece
    return data


def _message(sock):
    """Return the kind and the body of the next message."""
    kind, length = struct.unpack("!ci", _exactly(sock, 5))
    return kind, _exactly(sock, length - 4)


def _framed(kind, body):
    return kind + struct.pack("!i", len(body) + 4) + body
