"""Faults at random, for as long as you like, with many clients: is anything lost or doubled?

    python -m tools.soak MINUTES [--seed N]

Messages flow all the time on Odoo 19.0, prefork. The clients are as browsers: who loses the websocket comes back and
says what it had last. The seed decides which faults there are, and for how long; it does not decide how fast the
machine is.
"""

import argparse
import collections
import contextlib
import json
import random
import re
import sys
import threading
import time
from typing import NamedTuple

import psycopg2
import websocket

from stack.stack import Stack
from stack.waiting import wait_until

CLIENTS = 50
CHANNELS = 10
PER_SECOND = 20
NO_FAULT = "none yet"
# Odoo closes it when it can't ask the database, and the client is as slow as it is to come back.
NO_WEBSOCKET = "websocket lost, until the client is back"
# Seconds that the last messages may take to arrive; a check of the listener has time to fail meanwhile.
PATIENCE = 60
ENVIRONMENT = {"IMDISPATCHER_CHECK_INTERVAL": "5", "IMDISPATCHER_DB_CONNECT_TIMEOUT": "2"}


class Message(NamedTuple):
    channel: str
    at: float  # time.monotonic()


class Soak(NamedTuple):
    """All that was found out."""

    browsers: list
    sent: dict  # message -> Message
    faults: list  # (time.monotonic(), name) of each when it began
    bugs: list  # lines of the log


class Browser:
    """A client that comes back whenever it loses its websocket."""

    def __init__(self, stack, session, channel):
        self.channel = channel
        #: message -> monotonic seconds of each time that it was received
        self.received = collections.defaultdict(list)
        #: (since, until) in monotonic seconds, of each time without a websocket
        self.away = []
        self._url = "ws%s/websocket?version=%s" % (stack.odoo.event_url[4:], stack.build.websocket_version)
        self._options = {"cookie": "session_id=" + session, "origin": stack.odoo.event_url, "timeout": 10}
        self._last = stack.last_id()
        self._socket = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="browser")
        self._thread.start()

    def stop(self):
        self._stopped.set()
        with contextlib.suppress(OSError, websocket.WebSocketException, AttributeError):
            self._socket.close(timeout=1)
        self._thread.join(15)

    def was_away(self, since, until):
        """Return whether there was a time without a websocket between these two."""
        return any(began < until and since < ended for began, ended in list(self.away))

    def _run(self):
        lost = time.monotonic()
        while not self._stopped.is_set():
            with contextlib.suppress(OSError, websocket.WebSocketException):
                self._connect()
                self.away.append((lost, time.monotonic()))
                with contextlib.suppress(OSError, websocket.WebSocketException):
                    self._receive()
                lost = time.monotonic()
            # Odoo's web client has some pity with the server as well.
            self._stopped.wait(random.uniform(0.5, 1.5))

    def _connect(self):
        self._socket = websocket.create_connection(self._url, **self._options)
        subscription = {"channels": [self.channel], "last": self._last}
        self._socket.send(json.dumps({"event_name": "subscribe", "data": subscription}))
        self._socket.settimeout(None)

    def _receive(self):
        while True:
            text = self._socket.recv()
            if not text:
                return
            for notification in json.loads(text):
                self._last = max(self._last, notification["id"])
                self.received[notification["message"]["payload"]].append(time.monotonic())


class Sender:
    """Sends steadily, through the pooler; what the pooler fails to take is sent as soon as it does."""

    def __init__(self, stack):
        #: message -> `Message`
        self.sent = {}
        #: what was wrong with the sender itself
        self.problem = None
        self._stack = stack
        self._sender = stack.sender()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="sender")
        self._thread.start()

    def stop(self):
        self._stopped.set()
        self._thread.join(PATIENCE)
        self.check()
        self._sender.close()

    def check(self):
        """Raise what has gone wrong with the sender itself."""
        if self.problem or self._stopped.is_set() and self._thread.is_alive():
            raise RuntimeError("the sender has failed") from self.problem

    def _run(self):
        number = 0
        try:
            while not self._stopped.wait(1 / PER_SECOND):
                number += 1
                self._send("message %d" % number, "channel %d" % (number % CHANNELS))
        except Exception as error:
            self.problem = error

    def _send(self, message, channel):
        # It may well be there although the pooler or the server died before they could say so.
        while not (self._try(self._sender.insert, channel, message) or self._is_there(message)):
            self._stopped.wait(0.2)
        self.sent[message] = Message(channel, time.monotonic())
        payload = json.dumps([self._sender.channel(channel)])
        while not self._try(self._sender.notify, payload):
            self._stopped.wait(0.2)

    def _try(self, action, *arguments):
        try:
            action(*arguments)
        except psycopg2.Error:
            return False
        return True

    def _is_there(self, message):
        """Return whether the message was committed, as soon as the server can be asked."""

        def ask():
            try:
                (row,) = self._stack.server.execute(
                    "SELECT count(*) AS number FROM bus_bus WHERE message::json->>'payload' = %s",
                    (message,),
                    self._stack.database,
                )
            except psycopg2.Error:
                return None
            return row

        return wait_until(ask, PATIENCE, "the server to answer", 0.2).number > 0


# Faults: each takes the stack and a source of chance, and returns when it is over ------------------------------------


def listener_killed(stack, chance):
    for _ in range(chance.randint(1, 5)):
        stack.server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'odoo-listener-%'"
        )
        time.sleep(chance.uniform(0, 1))


def server_restarted(stack, chance):
    stack.server.stop(chance.choice(["fast", "immediate"]))
    time.sleep(chance.uniform(0, 4))
    stack.server.start()


def server_crashed(stack, chance):
    stack.server.kill()
    time.sleep(chance.uniform(0, 4))
    stack.server.start()


def pooler_restarted(stack, chance):
    stack.pooler.stop()
    time.sleep(chance.uniform(0, 4))
    stack.pooler.start()


def pooler_paused(stack, chance):
    stack.pooler.pause()
    time.sleep(chance.uniform(1, 5))
    stack.pooler.resume()


def path_swallowed(stack, chance):
    stack.proxy.swallow()
    time.sleep(chance.uniform(1, 12))
    stack.proxy.forward()


def path_cut(stack, chance):
    for _ in range(chance.randint(1, 5)):
        stack.proxy.cut()
        time.sleep(chance.uniform(0, 1))


def path_refused(stack, chance):
    stack.proxy.refuse()
    stack.proxy.cut()
    time.sleep(chance.uniform(1, 10))
    stack.proxy.forward()


def path_swallowed_and_pooler_restarted(stack, chance):
    stack.proxy.swallow()
    time.sleep(chance.uniform(0, 4))
    pooler_restarted(stack, chance)
    stack.proxy.forward()


def garbage_sent(stack, chance):
    with contextlib.closing(stack.sender()) as sender:
        for _ in range(chance.randint(10, 100)):
            letters = [chance.choice("[]{}\",:0e\\u \t'é") for _ in range(chance.randint(0, 200))]
            sender.notify("".join(letters))
            sender.notify(json.dumps(chance.choice([None, {}, [None], [[["x"]]], [{"a": 1}], [[0.5]], "x", 1e308])))


FAULTS = [
    listener_killed,
    server_restarted,
    server_crashed,
    pooler_restarted,
    pooler_paused,
    path_swallowed,
    path_cut,
    path_refused,
    path_swallowed_and_pooler_restarted,
    garbage_sent,
]


def faults_in_turn(chance):
    """Yield faults: each kind once in every round, in an order of the round's own."""
    while True:
        yield from chance.sample(FAULTS, len(FAULTS))


def soak(minutes, seed, say):
    """Run for so many minutes; return the `Soak`."""
    chance = random.Random(seed)
    faults = []
    with Stack("19.0", 2, environment=ENVIRONMENT, proxy=True) as stack:
        session = stack.client(channels=())._session_id
        browsers = [Browser(stack, session, "channel %d" % (number % CHANNELS)) for number in range(CLIENTS)]
        wait_until(lambda: all(browser.away for browser in browsers), 60, "all browsers to connect")
        stack.wait_for_listen()
        sender = Sender(stack)
        began = time.monotonic()
        for fault in faults_in_turn(chance):
            calm = chance.uniform(0.5, 4)
            if time.monotonic() - began + calm >= 60 * minutes:
                break
            time.sleep(calm)
            faults.append((time.monotonic(), fault.__name__.replace("_", " ")))
            say("%4d s  %s" % (faults[-1][0] - began, faults[-1][1]))
            fault(stack, chance)
            sender.check()
        sender.stop()

        def all_there():
            return not any(
                message not in browser.received
                for browser in browsers
                for message, sent in sender.sent.items()
                if sent.channel == browser.channel
            )

        with contextlib.suppress(TimeoutError):
            wait_until(all_there, PATIENCE, "the last messages", 0.5)
        # What is doubled comes late.
        time.sleep(3)
        for browser in browsers:
            browser.stop()
        bugs = [
            line for line in stack.odoo.log().splitlines() if re.search(r"bus_alt_connection.*internal error", line)
        ]
    return Soak(browsers, sender.sent, faults, bugs)


def report(found, say):
    """Say what became of the messages; return whether all is well."""
    lost = doubled = once = reconnected = 0
    gaps = collections.defaultdict(float)
    deliveries = collections.Counter()
    for browser in found.browsers:
        reconnected += len(browser.away) - 1
        for message, (channel, at) in found.sent.items():
            if channel != browser.channel:
                continue
            times = browser.received.get(message, [])
            once += len(times) == 1
            lost += not times
            doubled += len(times) > 1
            if times:
                # Its fault is the last that had begun when it came.
                fault = next((name for began, name in reversed(found.faults) if began < times[0]), NO_FAULT)
                if browser.was_away(at, times[0]):
                    fault = NO_WEBSOCKET
                deliveries[fault] += 1
                gaps[fault] = max(gaps[fault], times[0] - at)
    faults = collections.Counter(name for _, name in found.faults)
    faults[NO_WEBSOCKET] = reconnected
    say("")
    say("%-40s %5s %11s %14s" % ("fault, until the next", "times", "deliveries", "longest gap"))
    for fault in [NO_FAULT, *sorted(faults)]:
        say("%-40s %5s %11d %12.2f s" % (fault, faults[fault] or "", deliveries[fault], gaps[fault]))
    say("")
    say("%d messages sent, for %d clients" % (len(found.sent), len(found.browsers)))
    say("delivered once %d, lost %d, doubled %d" % (once, lost, doubled))
    say("longest gap %.2f s" % max(gaps.values(), default=0))
    for line in found.bugs:
        say(line)
    return once and not (lost or doubled or found.bugs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", type=float)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()

    def say(text):
        print(text, flush=True)

    say("seed %d" % arguments.seed)
    well = report(soak(arguments.minutes, arguments.seed, say), say)
    say("seed %d" % arguments.seed)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
