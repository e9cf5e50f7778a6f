"""How many NOTIFYs a second a cluster takes while instances of Odoo listen on it."""

import contextlib
import os
import random
import time

import psutil

from stack.postgres import PostgreSQL

from .bare import BareListeners, notifies_per_second
from .contenders import SOON, new_stack, running, settle, start_more
from .figures import spread

HOW = """\
Odoo 19.0, prefork: 1 HTTP worker, gevent with one websocket, 2 cron workers for each instance, all of them idle; each
contender has its instances on a PostgreSQL of its own. pgbench sends as Odoo does, on imbus in database postgres, but
straight to the server, from four connections as fast as it can, each NOTIFY in a transaction of its own, for 1 s, for
a channel that nobody has subscribed to. Contenders take turns in rounds of random order, and ratios are to (a) or to
the floor in the same round. The floor is one bare connection that says LISTEN, read by a process that looks at nothing.
"after": seconds from the end of the flood until a message sent then has arrived at a client of each instance. This
addon checks itself each 5 s here, so that it has settled on its direct connections when the flood begins; their number
is that after the last one. As if they were machines of their own, PostgreSQL and pgbench have one half of the CPUs and
what listens the other half: or what processes of Odoo do with a notification would be time that PostgreSQL has not."""

_CRON = 2
_CHANNEL = "flood"
_PATIENCE = 60
_CPUS = sorted(os.sched_getaffinity(0))
# For PostgreSQL and the sender, and for what listens; with a single one there are no halves.
_SERVERS, _LISTENERS = _CPUS[: len(_CPUS) // 2] or _CPUS, _CPUS[len(_CPUS) // 2 :]


def run(quick, tell):
    keys = ("a", "e") if quick else ("a", "c", "d", "e", "e-own")
    stacks = {
        key: new_stack(key, "19.0", workers=1, conf={"max_cron_threads": _CRON}, jobs=False, environment=SOON)
        for key in keys
    }
    with running(stacks), contextlib.ExitStack() as exits:
        targets = {key: _Instances(stack, key, exits) for key, stack in stacks.items()}
        targets["floor"] = _Floor(exits)
        for count in (1, 2) if quick else (1, 2, 4, 8):
            tell("%d instance(s)" % count)
            for target in targets.values():
                target.have(count)
                for pid, cpus in ((target.server.pid, _SERVERS), *((pid, _LISTENERS) for pid in target.listening())):
                    _keep_to(pid, cpus)
            runs = {key: [] for key in targets}
            for number in range(1 if quick else 3):
                for key in random.sample(list(targets), len(targets)):
                    sent = notifies_per_second(targets[key].server, 1, _SERVERS)
                    runs[key].append((sent, targets[key].catch_up("%d of %d" % (number, count))))
            yield (
                "%d instances" % count,
                {key: {**_figures(runs, key), "direct": targets[key].direct()} for key in targets},
            )


def _figures(runs, key):
    def ratios(base):
        return spread([one[0] / other[0] for one, other in zip(runs[key], runs[base])])

    return {
        "notifies_per_second": spread([sent for sent, _ in runs[key]], 0),
        "ratio": ratios("a"),
        "ratio_to_floor": ratios("floor"),
        "after_seconds": spread([seconds for _, seconds in runs[key] if seconds is not None]),
    }


class _Instances:
    """Some Odoos on one server, each with a client."""

    def __init__(self, stack, key, exits):
        self.server = stack.server
        self._stack = stack
        self._shares = key == "e"
        self._addon = key in ("e", "e-own")
        self._exits = exits
        self._stacks, self._clients = [], []
        self._sender = exits.enter_context(contextlib.closing(stack.sender(direct=True)))

    def have(self, count):
        """Return when there are so many instances, and all of them listen."""
        started = start_more(self._stack, [{}] * (count - max(len(self._stacks), 1)), self._exits)
        for stack in started if self._stacks else [self._stack, *started]:
            self._stacks.append(stack)
            self._clients.append(stack.client([_CHANNEL], listening=False))
        self._prove("first of %d" % count)
        if self._addon:
            settle(self._stack, 1 if self._shares else count * (1 + _CRON))

    def catch_up(self, text):
        """Return the seconds until all have a message that is sent now."""
        sent = self._sender.send(_CHANNEL, text)
        return max(client.wait_for(text, _PATIENCE).at for client in self._clients) - sent.at

    def listening(self):
        """Return the pids of all that listen; those of their children are not among them."""
        return [stack.odoo.pid for stack in self._stacks]

    def direct(self):
        return len(self._stack.direct_connections()) if self._addon else None

    def _prove(self, text):
        # What is sent before somebody listens is not lost, but it comes with the next one only.
        deadline = time.monotonic() + _PATIENCE
        while True:
            self._sender.send(_CHANNEL, text)
            try:
                for client in self._clients:
                    client.wait_for(text, 1)
                return
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise


class _Floor:
    """No Odoo, but one bare listener."""

    def __init__(self, exits):
        self.server = exits.enter_context(PostgreSQL({"log_statement": "none", "max_connections": 600}))
        self._listener = exits.enter_context(BareListeners(self.server, 1))

    def have(self, count):
        pass

    def catch_up(self, _text):
        began = time.monotonic()
        self._listener.catch_up()
        return time.monotonic() - began

    def listening(self):
        return [self._listener.pid]

    def direct(self):
        return None


def _keep_to(pid, cpus):
    """Have a process and its children, present and future, run on these CPUs only."""
    main = psutil.Process(pid)
    for process in (main, *main.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            for thread in process.threads():
                os.sched_setaffinity(thread.id, cpus)
