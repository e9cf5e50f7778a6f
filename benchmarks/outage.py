"""How long clients receive nothing after a fault, and whether messages that are sent meanwhile are lost."""

import concurrent.futures
import contextlib
import itertools
import threading
import time

import psycopg2

from stack.sender import Flow
from stack.waiting import wait_until

from .contenders import new_stack, start, wait_for_push
from .figures import spread

TITLE = "Outage, Odoo 19.0"
FAULTS = ("kill", "restart", "garbage")
# All in seconds. Some contenders sleep for 50 after an error.
_LONGEST = 80.0
# The stream is fast at first, to measure short outages, but must not fill the database in long ones.
_FAST_FOR, _FAST, _SLOW = 2.0, 0.01, 0.1


def run(quick, tell):
    """Prefork mode, with two clients that have a channel each. Right after the fault, one lone message is sent to the
    first client. Then a stream of messages is sent to the second client until one of them arrives: one every 10 ms, and
    after 2 s one every 100 ms. "s to the first push" is the time from the end of the fault to that arrival. A fault
    ends when the listening backend has been told to terminate, when the restarted PostgreSQL answers again, or when the
    garbage is committed. The lone message has 3 s more to arrive, then another one is sent to the same client. "held
    back" counts lone messages that arrived only with that other one. "lost" counts messages of the stream that had not
    arrived 5 s after the first push, and lone messages that never arrived. The contenders that sleep for 50 s after an
    error have each fault at the same time; this addon has its faults while they sleep, each 6 s after the one before is
    over. A client that Odoo disconnects reconnects, as a browser does.
    """
    keys = ("c", "e") if quick else ("a", "c", "d", "e")
    with contextlib.ExitStack() as exits, concurrent.futures.ThreadPoolExecutor(len(keys)) as pool:
        tell("starting %d stacks" % len(keys))
        stacks = start((new_stack(key, statements=True, workers=1) for key in keys), exits)
        trials = dict(zip(keys, (_Trial(stack, exits) for stack in stacks)))
        for fault in FAULTS[:1] if quick else FAULTS:
            tell(fault)
            asleep = {key: threading.Event() for key in keys if key != "e"}
            others = {key: pool.submit(trials[key].repeat, fault, 1, event) for key, event in asleep.items()}
            for event in asleep.values():
                event.wait(_LONGEST)
            mine = trials["e"].repeat(fault, 3 if quick else 10, threading.Event())
            for key in keys:
                yield TITLE, _row(key, fault, mine if key == "e" else others[key].result())


def _row(key, fault, outages):
    return {
        "contender": key,
        "fault": fault,
        "n": len(outages),
        "s to the first push": spread([outage["seconds"] for outage in outages]),
        "s to the lone message": spread([outage["lone"] for outage in outages if outage["lone"] is not None]),
        "held back": sum(outage["held back"] for outage in outages),
        "lost": sum(outage["lost"] for outage in outages),
        "sent": sum(outage["sent"] for outage in outages),
    }


class _Trial:
    """Faults of one stack, one after the other."""

    def __init__(self, stack, exits):
        self._stack = stack
        self._numbers = itertools.count()
        self._lone, self._flow = _Client(stack, "lone", exits), _Client(stack, "stream", exits)

    def repeat(self, fault, times, asleep):
        """Cause a fault several times; return a dictionary for each outage.

        :param asleep: an event that is set as soon as the stream is slow: Odoo sleeps and needs no CPU
        """
        try:
            return [self._once(fault, number, asleep) for number in range(times)]
        finally:
            asleep.set()

    def _once(self, fault, number, asleep):
        # The addon replaces sessions of less than 5 s at once only a few times in a row, and a real fault is rare.
        time.sleep(6)
        self._lone.prove()
        self._flow.prove()
        self._cause(fault, number, self._stack.wait_for_listen())
        over = time.monotonic()
        lone = "lone %f" % over
        self._lone.send(lone)

        def interval():
            if time.monotonic() - over > _FAST_FOR:
                asleep.set()
            return _SLOW if asleep.is_set() else _FAST

        with Flow(self._stack.sender(), self._flow.channel, interval, self._numbers) as stream:
            first = min(wait_until(lambda: self._arrived(stream), _LONGEST, "a push", 0.01, self._stack.odoo.log_tail))
        self._flow.has_all(stream.sent, 5)
        by_itself = self._lone.has_all([lone], 3)
        if not by_itself:
            self._lone.send("next")
        lost = [message for message in stream.sent if message not in self._flow.arrivals()]
        return {
            "seconds": first - over,
            "lone": self._lone.arrivals()[lone] - over if by_itself else None,
            "held back": not by_itself and self._lone.has_all([lone], 5),
            "lost": len(lost) + (lone not in self._lone.arrivals()),
            "sent": len(stream.sent),
        }

    def _cause(self, fault, number, backend):
        server = self._stack.server
        if fault == "kill":
            server.execute("SELECT pg_terminate_backend(%s)", (backend,))
        elif fault == "restart":
            # A crash and a proper end in turn.
            if number % 2:
                server.kill()
            server.restart()
        else:
            with contextlib.closing(self._stack.sender()) as sender:
                sender.notify("garbage")

    def _arrived(self, stream):
        """Return when messages of ``stream`` arrived."""
        return [at for message, at in self._flow.arrivals().items() if message in stream.sent]


class _Client:
    """A client with one channel. It ends with ``exits``."""

    def __init__(self, stack, channel, exits):
        self.channel = channel
        self._stack = stack
        # For Odoo the id 0, that of an empty table, means "the last 50 s".
        self.send("before")
        self._client = exits.enter_context(stack.client([channel], listening=False))

    def send(self, message):
        """Send ``message`` as soon as the server and the pooler accept it."""

        def accepted():
            with contextlib.suppress(psycopg2.Error):
                return self._stack.send(self.channel, message)

        wait_until(accepted, 20, "a message to be accepted")

    def prove(self):
        """Return when pushes arrive."""
        wait_for_push(self._stack, self.channel, self._client, _LONGEST)

    def has_all(self, messages, seconds):
        """Return whether all of ``messages`` arrive within ``seconds``."""
        with contextlib.suppress(TimeoutError):
            return wait_until(lambda: set(messages) <= set(self.arrivals()), seconds, interval=0.02)

    def arrivals(self):
        """Return the monotonic second of the first arrival of each message."""
        found = {}
        for received in list(self._client.received):
            found.setdefault(received.message, received.at)
        return found
