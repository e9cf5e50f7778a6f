"""A client of Odoo's bus, as a browser is one: over a websocket from 16.0 on, by long polls before."""

import contextlib
import http.client
import json
import random
import socket
import threading
import time
from typing import NamedTuple
from urllib.parse import urlsplit

import websocket

from .odoo import series_number

# Seconds to connect, or to subscribe.
_DEADLINE = 10
# Odoo tells nobody that it could not subscribe a client for want of a database, and leaves the websocket open. Seconds
# after which a client that comes back, and has heard nothing yet, subscribes again.
_REPEAT = 2
_ERRORS = (OSError, ValueError, http.client.HTTPException, websocket.WebSocketException)


class Received(NamedTuple):
    at: float  # time.monotonic() when it was here
    id: int  # of the row in bus_bus
    message: object


class Client:
    """A user, logged in, who records what the bus delivers.

    A message that is delivered twice is recorded twice. When it loses its websocket, it comes back and says what it had
    last, as browsers do.

    :param odoo: the :class:`~.odoo.Odoo` that it is a client of
    :param session_id: of another client, to do without logging in
    """

    def __init__(self, odoo, session_id=None):
        self.odoo = odoo
        self.session_id = session_id or odoo.log_in().cookies["session_id"]
        self.received = []
        #: What went wrong, as text: a request that failed, a socket that was closed.
        self.failures = []
        self._news = threading.Condition()
        self._closing = self._transport = self._reader = None

    @property
    def messages(self):
        """The messages received, in the order of their receipt."""
        return [received.message for received in list(self.received)]

    def subscribe(self, channels, last=0):
        """Ask for the messages of these channels, in place of earlier ones; returns when that is in force.

        Each call opens a new connection, as a page does that is loaded. What it does not wait for is Odoo's LISTEN,
        which the first subscriber of a process sets off: see ``Stack.wait_for_listen``.

        :param channels: names
        :param last: id of the last row of bus_bus already known; 0: send also what is not older than 50 s
        """
        self.close()
        self._closing = threading.Event()
        self._transport = self._connect(channels, last)
        self._reader = threading.Thread(target=self._read, args=(channels, last), daemon=True, name="bus client")
        self._reader.start()
        if not self._transport.wait_until_in_force():
            raise ConnectionError("not subscribed: %s" % self.failures)

    def wait_for(self, message, deadline=5.0):
        """Return the first :class:`Received` that holds ``message``.

        :raise TimeoutError: there is none after ``deadline`` seconds
        """

        def find():
            return next((received for received in self.received if received.message == message), None)

        return self._wait(find, deadline, repr(message))

    def wait_for_count(self, count, deadline=5.0):
        """Return all received, as soon as there are ``count`` of them.

        :raise TimeoutError: there are fewer after ``deadline`` seconds
        """
        return self._wait(lambda: len(self.received) >= count and list(self.received), deadline, "%d messages" % count)

    def close(self):
        if self._reader:
            self._closing.set()
            self._transport.close()
            self._reader.join(5)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _connect(self, channels, last, repeat=None):
        if series_number(self.odoo.build.series) >= 16:
            return _Websocket(self.odoo, self.session_id, channels, last, repeat)
        return _LongPolls(self.odoo, self.session_id, channels, last)

    def _wait(self, condition, deadline, what):
        with self._news:
            found = self._news.wait_for(condition, deadline)
            if not found:
                text = "waited %.1f s for %s; received: %s" % (deadline, what, self.messages)
                raise TimeoutError("\n".join([text, *self.failures]))
            return found

    def _read(self, channels, last):
        while not self._closing.is_set():
            try:
                self._record(self._transport.receive())
            except _ERRORS as error:
                if not self._closing.is_set():
                    self.failures.append("%s: %s" % (type(error).__name__, error))
                    self._come_back(channels, last)

    def _record(self, notifications):
        at = time.monotonic()
        with self._news:
            for notification in notifications:
                message = notification["message"]
                if isinstance(message, dict) and set(message) == {"type", "payload"}:
                    message = message["payload"]
                self.received.append(Received(at, notification["id"], message))
            self._news.notify_all()

    def _come_back(self, channels, last):
        # Odoo's web client has some pity with the server as well.
        while not self._closing.wait(random.uniform(0.5, 1.5)):
            with contextlib.suppress(*_ERRORS):
                self._transport.close()
                known = max([last, *(received.id for received in self.received)])
                self._transport = self._connect(channels, known, _REPEAT)
                break


class _Websocket:
    """Odoo counts frames: more than 10 at once, one each 0.2 s later, and it closes the websocket.

    Each subscription takes two of them.

    :param repeat: seconds without a message after which to ask again
    """

    def __init__(self, odoo, session_id, channels, last, repeat=None):
        version = odoo.build.websocket_version
        # 20.0 requires "check_outdated": whether to tell if the row ``last`` is gone.
        data = {"channels": channels, "last": last, "check_outdated": False}
        self._subscription = json.dumps({"event_name": "subscribe", "data": data})
        self._in_force = threading.Event()
        self._socket = websocket.create_connection(
            "ws%s/websocket%s" % (odoo.event_url[4:], "?version=" + version if version else ""),
            cookie="session_id=" + session_id,
            origin=odoo.event_url,
            timeout=_DEADLINE,
        )
        self._socket.settimeout(repeat)
        self._subscribe()

    def wait_until_in_force(self):
        """Return whether the subscription is in force within the deadline, if all that comes is read."""
        return self._in_force.wait(_DEADLINE)

    def receive(self):
        """Return the notifications that come next, which may be none."""
        try:
            opcode, data = self._socket.recv_data(control_frame=True)
        except websocket.WebSocketTimeoutException:
            self._subscribe()
            return []
        if opcode == websocket.ABNF.OPCODE_CLOSE:
            raise ConnectionError("closed by the server: %s %s" % (int.from_bytes(data[:2], "big"), data[2:].decode()))
        if opcode == websocket.ABNF.OPCODE_PONG:
            self._in_force.set()
        if opcode != websocket.ABNF.OPCODE_TEXT:
            return []
        self._socket.settimeout(None)
        # 20.0 also sends what is meant for the web client itself, without an id.
        return [one for one in json.loads(data) if "id" in one]

    def close(self):
        # The server need not be there any more.
        self._socket.close(timeout=1)
        # Which does nothing once the server has closed: the socket would be left open.
        self._socket.shutdown()

    def _subscribe(self):
        self._socket.send(self._subscription)
        # Odoo takes up the next frame only when it has done what the last one asked for.
        self._socket.ping()


class _LongPolls:
    """Polls again as soon as an answer is here, as Odoo's web client does.

    Core has a gap of its own: a message committed while a poll is between its query and its wait is delivered with the
    next one only.
    """

    def __init__(self, odoo, session_id, channels, last):
        self._address = urlsplit(odoo.event_url).netloc
        self._headers = {"Content-Type": "application/json", "Cookie": "session_id=" + session_id}
        self._channels = channels
        self._last = last
        self._sent = threading.Event()
        self._connection = None

    def wait_until_in_force(self):
        """Return whether the first poll waits for messages within the deadline."""
        if not self._sent.wait(_DEADLINE):
            return False
        # No fact tells from outside that the poll is waiting. But it was sent first, so it is when other polls for the
        # same, which take the same way but do not wait, were answered.
        for _ in range(2):
            with contextlib.closing(self._request({"peek": True})) as connection:
                _answer(connection)
        return True

    def receive(self):
        """Return the notifications that one poll brings.

        :raise ValueError: the answer is an error of Odoo's
        """
        with contextlib.closing(self._request({})) as self._connection:
            self._sent.set()
            notifications = _answer(self._connection)
        self._last = max([self._last, *(notification["id"] for notification in notifications)])
        return notifications

    def close(self):
        sock = self._connection and self._connection.sock
        if sock:
            # Wakes the thread that reads, as close() would not.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _request(self, options):
        # The request that waits has to be broken off from another thread, for which a plain connection will do best.
        connection = http.client.HTTPConnection(self._address, timeout=90)
        params = {"channels": self._channels, "last": self._last, "options": options}
        connection.request("POST", "/longpolling/poll", json.dumps({"params": params}), self._headers)
        return connection


def _answer(connection):
    answer = json.loads(connection.getresponse().read())
    if "error" in answer:
        raise ValueError(answer["error"])
    result = answer["result"]
    return result["notifications"] if isinstance(result, dict) else result
