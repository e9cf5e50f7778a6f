"""Clients of Odoo's bus, as a browser is one: a websocket from 16.0 on, a long poll before."""

import http.client
import json
import socket
import threading
import time
import uuid
from typing import NamedTuple
from urllib.parse import urlsplit

import websocket

from .odoo import http_session, series_number


class Received(NamedTuple):
    at: float  # time.monotonic() when it was here
    id: int  # of the row in bus_bus
    type: str  # None up to 14.0
    message: object


def client_class(series):
    """Return the class of the client for an Odoo series."""
    return WebsocketClient if series_number(series) >= 16 else LongPollClient


class Client:
    """A user, logged in, who records what the bus delivers.

    A message that is delivered twice is recorded twice.

    :param http_url: where to log in
    :param event_url: where the bus is served
    """

    def __init__(self, http_url, event_url, database, login="admin", password="admin", websocket_version=None):
        self.event_url = event_url
        self.websocket_version = websocket_version
        self.received = []
        #: What went wrong, as text: a request that failed, a socket that was closed.
        self.failures = []
        self._news = threading.Condition()
        self._closing = False
        self._session_id = _log_in(http_url, database, login, password)

    @property
    def messages(self):
        """The messages received, in the order of their receipt."""
        return [received.message for received in list(self.received)]

    def subscribe(self, channels, last=0):
        """Ask for the messages of these channels, from now on in place of earlier ones; returns when that is in force.

        What it does not wait for is Odoo's LISTEN, which the first subscriber of a process sets off:
        see ``Stack.wait_for_listen``.

        :param channels: names
        :param last: id of the last row of bus_bus already known; 0: send also what is not older than 50 s
        """
        raise NotImplementedError

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
        raise NotImplementedError

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _wait(self, condition, deadline, what):
        with self._news:
            found = self._news.wait_for(condition, deadline)
            if not found:
                text = "waited %.1f s for %s; received: %s" % (deadline, what, self.messages)
                raise TimeoutError("\n".join([text, *self.failures]))
            return found

    def _record(self, notifications):
        at = time.monotonic()
        with self._news:
            for notification in notifications:
                message, kind = notification["message"], None
                if isinstance(message, dict) and set(message) == {"type", "payload"}:
                    kind, message = message["type"], message["payload"]
                self.received.append(Received(at, notification["id"], kind, message))
            self._news.notify_all()

    def _fail(self, text):
        with self._news:
            if not self._closing:
                self.failures.append(str(text))
            self._news.notify_all()


class WebsocketClient(Client):
    """Odoo counts the frames of a client: more than 10 at once, one each 0.2 s later, and it closes the socket.

    Each :meth:`subscribe` takes two of them.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        address = urlsplit(self.event_url).netloc
        query = "?version=" + self.websocket_version if self.websocket_version else ""
        self._socket = websocket.create_connection(
            "ws://%s/websocket%s" % (address, query),
            cookie="session_id=" + self._session_id,
            origin=self.event_url,
            timeout=10,
        )
        self._socket.settimeout(None)
        self._pongs = set()
        self._reader = threading.Thread(target=self._read, daemon=True, name="websocket client")
        self._reader.start()

    def subscribe(self, channels, last=0):
        self._send("subscribe", {"channels": list(channels), "last": last})
        # Odoo takes up the next frame only when it has done what the last one asked for.
        token = uuid.uuid4().hex
        self._socket.ping(token)
        self._wait(lambda: token in self._pongs or not self._reader.is_alive(), 10, "the subscription")
        if token not in self._pongs:
            raise ConnectionError("not subscribed: %s" % self.failures)

    def close(self):
        self._closing = True
        # The server need not be there any more.
        self._socket.close(timeout=1)
        # Which does nothing once the server has closed: the socket would be left open.
        self._socket.shutdown()
        self._reader.join(5)

    def _send(self, event, data):
        self._socket.send(json.dumps({"event_name": event, "data": data}))

    def _read(self):
        try:
            while True:
                opcode, data = self._socket.recv_data(control_frame=True)
                if opcode == websocket.ABNF.OPCODE_TEXT:
                    self._record(json.loads(data))
                elif opcode == websocket.ABNF.OPCODE_PONG:
                    with self._news:
                        self._pongs.add(data.decode())
                        self._news.notify_all()
                elif opcode == websocket.ABNF.OPCODE_CLOSE:
                    self._fail("closed by the server: %s %s" % (int.from_bytes(data[:2], "big"), data[2:].decode()))
                    return
        except (websocket.WebSocketException, OSError) as error:
            self._fail("%s: %s" % (type(error).__name__, error))


class LongPollClient(Client):
    """Polls again as soon as an answer is here, as Odoo's web client does.

    Core has a gap of its own: a message committed while a poll is between its query and its wait is delivered with the
    next one only.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._poller = None

    def subscribe(self, channels, last=0):
        if self._poller:
            last = max(last, self._poller.last)
            self._poller.abort()
        self._poller = _Poller(self, list(channels), last)
        self._poller.start()
        # No fact tells from outside that the poll is waiting. But it was sent first, so it is when other polls for the
        # same, which take the same way but do not wait, were answered.
        self._poller.sent.wait(10)
        for _ in range(2):
            _Poller(self, list(channels), last).poll({"peek": True})

    def close(self):
        self._closing = True
        if self._poller:
            self._poller.abort()
            self._poller.join(5)


class _Poller(threading.Thread):
    """Polls for one subscription until it is aborted."""

    def __init__(self, client, channels, last):
        super().__init__(daemon=True, name="long poll client")
        self.last = last
        self.sent = threading.Event()
        self._client = client
        self._channels = channels
        self._aborted = threading.Event()
        self._connection = None

    def run(self):
        while not self._aborted.is_set():
            try:
                notifications = self.poll()
            except (OSError, http.client.HTTPException, ValueError) as error:
                if not self._aborted.is_set():
                    self._client._fail("%s: %s" % (type(error).__name__, error))
                self._aborted.wait(0.2)  # the server may be down; do not drum on its door
                continue
            if notifications and not self._aborted.is_set():
                self.last = max([self.last, *(notification["id"] for notification in notifications)])
                self._client._record(notifications)

    def poll(self, options=None):
        """Return the notifications that one request brings.

        :raise ValueError: the answer is an error of Odoo's
        """
        params = {"channels": self._channels, "last": self.last, "options": options or {}}
        # The waiting request has to be broken off from another thread, for which a plain connection will do best.
        self._connection = http.client.HTTPConnection(urlsplit(self._client.event_url).netloc, timeout=90)
        try:
            self._connection.request(
                "POST",
                "/longpolling/poll",
                json.dumps({"params": params}),
                {"Content-Type": "application/json", "Cookie": "session_id=" + self._client._session_id},
            )
            self.sent.set()
            if self._aborted.is_set():
                raise ConnectionAbortedError("aborted before there was a socket to shut down")
            answer = json.loads(self._connection.getresponse().read())
        finally:
            self._connection.close()
        if "error" in answer:
            raise ValueError(answer["error"])
        result = answer["result"]
        return result["notifications"] if isinstance(result, dict) else result

    def abort(self):
        self._aborted.set()
        sock = self._connection and self._connection.sock
        if sock:
            try:
                sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads, as close() would not
            except OSError:
                pass


def _log_in(http_url, database, login, password):
    """Return the id of a new session.

    :raise RuntimeError: Odoo refused
    """
    params = {"db": database, "login": login, "password": password}
    with http_session() as session:
        answer = session.post(
            http_url + "/web/session/authenticate",
            json={"params": params},
            timeout=60,
        )
        answer.raise_for_status()
        if not (answer.json().get("result") or {}).get("uid"):
            raise RuntimeError("login as %r refused: %s" % (login, answer.text))
        return session.cookies["session_id"]
