"""How many NOTIFYs a second a cluster takes while instances of Odoo listen on it."""

import contextlib
import os
import random

import psutil

from stack.postgres import PostgreSQL

from .bare import BareListeners, notifies_per_second
from .contenders import SOON, new_stack, settle, start, wait_for_push
from .figures import spread

TITLE = "NOTIFYs that a cluster takes beside instances of Odoo 19.0"
_CRON = 2
_CHANNEL = "flood"
_PATIENCE = 60
_CPUS = sorted(os.sched_getaffinity(0))
# For PostgreSQL and the sender, and for what listens. A single CPU has no halves.
_SERVERS, _LISTENERS = _CPUS[: len(_CPUS) // 2] or _CPUS, _CPUS[len(_CPUS) // 2 :]


def run(quick, tell):
    """Prefork mode with 1 HTTP worker, gevent with one websocket, and 2 cron workers for each instance, all of them
    idle. Each contender has its instances on a PostgreSQL of its own. pgbench sends as Odoo does, on imbus in database
    postgres, but straight to the server: from four connections, as fast as it can, each NOTIFY in a transaction of its
    own, for 1 s, for a channel that nobody has subscribed to. Contenders take turns in rounds of random order. Ratios
    are to (a) and to one bare listener in the same round: a connection that listens, and whose notifications are read
    but not looked at. "after" is the time from the end of the flood until a message that is sent then has arrived at a
    client of each instance. This addon checks itself each 5 s here, so that it has settled on its direct connections
    when the flood begins; "direct" is their number after the last flood. PostgreSQL and pgbench have one half of the
    CPUs, and whatever listens has the other half, as if they were two machines. Otherwise the work of Odoo's processes
    would take time from PostgreSQL.
    """
    keys = ("a", "e") if quick else ("a", "c", "d", "e", "e-own")
    with contextlib.ExitStack() as exits:
        # All processes that are started from here on inherit it.
        os.sched_setaffinity(0, _LISTENERS)
        exits.callback(os.sched_setaffinity, 0, _CPUS)
        options = {"workers": 1, "conf": {"max_cron_threads": _CRON}, "jobs": False, "environment": SOON}
        stacks = start((new_stack(key, **options) for key in keys), exits)
        targets = {key: _Instances(key, stack, exits) for key, stack in zip(keys, stacks)}
        targets["floor"] = _Floor(exits)
        for target in targets.values():
            _keep_to(target.server.pid, _SERVERS)
        for count in (1, 2) if quick else (1, 2, 4, 8):
            tell("%d instance(s)" % count)
            for target in targets.values():
                target.have(count)
            rounds = []
            for number in range(1 if quick else 3):
                order = random.sample(list(targets), len(targets))
                rounds.append({key: targets[key].flood("%d of %d" % (number, count)) for key in order})
            for key, target in targets.items():
                yield TITLE, {"instances": count, "contender": key, **_figures(rounds, key), **target.facts()}


def _figures(rounds, key):
    return {
        "NOTIFY/s": spread([found[key][0] for found in rounds], 0),
        "ratio to (a)": spread([found[key][0] / found["a"][0] for found in rounds]),
        "ratio to one bare listener": spread([found[key][0] / found["floor"][0] for found in rounds]),
        "after s": spread([found[key][1] for found in rounds if found[key][1] is not None]),
    }


class _Instances:
    """Instances of Odoo on one server, each with a client."""

    def __init__(self, key, stack, exits):
        self.server = stack.server
        self._key = key
        self._first = stack
        self._exits = exits
        self._clients = []
        self._sender = exits.enter_context(contextlib.closing(stack.sender(direct=True)))

    def have(self, count):
        """Return when there are ``count`` instances, and all of them listen."""
        others = start([self._first.another() for _ in range(count - max(len(self._clients), 1))], self._exits)
        for stack in others if self._clients else [self._first, *others]:
            self._clients.append(stack.client([_CHANNEL], listening=False))
            wait_for_push(stack, _CHANNEL, self._clients[-1])
        if self._key in ("e", "e-own"):
            settle(self._first, 1 if self._key == "e" else count * (1 + _CRON))

    def flood(self, text):
        """Return how many NOTIFYs a second the server takes, and the seconds after that until ``text`` arrives."""
        taken = notifies_per_second(self.server, cpus=_SERVERS)
        sent = self._sender.send(_CHANNEL, text)
        return taken, max(client.wait_for(text, _PATIENCE).at for client in self._clients) - sent.at

    def facts(self):
        return {"direct": len(self._first.direct_connections())} if self._key in ("e", "e-own") else {}


class _Floor:
    """No Odoo, but one bare listener."""

    def __init__(self, exits):
        self.server = exits.enter_context(PostgreSQL({"log_statement": "none", "max_connections": 600}))
        self._listener = exits.enter_context(contextlib.closing(BareListeners(self.server)))

    def have(self, count):
        self._listener.listen(1)

    def flood(self, _text):
        return self._listener.beside(lambda: notifies_per_second(self.server, cpus=_SERVERS)), None

    def facts(self):
        return {}


def _keep_to(pid, cpus):
    """Have a process and its children, present and future, run on these CPUs only."""
    main = psutil.Process(pid)
    for process in (main, *main.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            os.sched_setaffinity(process.pid, cpus)
