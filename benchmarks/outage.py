"""How long the bus does not listen after a fault, and what becomes of what is sent meanwhile."""

import concurrent.futures
import contextlib
import itertools
import threading
import time

import psycopg2

from stack.waiting import wait_until

from .contenders import new_stack, start
from .figures import spread

TITLE = "Outage, Odoo 19.0"
FAULTS = ("kill", "restart", "garbage")
# Seconds: contenders sleep for 50 after an error.
_LONGEST = 80.0
# For so long the stream is fast.
_FAST = 2.0
# What the picture shows: from so long before the kill to so long after it.
_BEFORE, _AFTER = 3.0, 57.0


def run(quick, tell):
    """Prefork. Two clients with a channel each. Right after the fault one lone message is sent to the first client, and
    then a stream of messages to the second, one each 10 ms for 2 s and each 100 ms later, until one arrives: the
    seconds are from the end of the fault (the backend that listens has been told to terminate; the restarted PostgreSQL
    answers again; the garbage is committed) to that arrival. The lone message is waited for until 3 s after that; if it
    is not there, one more is sent to the same client. "held back": lone messages that came along with that one only.
    "lost": messages of the stream that had not arrived 5 s after the first, and lone ones that never did. The
    contenders that sleep for 50 s after an error have each fault at the same time, and this addon has its own once they
    are asleep. A client that Odoo throws out comes back as a browser does.
    """
    keys = ("c", "e") if quick else ("a", "c", "d", "e")
    with contextlib.ExitStack() as exits, concurrent.futures.ThreadPoolExecutor(len(keys)) as pool:
        tell("starting %d stacks" % len(keys))
        stacks = start((new_stack(key, statements=True, workers=1) for key in keys), exits)
        trials = dict(zip(keys, (_Trial(stack, exits) for stack in stacks)))
        tell("a kill, for the picture")
        timelines = dict(zip("ce", pool.map(_Trial.timeline, (trials["c"], trials["e"]))))
        for fault in FAULTS[:1] if quick else FAULTS:
            tell(fault)
            others = {key: pool.submit(trials[key].repeat, fault, 1) for key in keys if key != "e"}
            for key in others:
                trials[key].asleep.wait(_LONGEST)
            mine = trials["e"].repeat(fault, 3 if quick else 10)
            for key in keys:
                row = _row(key, fault, mine if key == "e" else others[key].result())
                yield TITLE, {**row, "_arrived": timelines.get(key)} if fault == "kill" else row


def _row(key, fault, found):
    return {
        "contender": key,
        "fault": fault,
        "n": len(found),
        "s to the first push": spread([one["seconds"] for one in found]),
        "s to the lone message": spread([one["lone"] for one in found if one["lone"] is not None]),
        "held back": sum(one["held back"] for one in found),
        "lost": sum(one["lost"] for one in found),
        "sent": sum(one["sent"] for one in found),
    }


class _Trial:
    """Faults of one stack, one after the other."""

    def __init__(self, stack, exits):
        #: set when the stream is slow: the listener has been lost for long
        self.asleep = threading.Event()
        self._stack = stack
        self._lone, self._flow = _Client(stack, "lone", exits), _Client(stack, "stream", exits)

    def repeat(self, fault, times):
        """Return what was found each time, dictionaries."""
        self.asleep.clear()
        try:
            return [self._once(fault, number) for number in range(times)]
        finally:
            self.asleep.set()

    def timeline(self):
        """Return the seconds after a kill at which messages arrived that are sent all the time."""
        backend = self._listening_backend()
        with _Stream(self._stack, self._flow.channel, 0.1) as stream:
            time.sleep(_BEFORE)
            self._cause("kill", 0, backend)
            killed = time.monotonic()
            time.sleep(_AFTER)
        return [round(at - killed, 3) for at in sorted(self._arrived(stream))]

    def _once(self, fault, number):
        backend = self._listening_backend()
        self._cause(fault, number, backend)
        over = time.monotonic()
        lone = "lone %f" % over
        self._lone.send(lone)
        with _Stream(self._stack, self._flow.channel, 0.01, self.asleep) as stream:
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

    def _listening_backend(self):
        self._lone.prove()
        self._flow.prove()
        return self._stack.wait_for_listen()

    def _cause(self, fault, number, backend):
        server = self._stack.server
        if fault == "kill":
            server.execute("SELECT pg_terminate_backend(%s)", (backend,))
        elif fault == "restart":
            server.restart("immediate" if number % 2 else "fast")
        else:
            with contextlib.closing(self._stack.sender()) as sender:
                sender.notify("garbage")

    def _arrived(self, stream):
        """Return when messages of ``stream`` arrived."""
        return [at for message, at in self._flow.arrivals().items() if message in stream.sent]


class _Client:
    """A client with one channel; it comes back if it is thrown out. It ends with ``exits``."""

    def __init__(self, stack, channel, exits):
        self.channel = channel
        self._stack = stack
        self._exits = exits
        # For Odoo the id 0, that of an empty table, means "the last 50 s".
        self.send("before")
        self._clients = [exits.enter_context(stack.client([channel], listening=False))]

    def send(self, message):
        """Send it as soon as the server or the pooler can take it."""

        def taken():
            with contextlib.suppress(psycopg2.Error):
                return self._stack.send(self.channel, message)

        wait_until(taken, 20, "a message to be taken")

    def prove(self):
        """Return when pushes arrive."""

        def one_arrives():
            proof = "proof %f" % time.monotonic()
            self.send(proof)
            return self.has_all([proof], 0.5)

        wait_until(one_arrives, _LONGEST, "a push", 0.1, self._stack.odoo.log_tail)

    def has_all(self, messages, seconds):
        """Return whether all of ``messages`` arrive within ``seconds``."""
        with contextlib.suppress(TimeoutError):
            return wait_until(lambda: set(messages) <= set(self.arrivals()), seconds, interval=0.02)

    def arrivals(self):
        """Return the monotonic second of the first arrival of each message."""
        if self._clients[-1].failures:
            self._come_back()
        found = {}
        for received in itertools.chain(*(list(client.received) for client in self._clients)):
            found.setdefault(received.message, received.at)
        return found

    def _come_back(self):
        known = max((received.id for client in self._clients for received in client.received), default=0)
        with contextlib.suppress(Exception):  # the server may be away
            client = self._stack.client([self.channel], known, listening=False)
            self._clients.append(self._exits.enter_context(client))


class _Stream(threading.Thread):
    """Numbers that are sent to a channel as long as the block lasts, whatever happens.

    :param interval: seconds between two of them; after two seconds 0.1
    :param slow: an event that is set then
    """

    _numbers = itertools.count()

    def __init__(self, stack, channel, interval, slow=None):
        super().__init__(daemon=True)
        #: number -> monotonic second
        self.sent = {}
        self._stack, self._channel = stack, channel
        self._interval, self._slow = interval, slow
        self._done = threading.Event()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exception):
        self._done.set()
        self.join()

    def run(self):
        began = time.monotonic()
        with contextlib.closing(self._stack.sender()) as sender:
            while not self._done.wait(self._interval):
                if self._slow and time.monotonic() - began > _FAST:
                    self._interval = 0.1
                    self._slow.set()
                number = next(self._numbers)
                with contextlib.suppress(psycopg2.Error):  # there may be no server, and then nothing was sent
                    self.sent[number] = sender.send(self._channel, number).at
