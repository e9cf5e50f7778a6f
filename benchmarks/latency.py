"""How long a push takes: from the COMMIT of the NOTIFY to the client's receipt."""

import contextlib
import random
import select
import threading
import time

from stack.odoo import series_number
from stack.waiting import wait_until

from .contenders import new_stack, running
from .figures import pushes

HOW = """\
All contenders run at the same time, each with its own PostgreSQL, and take turns: one notification each to one client
in rounds of random order, the next one when the last has arrived. Sender and client are threads of one process, so that
one clock is read. "after": from the return of the COMMIT with the NOTIFY to the receipt by the client; "before": from
right before the transaction with the NOTIFY, so with the pooler's own hop, up to three times, in it. A message that has
not arrived after 2 s is counted as late and left out. Ratios are to contender (a); their spread is that of ten blocks
of rounds. The floor says LISTEN itself, directly, and is no Odoo. Contender (b) is tried with 20 messages."""

_CHANNEL = "latency"
_PATIENCE = 2.0
# Seconds for all pushes of a variant; a slow machine takes fewer of them, and the table says how many.
_LIMIT = 120.0
_DEAF_MESSAGES = 20
_DEAF_PATIENCE = 3.0


def run(quick, tell):
    variants = [("19.0", 2)] if quick else [("19.0", 2), ("19.0", 0), ("14.0", 2), ("14.0", 0)]
    for series, workers in variants:
        name = "%s %s" % (series, "prefork" if workers else "threaded")
        tell(name)
        yield name, _measure(series, workers, 60 if quick else 1000)


def _measure(series, workers, count):
    keys = ["a", "c", "d", "e", "e-direct"]
    stacks = {key: new_stack(key, series, workers=workers) for key in [*keys, "b"]}
    with running(stacks), contextlib.ExitStack() as exits:
        targets = {key: exits.enter_context(contextlib.closing(OdooClient(stacks[key], _CHANNEL))) for key in keys}
        targets["floor"] = exits.enter_context(contextlib.closing(_BareClient(stacks["e"])))
        deaf = _deaf(stacks["b"])
        for target in targets.values():
            target.warm_up()
        taken = {key: [] for key in targets}
        late = dict.fromkeys(targets, 0)
        order = list(targets)
        end = time.monotonic() + _LIMIT
        for number in range(count):
            if time.monotonic() > end:
                break
            random.shuffle(order)
            for key in order:
                try:
                    taken[key].append(targets[key].push(number))
                except TimeoutError:
                    late[key] += 1
                    if late[key] > max(5, count // 20):
                        raise
    figures = {key: {**pushes(taken[key], taken["a"]), "late": late[key]} for key in taken}
    figures["b"] = {"runs": _DEAF_MESSAGES, "arrived": deaf}
    return figures


def _deaf(stack):
    """Return how many messages arrive where LISTEN is lost."""
    client = stack.client([_CHANNEL], listening=False)
    for number in range(_DEAF_MESSAGES):
        stack.send(_CHANNEL, number)
    with contextlib.suppress(TimeoutError):
        client.wait_for_count(_DEAF_MESSAGES, _DEAF_PATIENCE)
    return len(set(client.messages))


class OdooClient:
    """A client of the bus of the stack's Odoo."""

    def __init__(self, stack, channel):
        self._stack = stack
        self._channel = channel
        self._client = stack.client([channel], listening=False)
        # Core's long poll misses what is sent while it is on its way back.
        self._unstick = series_number(stack.series) < 16

    def warm_up(self):
        def one_arrives():
            self._stack.send(self._channel, "warm-up")
            return "warm-up" in self._client.messages

        wait_until(one_arrives, 60, "the first push", 0.2, self._stack.odoo.log_tail)

    def push(self, number):
        """Return the seconds from after and from before the NOTIFY to the receipt."""
        sent = self._stack.send(self._channel, number)
        try:
            received = self._client.wait_for(number, _PATIENCE)
        except TimeoutError:
            if self._unstick:
                self._stack.send(self._channel, "next")
            raise
        return received.at - sent.committed, received.at - sent.at

    def close(self):
        self._client.close()


class _BareClient:
    """No Odoo: a thread that says LISTEN to the server, and waits."""

    def __init__(self, stack):
        self._sender = stack.sender()
        self._connection = stack.server.connect(application_name="tests")
        self._connection.autocommit = True
        self._connection.cursor().execute("LISTEN floor")
        self._received = {}
        self._news = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def warm_up(self):
        for number in range(20):
            self.push(-1 - number)

    def push(self, number):
        before = time.monotonic()
        self._sender.notify(str(number), "floor")
        after = time.monotonic()
        with self._news:
            if not self._news.wait_for(lambda: str(number) in self._received, _PATIENCE):
                raise TimeoutError("the bare client has not received %s" % number)
            at = self._received[str(number)]
        return at - after, at - before

    def close(self):
        self._closing = True
        self._thread.join()
        self._connection.close()
        self._sender.close()

    def _run(self):
        while not self._closing:
            if not select.select([self._connection], [], [], 0.2)[0]:
                continue
            self._connection.poll()
            at = time.monotonic()
            with self._news:
                while self._connection.notifies:
                    self._received[self._connection.notifies.pop().payload] = at
                self._news.notify_all()
